#!/usr/bin/env python3
"""Seconds of a step of a GGUF model in Hugging Face transformers on the CPU, in f32: the median.

    pip install -r requirements.txt
    python decode_hf.py MODEL.gguf BATCH CONTEXT STEPS

The context is read once, its keys and values are repeated for the batch, and each step takes a token a sequence.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

path, (batch, context, steps) = Path(sys.argv[1]), map(int, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
torch.manual_seed(1)
vocab = model.config.vocab_size
with torch.no_grad():
    past = model(torch.randint(vocab, (1, context)), use_cache=True, logits_to_keep=1).past_key_values
    past.batch_repeat_interleave(batch)
    times = []
    for step in range(steps + 1):
        started = time.perf_counter()
        past = model(torch.randint(vocab, (batch, 1)), past_key_values=past, use_cache=True).past_key_values
        times.append(time.perf_counter() - started)
print(statistics.median(times[1:]))
