#!/usr/bin/env python3
"""Train a small English -> French / Traditional Chinese translator and export
it as a Hugging Face MarianMT directory.

    python train.py spm    --data DATA --work WORK
    python train.py train  --data DATA --work WORK --minutes 125
    python train.py export --data DATA --work WORK --out tatoeba-en-fra-zho
    python train.py eval   --data DATA --model tatoeba-en-fra-zho

`DATA` holds {train,dev}.en-{fr,zh}.tsv: English, a tab, the translation; one
pair a line, UTF-8, the Chinese in Traditional characters. `WORK` receives the
sentencepiece model, the checkpoints and the log of dev scores. `train` starts
from the newest checkpoint in `WORK` if there is one, so an interrupted run is
continued by giving the same command again.

The learning rate is tied to time, not to a number of steps: it has decayed to
nothing when `--minutes` of training are used up (all runs on the same `WORK`
counted together), however fast the machine is. Everything runs on the CPU;
where other programs compete for it, set OMP_WAIT_POLICY=passive.
"""

import argparse
import json
import math
import random
import re
import shutil
import sys
import time
from pathlib import Path

import sentencepiece
import torch
from torch import nn

# --------------------------------------------------------------------------
# Vocabulary
# --------------------------------------------------------------------------

# The ids below SPM_SIZE are sentencepiece's own; the two target language tags
# and the padding token, which never come out of a text, follow them.
VOCAB_SIZE = 6000
TAGS = {"fr": ">>fra<<", "zh": ">>zho<<"}
SPM_SIZE = VOCAB_SIZE - len(TAGS) - 1
EOS, UNK, PAD = 0, 1, VOCAB_SIZE - 1
TAG_IDS = {lang: SPM_SIZE + i for i, lang in enumerate(TAGS)}
MAX_POSITIONS = 256

# Characters folded together before the text is cut into pieces. This becomes
# the character map inside the sentencepiece model, so that whatever runs the
# model gets it too. sentencepiece's default rules (NFKC) would be wrong here:
# they turn the full-width punctuation of Chinese into ASCII.
FOLD = {
    "\u2018": "'", "\u2019": "'", "\u201b": "'", "\u02bc": "'",
    "\u201c": '"', "\u201d": '"', "\u201e": '"', "\uff02": '"',
    "\u00a0": " ", "\u202f": " ", "\u2009": " ", "\u3000": " ", "\t": " ",
    "\u2010": "-", "\u2011": "-",
    "\u2026": "...",
}

# The Chinese sentences mix ASCII and full-width punctuation; only the latter
# is right, and the model should not have to guess.
ZH_PUNCTUATION = str.maketrans({"?": "？", "!": "！", ",": "，", "﹐": "，"})

# --------------------------------------------------------------------------
# Everyday sentences
# --------------------------------------------------------------------------

# Tatoeba often gives several translations of one short sentence (formal and
# informal, singular and plural), which leaves the model undecided exactly
# where a reader is least forgiving. These fix one. Other translations of the
# same English sentences are left out of the training data.
with open(Path(__file__).with_name("everyday.tsv"), encoding="utf-8") as file:
    # English, French, Chinese.
    EVERYDAY = [tuple(line.rstrip("\n").split("\t")) for line in file]
EVERYDAY_TIMES = 12  # an epoch, as written
VARIANT_TIMES = 4    # an epoch, lower case and/or without the final stop


def key(english):
    """What makes two English sentences the same: letters and digits only."""
    return re.sub(r"[\W_]+", " ", english.lower()).strip()


def variants(english):
    """`english` in lower case and/or without its final punctuation."""
    bare = english.rstrip(".?!")
    return sorted({bare, english.lower(), bare.lower()} - {english})


# --------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------

def read_pairs(data, split, lang):
    with open(Path(data) / f"{split}.en-{lang}.tsv", encoding="utf-8") as file:
        return [tuple(line.rstrip("\n").split("\t")) for line in file]


