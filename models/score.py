"""Scores the program's own translations of the dev sentences.

    python models/score.py --data DIR [--qkv target/release/qkv] [--model DIR] [--beam 1 4]

DIR holds dev.en-fr.tsv and dev.en-zh.tsv: English, a tab, the translation. Prints chrF and BLEU
by sacrebleu (BLEU with the tokenizer zh for Chinese), greedy and with four beams.
"""
import argparse
import subprocess
from pathlib import Path

import sacrebleu


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", required=True)
    parser.add_argument("--qkv", default="target/release/qkv")
    parser.add_argument("--model", help="a directory instead of the embedded model")
    parser.add_argument("--beam", type=int, nargs="+", default=[1, 4])
    args = parser.parse_args()
    for language, suffix, tokenizer in (("fra", "fr", "13a"), ("zho", "zh", "zh")):
        lines = Path(args.data, f"dev.en-{suffix}.tsv").read_text(encoding="utf-8").splitlines()
        pairs = [line.split("\t")[:2] for line in lines]
        english = "".join(pair[0] + "\n" for pair in pairs)
        for beams in args.beam:
            command = [args.qkv, "translate", "--to", language, "--beam", str(beams), "--batch", "64"]
            if args.model:
                command += ["--model", args.model]
            done = subprocess.run(command, input=english.encode(), stdout=subprocess.PIPE, check=True)
            output = done.stdout.decode().splitlines()
            assert len(output) == len(pairs)
            references = [[pair[1] for pair in pairs]]
            chrf = sacrebleu.corpus_chrf(output, references).score
            bleu = sacrebleu.corpus_bleu(output, references, tokenize=tokenizer).score
            print(f"{language} beams {beams}: chrF {chrf:.1f}  BLEU {bleu:.1f}  ({len(pairs)} sentences)", flush=True)


main()
