#!/usr/bin/env python3
"""Attention by `qkv attend` and by its peers, every answer checked against f64.

    python -m venv ENV && ENV/bin/pip install -r attention-requirements.txt
    cargo build --release --locked --manifest-path burn/Cargo.toml
    ENV/bin/python attention.py [--burn burn/target/release/burn-attend] [--only ours,ort,burn,ggml,torch]
                                [--shapes 0 decode ...] [--types f32] [--json FILE]

The sides take turns on every shape, so that a change in the machine's load falls on all of them;
minimum and median are over all calls of a side. What is timed, always after an untimed call:

  ours   `qkv attend --time N`, a new process each turn. device: its `times_ms`.
  ort    One process a shape, which keeps its session. Inputs and KV cache stay on the device.
         device: its kernels' times by its own profiler, summed, in calls apart from the others.
         wall: one run_with_iobinding with the copy of the answer to the CPU, since nothing else in
         its Python API waits for the device (synchronize_outputs does not).
         Full and cross attention is MultiHeadAttention, causal is GroupQueryAttention without a
         past; both copy K and V into a cache first, and that is in the time. Decode is
         GroupQueryAttention on a cache shared by past and present: one row is written.
  burn   `burn-attend --time N`, burn 0.22.1 on wgpu in WGSL, in a crate of its own beside this file; a
         new process each turn. device: timestamps of its own profiler. wall: a call and the wait for
         it. It has no grouped heads: those of K and V are repeated first, out of the time. --burn-by
         chooses the kernel: `unit`, its flash attention; `fallback`, separate kernels, faster for one
         query; `autotune`, what burn's tensors call, which compiles and times them all each turn.
  ggml   ggml_flash_attn_ext in ggml-vulkan, by the C libraries of two wheels, the last two lines of
         attention-requirements.txt. One process a shape. wall: one graph_compute, which waits. K and V are
         of the type named, Q and the answer f32; a causal mask is a tensor. In f32 its shaders are
         kept from computing in f16 (GGML_VK_DISABLE_F16).
  torch  scaled_dot_product_attention on the CPU: wall only. For one query and grouped heads it may
         fold the group into query rows, where that is the faster form.

A time counts only with a right answer: the largest error, as a part of the root mean square of the
exact output, must be at most 1e-3 in f32 and 2e-2 in f16. For f16 the inputs are numbers of f16, so
that rounding them costs nobody anything. How long a first call takes hangs on the driver's cache of
compiled shaders (Mesa: MESA_SHADER_CACHE_DISABLE=true for none); a peer's may take minutes. A side that gives no
answer within --timeout, or fails, says so in its line and has no more turns on that shape.

All GPU sides use the device that the Vulkan loader offers: on Linux, VK_ICD_FILENAMES chooses it.
ORT finds no adapter in the software driver of Mesa 22.3; in that of 25.0 it does.
"""

import argparse
import collections
import ctypes
import functools
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import distribution, version

import numpy as np
from safetensors.numpy import load_file, save_file

Shape = collections.namedtuple("Shape", "kind B H Hk Q K D causal")
SHAPES = [
    Shape("prefill", 1, 8, 8, 512, 512, 64, False),
    Shape("prefill", 1, 8, 8, 1024, 1024, 64, True),
    Shape("prefill", 1, 32, 8, 1024, 1024, 128, True),
    Shape("prefill", 1, 8, 8, 4096, 4096, 64, True),
    Shape("prefill", 2, 12, 12, 384, 384, 64, False),
    Shape("cross", 1, 8, 8, 16, 512, 64, False),
    Shape("decode", 1, 8, 8, 1, 512, 64, False),
    Shape("decode", 1, 32, 8, 1, 4096, 128, False),
    Shape("decode", 1, 32, 8, 1, 16384, 128, False),
    Shape("decode", 8, 32, 8, 1, 2048, 128, False),
]
NUMBER = {"f32": np.float32, "f16": np.float16}
MOST_ERROR = {"f32": 1e-3, "f16": 2e-2}
MOST_CALLS = 100  # of one turn
CLOCKS = ("device", "wall")


