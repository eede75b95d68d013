"""Scores the program's own translations of the dev sentences.

    python models/score.py --data DIR [--qkv target/release/qkv] [--model DIR] [--beam 1 4]

DIR holds dev.en-fr.tsv and dev.en-zh.tsv: English, a tab, the translation. Many English sentences
stand there several times, each time with another translation. Prints chrF and BLEU by sacrebleu
(BLEU with the tokenizer zh for Chinese), greedy and with four beams, counted in two ways: every
distinct sentence once, against all of its translations; and every pair by itself, against its one
translation. In French, one human translation against another scores chrF 65 in the second way.
"""
import argparse
import subprocess
from collections import defaultdict
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
        references = defaultdict(list)
        for line in Path(args.data, f"dev.en-{suffix}.tsv").read_text(encoding="utf-8").splitlines():
            english, translation = line.split("\t")[:2]
            references[english].append(translation)
        sentences = list(references)
        most = max(map(len, references.values()))
        # sacrebleu wants as many references for each sentence: the last one again changes nothing.
        streams = [[references[s][min(n, len(references[s]) - 1)] for s in sentences] for n in range(most)]
        for beams in args.beam:
            command = [args.qkv, "translate", "--to", language, "--beam", str(beams), "--batch", "64"]
            if args.model:
                command += ["--model", args.model]
            text = "".join(s + "\n" for s in sentences)
            done = subprocess.run(command, input=text.encode(), stdout=subprocess.PIPE, check=True)
            output = done.stdout.decode().splitlines()
            assert len(output) == len(sentences)
            pairs = [(o, r) for s, o in zip(sentences, output) for r in references[s]]
            for what, hypotheses, given in (
                ("sentences, all references", output, streams),
                ("pairs, one reference", [o for o, _ in pairs], [[r for _, r in pairs]]),
            ):
                chrf = sacrebleu.corpus_chrf(hypotheses, given).score
                bleu = sacrebleu.corpus_bleu(hypotheses, given, tokenize=tokenizer).score
                print(f"{language} beams {beams}: chrF {chrf:.1f}  BLEU {bleu:.1f}  ({len(hypotheses)} {what})", flush=True)


main()
