#!/usr/bin/env python3
"""Seconds of a step of a GGUF model in llama.cpp on the CPU, with its defaults (keys and values in f16): the median.

    pip install -r decode-llama-requirements.txt
    python decode_llama.py MODEL.gguf BATCH CONTEXT STEPS

The context is read once and belongs to all sequences of the batch, in one cache; each step takes a token a sequence.
"""

import os
import statistics
import sys
import time

import llama_cpp as llama

path, (batch, context, steps) = sys.argv[1], map(int, sys.argv[2:])
CHUNK = 256  # tokens of a call that reads the context


@llama.llama_log_callback
def silent(level, text, data):
    pass


llama.llama_log_set(silent, None)
llama.llama_backend_init()
settings = llama.llama_model_default_params()
settings.n_gpu_layers = 0
model = llama.llama_model_load_from_file(path.encode(), settings)
if not model:
    sys.exit(f"llama.cpp does not load {path}")
vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
settings = llama.llama_context_default_params()
settings.n_ctx = context + batch * (steps + 1)
settings.n_batch = settings.n_ubatch = CHUNK
settings.n_seq_max = batch
settings.kv_unified = True
settings.n_threads = settings.n_threads_batch = os.cpu_count()
state = llama.llama_init_from_model(model, settings)
if not state:
    sys.exit(f"llama.cpp has no context of {settings.n_ctx} positions")


def token(at):
    return at * 2_654_435_761 % 2**32 % vocab


tokens = llama.llama_batch_init(max(CHUNK, batch), 0, 1)


def decode(rows):
    """Rows of token, position, sequence and whether logits are wanted."""
    tokens.n_tokens = len(rows)
    for ix, (id, position, sequence, logits) in enumerate(rows):
        tokens.token[ix] = id
        tokens.pos[ix] = position
        tokens.n_seq_id[ix] = 1
        tokens.seq_id[ix][0] = sequence
        tokens.logits[ix] = logits
    if llama.llama_decode(state, tokens) != 0:
        sys.exit(f"llama.cpp does not decode {len(rows)} tokens")


for start in range(0, context, CHUNK):
    end = min(start + CHUNK, context)
    decode([(token(at), at, 0, at == context - 1) for at in range(start, end)])
memory = llama.llama_get_memory(state)
for sequence in range(1, batch):
    llama.llama_memory_seq_cp(memory, 0, sequence, -1, -1)
times = []
for step in range(steps + 1):
    rows = [(token(1_000_000 + 1000 * step + s), context + step, s, True) for s in range(batch)]
    started = time.perf_counter()
    decode(rows)
    llama.llama_synchronize(state)
    times.append(time.perf_counter() - started)
print(statistics.median(times[1:]))
