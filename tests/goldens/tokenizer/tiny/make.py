"""Makes the small tokenizers beside this file, and goldens.json: what others make of hostile sentences.

    pip install transformers torch sentencepiece tokenizers protobuf
    python tests/goldens/tokenizer/tiny/make.py

`words` is a MarianTokenizer directory whose sentencepiece model folds quotes and spaces by a map of its
own, and has a symbol; `bytes` has two models and two vocabularies, and falls back on bytes; `json` is
`words` as a tokenizer.json, judged by the tokenizers library itself.
"""

import json
import tempfile
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from sentencepiece import sentencepiece_model_pb2 as spm_pb2
from transformers import MarianTokenizer

HERE = Path(__file__).parent

ENGLISH = """
The cat sleeps on the warm stone. The dog runs after the red ball. My sister reads a long book at night.
Where did you put the keys? I put them on the table. It's raining again today. We don't like cold soup.
How many apples are in the basket? There are twelve apples and three pears. He can't find his left shoe.
The train to the city leaves at seven. She sings while she cooks. They walked along the river for hours.
Please close the window before you go. What a lovely morning! Our teacher speaks four languages.
The little boat crossed the wide bay. Nobody knows the answer. Open the door, would you?
""".split("\n")
FRENCH = """
Le chat dort sur la pierre chaude. Le chien court après la balle rouge. Ma sœur lit un long livre la nuit.
Où as-tu mis les clés ? Je les ai mises sur la table. Il pleut encore aujourd'hui. Nous n'aimons pas la soupe froide.
Combien de pommes y a-t-il dans le panier ? Il y a douze pommes et trois poires. Il ne trouve pas sa chaussure gauche.
Le train pour la ville part à sept heures. Elle chante en cuisinant. Ils ont marché le long de la rivière.
Ferme la fenêtre avant de partir, s'il te plaît. Quelle belle matinée ! Personne ne connaît la réponse.
""".split("\n")
CHINESE = """
貓睡在溫暖的石頭上。狗追著紅色的球跑。我姐姐晚上看一本很長的書。你把鑰匙放在哪裡？我把它們放在桌子上。
今天又下雨了。籃子裡有多少個蘋果？去城裡的火車七點開。請在你走之前關上窗戶。沒有人知道答案。
""".split("\n")
FOLD = "2018\t27\n2019\t27\n201C\t22\n201D\t22\nA0\t20\n202F\t20\n3000\t20\n9\t20\n2026\t2E 2E 2E\n65 301\tE9\n301\t\n"

COMPOSE = "FB01\t66 69\nBD\t31 2044 32\n65 301\tE9\n65 301 302\tE9 302\nFF26\t46\n200B\t\nA0\t20\n"

SENTENCES = [
    "The cat sleeps.", "Where did you put the keys?", "Où as-tu mis les clés ?", "貓睡在石頭上。",
    "", " ", "   \t ", "  two  spaces,   three   ", "a\tb", "a\nb", "\u00a0no\u00a0break\u202f!", "\u3000全\u3000形\u3000",
    "‘single’ “double” …", "It’s", "cafe\u0301 e\u0301\u0301 \u0301", "\u3000\u0301x", "▁", "▁▁ a ▁", "a▁b",
    "<ent> and <entity><ent>", "x<ent>x", "</ s> < unk>", "<0x41>", "😀", "😀😀 a😀b", "👩‍👩‍👧‍👦", "🇫🇷",
    "한국어 텍스트", "日本語のテキスト", "Русский", "مرحبا", "naïve façade Ångström", "ﬁ ½ ① Ⅳ", "Ｆｕｌｌ！",
    "\u200bzero\u200b", "\ufeffbom", "\u0001\u007f", "1234567890", "https://a.b/c?d=e&f#g", "A" * 40,
    "the the the the the the", "𠀀𝔘𝒳", "cat\u0085", "?!?!...", "Where 貓 déjà 😀 <ent>?", "-", "'", "''\"\"",
]


def train(path, lines, rules="", **settings):
    with tempfile.NamedTemporaryFile("w") as text, tempfile.NamedTemporaryFile("w") as table:
        if rules:
            table.write(rules)
            table.flush()
            settings["normalization_rule_tsv"] = table.name
        text.write("\n".join(s.strip() + m for line in lines for s in line.split(". ") for m in ("", ".") if s.strip()))
        text.flush()
        sentencepiece.SentencePieceTrainer.train(
            input=text.name, model_prefix=str(path), minloglevel=2, num_threads=1, hard_vocab_limit=False,
            character_coverage=0.999, bos_id=-1, unk_id=1, eos_id=0, **settings)
    Path(f"{path}.vocab").unlink()
    # Neither where it was made nor from what belongs in the model.
    proto = spm_pb2.ModelProto()
    proto.ParseFromString(Path(f"{path}.model").read_bytes())
    del proto.trainer_spec.input[:]
    proto.trainer_spec.ClearField("model_prefix")
    proto.normalizer_spec.ClearField("normalization_rule_tsv")
    path.write_bytes(proto.SerializeToString())
    Path(f"{path}.model").unlink()
    return proto


