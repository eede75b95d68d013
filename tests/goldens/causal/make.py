#!/usr/bin/env python3
"""Makes the goldens of decoder-only models in this directory with Hugging Face transformers.

    python make.py [NAME...]    write all models (or those named), and rope.json

../README.md says what the files hold. Weights are random; a seed is taken whose texts do not stick to a few
tokens and whose every choice is clear, so that rounding decides nothing.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
GAP = 5e-3  # no greedy choice is closer than this
NEW = 12  # tokens written behind each prompt
LENGTHS = [9, 14, 4]  # of the prompts
VOCAB = 96

SMALL = dict(vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=64, rms_norm_eps=1e-5)

# Everything that differs. `greedy`: whether texts are written too. `shard`: save_pretrained's max_shard_size.
CONFIGS = {
    # as SmolLM2: grouped heads, tied embeddings
    "llama": dict(
        kind="Llama", dtype=torch.float32,
        config=dict(hidden_size=36, intermediate_size=56, num_attention_heads=6, num_key_value_heads=2,
                    tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=100000.0)),
    ),
    # as Llama 3: its scaling, embeddings apart; all biases; heads wider than the width's share; several files
    "llama3": dict(
        kind="Llama", dtype=torch.bfloat16, shard="24KB",
        config=dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=4, head_dim=12,
                    attention_bias=True, mlp_bias=True, tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="llama3", rope_theta=50.0, factor=8.0, low_freq_factor=1.0,
                                         high_freq_factor=4.0, original_max_position_embeddings=16)),
    ),
    "llama-yarn": dict(
        kind="Llama", dtype=torch.float16,
        config=dict(hidden_size=32, intermediate_size=44, num_attention_heads=2, num_key_value_heads=1,
                    tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="yarn", rope_theta=100.0, factor=4.0, beta_fast=2.0,
                                         original_max_position_embeddings=16)),
    ),
    "llama-linear": dict(
        kind="Llama", dtype=torch.bfloat16,
        config=dict(hidden_size=28, intermediate_size=33, num_attention_heads=2, num_key_value_heads=2,
                    hidden_act="gelu_pytorch_tanh",
                    tie_word_embeddings=True,
                    rope_parameters=dict(rope_type="linear", rope_theta=10000.0, factor=2.5)),
    ),
    # the texts are longer than the model's positions, so that its base has grown
    "llama-dynamic": dict(
        kind="Llama", dtype=torch.bfloat16, greedy=False,
        config=dict(hidden_size=32, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
                    tie_word_embeddings=True, max_position_embeddings=8,
                    rope_parameters=dict(rope_type="dynamic", rope_theta=100.0, factor=3.0)),
    ),
    # a window shorter than the texts
    "mistral": dict(
        kind="Mistral", dtype=torch.bfloat16,
        config=dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
                    sliding_window=5, tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="default", rope_theta=10000.0)),
    ),
    # a window in its second layer alone
    "qwen2": dict(
        kind="Qwen2", dtype=torch.float16,
        config=dict(hidden_size=40, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2,
                    use_sliding_window=True, sliding_window=4, max_window_layers=1, tie_word_embeddings=False,
                    rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
    ),
    "qwen3": dict(
        kind="Qwen3", dtype=torch.bfloat16,
        config=dict(hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=1, head_dim=20,
                    tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=1000000.0)),
    ),
}


def randomise(model, gen):
    """Weights that keep attention sharp and outputs varied: nothing is zero, nothing is one."""

    def normal(p, std, mean=0.0):
        p.copy_(torch.randn(p.shape, generator=gen) * std + mean)

    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "q_norm" in name or "k_norm" in name:  # or queries and keys would be too short to be choosy
                normal(p, 0.4, mean=2.0)
            elif "norm" in name:
                normal(p, 0.2, mean=1.0)
            elif "embed_tokens" in name or name == "lm_head.weight":
                normal(p, 0.4)  # small, or each token would call for itself
            elif name.endswith("bias"):
                normal(p, 0.3)
            else:
                normal(p, (1.5 if "q_proj" in name or "k_proj" in name else 1.2) / math.sqrt(p.shape[1]))


def build(spec, seed):
    gen = torch.Generator().manual_seed(seed)
    config = getattr(transformers, spec["kind"] + "Config")(
        **{**SMALL, **spec["config"]}, bos_token_id=None, eos_token_id=None, pad_token_id=None,
        attn_implementation="eager",
    )
    model = getattr(transformers, spec["kind"] + "ForCausalLM")(config).eval()
    randomise(model, gen)
    model.tie_weights()
    prompts = [torch.randint(0, VOCAB, (n,), generator=gen) for n in LENGTHS]
    # As it will be stored, computed in f32.
    return model.to(spec["dtype"]), prompts


def greedy(model, prompt):
    """The tokens behind a prompt, each from the whole text anew, and the closest choice."""
    text, gap = prompt.tolist(), math.inf
    for _ in range(NEW):
        with torch.no_grad():
            best = model(torch.tensor([text]), use_cache=False).logits[0, -1].topk(2)
        gap = min(gap, (best.values[0] - best.values[1]).item())
        text.append(best.indices[0].item())
    return text[len(prompt) :], gap


def make(name, spec):
    for seed in range(200):
        stored, prompts = build(spec, seed)
        out = HERE / name
        shutil.rmtree(out, ignore_errors=True)
        stored.save_pretrained(out, max_shard_size=spec.get("shard", "5GB"))
        (out / "generation_config.json").unlink(missing_ok=True)
        kind = getattr(transformers, spec["kind"] + "ForCausalLM")
        model = kind.from_pretrained(out, dtype=torch.float32, attn_implementation="eager").eval()

        tensors = {}
        if spec.get("greedy", True):
            texts = [greedy(model, prompt) for prompt in prompts]
            ids = [text for text, _ in texts]
            gap = min(gap for _, gap in texts)
            varied = min(len(set(text)) for text in ids)
            if gap < GAP or varied < 6:
                continue
            for prompt, text in zip(prompts, ids):
                given = model.generate(
                    prompt[None], attention_mask=torch.ones_like(prompt[None]), max_new_tokens=NEW, do_sample=False,
                    pad_token_id=0,
                )
                assert given[0, len(prompt) :].tolist() == text, "transformers' cache gives other tokens"
            # A token that ends the second text early, and perhaps the others.
            eos = ids[1][5]
            tensors["greedy_ids"] = torch.tensor(ids)
            tensors["eos"] = torch.tensor([[eos]])
            print(f"{name}: seed {seed}, closest choice {gap:.3f}, {varied} tokens at least")
        else:
            print(f"{name}: seed {seed}")
        width = max(LENGTHS)
        tensors["input_ids"] = torch.stack([torch.nn.functional.pad(p, (0, width - len(p))) for p in prompts])
        tensors["attention_mask"] = torch.tensor([[1] * n + [0] * (width - n) for n in LENGTHS])
        with torch.no_grad():
            o = model(tensors["input_ids"], attention_mask=tensors["attention_mask"], output_attentions=True)
        tensors["logits"] = o.logits
        for layer, a in enumerate(o.attentions):
            tensors[f"attentions.{layer}"] = a
        save_file({k: v.contiguous() for k, v in tensors.items()}, out / "goldens.safetensors")
        for file in out.glob("*.safetensors"):
            file.chmod(0o644)
        return
    sys.exit(f"{name}: no seed serves")


# What rope.json holds: frequencies that transformers computes of real models' settings.
ROPE = [
    dict(head_dim=64, max_position_embeddings=8192, context=8192, rope_type="linear", rope_theta=1e5, factor=4.0),
    dict(head_dim=128, max_position_embeddings=4096, context=4000, rope_type="dynamic", rope_theta=1e4, factor=2.0),
    dict(head_dim=128, max_position_embeddings=4096, context=9000, rope_type="dynamic", rope_theta=1e4, factor=2.0),
    dict(head_dim=128, max_position_embeddings=32768, context=1, rope_type="yarn", rope_theta=1e6, factor=4.0,
         original_max_position_embeddings=32768),
    dict(head_dim=96, max_position_embeddings=65536, context=1, rope_type="yarn", rope_theta=1e4, factor=16.0,
         original_max_position_embeddings=4096, beta_fast=16.0, beta_slow=2.0, truncate=False, mscale=1.0,
         mscale_all_dim=0.8),
    dict(head_dim=128, max_position_embeddings=131072, context=1, rope_type="llama3", rope_theta=5e5, factor=8.0,
         low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
    dict(head_dim=64, max_position_embeddings=131072, context=1, rope_type="llama3", rope_theta=5e5, factor=32.0,
         low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192),
]


def rope():
    cases = []
    for case in ROPE:
        parameters = {k: v for k, v in case.items() if k not in ("head_dim", "max_position_embeddings", "context")}
        config = transformers.LlamaConfig(
            hidden_size=case["head_dim"], num_attention_heads=1, rope_parameters=dict(parameters),
            max_position_embeddings=case["max_position_embeddings"],
        )
        inverse, factor = ROPE_INIT_FUNCTIONS[case["rope_type"]](config, "cpu", seq_len=case["context"])
        cases.append({**case, "attention_factor_is": float(factor), "frequencies": inverse.tolist()})
    text = ",\n ".join(json.dumps(case) for case in cases)
    (HERE / "rope.json").write_text(f"[{text}]\n")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[[], *CONFIGS])
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for name in args.names or CONFIGS:
        make(name, CONFIGS[name])
    rope()


if __name__ == "__main__":
    main()
