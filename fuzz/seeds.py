"""Writes the fuzz targets' seeds: small whole files with a value, a tensor and an extent of every kind."""

import base64
import json
import struct
from pathlib import Path

HERE = Path(__file__).parent / "seeds"


def text(value):
    raw = value.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind, payload):
    return struct.pack("<I", kind) + payload


def array(kind, items):
    return struct.pack("<IQ", kind, len(items)) + b"".join(items)


def gguf(metadata, tensors, alignment=32):
    out = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, item in metadata:
        out += text(key) + item
    body = b""
    for name, kind, shape, data in tensors:
        out += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape)
        out += struct.pack("<IQ", kind, len(body))
        body += data + bytes(-len(data) % alignment)
    return out + bytes(-len(out) % alignment) + body


def safetensors(tensors):
    header, body = {}, b""
    for name, kind, shape, data in tensors:
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + body


TENSORS = [  # type, elements of a block, bytes of a block
    (0, 1, 4), (1, 1, 2), (30, 1, 2), (8, 32, 34), (2, 32, 18), (3, 32, 20), (6, 32, 22), (12, 256, 144), (14, 256, 210),
]
VALUES = [
    value(0, b"\x01"), value(1, b"\xff"), value(2, b"\x01\x00"), value(3, b"\xff\xff"),
    value(4, struct.pack("<I", 7)), value(5, struct.pack("<i", -7)), value(6, struct.pack("<f", 1e-5)),
    value(7, b"\x01"), value(8, text("llama")), value(9, array(8, [text("a"), text("b c")])),
    value(10, struct.pack("<Q", 9)), value(11, struct.pack("<q", -9)), value(12, struct.pack("<d", 0.5)),
    value(9, array(9, [array(4, [struct.pack("<I", 1)]), array(6, [struct.pack("<f", 2.0)])])),
]

seeds = {
    "gguf/empty": gguf([], []),
    "gguf/values": gguf([(f"key.{ix}", item) for ix, item in enumerate(VALUES)], []),
    "gguf/tensors": gguf(
        [("general.alignment", value(4, struct.pack("<I", 64)))],
        [(f"t{kind}", kind, [n, 2], bytes(range(size)) * 2) for kind, n, size in TENSORS],
        64,
    ),
    "gguf/model": gguf(
        [
            ("general.architecture", value(8, text("llama"))),
            ("tokenizer.ggml.model", value(8, text("gpt2"))),
            ("tokenizer.ggml.tokens", value(9, array(8, [text("a"), text("b"), text("ab")]))),
            ("tokenizer.ggml.token_type", value(9, array(5, [struct.pack("<i", 1)] * 3))),
            ("tokenizer.ggml.merges", value(9, array(8, [text("a b")]))),
        ],
        [("token_embd.weight", 8, [32, 3], bytes(102)), ("output_norm.weight", 0, [32], bytes(128))],
    ),
    "safetensors/empty": safetensors([]),
    "safetensors/kinds": safetensors(
        [("a", "F32", [2, 3], bytes(24)), ("b", "F16", [3], bytes(6)), ("c", "BF16", [1, 1, 2], bytes(4)),
         ("d", "I64", [1], bytes(8)), ("e", "F32", [0], b""), ("f", "F32", [], bytes(4))],
    ),
}


def letters():
    """GPT-2's letter of every byte."""
    prints = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in prints else chr(next(others)) for byte in range(256)]


TEMPLATE = "{% for m in messages %}{{ m.role | trim }}{{ m['content'].strip() + eos_token }}{% endfor %}{{ [1] | tojson }}"


def tokenizer(model, tokens, kinds, *more):
    return gguf(
        [
            ("tokenizer.ggml.model", value(8, text(model))),
            ("tokenizer.ggml.tokens", value(9, array(8, [text(token) for token in tokens]))),
            ("tokenizer.ggml.token_type", value(9, array(5, [struct.pack("<i", kind) for kind in kinds]))),
            ("tokenizer.ggml.eos_token_id", value(4, struct.pack("<I", 2))),
            ("tokenizer.chat_template", value(8, text(TEMPLATE))),
            *more,
        ],
        [],
    )