def training_pairs(data):
    """One epoch's (language, English, translation); Chinese counts twice."""
    fixed = {key(row[0]) for row in EVERYDAY}
    pairs = []
    for lang, times in (("fr", 1), ("zh", 2)):
        for english, target in read_pairs(data, "train", lang):
            if lang == "zh":
                target = target.translate(ZH_PUNCTUATION)
            if key(english) not in fixed:
                pairs += [(lang, english, target)] * times
    written = {row[0] for row in EVERYDAY}
    for english, french, chinese in EVERYDAY:
        for lang, target in (("fr", french), ("zh", chinese)):
            pairs += [(lang, english, target)] * EVERYDAY_TIMES
            # "Hello" without its stop is taken from "Hello.", not "Hello!".
            if english.endswith("!") and english[:-1] + "." in written:
                continue
            for variant in variants(english):
                pairs += [(lang, variant, target)] * VARIANT_TIMES
    return pairs


def train_spm(args):
    """One unigram model for the three languages."""
    work = Path(args.work)
    work.mkdir(parents=True, exist_ok=True)
    fr = read_pairs(args.data, "train", "fr")
    zh = read_pairs(args.data, "train", "zh")
    lines = sorted({p[0] for p in fr + zh})
    lines += [p[1] for p in fr]
    lines += [p[1].translate(ZH_PUNCTUATION) for p in zh] * 2
    lines += [text for row in EVERYDAY for text in row] * 3
    (work / "spm.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with open(work / "fold.tsv", "w", encoding="utf-8") as file:
        for a, b in FOLD.items():
            to = " ".join(f"{ord(c):X}" for c in b)
            file.write(f"{ord(a):X}\t{to}\n")
    sentencepiece.SentencePieceTrainer.train(
        input=str(work / "spm.txt"),
        model_prefix=str(work / "spm"),
        model_type="unigram",
        vocab_size=SPM_SIZE,
        character_coverage=args.coverage,
        normalization_rule_tsv=str(work / "fold.tsv"),
        split_digits=True,
        eos_id=EOS, unk_id=UNK, bos_id=-1, pad_id=-1,
        num_threads=2,
        minloglevel=1,
    )
    spm = load_spm(work)
    pieces = [spm.id_to_piece(i) for i in range(SPM_SIZE)]
    print("pieces:", len(pieces), "single characters:", sum(len(p) == 1 for p in pieces))
    for lang, rows in (("fr", fr), ("zh", zh)):
        ids = spm.encode([p[1] for p in rows])
        total = sum(map(len, ids))
        print(lang, "pieces a sentence: %.2f" % (total / len(rows)),
              "unknown: %.4f %%" % (100 * sum(i == UNK for s in ids for i in s) / total))
    ids = spm.encode([p[0] for p in fr + zh])
    print("en pieces a sentence: %.2f" % (sum(map(len, ids)) / len(ids)))


def load_spm(work):
    spm = sentencepiece.SentencePieceProcessor()
    spm.load(str(Path(work) / "spm.model"))
    assert spm.get_piece_size() == SPM_SIZE
    return spm


def make_epoch(spm, pairs, target, epoch, args):
    """The batches of one epoch, each a list of (source, target) id lists.

    `target` holds the translations' ids. Some of the source sentences are cut
    up at random instead of in the most probable way (subword regularisation),
    others each epoch. Sentences of equal length go together, so that hardly
    any padding is needed.
    """
    rng = random.Random(args.seed * 1000 + epoch)
    sentencepiece.set_random_generator_seed(args.seed * 1000 + epoch)
    source = spm.encode([p[1] for p in pairs])
    sampled = [i for i in range(len(pairs)) if rng.random() < args.sample]
    for i, ids in zip(sampled, spm.encode([pairs[i][1] for i in sampled], num_threads=1,
                                          enable_sampling=True, alpha=args.alpha, nbest_size=-1)):
        source[i] = ids
    rows = [([TAG_IDS[p[0]]] + s + [EOS], t + [EOS]) for p, s, t in zip(pairs, source, target)]
    rng.shuffle(rows)
    rows.sort(key=lambda row: (len(row[1]), len(row[0])))
    batches, batch, wide, tall = [], [], 0, 0
    for row in rows:
        wide, tall = max(wide, len(row[0])), max(tall, len(row[1]))
        if batch and (len(batch) + 1) * (wide + tall) > args.batch_tokens:
            batches.append(batch)
            batch, wide, tall = [], len(row[0]), len(row[1])
        batch.append(row)
    batches.append(batch)
    rng.shuffle(batches)
    return batches


def pad(rows, value):
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


# --------------------------------------------------------------------------
# Model
# --------------------------------------------------------------------------

def attention(module, query, key, value, mask, **kwargs):
    """transformers' "sdpa", always in f32: its bf16 backward pass is slow on a CPU."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    with torch.autocast("cpu", enabled=False):
        return sdpa_attention_forward(module, query.float(), key.float(), value.float(), mask, **kwargs)


def cheap_dropout(rate, size=1 << 22):
    """A dropout that takes its masks from a random place in one long mask:
    drawing fresh ones takes a tenth of the time on a CPU."""
    pool = (torch.rand(size) >= rate).float() / (1 - rate)

    def dropout(x, p=rate, training=True, inplace=False):
        if not training or p == 0:
            return x
        at = random.randrange(size - x.numel())
        return x * pool[at:at + x.numel()].view_as(x)

    return dropout


def new_model(args):
    from transformers import AttentionInterface, MarianConfig, MarianMTModel
    AttentionInterface.register("sdpa", attention)
    config = MarianConfig(
        vocab_size=VOCAB_SIZE, decoder_vocab_size=VOCAB_SIZE,
        d_model=192, encoder_layers=3, decoder_layers=3,
        encoder_attention_heads=6, decoder_attention_heads=6,
        encoder_ffn_dim=768, decoder_ffn_dim=768,
        activation_function="relu", scale_embedding=True,
        max_position_embeddings=MAX_POSITIONS,
        dropout=args.dropout, attention_dropout=0.0, activation_dropout=0.0,
        init_std=192 ** -0.5,
        pad_token_id=PAD, eos_token_id=EOS, forced_eos_token_id=EOS,
        decoder_start_token_id=PAD,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(args.seed)
    random.seed(args.seed)
    model = MarianMTModel(config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dim() == 2 and "embed" not in name and "shared" not in name:
            nn.init.xavier_uniform_(parameter)
    return model


class SmoothedCrossEntropy(torch.autograd.Function):
    """Label-smoothed cross entropy of `hidden @ weight.T`, averaged.

    The gradient with respect to the logits (softmax minus smoothed target) is
    made in place in the forward pass: three passes over the largest tensor of
    the network instead of the dozen that the generic function needs.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, smoothing):
        n = labels.numel()
        logits = hidden @ weight.T
        chosen = logits.gather(1, labels[:, None]).float()
        mean = (hidden.float() @ weight.float().mean(0)).sum()
        grad = torch.softmax(logits, dim=1)
        log_p = grad.gather(1, labels[:, None]).float().clamp_min(1e-30).log()
        # log Z = logit - log p
        normaliser = (chosen - log_p).sum()
        loss = (normaliser - (1 - smoothing) * chosen.sum() - smoothing * mean) / n
        grad -= smoothing / weight.shape[0]
        grad.scatter_add_(1, labels[:, None], grad.new_full((n, 1), smoothing - 1))
        ctx.save_for_backward(hidden, weight, grad)
        return loss

    @staticmethod
    def backward(ctx, upstream):
        hidden, weight, grad = ctx.saved_tensors
        scale = upstream / grad.shape[0]
        return (grad @ weight) * scale.to(weight.dtype), (grad.T @ hidden) * scale.to(weight.dtype), None, None


