"""Small GGUF files with a vocabulary of every kind, and the ids that transformers gives hard texts.

    pip install gguf tokenizers transformers && python make_tokenizers.py [SmolLM2-135M-Instruct.Q4_1.gguf]

Writes NAME.gguf and NAME-ids.json for each kind, two of them as Hugging Face directories too; with the path of the real file, smollm2-ids.json too. The kinds are
names of `tokenizer.ggml.pre`, and `spm` is sentencepiece's BPE. transformers knows no `smollm`, whose texts
llama.cpp and the model's own tokenizer.json cut at every digit, so that step is put in here.
"""

import json
import random
import sys
from pathlib import Path

from gguf import GGUFWriter
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer

HERE = Path(__file__).parent
ROOT = HERE.parents[2]

HARD = [
    "", " ", "  ", "\n", "\n\n", "\t", " \n ", "a", " a", "a ", "Hello, world!", "hello  world", "hello   world   ",
    "What is the capital of France?", "It's we're I'll you've he'd I'm THEY'RE it'S",
    "1", "12", "123", "1234", "12345678", "3.14159", "1,000,000", "a1b2c3", "year 2024", "x  12", "v   1.0", "٣٤٥ १२३ ²³ Ⅷ",
    "naïve café", "cafe\u0301", "Ångström A\u030a", "Straße", "İstanbul ı", "ﬁne ﬀ", "Ελληνικά", "русский текст", "עברית", "العربية",
    "हिन्दी", "ไทย", "日本語のテキスト", "你好，世界！", "한국어", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "👍", "👨‍👩‍👧‍👦", "🇫🇷🇩🇪", "e🙂f", "\u200b\u200d\ufeff", "\u00a0x\u00a0",
    "\u3000全角", "a\u2028b\u2029c", "a\r\nb\rc", "line\n\n\nline", "tab\t\tend\t", "trailing   \n", "   leading", " \u00a0 \t ",
    "def f(x):\n    return x ** 2  # squared\n", "if (a && b) { c[i]++; }\n\n\n}", "<a href='x'>&amp;</a>", "C:\\path\\file", "a_b-c.d/e@f#g$h%i^j&k*l",
    "!!!???...", "----====____", "\"quoted\" 'text'", "(((()))", "«guillemets» “curly” ‘single’", "a—b–c…", "$5 €6 £7 ¥8",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", "<|endoftext|>", "x<|im_end|>y", "<|im_start|", "<think>why</think>", "</s><s>[INST] a [/INST]",
    "<s>", "<unk>", "<0x0A>", "▁", "a▁b", "▁▁a", "Ġ", "Ċ", "\x00", "\x01\x7f\x80", "\ufffd", "\U0010ffff",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "ababababababababab", "The the THE tHe", "don't can't won't shan't'tis", "I'MISSING 'saw 'LLama",
    "e" * 100, " " * 33, "\n" * 9, "- item\n- item 2\n\t- nested\n", "| a | b |\n|---|---|\n", "https://example.com/?q=a%20b&c=d#e", "me@example.org",
]


def texts():
    """The hard ones, lines of this repository, and random mixtures of both."""
    rng = random.Random(5)
    lines = [line for name in ("README.md", "ARCHITECTURE.md", "src/error.rs") for line in (ROOT / name).read_text().splitlines()]
    out = HARD + rng.sample([line for line in lines if len(line) > 20], 60)
    pieces = [piece for piece in HARD if piece]
    out += ["".join(rng.choice(pieces) for _ in range(rng.randint(2, 4))) for _ in range(90)]
    for _ in range(60):
        out.append("".join(rng.choice("ab \n\t01.'és日👍\u0301ß▁<|>") for _ in range(rng.randint(3, 24))))
    return list(dict.fromkeys(out))


def corpus():
    names = ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "src").glob("*/mod.rs"))]
    return [(ROOT / name).read_text()[:6000] for name in names] + ["naïve café 日本語 русский 👍 don't it's 2024 12345"] * 20


def byte_level(path, pre, specials, flags):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=640, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    kinds = [1] * len(tokens) + [kind for _, kind in specials]
    tokens += [token for token, _ in specials]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]])
    finish(writer, tokens, flags)


def sentencepiece(path, flags):
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=420, show_progress=False)
    trained.train_from_iterator(corpus(), trainer)
    model = json.loads(trained.to_str())["model"]
    merged = ["".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model["merges"]]
    letters = sorted(set(model["vocab"]) - set(merged))
    tokens = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)] + list(dict.fromkeys(merged)) + letters
    kinds = [2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259)
    scores = [0.0] * 259 + [-float(n // 24) for n in range(len(tokens) - 259)]  # many of one score
    tokens, kinds, scores = tokens + ["<think>"], kinds + [4], scores + [0.0]
    writer = GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_scores(scores)
    writer.add_unk_token_id(0)
    finish(writer, tokens, flags)


def finish(writer, tokens, flags):
    for name, token in flags.items():
        if name.startswith("add_"):
            getattr(writer, f"add_{name}_token")(token)
        else:
            getattr(writer, f"add_{name}_token_id")(tokens.index(token))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def golden(gguf, name):
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    cases = []
    plain = tokenizer.backend_tokenizer.pre_tokenizer
    if name == "smollm2":
        # See above. What this changes is counted, so that it stays what it is.
        digits = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    changed = 0
    for text in texts():
        ids = tokenizer.encode(text, add_special_tokens=False)
        if name == "smollm2":
            tokenizer.backend_tokenizer.pre_tokenizer = digits
            split = tokenizer.encode(text, add_special_tokens=False)
            tokenizer.backend_tokenizer.pre_tokenizer = plain
            changed += ids != split
            ids = split
        cases.append({"text": text, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    whole = tokenizer.encode("Hello", add_special_tokens=True)
    out = {"whole": {"text": "Hello", "ids": whole}, "cases": cases}
    lines = [f'{{"whole": {json.dumps(out["whole"])},', '"cases": [']
    lines.append(",\n".join(json.dumps(case, ensure_ascii=True) for case in cases))
    (HERE / f"{name}-ids.json").write_text("\n".join(lines) + "\n]}\n")
    if name in ("qwen2", "spm"):  # also as a Hugging Face directory
        tokenizer.save_pretrained(HERE / name)
    print(name, len(cases), "texts", len(tokenizer), "tokens; cut otherwise at digits:", changed)


CHATML = [("<|endoftext|>", 3), ("<|im_start|>", 3), ("<|im_end|>", 3), ("<think>", 4), ("</think>", 4)]
for name, pre, flags in [
    ("qwen2", "qwen2", {"eos": "<|im_end|>", "bos": "<|endoftext|>", "add_bos": False}),
    ("llama-bpe", "llama-bpe", {"eos": "<|im_end|>", "bos": "<|endoftext|>", "add_bos": True}),
    ("tekken", "tekken", {"eos": "<|im_end|>", "bos": "<|endoftext|>", "add_bos": True, "add_eos": True}),
    ("default", "default", {"eos": "<|endoftext|>"}),
]:
    byte_level(HERE / f"{name}.gguf", pre, CHATML, flags)
    golden(HERE / f"{name}.gguf", name)
sentencepiece(HERE / "spm.gguf", {"bos": "<s>", "eos": "</s>"})
golden(HERE / "spm.gguf", "spm")
if len(sys.argv) > 1:
    golden(Path(sys.argv[1]), "smollm2")
