#!/usr/bin/env python3
"""Makes `attention.safetensors` here from the test cases of ONNX's operator `Attention`.

    python make.py

The onnx package brings inputs and expected outputs of every case, for opsets 23, 24 and 25. Each is
turned into tensors and options of `qkv attend`: the past is put before the keys, three dimensions become
four, a mask reaches the rank and the length the program wants. What the options then mean is written
down in `attend` below, in f64, from the program's contract and not from ONNX's code; a case is only
written where that finds what ONNX expects.

The file holds `CASE/q`, `CASE/k`, `CASE/v`, where the case has them `CASE/bias`, `CASE/mask`,
`CASE/kv_len`, `CASE/q_offset`, and as expected outputs `CASE/out` and, where ONNX gives
`qk_matmul_output`, `CASE/weights`, both f32. Its metadata holds two texts of JSON: `cases`, a list of
{name, opset, args, rtol, atol}, args in the form `--name=value`; and `not_expressed`, an object of the
cases that have no counterpart in the program, by name, and why.
"""

import json
import struct
import sys
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
from onnx import helper
from safetensors.numpy import save

FIXTURE = Path(__file__).resolve().parent / "attention.safetensors"
BF16 = np.dtype(ml_dtypes.bfloat16)
STORAGE = {np.dtype(np.float16): "f16", BF16: "bf16"}  # f32 is the program's own

# ONNX computes in the type of its inputs, rounding after each operation: so many of its roundings
# (machine epsilons of the type) may lie between what it expects and the exact result.
ROUNDINGS = 2
EPSILON = {np.dtype(np.float16): 2.0**-10, BF16: 2.0**-7}

# `qk_matmul_output_mode` as the program calls it.
WEIGHTS = ["raw", "softcap", "biased", "softmax"]


class NotExpressed(Exception):
    """The program has no option for what this case asks."""


# ---- ONNX's cases -----------------------------------------------------------------------


