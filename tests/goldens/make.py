#!/usr/bin/env python3
"""Makes the goldens in this directory with Hugging Face transformers.

    python make.py [NAME...]         write all goldens (or those named)
    python make.py --find [NAME...]  look for seeds whose goldens tell right from wrong

README.md says what the files hold and describes HF's generation, rule by rule.
`plain_greedy` and `plain_beam` below are that description as code: they run beside
`generate`, in f64, and must agree with it, or nothing is written.
"""

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import GenerationConfig, MarianConfig, MarianMTModel
from transformers.utils import logging

HERE = Path(__file__).resolve().parent
EOS = 0
GAP = 3e-4  # no decision in a golden run is closer than this

# Everything that differs; `model` goes to MarianConfig, `generation` to GenerationConfig.
# `tied`: HF's tie_word_embeddings. The pad id is the last id of the smaller vocabulary.
CONFIGS = {
    # heads of 12 and 18, tied, scaled; stops as soon as four are done
    "relu": {
        "seed": 4,
        "dtype": torch.float32,
        "eos_bias": 0.5,
        "model": dict(
            activation_function="relu", d_model=36, vocab_size=97, scale_embedding=True,
            encoder_layers=2, decoder_layers=3, encoder_attention_heads=3, decoder_attention_heads=2,
            encoder_ffn_dim=56, decoder_ffn_dim=72, max_position_embeddings=40,
        ),
        "generation": dict(early_stopping=True, length_penalty=1.0, max_length=24, forced_eos_token_id=EOS),
    },
    # heads of 20 and 8, its own embedding on each side, another vocabulary on each side, unscaled
    "gelu-separate": {
        "seed": 73,
        "dtype": torch.float32,
        "eos_bias": 0.5,
        "model": dict(
            activation_function="gelu", d_model=40, vocab_size=131, decoder_vocab_size=113,
            share_encoder_decoder_embeddings=False, scale_embedding=False,
            encoder_layers=3, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=5,
            encoder_ffn_dim=64, decoder_ffn_dim=100, max_position_embeddings=24,
        ),
        "generation": dict(early_stopping=False, length_penalty=0.6, max_length=24, forced_eos_token_id=EOS),
    },
    # an odd width (heads of 11 and 33, uneven sine and cosine halves), stored as f16
    "gelu-new-f16": {
        "seed": 1,
        "steps": 1200,
        "dtype": torch.float16,
        "eos_bias": 0.5,
        "model": dict(
            activation_function="gelu_new", d_model=33, vocab_size=260, scale_embedding=True,
            encoder_layers=1, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=1,
            encoder_ffn_dim=47, decoder_ffn_dim=64, max_position_embeddings=33,
        ),
        "generation": dict(early_stopping="never", length_penalty=2.0, max_length=22, forced_eos_token_id=EOS),
    },
    # powers of two, stored as bf16; suppressed tokens
    "swish-bf16": {
        "seed": 9,
        "dtype": torch.bfloat16,
        "eos_bias": 0.5,
        "suppress": True,
        "model": dict(
            activation_function="swish", d_model=32, vocab_size=260, scale_embedding=False,
            encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=2,
            encoder_ffn_dim=64, decoder_ffn_dim=32, max_position_embeddings=64,
        ),
        "generation": dict(early_stopping=False, length_penalty=1.0, max_length=25, forced_eos_token_id=EOS),
    },
    # three separate embedding matrices, a larger target vocabulary, nothing forced at the end,
    # a negative length penalty, a bad word of two ids
    "tanh-untied": {
        "seed": 58,
        "ends": 0.2,
        "dtype": torch.float32,
        "eos_bias": 0.5,
        "bad_pair": True,
        "model": dict(
            activation_function="gelu_pytorch_tanh", d_model=28, vocab_size=64, decoder_vocab_size=101,
            share_encoder_decoder_embeddings=False, tie_word_embeddings=False, scale_embedding=True,
            encoder_layers=2, decoder_layers=2, encoder_attention_heads=1, decoder_attention_heads=7,
            encoder_ffn_dim=30, decoder_ffn_dim=50, max_position_embeddings=32,
        ),
        "generation": dict(early_stopping="never", length_penalty=-0.5, max_length=20),
    },
}


