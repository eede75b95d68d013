"""Writes goldens.json: what transformers' MarianTokenizer makes of some sentences.

    python tests/goldens/tokenizer/make.py models/tatoeba-en-fra-zho [FILE.tsv...]

With FILEs (English, a tab, a translation), their sentences are written too, for a check in bulk:
QKV_TOKENIZER_GOLDENS=FILE.json cargo test --release --test text
"""
import json
import sys
from pathlib import Path

from transformers import MarianTokenizer

SENTENCES = [
    "Who are you?", "How are you?", "how are you", "HOW ARE YOU", "I love you.",
    "Where is the train station?", "What time is it?", "It's eight o'clock.",
    "It’s eight o’clock.", "“Hello,” she said.", "a  b   c", "  leading and trailing  ",
    "tab\tseparated\twords", "no-break\u00a0space and narrow\u202fone", "ligature ﬁsh, ½, ①, Ⅳ",
    "café cafe\u0301", "naïve façade", "Où est la gare ?", "你好嗎？", "我愛你。", "火車站在哪裏？",
    "mixed 你好 and English，with punctuation！", "emoji 😀😃 and 🇫🇷 flags", "👩‍👩‍👧 family",
    "日本語のテキスト", "한국어 텍스트", "Русский текст", "العربية", "zero\u200bwidth", "soft\u00adhyphen",
    "\ufeffbyte order mark", "control \u0001 character", ">>fra<< inside", "</s> <unk> <pad> <s>",
    "▁ lower one eighth block ▁▁", "1234567890", "3.14159 2,71828", "http://example.com/a?b=c&d=e",
    "user@example.com", "C++ && Rust || WGSL", "...", "?!?!", "(parentheses) [brackets] {braces}",
    "A" * 60, "the " * 40, "x", " ", "\u3000full-width\u3000space", "Ｆｕｌｌ ｗｉｄｔｈ", "é", "e\u0301",
    "line\nbreak", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝒎𝒂𝒕𝒉", "龘龘龘", "ſ long s", "İstanbul", "Straße", "don't can't won't",
]


def main():
    directory, files = sys.argv[1], sys.argv[2:]
    tokenizer = MarianTokenizer.from_pretrained(directory)
    sentences = list(SENTENCES)
    for file in files:
        for line in Path(file).read_text(encoding="utf-8").splitlines():
            sentences += line.split("\t")[:2]
    out = []
    for sentence in sentences:
        pieces = tokenizer.spm_source.encode(sentence, out_type=str)
        ids = tokenizer.convert_tokens_to_ids(pieces) + [tokenizer.eos_token_id]
        out.append({"text": sentence, "ids": ids, "decoded": tokenizer.decode(ids, skip_special_tokens=True)})
    path = Path(__file__).with_name("goldens.json") if not files else Path("goldens.json")
    path.write_text(json.dumps(out, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    print(len(out), "sentences:", path)


main()
