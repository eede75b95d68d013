#!/usr/bin/env python3
"""What quantised keys and values do to attention's results: on the queries, keys and values of a real model, and on
random ones.

    pip install torch transformers gguf safetensors && cargo build --release
    python quantized_cache.py QKV "$(scripts/fetch-smollm2)"

QKV is the program, which does the attention (`qkv attend --kv-storage`). A text of the project's own is read by the
model in transformers; each layer's queries and keys are taken as they go into attention, after the rotation. Error:
root mean square of the difference from the result with keys and values in f16, over that of the latter.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

TOKENS = 512
STORAGE = ["q8_0", "q4_0"]
qkv, path = sys.argv[1], Path(sys.argv[2])
here = Path(tempfile.mkdtemp())


def attend(q, k, v, storage):
    save_file({"q": q.contiguous(), "k": k.contiguous(), "v": v.contiguous()}, here / "in.safetensors")
    call = [qkv, "attend", here / "in.safetensors", "-o", here / "out.safetensors", "--causal"]
    subprocess.run([*call, "--kv-storage", storage], check=True)
    return load_file(here / "out.safetensors")["out"].double()


def errors(q, k, v):
    want = attend(q, k, v, "f16")
    return [((attend(q, k, v, storage) - want).norm() / want.norm()).item() for storage in STORAGE]


seen = []


def watch(module, query, key, value, mask, **rest):
    seen.append((query, key, value))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, mask, **rest)


ALL_ATTENTION_FUNCTIONS["watch"] = watch
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
model.config._attn_implementation = "watch"
tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
text = (Path(__file__).parents[2] / "README.md").read_text()
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :TOKENS]
with torch.no_grad():
    model(ids)

print(f"{'layer':8}" + "".join(f"{storage:>10}" for storage in STORAGE))
real = []
for layer, (q, k, v) in enumerate(seen):
    real.append(errors(q, k, v))
    print(f"{layer:<8}" + "".join(f"{100 * error:>8.2f} %" for error in real[-1]))
torch.manual_seed(1)
random = errors(*(torch.randn(t.shape) for t in seen[0]))
for name, row in [("median", torch.tensor(real).median(0).values.tolist()), ("random", random)]:
    print(f"{name:<8}" + "".join(f"{100 * error:>8.2f} %" for error in row))