# ---- models ---------------------------------------------------------------------------


def randomise(model, gen, eos_bias):
    """Weights that keep attention sharp and outputs varied: nothing is zero, nothing is one."""

    def normal(p, std, mean=0.0):
        p.copy_(torch.randn(p.shape, generator=gen) * std + mean)

    d = model.config.d_model
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if "embed_positions" in name:
                continue
            if "layer_norm" in name:
                normal(p, 0.2, mean=1.0 if name.endswith("weight") else 0.0)
            elif "embed_tokens" in name or "shared" in name or name == "lm_head.weight":
                normal(p, 1.2 / math.sqrt(d))
            elif name.endswith("bias"):
                normal(p, 0.2)
            else:  # so that attention is uneven from the beginning
                normal(p, (1.2 if "q_proj" in name or "k_proj" in name else 1.0) / math.sqrt(p.shape[1]))
        normal(model.final_logits_bias, 0.7)
        model.final_logits_bias[0, EOS] = eos_bias


def taught(model, gen, steps, ends):
    """A little training, so that outputs are varied: random weights alone repeat one token for ever.

    Each source has a theme, a word that fills most of it. The theme says with which word the target
    begins and which of three maps leads from each word to the next, most of the time; some words like
    to be the last. So rows differ, several continuations are likely at each step, and ends come at
    varied places.
    """
    config = model.config
    words = torch.tensor([t for t in range(1, config.decoder_vocab_size) if t != config.pad_token_id])
    n, batch, width = len(words), 48, 12
    first = words[torch.randint(0, n, (config.vocab_size,), generator=gen)]
    after = torch.zeros(config.decoder_vocab_size, 3, dtype=torch.long)
    for k in range(3):
        cycle = words[torch.randperm(n, generator=gen)]
        after[cycle, k] = cycle.roll(-1)
    likes_to_end = torch.rand(config.decoder_vocab_size, generator=gen) < ends

    optimiser = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = 3e-3 * min(1.0, (step + 1) / 50)
        theme = torch.randint(1, config.vocab_size - 1, (batch, 1), generator=gen)
        source = torch.randint(0, config.vocab_size - 1, (batch, 8), generator=gen)
        source = torch.where(torch.rand(batch, 8, generator=gen) < 0.7, theme, source)
        theme = theme[:, 0]
        target = torch.full((batch, width + 1), config.pad_token_id)
        labels = torch.full((batch, width), -100)
        now = first[theme]
        going = torch.ones(batch, dtype=torch.bool)
        for t in range(width):
            target[:, t + 1] = now
            labels[going, t] = now[going]
            going = going & (now != EOS)
            other = torch.randint(0, 3, (batch,), generator=gen)
            branch = torch.where(torch.rand(batch, generator=gen) < 0.5, theme % 3, other)
            stop = likes_to_end[now] & (torch.rand(batch, generator=gen) < 0.5)
            now = torch.where(stop, EOS, after[now, branch])
        out = model(input_ids=source, decoder_input_ids=target[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(out.flatten(0, 1), labels.flatten(), label_smoothing=0.02)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return loss.item()


MODELS = {}


def build(name, seed):
    """The model as it will be saved, and its inputs. Seeds 0 to 9 share a model, 10 to 19 another, …; inputs differ."""
    spec = CONFIGS[name]
    sizes = spec["model"]
    target_vocab = sizes.get("decoder_vocab_size", sizes["vocab_size"])
    pad = min(sizes["vocab_size"], target_vocab) - 1
    which = (name, seed // 10)
    if which not in MODELS:
        gen = torch.Generator().manual_seed(1000 + 100 * (seed // 10) + sorted(CONFIGS).index(name))
        config = MarianConfig(
            **sizes, pad_token_id=pad, eos_token_id=EOS, decoder_start_token_id=pad,
            forced_eos_token_id=spec["generation"].get("forced_eos_token_id"),
        )
        model = MarianMTModel(config).eval()
        model.tie_weights()
        randomise(model, gen, spec["eos_bias"])
        model.tie_weights()
        loss = taught(model, gen, spec.get("steps", 500), spec.get("ends", 0.3))
        print(f"{name}: trained to a loss of {loss:.2f}", file=sys.stderr, flush=True)
        MODELS[which] = model.to(spec["dtype"])
    model = MODELS[which]
    gen = torch.Generator().manual_seed(seed)

    bad = [[pad]]
    generation = dict(
        spec["generation"], num_beams=4, pad_token_id=pad, eos_token_id=EOS, decoder_start_token_id=pad,
        bad_words_ids=bad,
    )
    generation["_chosen_later"] = {k: spec[k] for k in ("suppress", "bad_pair") if k in spec}

    def ids(n, vocab):  # neither end nor pad
        t = torch.randint(1, vocab - 1, (n,), generator=gen)
        return t + (t >= pad).long()

    lengths = {"relu": [11, 6, 1], "gelu-separate": [7, 13, 1], "gelu-new-f16": [1, 9, 4],
               "swish-bf16": [12, 1, 10], "tanh-untied": [5, 1, 9]}[name]
    source = torch.full((3, max(lengths)), pad)
    mask = torch.zeros_like(source)
    for row, n in enumerate(lengths):
        source[row, :n] = torch.cat([ids(n - 1, sizes["vocab_size"]), torch.tensor([EOS])])
        mask[row, :n] = 1
    steps = {"relu": 9, "gelu-separate": 12, "gelu-new-f16": 7, "swish-bf16": 10, "tanh-untied": 8}[name]
    target = torch.stack([torch.cat([torch.tensor([pad]), ids(steps - 1, target_vocab)]) for _ in lengths])
    return model, generation, source, mask, target


# ---- the description in README.md, as code -------------------------------------------------


class Scores:
    """Next-token logits in f64, recomputed from the beginning each time: no cache to be wrong."""

    def __init__(self, model, source, mask):
        self.model = model.double()
        self.mask = mask
        with torch.no_grad():
            self.states = model.model.encoder(input_ids=source, attention_mask=mask)

    def __call__(self, row, sequences):
        n = len(sequences)
        states = self.states.last_hidden_state[row : row + 1].expand(n, -1, -1)
        with torch.no_grad():
            out = self.model(
                encoder_outputs=(states,), attention_mask=self.mask[row : row + 1].expand(n, -1),
                decoder_input_ids=torch.tensor(sequences), use_cache=False,
            )
        return out.logits[:, -1]


def process(scores, ids, g):
    """The score processors, in HF's order, for one row."""
    scores = scores.clone()
    for bad in g.get("bad_words_ids") or []:
        if bad == [g["eos_token_id"]]:
            continue
        prefix = bad[:-1]
        if len(prefix) <= len(ids) and ids[len(ids) - len(prefix) :] == prefix:
            scores[bad[-1]] = -math.inf
    if g.get("forced_eos_token_id") is not None and len(ids) == g["max_length"] - 1:
        scores[:] = -math.inf
        scores[g["forced_eos_token_id"]] = 0.0
    for token in g.get("suppress_tokens") or []:
        scores[token] = -math.inf
    if len(ids) == 1:
        for token in g.get("begin_suppress_tokens") or []:
            scores[token] = -math.inf
    return scores


def pad_rows(rows, pad):
    longest = max(map(len, rows))
    return torch.tensor([row + [pad] * (longest - len(row)) for row in rows])


def plain_greedy(scores, batch, g):
    rows, gap = [], math.inf
    for row in range(batch):
        ids = [g["decoder_start_token_id"]]
        while len(ids) < g["max_length"] and (len(ids) == 1 or ids[-1] != EOS):
            s = process(scores(row, [ids])[0], ids, g)
            best = s.topk(2).values
            if best[1] > -math.inf:
                gap = min(gap, (best[0] - best[1]).item())
            ids = ids + [int(s.argmax())]
        rows.append(ids)
    return pad_rows(rows, g["pad_token_id"]), gap


def plain_beam_row(scores, row, g):
    n_beams, penalty, early = g["num_beams"], g["length_penalty"], g["early_stopping"]
    max_length, start, keep = g["max_length"], [g["decoder_start_token_id"]], 2 * g["num_beams"]
    gap = math.inf

    def close(a, b):
        nonlocal gap
        if min(a, b) > -1e8:
            gap = min(gap, abs(a - b))

    running = [(0.0, start)] + [(-1e9, start)] * (n_beams - 1)
    slots = []  # done ones only: (score, raw score, ids), best first
    improvable = True
    while True:
        length = len(running[0][1])
        n = length  # generated ids after this step: length + 1 - 1
        logits = scores(row, [ids for _, ids in running])
        candidates = []
        for beam, (score, ids) in enumerate(running):
            logp = process(torch.log_softmax(logits[beam], -1), ids, g)
            candidates += [(score + x, ids + [v]) for v, x in enumerate(logp.tolist())]
        candidates.sort(key=lambda c: -c[0])  # stable: the lower flat index first
        top = candidates[:keep]
        hits = [ids[-1] == EOS or length + 1 >= max_length for _, ids in top]

        alive = [c for c, hit in zip(top, hits) if not hit]
        others = [c[0] for c in candidates[: keep + n_beams] if c[1][-1] != EOS]
        if alive:
            close(others[n_beams - 1], others[n_beams])
        if any(hits):
            close(top[n_beams - 1][0], top[n_beams][0])

        if improvable and not (early is True and len(slots) == n_beams):
            new = [(s / n**penalty, s, ids) for (s, ids), hit in zip(top[:n_beams], hits) if hit]
            new = [c for c in new if c[1] > -1e8]
            merged = sorted(slots + new, key=lambda c: -c[0])
            if len(merged) > n_beams:
                close(merged[n_beams - 1][0], merged[n_beams][0])
            slots = merged[:n_beams]
        if length + 1 >= max_length:
            break
        running = alive[:n_beams]
        assert len(running) == n_beams
        horizon = max_length - 1 if early == "never" and penalty > 0 else n
        if len(slots) == n_beams:
            best, worst = running[0][0] / horizon**penalty, slots[-1][0]
            close(best, worst)
            improvable = improvable and best > worst
        if not improvable or (early is True and len(slots) == n_beams):
            break
    if len(slots) > 1:
        close(slots[0][0], slots[1][0])
    return slots[0], gap


def plain_beam(scores, batch, g):
    rows = [plain_beam_row(scores, row, g) for row in range(batch)]
    ids = pad_rows([best[2] for best, _ in rows], g["pad_token_id"])
    normal = torch.tensor([best[0] for best, _ in rows])
    raw = torch.tensor([best[1] for best, _ in rows])
    return ids, normal, raw, min(gap for _, gap in rows)


# ---- goldens ------------------------------------------------------------------------------


def make(name, seed, out):
    """Writes one golden directory; returns what is wrong with it as a golden."""
    model, g, source, mask, target = build(name, seed)
    later = g.pop("_chosen_later")
    pad = g["pad_token_id"]
    shutil.rmtree(out, ignore_errors=True)
    model.save_pretrained(out)

    def load(dtype):
        return MarianMTModel.from_pretrained(out, dtype=dtype, attn_implementation="eager").eval()

    exact = load(torch.float32)
    scores = Scores(exact, source, mask)

    # Ban what it would have said, so that the ban can be seen to work.
    said, _ = plain_greedy(scores, 3, g)
    if "suppress" in later:
        inner = [t for t in said[:, 2:].flatten().tolist() if t not in (EOS, pad)]
        g["suppress_tokens"] = sorted(set(inner[:2]))
        g["begin_suppress_tokens"] = sorted({EOS, *said[:, 1].tolist()} - {pad})
    if "bad_pair" in later:
        pair = said[0, 2:4].tolist()
        if EOS in pair or pad in pair:
            return ["the first row is too short for a pair to ban"]
        g["bad_words_ids"] = g["bad_words_ids"] + [pair, [EOS]]  # [EOS] alone is ignored by HF

    greedy, greedy_gap = plain_greedy(scores, 3, g)
    beam, normal, raw, beam_gap = plain_beam(scores, 3, g)

    wrong = []
    if greedy_gap < GAP or beam_gap < GAP:
        wrong.append(f"a decision is close: greedy {greedy_gap:.1e}, beam {beam_gap:.1e}")
    for what, ids in (("greedy", greedy), ("beam", beam)):
        rows = [[t for t in row if t not in (EOS, pad)] for row in ids.tolist()]
        lengths = sorted(len(row) for row in rows)
        bias = g["length_penalty"] if what == "beam" else 1.0  # 2 makes all long, below 0 short
        if lengths[0] < 2 - (bias < 0) or lengths[-1] < (6 if bias >= 1 else 4):
            wrong.append(f"{what} rows are short: {lengths}")
        if len(set(lengths)) < 2 and bias < 2:
            wrong.append(f"{what} rows all end at one place: {lengths}")
        if any(len(row) > 3 and len(set(row)) < 0.5 * len(row) for row in rows):
            wrong.append(f"{what} repeats itself")
        if len({tuple(row) for row in rows}) < 3:
            wrong.append(f"{what} rows are alike")
    if greedy.shape == beam.shape and torch.equal(greedy, beam):
        wrong.append("beam search finds what greedy finds")
    if not wrong:
        def same(change):
            ids, *_ = plain_beam(scores, 3, {**g, **change})
            return ids.shape == beam.shape and torch.equal(ids, beam)

        # (a negative length penalty all but stops the search where `true` would)
        if g["length_penalty"] > 0 and all(same({"early_stopping": e}) for e in (True, False, "never") if e != g["early_stopping"]):
            wrong.append("the ids would be the same whatever early_stopping says")
        if same({"length_penalty": 1.5 if g["length_penalty"] < 1 else 0.1}):
            wrong.append("the ids would be the same with another length_penalty")
    if wrong:
        return wrong

    # HF's own, in f32.
    model = load(torch.float32)
    model.generation_config = GenerationConfig(**g)
    del exact, scores
    # the directory's generation_config.json is what HF's run reads
    model.generation_config.save_pretrained(out)
    batch = dict(input_ids=source, attention_mask=mask)
    with torch.no_grad():
        o = model(**batch, decoder_input_ids=target, output_attentions=True)
        hf_greedy = model.generate(**batch, num_beams=1, early_stopping=False, length_penalty=1.0)
        hf = model.generate(**batch, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(hf_greedy, greedy), (name, hf_greedy, greedy)
    assert torch.equal(hf.sequences, beam), (name, hf.sequences, beam)
    assert torch.allclose(hf.sequences_scores, normal.float(), atol=1e-4), (hf.sequences_scores, normal)

    tensors = {
        "input_ids": source, "attention_mask": mask, "decoder_input_ids": target,
        "logits": o.logits, "encoder_states": o.encoder_last_hidden_state,
        "greedy_ids": hf_greedy, "beam4_ids": hf.sequences,
        "beam4_scores": hf.sequences_scores, "beam4_raw_scores": raw.float(),
    }
    for kind in ("encoder_attentions", "decoder_attentions", "cross_attentions"):
        for layer, a in enumerate(getattr(o, kind)):
            assert a.dtype == torch.float32
            tensors[f"{kind}.{layer}"] = a
    save_file({k: v.contiguous() for k, v in tensors.items()}, out / "goldens.safetensors")

    margin = o.logits.topk(2).values
    settings = {
        "seed": seed,
        "greedy": {**g, "num_beams": 1, "early_stopping": False, "length_penalty": 1.0},
        "beam4": g,
        "closest_decision": {"greedy": float(f"{greedy_gap:.3g}"), "beam4": float(f"{beam_gap:.3g}")},
        "smallest_top2_margin_of_logits": float(f"{(margin[..., 0] - margin[..., 1]).min().item():.3g}"),
    }
    for file in out.glob("*.safetensors"):
        file.chmod(0o644)
    (out / "generation.json").write_text(json.dumps(settings, indent=1) + "\n")
    return []


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("names", nargs="*", choices=[[], *CONFIGS])
    parser.add_argument("--find", action="store_true", help="look for seeds, from the one in the table on")
    parser.add_argument("--tries", type=int, default=400)
    args = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    for name in args.names or CONFIGS:
        seed = CONFIGS[name]["seed"]
        for seed in range(seed, seed + (args.tries if args.find else 1)):
            wrong = make(name, seed, HERE / name)
            if not wrong:
                print(f"{name}: seed {seed}", flush=True)
                break
            if args.find:
                print(f"{name}: seed {seed}: {'; '.join(wrong)}", file=sys.stderr, flush=True)
        else:
            sys.exit(f"{name}: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