def write(path, value):
    path.write_text(json.dumps(value, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")


def vocabulary(path, pieces):
    write(path, {piece: ix for ix, piece in enumerate(pieces)})


def golden(tokenizer, sentences, before="", skip=()):
    out = []
    for text in sentences:
        ids = tokenizer(before + text).input_ids
        read = tokenizer.decode([ix for ix in ids if ix not in skip], skip_special_tokens=True)
        out.append({"text": text, "ids": ids, "decoded": read})
    return out


def main():
    goldens = {}
    words, split, one = HERE / "words", HERE / "bytes", HERE / "json"
    for directory in (words, split, one):
        directory.mkdir(exist_ok=True)

    proto = train(words / "source.spm", ENGLISH + FRENCH + CHINESE, FOLD, vocab_size=420,
                  user_defined_symbols=["<ent>", "<entity>"])
    (words / "target.spm").write_bytes((words / "source.spm").read_bytes())
    pieces = [piece.piece for piece in proto.pieces]
    tags = [">>fra<<", ">>zho<<"]
    vocabulary(words / "vocab.json", pieces + tags + ["<pad>"])
    tokenizer = MarianTokenizer.from_pretrained(words)
    fra = tokenizer.convert_tokens_to_ids(">>fra<<")
    goldens["words"] = golden(tokenizer, SENTENCES, ">>fra<<", [fra])

    source = train(split / "source.spm", ENGLISH, COMPOSE, vocab_size=360, byte_fallback=True)
    target = train(split / "target.spm", FRENCH, vocab_size=370, byte_fallback=True,
                   normalization_rule_name="identity", add_dummy_prefix=False, remove_extra_whitespaces=False)
    for name, proto in (("vocab.json", source), ("target_vocab.json", target)):
        # Special tokens in the same places: transformers 5 skips the source's ids when it reads the target's.
        end, unknown, *pieces = [piece.piece for piece in proto.pieces]
        vocabulary(split / name, [end, unknown, "<pad>", *pieces])
    write(split / "tokenizer_config.json", {"separate_vocabs": True})
    tokenizer = MarianTokenizer.from_pretrained(split)
    goldens["bytes"] = golden(tokenizer, SENTENCES)
    # What the target's pieces read back as, the source's ids being another vocabulary's.
    for entry in goldens["bytes"]:
        written = tokenizer(text_target=entry["text"]).input_ids
        entry |= {"written": written, "decoded": tokenizer.decode(written, skip_special_tokens=True)}

    proto = spm_pb2.ModelProto()
    proto.ParseFromString((words / "source.spm").read_bytes())
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    scores += [(piece, 0.0) for piece in tags + ["<pad>"]]
    rust = Tokenizer(models.Unigram(scores, unk_id=1))
    rust.normalizer = normalizers.Sequence([
        normalizers.Precompiled(proto.normalizer_spec.precompiled_charsmap),
        normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")])
    rust.pre_tokenizer = pre_tokenizers.Metaspace()
    rust.decoder = decoders.Metaspace()
    rust.add_special_tokens([AddedToken(piece, special=True, normalized=False)
                             for piece in tags + ["</s>", "<unk>", "<pad>"]])
    rust.save(str(one / "tokenizer.json"), pretty=False)
    rust = Tokenizer.from_file(str(one / "tokenizer.json"))
    goldens["json"] = []
    for text in SENTENCES:
        ids = rust.encode(text, add_special_tokens=False).ids if text.strip() else []
        goldens["json"].append({"text": text, "ids": [fra] + ids + [0], "decoded": rust.decode(ids).strip()})

    lists = (f'"{name}": [\n' + ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries) + "\n]"
             for name, entries in goldens.items())
    (HERE / "goldens.json").write_text("{\n" + ",\n".join(lists) + "\n}\n", encoding="utf-8")
    same = sum(a["ids"] == b["ids"] for a, b in zip(goldens["words"], goldens["json"]))
    print(f"{len(SENTENCES)} sentences; tokenizer.json gives the ids of MarianTokenizer for {same}")


main()