def batch_loss(model, batch, args):
    source = pad([row[0] for row in batch], PAD)
    labels = pad([row[1] for row in batch], PAD)
    start = labels.new_full((len(batch), 1), PAD)
    inputs = torch.cat([start, labels[:, :-1]], dim=1)
    mask = None if not (source == PAD).any() else (source != PAD).long()
    with torch.autocast("cpu", torch.bfloat16, enabled=args.bf16):
        hidden = model.model(
            input_ids=source, attention_mask=mask,
            decoder_input_ids=inputs, use_cache=False,
        ).last_hidden_state
    # Neither padding nor characters outside the vocabulary are to be learnt.
    wanted = (labels != PAD) & (labels != UNK)
    hidden, labels = hidden[wanted], labels[wanted]
    weight = model.model.shared.weight
    if args.bf16:
        hidden, weight = hidden.bfloat16(), weight.bfloat16()
    return SmoothedCrossEntropy.apply(hidden, weight, labels, args.smoothing), source.numel() + inputs.numel()


# --------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------

@torch.no_grad()
def translate(model, spm, lang, sentences, beams=1, batch=128):
    model.eval()
    out = [""] * len(sentences)
    ids = [[TAG_IDS[lang]] + s + [EOS] for s in spm.encode(sentences)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    for at in range(0, len(order), batch):
        chunk = order[at:at + batch]
        source = pad([ids[i] for i in chunk], PAD)
        result = model.generate(
            input_ids=source, attention_mask=(source != PAD).long(), num_beams=beams,
            max_length=min(MAX_POSITIONS, 3 * source.shape[1] + 20), do_sample=False,
            bad_words_ids=[[PAD]], forced_eos_token_id=EOS,
        )
        for i, row in zip(chunk, result.tolist()):
            out[i] = spm.decode([t for t in row if t < SPM_SIZE and t != EOS])
    return out


def scores(model, spm, data, beams=1):
    """chrF and BLEU on dev, one reference a line, the text as it is."""
    import sacrebleu
    out = {}
    for lang in TAGS:
        pairs = read_pairs(data, "dev", lang)
        got = translate(model, spm, lang, [p[0] for p in pairs], beams)
        refs = [[p[1] for p in pairs]]
        out[lang] = sacrebleu.corpus_chrf(got, refs).score
        out[lang + "_bleu"] = sacrebleu.corpus_bleu(
            got, refs, tokenize="zh" if lang == "zh" else "13a").score
    return out


def everyday_misses(model, spm):
    rows = []
    for column, lang in ((1, "fr"), (2, "zh")):
        got = translate(model, spm, lang, [row[0] for row in EVERYDAY])
        rows += [(row[0], text, row[column]) for row, text in zip(EVERYDAY, got) if text != row[column]]
    return rows


# --------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------

def checkpoints(work):
    return sorted(Path(work).glob("step-*.pt"))


def train(args):
    work = Path(args.work)
    torch.set_num_threads(args.threads)
    spm = load_spm(work)
    pairs = training_pairs(args.data)
    target = spm.encode([p[2] for p in pairs])
    model = new_model(args)
    nn.functional.dropout = cheap_dropout(args.dropout)
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=args.lr, betas=(0.9, 0.98), eps=1e-9, fused=True)
    average = [p.detach().clone() for p in parameters]
    state = {"step": 0, "epoch": 0, "batch": 0, "seconds": 0.0, "tokens": 0}
    if checkpoints(work):
        saved = torch.load(checkpoints(work)[-1])
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        for a, b in zip(average, saved["average"]):
            a.copy_(b)
        state = saved["state"]
        torch.set_rng_state(saved["rng"])
        random.seed(args.seed + state["step"])
        print("resumed", state, flush=True)
    elif args.start:
        from transformers import MarianMTModel
        exported = MarianMTModel.from_pretrained(args.start).float().state_dict()
        model.load_state_dict(exported, strict=False)
        for a, p in zip(average, parameters):
            a.copy_(p.detach())
        print("started from", args.start, flush=True)
    print(f"{sum(p.numel() for p in parameters)} parameters, {len(pairs)} pairs an epoch", flush=True)

    started, base = time.time(), state["seconds"]
    best = 0.0

    def save():
        path = work / f"step-{state['step']:06d}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                    "average": average, "state": state, "rng": torch.get_rng_state()},
                   path.with_suffix(".new"))
        path.with_suffix(".new").rename(path)
        for old in checkpoints(work)[:-args.keep]:
            old.unlink()

    def swap():
        """Exchange the weights for their running average, or back."""
        with torch.no_grad():
            for p, a in zip(parameters, average):
                kept = p.clone()
                p.copy_(a)
                a.copy_(kept)

    done = False
    while not done:
        batches = make_epoch(spm, pairs, target, state["epoch"], args)
        if state["batch"] == 0:
            print(f"epoch {state['epoch']}: {len(batches)} batches", flush=True)
        model.train()
        shown, shown_tokens, shown_loss, shown_at = 0, 0, 0.0, time.time()
        while state["batch"] < len(batches):
            state["seconds"] = base + time.time() - started
            used = state["seconds"] / 60 / args.minutes
            if used >= 1 or (args.steps and state["step"] >= args.steps):
                done = True
                break
            # Linear warm-up, then half a cosine that ends with the time.
            rate = args.lr * min(1.0, (state["step"] + 1) / args.warmup) * 0.5 * (1 + math.cos(math.pi * used))
            for group in optimizer.param_groups:
                group["lr"] = max(rate, 1e-6)
            loss, tokens = batch_loss(model, batches[state["batch"]], args)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
            optimizer.step()
            state["step"] += 1
            state["batch"] += 1
            state["tokens"] += tokens
            with torch.no_grad():
                decay = min(args.ema, (1 + state["step"]) / (10 + state["step"]))
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            shown += 1
            shown_tokens += tokens
            shown_loss += loss.item()
            if state["step"] % 100 == 0:
                took = time.time() - shown_at
                print(f"step {state['step']} epoch {state['epoch']} loss {shown_loss / shown:.3f} "
                      f"lr {rate:.2e} {shown_tokens / took:.0f} tokens/s "
                      f"{state['seconds'] / 60:.1f} min", flush=True)
                shown, shown_tokens, shown_loss, shown_at = 0, 0, 0.0, time.time()
            if state["step"] % args.save_every == 0:
                save()
        if not done:
            state["epoch"] += 1
            state["batch"] = 0
        if not args.steps and (done or state["epoch"] % args.eval_every == 0):
            swap()
            got = scores(model, spm, args.data)
            missed = everyday_misses(model, spm)
            swap()
            total = got["fr"] + got["zh"]
            print(f"== epoch {state['epoch']} step {state['step']} tokens {state['tokens']} "
                  f"chrF fr {got['fr']:.2f} zh {got['zh']:.2f} BLEU fr {got['fr_bleu']:.2f} "
                  f"zh {got['zh_bleu']:.2f} everyday missed {len(missed)}"
                  + (" *" if total > best else ""), flush=True)
            best = max(best, total)
        if not args.steps:
            state["seconds"] = base + time.time() - started
            save()