def onnx_cases():
    """Every case that is a single node `Attention`, in ONNX's order."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other operators' cases, which are made along with these
        from onnx.backend.test.case.node import collect_testcases

        cases = collect_testcases(None)
    return [case for case in cases if [node.op_type for node in case.model.graph.node] == ["Attention"]]


def named(names, arrays):
    """The tensors of a node by their names; an absent one has the empty name and no array."""
    present = [name for name in names if name]
    assert len(present) == len(arrays)
    return dict(zip(present, arrays))


def split_heads(x, heads):
    """[B, L, H·D] as [B, H, L, D]; what has four dimensions stays."""
    if x.ndim == 4:
        return x
    batch, length, width = x.shape
    return x.reshape(batch, length, heads, width // heads).transpose(0, 2, 1, 3)


def storable(x):
    """Floats as the program reads them: f64 becomes f32."""
    return x.astype(np.float32) if x.dtype == np.float64 else x


def whole_mask(mask, k_len):
    """A mask of rank 4, to the last key: ONNX masks the keys past the end of a short one."""
    short = k_len - mask.shape[-1]
    if short > 0:
        nothing = False if mask.dtype == np.bool_ else -np.inf
        mask = np.concatenate([mask, np.full((*mask.shape[:-1], short), nothing, mask.dtype)], axis=-1)
    return mask.reshape((1,) * (4 - mask.ndim) + mask.shape)


def number(x):
    """The shortest decimal that is the same f32, in which ONNX keeps its attributes."""
    return str(np.float32(x))


def convert(case):
    """The program's tensors and options for a case, and what to expect: (inputs, args, expected)."""
    (node,) = case.model.graph.node
    (arrays,) = case.data_sets
    given, wanted = named(node.input, arrays[0]), named(node.output, arrays[1])
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    get = attributes.pop
    q_heads, kv_heads = get("q_num_heads", None), get("kv_num_heads", None)

    q = split_heads(given.pop("Q"), q_heads)
    k = split_heads(given.pop("K"), kv_heads)
    v = split_heads(given.pop("V"), kv_heads)
    past = 0
    if "past_key" in given:
        past = given["past_key"].shape[2]
        k = np.concatenate([given.pop("past_key"), k], axis=2)
        v = np.concatenate([given.pop("past_value"), v], axis=2)
    for mine, name in ((k, "present_key"), (v, "present_value")):
        assert np.array_equal(mine, wanted.pop(name, mine)), (case.name, name)
    batch, k_len = q.shape[0], k.shape[2]
    inputs = {"q": storable(q), "k": storable(k), "v": storable(v)}
    if "attn_mask" in given:
        mask = whole_mask(given.pop("attn_mask"), k_len)
        inputs["mask" if mask.dtype == np.bool_ else "bias"] = storable(mask)
    if "nonpad_kv_seqlen" in given:
        inputs["kv_len"] = given.pop("nonpad_kv_seqlen").reshape(batch).astype(np.int32)

    args = []
    if get("is_causal", 0):
        args.append("--causal")
    window = [get("left_window_size", None), get("right_window_size", None)]
    if window != [None, None]:
        left, right = (-1 if side is None else side for side in window)
        args.append(f"--window={left},{right}")
    if args:  # the queries stand after the past, at the end of the keys that count, or at the start
        if past:
            inputs["q_offset"] = np.full(batch, past, np.int32)
        else:
            args.append("--align=" + ("bottom-right" if "kv_len" in inputs else "top-left"))
    if (scale := get("scale", None)) is not None:
        args.append(f"--scale={number(scale)}")
    if softcap := get("softcap", 0.0):
        args.append(f"--softcap={number(softcap)}")
    if q.dtype in STORAGE:
        args.append(f"--storage={STORAGE[q.dtype]}")
    get("softmax_precision", None)  # how exactly ONNX computes: the tolerance covers it
    mode = get("qk_matmul_output_mode", 0)

    expected = {"out": split_heads(wanted.pop("Y"), q_heads).astype(np.float32)}
    if "qk_matmul_output" in wanted:
        if mode == 0 and softcap:  # specified as before softcap, computed by ONNX after it
            raise NotExpressed("qk_matmul_output_mode 0 with softcap: ONNX's reference gives mode 1")
        expected["weights"] = wanted.pop("qk_matmul_output").astype(np.float32)
        args.append(f"--weights={WEIGHTS[mode]}")
    if unknown := {**given, **wanted, **attributes}:
        raise NotExpressed(f"unknown to the program: {', '.join(sorted(unknown))}")
    return inputs, args, expected


# ---- the program's contract, as code ----------------------------------------------------


def options(args):
    """`--name=value` and `--name` by name."""
    pairs = (arg.removeprefix("--").partition("=") for arg in args)
    return {name: value for name, _, value in pairs}


