#!/usr/bin/env python3
"""Times a MarianMT directory in Hugging Face transformers on the CPU, beside `qkv translate`.

    python translate_hf.py --model DIR [--tag ">>fra<<"] [--batch N] [--beam N] [FILE]

Reads sentences, one a line, from FILE or standard input. Warms up, translates all of them
--runs times, and prints one line of JSON; times are the median over the runs, the fastest
beside it. Lines are taken in batches in the order given, as `qkv translate --batch` does.
"""

import argparse
import json
import os
import statistics
import sys
import time
import warnings


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("file", nargs="?", help="sentences, one a line (standard input when absent)")
    p.add_argument("--model", required=True, help="a MarianMT directory")
    p.add_argument("--tag", default="", help='put before every sentence, as ">>fra<<"')
    p.add_argument("--batch", type=int, default=1)
    p.add_argument("--beam", type=int, default=1, help="1 is greedy")
    p.add_argument("--max-tokens", type=int, default=128, help="most new tokens for one sentence")
    p.add_argument("--runs", type=int, default=5)
    p.add_argument("--warm-up", type=int, default=1)
    p.add_argument("--threads", type=int, help="torch's threads (all cores when absent)")
    p.add_argument("--dtype", choices=["f32", "f16", "bf16"], default="f32")
    p.add_argument("--limit", type=int, help="only the first N sentences")
    p.add_argument("--translations", help="write the last run's translations here, one a line")
    args = p.parse_args()
    for name in ("batch", "beam", "max_tokens", "runs"):
        if getattr(args, name) < 1:
            p.error(f"--{name.replace('_', '-')} {getattr(args, name)}: at least 1")
    return args


def sentences(args):
    with open(args.file, encoding="utf-8") if args.file else sys.stdin as f:
        lines = [line.strip() for line in f]
    lines = [line for line in lines if line][: args.limit]
    if not lines:
        sys.exit("no sentences")
    return lines


class Tokens:
    """The directory's tokenizer: MarianTokenizer (source.spm, vocab.json) or tokenizer.json."""

    def __init__(self, directory):
        has = lambda name: os.path.exists(os.path.join(directory, name))
        if has("source.spm"):
            from transformers import MarianTokenizer

            warnings.filterwarnings("ignore", message=".*sacremoses.*")  # OPUS-MT's pieces need none
            self.inner = MarianTokenizer.from_pretrained(directory)
        elif has("tokenizer.json"):
            from transformers import PreTrainedTokenizerFast

            self.inner = PreTrainedTokenizerFast(tokenizer_file=os.path.join(directory, "tokenizer.json"))
        else:
            sys.exit(f"{directory}: neither source.spm nor tokenizer.json")

    def encode(self, text, eos):
        ids = list(self.inner(text)["input_ids"])
        return ids if ids and ids[-1] == eos else ids + [eos]

    def decode(self, ids):
        return self.inner.decode(ids, skip_special_tokens=True)


def main():
    args = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    started = time.perf_counter()
    import torch
    import transformers
    from transformers import MarianMTModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    if args.threads:
        torch.set_num_threads(args.threads)
    dtype = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}[args.dtype]
    model = MarianMTModel.from_pretrained(args.model, dtype=dtype).eval()
    tokens = Tokens(args.model)
    loaded = time.perf_counter() - started

    pad, eos = model.config.pad_token_id, model.config.eos_token_id
    lines = sentences(args)

    # When each decoder step began; the gaps between those of one call are the steps' own times.
    stamps = []
    model.get_decoder().register_forward_pre_hook(lambda *_: stamps.append(time.perf_counter()))
    gaps = []
    calls = 0

    def batches():
        for at in range(0, len(lines), args.batch):
            rows = [tokens.encode(f"{args.tag} {line}".strip(), eos) for line in lines[at : at + args.batch]]
            longest = max(map(len, rows))
            ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
            yield ids, mask

    def generate(ids, mask, new):
        settings = dict(max_length=None, max_new_tokens=new, num_beams=args.beam)
        if args.beam == 1:
            settings.update(early_stopping=False, length_penalty=1.0)
        stamps.clear()
        out = model.generate(input_ids=ids, attention_mask=mask, do_sample=False, **settings)
        nonlocal calls
        calls += len(stamps)
        gaps.extend(b - a for a, b in zip(stamps, stamps[1:]))
        return out

    def run():
        """Seconds, tokens written (end tokens included), decoder steps, translations."""
        begin, before = time.perf_counter(), calls
        written, texts = 0, []
        for ids, mask in batches():
            out = generate(ids, mask, args.max_tokens)[:, 1:]
            for row in out.tolist():
                row = row[: row.index(eos) + 1] if eos in row else row
                written += len(row)
                texts.append(tokens.decode(row))
        return time.perf_counter() - begin, written, calls - before, texts

    def first_token():
        """Seconds from text to the first token of the first batch."""
        begin = time.perf_counter()
        ids, mask = next(batches())
        generate(ids, mask, 1)
        return time.perf_counter() - begin

    with torch.inference_mode():
        for _ in range(args.warm_up):
            run()
            first_token()
        gaps.clear()
        runs = [run() for _ in range(args.runs)]
        firsts = [first_token() for _ in range(max(args.runs, 5))]

    seconds = statistics.median(r[0] for r in runs)
    fastest = min(r[0] for r in runs)
    _, written, steps, texts = runs[-1]
    first = statistics.median(firsts)
    if args.translations:
        with open(args.translations, "w", encoding="utf-8") as f:
            f.writelines(text + "\n" for text in texts)
    print(
        json.dumps(
            {
                "engine": "transformers",
                "model": os.path.basename(os.path.abspath(args.model)),
                "device": "cpu",
                "threads": torch.get_num_threads(),
                "dtype": args.dtype,
                "tag": args.tag,
                "batch": args.batch,
                "beam": args.beam,
                "sentences": len(lines),
                "tokens": written,
                "decoder_steps": steps,
                "runs": args.runs,
                "seconds": round(seconds, 6),
                "seconds_fastest": round(fastest, 6),
                "sentences_per_s": round(len(lines) / seconds, 3),
                "tokens_per_s": round(written / seconds, 3),
                "time_to_first_token_ms": round(1e3 * first, 3),
                "ms_per_decoder_step": round(1e3 * statistics.median(gaps), 3) if gaps else None,
                "load_s": round(loaded, 3),
                "versions": {
                    "python": sys.version.split()[0],
                    "torch": torch.__version__,
                    "transformers": transformers.__version__,
                },
            }
        )
    )


if __name__ == "__main__":
    main()