WORDS = letters() + ["ab", "<end>", "abc"]
PIECES = ["<unk>", "<s>", "</s>", "a", "b", "ab", "\u2581", "\u2581a", "<0x0A>", "<think>"]
for pre in ("smollm", "qwen2", "llama-bpe", "tekken"):
    seeds[f"tokenizer/{pre}"] = tokenizer(
        "gpt2", WORDS, [1] * 257 + [3, 1],
        ("tokenizer.ggml.pre", value(8, text(pre))),
        ("tokenizer.ggml.merges", value(9, array(8, [text("a b"), text("ab c")]))),
        ("tokenizer.ggml.bos_token_id", value(4, struct.pack("<I", 257))),
    )
seeds["tokenizer/llama"] = tokenizer(
    "llama", PIECES, [2, 3, 3, 1, 1, 1, 1, 1, 6, 4],
    ("tokenizer.ggml.scores", value(9, array(6, [struct.pack("<f", -ix) for ix in range(len(PIECES))]))),
    ("tokenizer.ggml.unknown_token_id", value(4, struct.pack("<I", 0))),
    ("tokenizer.ggml.bos_token_id", value(4, struct.pack("<I", 1))),
)


def field(tag, raw):
    """A protobuf field of bytes, with its length in two bytes."""
    return bytes([tag << 3 | 2, len(raw) & 127 | 128, len(raw) >> 7]) + raw


# From the root by an a to a b: a double array of 256 units, then its texts.
ARRAY = [0] * 256
ARRAY[97], ARRAY[97 ^ 3] = 97 | 1 << 8 | 3 << 10, 1 << 31
CHARSMAP = struct.pack("<I256I", 1024, *ARRAY) + b"b\0"
SPM = b"".join(
    field(1, field(1, piece.encode()) + struct.pack("<Bf", 0x15, score) + bytes([0x18, kind]))
    for piece, score, kind in [("<unk>", 0, 2), ("</s>", 0, 3), ("a", -1, 1), ("\u2581a", -2, 1), ("<0x0A>", 0, 6)]
)
# A unigram model with byte fallback, and a normalizer.
seeds["directory/spm"] = b"s" + SPM + field(2, bytes([0x18, 1, 0x98, 2, 1])) + field(3, field(2, CHARSMAP))


def described(model, normalizer, pre_tokenizer, decoder):
    sequence = {"Sequence": {"id": "A", "type_id": 0}}
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    template = {
        "type": "TemplateProcessing", "single": [sequence, end], "pair": [sequence, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"</s>": {"id": "</s>", "ids": [0], "tokens": ["</s>"]}},
    }
    token = {"id": 0, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return b"j" + json.dumps({
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [token], "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer, "post_processor": template, "decoder": decoder, "model": model,
    }).encode()


SPACES = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "always", "split": True}
MAPPED = {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(CHARSMAP).decode()}
seeds["directory/unigram"] = described(
    {"type": "Unigram", "unk_id": 1, "vocab": [["</s>", 0.0], ["<unk>", 0.0], ["a", -1.0], ["\u2581a", -2.0]]},
    {"type": "Sequence", "normalizers": [MAPPED, {"type": "Lowercase"}]}, SPACES, SPACES,
)
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
seeds["directory/bpe"] = described(
    {"type": "BPE", "vocab": {"</s>": 0, "<unk>": 1, "a": 2, "b": 3, "ab": 4}, "merges": [["a", "b"]], "unk_token": "<unk>"},
    {"type": "NFC"}, BYTES, BYTES,
)
for name, raw in seeds.items():
    (HERE / name).parent.mkdir(parents=True, exist_ok=True)
    (HERE / name).write_bytes(raw)
