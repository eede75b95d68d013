"""blocks.safetensors: random blocks of every type and what the Python package `gguf` makes of them.

    pip install gguf safetensors && python make_blocks.py
"""

from pathlib import Path

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize
from safetensors.numpy import save_file

# Where the f16 numbers of a block stand.
HALVES = {"Q8_0": [0], "Q4_0": [0], "Q4_1": [0, 2], "Q5_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}
SCALES = [0.0, -0.0, 6e-8, -6.1e-5, 1.0, -0.33, 0.0123, 3.7, -60.0, 2e-3]

random = np.random.default_rng(7)
out = {}
for name, places in HALVES.items():
    kind = GGMLQuantizationType[name]
    size = GGML_QUANT_SIZES[kind][1]
    blocks = random.integers(0, 256, (len(SCALES), size), dtype=np.uint8)
    for place in places:
        scales = np.array(SCALES, dtype="<f2")[random.permutation(len(SCALES))]
        blocks[:, place : place + 2] = scales[:, None].view(np.uint8)
    out[f"{name}.blocks"] = blocks
    out[f"{name}.values"] = dequantize(blocks, kind).astype(np.float32)
for name, words in [("F16", 2), ("BF16", 2), ("F32", 4)]:
    values = random.normal(0, 1, (1, 16)).astype(np.float32)
    raw = {
        "F16": values.astype("<f2").view(np.uint8),
        "BF16": (values.view(np.uint32) >> 16).astype("<u2").view(np.uint8),
        "F32": values.view(np.uint8),
    }[name]
    out[f"{name}.blocks"] = raw
    out[f"{name}.values"] = dequantize(raw, GGMLQuantizationType[name]).astype(np.float32).reshape(1, -1)
save_file(out, Path(__file__).with_name("blocks.safetensors"))