def name(shape):
    return f"{shape.kind} {','.join(map(str, shape[1:7]))}{' causal' if shape.causal else ''}"


def arguments():
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    p.add_argument("--qkv", default="target/release/qkv", help="our program")
    p.add_argument("--burn", help="the program burn-attend")
    p.add_argument("--burn-by", choices=["unit", "fallback", "autotune"], default="unit", help="burn's kernel")
    p.add_argument("--only", help=f"of {','.join(SIDES)}; when absent ours,ort,torch, and burn if --burn is given")
    p.add_argument("--shapes", nargs="+", default=[], help="numbers from 0, or text of a name: decode, causal, 1,8,8,1")
    p.add_argument("--types", default="f32,f16", help="separated by commas")
    p.add_argument("--rounds", type=int, default=3, help="turns of each side")
    p.add_argument("--seconds", type=float, default=1.0, help="about as long a turn is; at least 2 calls")
    p.add_argument("--timeout", type=float, default=600, help="seconds for a turn; past them the side has no answer")
    p.add_argument("--json", help="write every figure here")
    args = p.parse_args()
    wanted = lambda i, s: any(int(w) == i if w.isdigit() else w in name(s) for w in args.shapes)
    args.shapes = [(i, s) for i, s in enumerate(SHAPES) if not args.shapes or wanted(i, s)]
    if not args.shapes:
        p.error("--shapes: none is so called\n" + "\n".join(f"{i}  {name(s)}" for i, s in enumerate(SHAPES)))
    args.only = args.only.split(",") if args.only else ["ours", "ort"] + ["burn"] * bool(args.burn) + ["torch"]
    args.types = args.types.split(",")
    if unknown := set(args.only) - set(SIDES) | set(args.types) - set(MOST_ERROR):
        p.error(f"--only, --types: unknown {', '.join(sorted(unknown))}")
    for side, program in (("ours", args.qkv), ("burn", args.burn or "")):
        if side in args.only and not os.path.exists(program):
            p.error(f"{side}: no program {program!r} (build it and give --qkv, --burn, or leave it out of --only)")
    return args


def inputs(shape, kind, seed):
    """Standard normal q [B,H,Q,D], k and v [B,Hk,K,D] in f32; for f16 rounded to it."""
    rng = np.random.default_rng(seed)
    made = lambda heads, length: rng.standard_normal((shape.B, heads, length, shape.D), dtype=np.float32)
    tensors = {"q": made(shape.H, shape.Q), "k": made(shape.Hk, shape.K), "v": made(shape.Hk, shape.K)}
    return {n: a.astype(np.float16).astype(np.float32) if kind == "f16" else a for n, a in tensors.items()}