# --------------------------------------------------------------------------
# Export
# --------------------------------------------------------------------------

def export(args):
    """The mean of the last checkpoints' running averages, in f16."""
    from transformers import GenerationConfig, MarianMTModel, MarianTokenizer
    torch.set_num_threads(args.threads)
    work, out = Path(args.work), Path(args.out)
    spm = load_spm(work)
    model = new_model(args)
    parameters = [p for p in model.parameters() if p.requires_grad]
    files = checkpoints(work)[-args.average:]
    with torch.no_grad():
        for p in parameters:
            p.zero_()
        for file in files:
            for p, a in zip(parameters, torch.load(file)["average"]):
                p.add_(a / len(files))
    print("averaged", ", ".join(f.stem for f in files))

    out.mkdir(parents=True, exist_ok=True)
    vocab = {spm.id_to_piece(i): i for i in range(SPM_SIZE)}
    vocab.update({TAGS[lang]: i for lang, i in TAG_IDS.items()})
    vocab["<pad>"] = PAD
    assert len(vocab) == VOCAB_SIZE
    (out / "vocab.json").write_text(
        json.dumps(vocab, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    shutil.copyfile(work / "spm.model", out / "source.spm")
    shutil.copyfile(work / "spm.model", out / "target.spm")
    (out / "tokenizer_config.json").write_text(json.dumps({
        "tokenizer_class": "MarianTokenizer",
        "source_lang": "eng", "target_lang": "mul",
        "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>",
        "model_max_length": MAX_POSITIONS, "separate_vocabs": False,
    }, indent=2) + "\n")

    model.generation_config = GenerationConfig(
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD,
        forced_eos_token_id=EOS, bad_words_ids=[[PAD]],
        max_length=MAX_POSITIONS, num_beams=4,
    )
    model = model.half()
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    size = (out / "model.safetensors").stat().st_size
    print("model.safetensors:", size, "bytes")
    assert size <= 9_000_000

    # The directory must load with the public classes and translate alike.
    tokenizer = MarianTokenizer.from_pretrained(out)
    loaded = MarianMTModel.from_pretrained(out).float().eval()
    model = model.float()
    sentences = ["Hello.", "how are you", "Where is the train station?", "It\u2019s 7 o'clock."]
    for lang, tag in TAGS.items():
        batch = tokenizer([f"{tag} {s}" for s in sentences], return_tensors="pt", padding=True)
        assert batch.input_ids[0].tolist() == [TAG_IDS[lang]] + spm.encode(sentences[0]) \
            + [EOS] + [PAD] * (batch.input_ids.shape[1] - 2 - len(spm.encode(sentences[0])))
        theirs = tokenizer.batch_decode(loaded.generate(**batch, num_beams=1), skip_special_tokens=True)
        ours = translate(model, spm, lang, sentences)
        print(ours)
        assert theirs == ours, theirs


def evaluate(args):
    """Dev scores of an exported directory, greedy and with four beams."""
    from transformers import MarianMTModel
    torch.set_num_threads(args.threads)
    spm = sentencepiece.SentencePieceProcessor()
    spm.load(str(Path(args.model) / "source.spm"))
    model = MarianMTModel.from_pretrained(args.model).float()
    for beams in (1, 4):
        got = scores(model, spm, args.data, beams)
        print(f"{beams} beams:", " ".join(f"{k} {v:.2f}" for k, v in got.items()), flush=True)
    for english, got, wanted in everyday_misses(model, spm):
        print(f"missed: {english} -> {got} (wanted: {wanted})")
    for lang in TAGS:
        for english, text in zip([r[0] for r in EVERYDAY], translate(model, spm, lang, [r[0] for r in EVERYDAY])):
            print(english, "->", text)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["spm", "train", "export", "eval"])
    parser.add_argument("--data", help="directory of the sentence pairs")
    parser.add_argument("--work", help="directory of the checkpoints")
    parser.add_argument("--start", help="train: an exported directory to go on from, with its source.spm as WORK/spm.model")
    parser.add_argument("--out", help="export: the directory to write")
    parser.add_argument("--model", help="eval: an exported directory")
    parser.add_argument("--minutes", type=float, default=125, help="training time, all runs together")
    parser.add_argument("--steps", type=int, default=0, help="stop here, without a score (for a trial)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--coverage", type=float, default=0.9998, help="spm: share of characters covered")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--warmup", type=int, default=1500, help="steps")
    parser.add_argument("--batch-tokens", type=int, default=1200, help="source and target together")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--smoothing", type=float, default=0.1)
    parser.add_argument("--sample", type=float, default=0.1, help="share of sources cut at random")
    parser.add_argument("--alpha", type=float, default=0.3, help="less is more random")
    parser.add_argument("--ema", type=float, default=0.999, help="decay of the running average of the weights")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--save-every", type=int, default=1000, help="steps")
    parser.add_argument("--keep", type=int, default=8, help="checkpoints kept")
    parser.add_argument("--eval-every", type=int, default=1, help="epochs")
    parser.add_argument("--average", type=int, default=4, help="export: checkpoints averaged")
    args = parser.parse_args()
    {"spm": train_spm, "train": train, "export": export, "eval": evaluate}[args.what](args)


if __name__ == "__main__":
    sys.exit(main())