def attend(inputs, args):
    """What `qkv attend` has to answer, in f64: `out` and the kind of `weights` that is asked for."""
    option = options(args)
    q, k, v = (inputs[name].astype(np.float64) for name in "qkv")
    batch, heads, q_len, depth = q.shape
    kv_heads, k_len = k.shape[1:3]
    group = heads // kv_heads
    kv_len = inputs.get("kv_len", np.full(batch, k_len))

    key = np.arange(k_len)
    counts = (key < kv_len[:, None])[:, None, None, :]
    allowed = np.broadcast_to(counts, (batch, heads, q_len, k_len)).copy()
    if "mask" in inputs:
        allowed &= inputs["mask"]
    if "causal" in option or "window" in option:
        if "q_offset" in inputs:
            offset = inputs["q_offset"]
        else:
            offset = {"top-left": 0 * kv_len, "bottom-right": kv_len - q_len}[option["align"]]
        position = (np.arange(q_len) + offset[:, None])[:, None, :, None]
        if "causal" in option:
            allowed &= key <= position
        left, right = map(int, option.get("window", "-1,-1").split(","))
        if left >= 0:
            allowed &= key >= position - left
        if right >= 0:
            allowed &= key <= position + right

    scores = {}
    products = np.stack([q[:, h] @ k[:, h // group].swapaxes(-1, -2) for h in range(heads)], axis=1)
    s = products * float(option.get("scale", depth**-0.5))
    scores["raw"] = np.where(counts, s, -np.inf)
    if "softcap" in option:
        cap = float(option["softcap"])
        s = cap * np.tanh(s / cap)
    scores["softcap"] = np.where(counts, s, -np.inf)
    if "bias" in inputs:
        s = s + inputs["bias"].astype(np.float64)
    scores["biased"] = s = np.where(allowed, s, -np.inf)
    highest = s.max(axis=-1, keepdims=True)
    e = np.exp(s - np.where(np.isfinite(highest), highest, 0.0))
    total = e.sum(axis=-1, keepdims=True)
    scores["softmax"] = p = np.divide(e, total, out=np.zeros_like(e), where=total > 0)

    answer = {"out": np.stack([p[:, h] @ v[:, h // group] for h in range(heads)], axis=1)}
    if "weights" in option:
        answer["weights"] = scores[option["weights"]]
    return answer


def check(answer, expected, rtol, atol):
    """What is wrong, in words, and the largest difference in units of what is allowed."""
    assert answer.keys() == expected.keys()
    wrong, worst = [], 0.0
    for name, want in expected.items():
        have = answer[name]
        if have.shape != want.shape:
            wrong.append(f"{name} is {list(have.shape)}, not {list(want.shape)}")
        elif not np.array_equal(np.isneginf(have), np.isneginf(want)):
            wrong.append(f"{name} is -inf in other places")
        else:
            have, want = have[~np.isneginf(want)], want[~np.isneginf(want)]
            far = (np.abs(have - want) / (atol + rtol * np.abs(want))).max(initial=0.0)
            worst = max(worst, far)
            if not far <= 1.0:
                wrong.append(f"{name} is {far:.3g} times as far off as is allowed")
    return wrong, worst


# ---- the file -----------------------------------------------------------------------------


def file_bytes(tensors, metadata):
    """A safetensors file, the same bytes each time: the library leaves the order of metadata to chance."""
    raw = save({name: np.ascontiguousarray(x) for name, x in tensors.items()}, metadata)
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.dumps(json.loads(raw[8 : 8 + length]), separators=(",", ":"), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header + raw[8 + length :]


def main():
    tensors, cases, not_expressed, failed = {}, [], {}, []
    all_cases = onnx_cases()
    for case in all_cases:
        (opset,) = (o.version for o in case.model.opset_import if o.domain == "")
        try:
            inputs, args, expected = convert(case)
        except NotExpressed as why:
            not_expressed[case.name] = str(why)
            continue
        rounding = ROUNDINGS * EPSILON.get(inputs["q"].dtype, 0.0)
        rtol, atol = max(case.rtol, rounding), case.atol
        wrong, worst = check(attend(inputs, args), expected, rtol, atol)
        print(f"{'differs' if wrong else 'agrees'}  {case.name}: {worst:.2g} of what is allowed")
        if wrong:
            failed.append(f"{case.name}: {'; '.join(wrong)}")
        for name, x in {**inputs, **expected}.items():
            tensors[f"{case.name}/{name}"] = x
        cases.append({"name": case.name, "opset": opset, "args": args, "rtol": rtol, "atol": atol})

    print(f"{len(cases) - len(failed)} of {len(all_cases)} agree")
    for name, why in not_expressed.items():
        print(f"not expressed  {name}: {why}")
    if failed:
        sys.exit("\n".join(failed))
    texts = {"cases": cases, "not_expressed": not_expressed}
    FIXTURE.write_bytes(file_bytes(tensors, {name: json.dumps(x) for name, x in texts.items()}))


if __name__ == "__main__":
    main()