def exact(shape, q, k, v):
    """Attention in f64, 512 query rows of one head at a time."""
    import torch

    out = torch.empty(q.shape, dtype=torch.float64)
    for b in range(shape.B):
        for h in range(shape.H):
            keys, values = (torch.from_numpy(x[b, h * shape.Hk // shape.H]).double() for x in (k, v))
            for at in range(0, shape.Q, 512):
                scores = torch.from_numpy(q[b, h, at : at + 512]).double() @ keys.T * shape.D**-0.5
                if shape.causal:
                    last = torch.arange(at, at + len(scores)) + shape.K - shape.Q
                    scores.masked_fill_(torch.arange(shape.K) > last[:, None], -torch.inf)
                out[b, h, at : at + 512] = scores.softmax(-1) @ values
    return out.numpy()


def clock(call):
    """Milliseconds, and what the call gave."""
    began = time.perf_counter()
    gave = call()
    return 1e3 * (time.perf_counter() - began), gave


# ---- The sides. A side is made once a shape; turn(n) makes about n timed calls and gives
# {device: [ms], wall: [ms], first: ms, out: [B,H,Q,D], about: {}}.


class Ours:
    def __init__(self, args, shape, kind, path):
        self.out, self.timeout = path + ".out", args.timeout
        self.command = [args.qkv, "attend", path, "-o", self.out, "--storage", kind] + ["--causal"] * shape.causal

    def turn(self, n):
        command = self.command + ["--time", str(n)]
        done = subprocess.run(command, timeout=self.timeout, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"exit {done.returncode}: {done.stderr.strip()}")
        said = json.loads(done.stdout.strip().splitlines()[-1])
        about = {n: x for n, x in said.items() if isinstance(x, str)}
        out = load_file(self.out)["out"]
        wall = said.get("wall_ms", [])  # ours gives none
        device = said["times_ms"] or []
        if said["clock"] == "host":  # a device without timestamps
            device, wall = [], wall or device
        return dict(device=device, wall=wall, first=said["first_ms"], out=out, about=about)

    def close(self):
        pass


class Burn(Ours):
    def __init__(self, args, shape, kind, path):
        super().__init__(args, shape, kind, path)
        self.command[:2] = [args.burn]
        self.command += ["--strategy", args.burn_by]


class Torch(Ours):
    def __init__(self, args, shape, kind, path):
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        q, k, v = (torch.from_numpy(load_file(path)[n].astype(NUMBER[kind])) for n in "qkv")
        grouped = shape.H != shape.Hk
        self.forms = [lambda: sdpa(q, k, v, is_causal=shape.causal, enable_gqa=grouped)]
        if grouped and shape.Q == 1:
            folded = q.view(shape.B, shape.Hk, -1, shape.D)
            self.forms.append(lambda: sdpa(folded, k, v).view(q.shape))
        self.about = {"version": torch.__version__, "threads": torch.get_num_threads()}
        self.inference_mode = torch.inference_mode

    def turn(self, n):
        with self.inference_mode():
            first, out = clock(self.forms[0])
            if len(self.forms) > 1:
                self.forms = [min(self.forms, key=lambda f: min(clock(f)[0] for _ in range(4)))]
                out = self.forms[0]()
            wall = [clock(self.forms[0])[0] for _ in range(n)]
        return dict(device=[], wall=wall, first=first, out=out.float().numpy(), about=self.about)


class Apart:
    """Takes its turns in a process of its own, so that a hang or a crash ends only this shape."""

    def __init__(self, turn, args, shape, kind, path):
        self.timeout, self.task = args.timeout, (turn, shape, kind, path)
        self.pool = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
        pid = self.pool.submit(os.getpid).result()
        self.process = next(p for p in multiprocessing.active_children() if p.pid == pid)

    def turn(self, n):
        return self.pool.submit(*self.task, n).result(self.timeout)

    def close(self):
        self.process.kill()
        self.pool.shutdown()


# ---- ONNX Runtime, in its process.


def ort_session(nodes, values_in, values_out, profile=None):
    """A session on the WebGPU provider: what would fall back to the CPU, here or there, is an error."""
    import onnxruntime as ort
    from onnx import helper

    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(helper.make_graph(nodes, "g", values_in, values_out), opset_imports=opsets, ir_version=9)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    # As provider options, in a dict, these two are ignored without a word; as session entries they act.
    options.add_session_config_entry("ep.webgpuexecutionprovider.dawnBackendType", "Vulkan")
    options.add_session_config_entry("ep.webgpuexecutionprovider.validationMode", "disabled")
    if profile:
        options.enable_profiling, options.profile_file_prefix = True, profile
    data, providers = model.SerializeToString(), ["WebGpuExecutionProvider"]
    return ort.InferenceSession(data, options, providers=providers, enable_fallback=False)


@functools.cache
def ort_bound(shape, kind, path):
    """Puts the inputs on the device; a session over them, a function that makes more, their owner."""
    from onnx import TensorProto, helper

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # Dawn warns of limits
    B, H, Hk, Q, K, D = shape[1:7]
    proto = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32}
    value = lambda n, a: helper.make_tensor_value_info(n, proto[a.dtype.name], a.shape)
    rows = lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(B, x.shape[2], -1)  # [B,length,heads*D]
    q, k, v = (load_file(path)[n].astype(NUMBER[kind]) for n in "qkv")

    # The node, and what it reads from the device: `total`, a number that ORT wants on the CPU, apart.
    new, total = (slice(-1, None) if shape.kind == "decode" else slice(None)), np.array([K], np.int32)
    held = {"q": rows(q), "k": rows(k[:, :, new]), "v": rows(v[:, :, new])}
    outs = {"out": np.empty_like(held["q"])}
    cached = shape.causal or shape.kind == "decode"
    if cached:
        past = ["past_k", "past_v"] if shape.kind == "decode" else ["", ""]
        held |= {"ends": np.full(B, K - 1, np.int32)} | ({"past_k": k, "past_v": v} if past[0] else {})
        outs |= {"new_k": np.empty_like(k), "new_v": np.empty_like(v)}
        op, reads, heads = "GroupQueryAttention", ["q", "k", "v", *past, "ends", "total"], {"kv_num_heads": Hk}
    else:
        op, reads, heads = "MultiHeadAttention", ["q", "k", "v"], {}
    node = helper.make_node(op, reads, list(outs), domain="com.microsoft", num_heads=H, scale=D**-0.5, **heads)

    # Python cannot allocate on this device, but a session's outputs may stay there: copy through one.
    copies = [helper.make_node("Identity", [n], [n + "_"]) for n in held]
    loader = ort_session(copies, [value(n, a) for n, a in held.items()], [value(n + "_", a) for n, a in held.items()])
    loading = loader.io_binding()
    for n, a in held.items():
        loading.bind_cpu_input(n, np.ascontiguousarray(a))
        loading.bind_output(n + "_", "webgpu")
    loader.run_with_iobinding(loading)
    on_device = dict(zip(held, loading.get_outputs()))

    def bound(profile=None):
        """A session, its binding with everything bound, and the call that runs it and waits."""
        values_in = [value(n, a) for n, a in held.items()] + [value("total", total)] * cached
        session = ort_session([node], values_in, [value(n, a) for n, a in outs.items()], profile)
        binding = session.io_binding()
        for n in held:
            binding.bind_ortvalue_input(n, on_device[n])
        binding.bind_output("out", "cpu")
        if cached:
            binding.bind_cpu_input("total", total)
        for n in ("k", "v") if cached else ():
            if "past_" + n in held:  # past and present are one buffer
                binding.bind_ortvalue_output("new_" + n, on_device["past_" + n])
            else:
                binding.bind_output("new_" + n, "webgpu")
        return session, binding, lambda: session.run_with_iobinding(binding)

    return bound(), bound, loader  # without the loader, what it put on the device is gone


def ort_turn(shape, kind, path, n):
    (_, binding, call), bound, _ = ort_bound(shape, kind, path)
    first, _ = clock(call)
    wall = [clock(call)[0] for _ in range(n)]
    out = binding.get_outputs()[0].numpy()
    out = out.reshape(shape.B, shape.Q, shape.H, shape.D).transpose(0, 2, 1, 3).astype(np.float32)

    # The kernels of n + 1 calls, from a profile; every call runs the same ones.
    profiled, _, call = bound(path + ".profile")
    for _ in range(n + 1):
        call()
    with open(profiled.end_profiling()) as f:
        kernels = [(e["name"].split("&")[-1], e["dur"] / 1e3) for e in json.load(f) if e.get("cat") == "Api"]
    each = max(1, len(kernels) // (n + 1))
    device = [sum(ms for _, ms in kernels[i : i + each]) for i in range(each, len(kernels), each)]

    about = {"version": version("onnxruntime-webgpu"), "kernels": [kernel for kernel, _ in kernels[:each]]}
    if sys.platform == "linux":
        with open("/proc/self/maps") as f:
            about["drivers"] = sorted({os.path.basename(l.split()[-1]) for l in f if "libvulkan_" in l})
    return dict(device=device, wall=wall, first=first, out=out, about=about)


# ---- ggml, in its process.


@functools.cache
def ggml_bound(shape, kind, path):
    """Puts the inputs on the device; the call that runs it and waits, what reads the answer, about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it lists devices
    os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")  # else it passes over a software device
    if kind == "f32":
        os.environ["GGML_VK_DISABLE_F16"] = "1"
    library = lambda package, file: ctypes.CDLL(f"{distribution(package).locate_file(file)}", ctypes.RTLD_GLOBAL)
    base = library("loom-py-rt", "loom/libggml-base.so")
    vulkan = library("loom-py-rt-vulkan", "loom_rt_vulkan/libggml-vulkan.so")

    def c(name, gives, *takes, of=base):
        f = getattr(of, "ggml_" + name)
        f.restype, f.argtypes = gives, takes
        return f

    pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float

    class InitParams(ctypes.Structure):
        _fields_ = [("mem_size", size), ("mem_buffer", pointer), ("no_alloc", ctypes.c_bool)]

    q, k, v = (load_file(path)[n] for n in "qkv")
    held = [q, k.astype(NUMBER[kind]), v.astype(NUMBER[kind])]
    if shape.causal:
        hidden = np.arange(shape.K) > np.arange(shape.Q)[:, None] + shape.K - shape.Q
        held.append(np.where(hidden, -np.inf, 0).astype(np.float16)[None, None])

    backend = c("backend_vk_init", pointer, size, of=vulkan)(0)
    if not backend:
        raise RuntimeError("ggml-vulkan finds no device")
    context = c("init", pointer, InitParams)(InitParams(1 << 20, None, True))
    new = c("new_tensor_4d", pointer, pointer, ctypes.c_int, *[ctypes.c_int64] * 4)
    tensors = [new(context, {"float32": 0, "float16": 1}[a.dtype.name], *a.shape[::-1]) for a in held]
    attention = c("flash_attn_ext", pointer, *[pointer] * 5, *[number] * 3)
    out = attention(context, *tensors, *[None] * (4 - len(tensors)), shape.D**-0.5, 0, 0)
    c("flash_attn_ext_set_prec", None, pointer, ctypes.c_int)(out, 10)  # GGML_PREC_F32
    if not c("backend_supports_op", ctypes.c_bool, pointer, pointer)(backend, out):
        raise RuntimeError("ggml-vulkan does not support this attention")
    if not c("backend_alloc_ctx_tensors", pointer, pointer, pointer)(context, backend):
        raise RuntimeError("ggml-vulkan has no memory for the tensors")
    for tensor, a in zip(tensors, held):
        c("backend_tensor_set", None, pointer, pointer, size, size)(tensor, a.ctypes.data, 0, a.nbytes)
    graph = c("new_graph", pointer, pointer)(context)
    c("build_forward_expand", None, pointer, pointer)(graph, out)
    compute = c("backend_graph_compute", ctypes.c_int, pointer, pointer)

    def call():
        if status := compute(backend, graph):
            raise RuntimeError(f"ggml_backend_graph_compute: status {status}")

    def answer():
        rows = np.empty((shape.B, shape.Q, shape.H, shape.D), np.float32)
        c("backend_tensor_get", None, pointer, pointer, size, size)(out, rows.ctypes.data, 0, rows.nbytes)
        return rows.transpose(0, 2, 1, 3)

    device = c("backend_dev_description", ctypes.c_char_p, pointer)(c("backend_get_device", pointer, pointer)(backend))
    return call, answer, {"version": c("version", ctypes.c_char_p)().decode(), "device": device.decode()}


def ggml_turn(shape, kind, path, n):
    call, answer, about = ggml_bound(shape, kind, path)
    first, _ = clock(call)
    wall = [clock(call)[0] for _ in range(n)]
    return dict(device=[], wall=wall, first=first, out=answer(), about=about)


SIDES = {
    "ours": Ours,
    "ort": functools.partial(Apart, ort_turn),
    "burn": Burn,
    "ggml": functools.partial(Apart, ggml_turn),
    "torch": Torch,
}


# ---- Taking turns.


def measure(args, number, shape, kind):
    """One dict a side."""
    case = dict(number=number, shape=name(shape), type=kind)
    results = {side: dict(side=side, **case, device=[], wall=[], errors=[]) for side in args.only}
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "in.safetensors")
        tensors = inputs(shape, kind, number)
        save_file(tensors, path)
        truth = exact(shape, **tensors)
        sides = {side: SIDES[side](args, shape, kind, path) for side in args.only}
        for side in args.only * args.rounds:
            if side not in sides:
                continue
            r = results[side]
            fastest = min(r["device"] or r["wall"], default=1e3 * args.seconds)
            time.sleep(0.3)  # threads of the side before may still spin
            try:
                took = sides[side].turn(int(max(2, min(MOST_CALLS, 1e3 * args.seconds / fastest))))
            except Exception as e:  # a refusal, a crash, or no answer in time: nothing more from this side
                late = isinstance(e, (TimeoutError, subprocess.TimeoutExpired))
                r["failed"] = f"no answer in {args.timeout:g} s" if late else " ".join(f"{e}".split())[-300:]
                sides.pop(side).close()
                continue
            for c in CLOCKS:
                r[c] += took[c]
            r.setdefault("first_ms", took["first"])
            r["about"] = took["about"]
            wrong = took["out"] - truth if took["out"].shape == truth.shape else np.array(np.nan)
            r["errors"].append((float(np.max(np.abs(wrong))), float(np.sqrt(np.mean(wrong**2)))))
        for side in sides.values():
            side.close()

    rms = float(np.sqrt(np.mean(truth**2)))
    flop = 4 * shape.B * shape.H * shape.Q * shape.K * shape.D / (2 if shape.causal else 1)
    kv_bytes = 2 * shape.B * shape.Hk * shape.K * shape.D * (4 if kind == "f32" else 2)
    for r in results.values():
        errors = np.array(r.pop("errors"))  # the largest and the root mean square of every turn
        worst = (errors.max(0) / rms).tolist() if errors.size and np.isfinite(errors).all() else [None, None]
        r["max_error_of_rms"], r["rms_error_of_rms"] = worst
        r["right"] = worst[0] is not None and worst[0] <= MOST_ERROR[kind]
        for c in CLOCKS:
            times = r.pop(c)
            r[c + "_ms"], r[c + "_calls"] = min(times, default=None), len(times)
            r[c + "_median_ms"] = statistics.median(times) if times else None
        best = r["device_ms"] or r["wall_ms"]
        r["gflop_s"], r["kv_gb_s"] = (flop / best / 1e6, kv_bytes / best / 1e6) if best else (None, None)
    for r in results.values():  # torch on the CPU has one clock for both
        ours, its = results.get("ours", {}).get("device_ms"), r["device_ms"] or r["wall_ms"]
        r["ours_by_this"] = ours / its if ours and its else None
    return list(results.values())


def table(number, shape, kind, results):
    rate, unit = ("kv_gb_s", "K+V GB/s") if shape.kind == "decode" else ("gflop_s", "GFLOP/s")
    columns = [("device_ms", ".4g", "device ms"), ("device_median_ms", ".4g", "median"), ("wall_ms", ".4g", "wall ms"),
               ("wall_median_ms", ".4g", "median"), ("first_ms", ".0f", "first"), (rate, ".3g", unit),
               ("max_error_of_rms", ".1e", "max error"), ("rms_error_of_rms", ".1e", "rms"), ("right", "", "answer"),
               ("ours_by_this", ".2f", "ours/it")]  # fmt: skip
    show = lambda x, form: "-" if x is None else ("WRONG", "right")[x] if form == "" else format(x, form)
    print(f"\n{number}  {name(shape)}  {kind}\n{'':5}" + "".join(f"{title:>10}" for _, _, title in columns))
    for r in results:
        if r["wall_ms"] or r["device_ms"]:
            print(f"{r['side']:5}" + "".join(f"{show(r.get(key), form):>10}" for key, form, _ in columns))
        if "failed" in r:
            print(f"{r['side']:5} {r['failed']}")
    sys.stdout.flush()


def main():
    args = arguments()
    everything = []
    for kind in args.types:
        for number, shape in args.shapes:
            results = measure(args, number, shape, kind)
            table(number, shape, kind, results)
            everything += results
            if args.json:  # after every shape: a run that is stopped keeps what it has
                with open(args.json, "w") as f:
                    json.dump(everything, f, indent=1)


if __name__ == "__main__":
    main()
