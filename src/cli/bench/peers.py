"""Another program's attention in turn with ours, for `qkv bench --peers`: python peers.py NAME [PACKAGE...]

Speaks the lines of JSON that peers.rs, beside this file, describes. What is timed is always a call with
the wait for its end:

  ort    ONNX Runtime on WebGPU, by its kernels' times from its own profiler, summed. Inputs and KV cache
         stay on the device. Full and cross attention is MultiHeadAttention, causal is
         GroupQueryAttention without a past; both copy K and V into a cache first, and that is in the
         time. One query is GroupQueryAttention on a cache shared by past and present: one row is
         written. Where the device has no timestamps, by the host's clock, with the copy of the answer.
  ggml   ggml_flash_attn_ext in ggml-vulkan, by the C libraries of two wheels, and the host's clock: one
         graph_compute, which waits. K and V are of the type named, Q and the answer f32; a causal mask is
         a tensor. In f32 its shaders are kept from computing in f16 (GGML_VK_DISABLE_F16).
  torch  scaled_dot_product_attention on the CPU. For one query and grouped heads it may fold the group
         into query rows, where that is the faster form. A call on a few keys goes before each, untimed, so
         that its threads are awake and its code is at hand, as they are within a model.

The GPU sides take the device that the Vulkan loader offers: on Linux, VK_ICD_FILENAMES chooses it. ORT
finds no adapter in the software driver of Mesa 22.3; in that of 25.0 it does.
"""

import ctypes
import importlib.metadata
import json
import os
import sys
import time


def clock(call):
    """Milliseconds."""
    began = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - began)


class Peer:
    """One attention. A peer has call(), which runs it and waits; answer(), [B,H,Q,D] of the last call; and
    about, a dict of texts."""

    def wake(self):
        """What goes before a call, untimed; it reads none of the call's inputs."""

    def device_times(self):
        """Milliseconds of every call but the first by the device's clock; none where there is none."""
        return []


class Ort(Peer):
    def __init__(self, case, q, k, v):
        import numpy as np
        from onnx import TensorProto, helper

        self.q_shape = q.shape
        self.profile = case["output"] + ".profile"
        B, H, Q, D = q.shape
        Hk, K = k.shape[1:3]
        proto = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int32": TensorProto.INT32}
        value = lambda n, a: helper.make_tensor_value_info(n, proto[a.dtype.name], a.shape)
        rows = lambda x: np.ascontiguousarray(x.transpose(0, 2, 1, 3)).reshape(B, x.shape[2], -1)  # [B,length,heads*D]

        # The node, and what it reads from the device: `total`, a number that ORT wants on the CPU, apart.
        new, total = (slice(-1, None) if Q == 1 else slice(None)), np.array([K], np.int32)
        held = {"q": rows(q), "k": rows(k[:, :, new]), "v": rows(v[:, :, new])}
        outs = {"out": np.empty_like(held["q"])}
        cached = case["causal"] or Q == 1
        if cached:
            past = ["past_k", "past_v"] if Q == 1 else ["", ""]
            held |= {"ends": np.full(B, K - 1, np.int32)} | ({"past_k": k, "past_v": v} if past[0] else {})
            outs |= {"new_k": np.empty_like(k), "new_v": np.empty_like(v)}
            op, reads, heads = "GroupQueryAttention", ["q", "k", "v", *past, "ends", "total"], {"kv_num_heads": Hk}
        else:
            op, reads, heads = "MultiHeadAttention", ["q", "k", "v"], {}
        node = helper.make_node(op, reads, list(outs), domain="com.microsoft", num_heads=H, scale=D**-0.5, **heads)

        # Python cannot allocate on this device, but a session's outputs may stay there: copy through one.
        copies = [helper.make_node("Identity", [n], [n + "_"]) for n in held]
        self.loader = self.session(  # without it, what it put on the device is gone
            copies, [value(n, a) for n, a in held.items()], [value(n + "_", a) for n, a in held.items()]
        )
        loading = self.loader.io_binding()
        for n, a in held.items():
            loading.bind_cpu_input(n, np.ascontiguousarray(a))
            loading.bind_output(n + "_", "webgpu")
        self.loader.run_with_iobinding(loading)
        on_device = dict(zip(held, loading.get_outputs()))

        values_in = [value(n, a) for n, a in held.items()] + [value("total", total)] * cached
        self.runner = self.session([node], values_in, [value(n, a) for n, a in outs.items()], self.profile)
        self.binding = self.runner.io_binding()
        for n in held:
            self.binding.bind_ortvalue_input(n, on_device[n])
        self.binding.bind_output("out", "cpu")  # nothing else in its Python API waits for the device
        if cached:
            self.binding.bind_cpu_input("total", total)
        for n in ("k", "v") if cached else ():
            if "past_" + n in held:  # past and present are one buffer
                self.binding.bind_ortvalue_output("new_" + n, on_device["past_" + n])
            else:
                self.binding.bind_output("new_" + n, "webgpu")
        self.calls = 0
        self.about = {"version": importlib.metadata.version("onnxruntime-webgpu"), "operator": op}
        if sys.platform == "linux":
            with open("/proc/self/maps") as f:
                drivers = {os.path.basename(l.split()[-1]) for l in f if "libvulkan_" in l}
            self.about["driver"] = " ".join(sorted(drivers))

    @staticmethod
    def session(nodes, values_in, values_out, profile=None):
        """A session on the WebGPU provider: what would fall back to the CPU, here or there, is an error."""
        import onnxruntime as ort
        from onnx import helper

        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        graph = helper.make_graph(nodes, "g", values_in, values_out)
        model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
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

    def call(self):
        self.runner.run_with_iobinding(self.binding)
        self.calls += 1

    def answer(self):
        B, H, Q, D = self.q_shape
        return self.binding.get_outputs()[0].numpy().reshape(B, Q, H, D).transpose(0, 2, 1, 3)

    def device_times(self):
        """Every call runs the same kernels."""
        with open(self.runner.end_profiling()) as f:
            kernels = [e["dur"] / 1e3 for e in json.load(f) if e.get("cat") == "Api"]
        each, rest = divmod(len(kernels), self.calls)
        if rest:
            raise RuntimeError(f"its profile has {len(kernels)} kernels for {self.calls} calls")
        return [sum(kernels[i : i + each]) for i in range(each, len(kernels), each)] if each else []


class Ggml(Peer):
    def __init__(self, case, q, k, v):
        import numpy as np

        os.environ.setdefault("GGML_VK_VISIBLE_DEVICES", "0")  # else it passes over a software device
        if case["storage"] == "f32":
            os.environ["GGML_VK_DISABLE_F16"] = "1"
        file = lambda package, name: f"{importlib.metadata.distribution(package).locate_file(name)}"
        library = lambda package, name: ctypes.CDLL(file(package, name), ctypes.RTLD_GLOBAL)
        base = library("loom-py-rt", "loom/libggml-base.so")
        vulkan = library("loom-py-rt-vulkan", "loom_rt_vulkan/libggml-vulkan.so")

        def c(name, gives, *takes, of=base):
            f = getattr(of, "ggml_" + name)
            f.restype, f.argtypes = gives, takes
            return f

        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_float

        class InitParams(ctypes.Structure):
            _fields_ = [("mem_size", size), ("mem_buffer", pointer), ("no_alloc", ctypes.c_bool)]

        B, H, Q, D = q.shape
        K = k.shape[2]
        held = [q.astype(np.float32), k, v]
        if case["causal"]:
            hidden = np.arange(K) > np.arange(Q)[:, None] + K - Q
            held.append(np.where(hidden, -np.inf, 0).astype(np.float16)[None, None])

        backend = c("backend_vk_init", pointer, size, of=vulkan)(0)
        if not backend:
            raise RuntimeError("ggml-vulkan finds no device")
        context = c("init", pointer, InitParams)(InitParams(1 << 20, None, True))
        new = c("new_tensor_4d", pointer, pointer, ctypes.c_int, *[ctypes.c_int64] * 4)
        tensors = [new(context, {"float32": 0, "float16": 1}[a.dtype.name], *a.shape[::-1]) for a in held]
        attention = c("flash_attn_ext", pointer, *[pointer] * 5, *[number] * 3)
        out = attention(context, *tensors, *[None] * (4 - len(tensors)), D**-0.5, 0, 0)
        c("flash_attn_ext_set_prec", None, pointer, ctypes.c_int)(out, 10)  # GGML_PREC_F32
        if not c("backend_supports_op", ctypes.c_bool, pointer, pointer)(backend, out):
            raise RuntimeError("ggml-vulkan does not support this attention")
        if not c("backend_alloc_ctx_tensors", pointer, pointer, pointer)(context, backend):
            raise RuntimeError("ggml-vulkan has no memory for the tensors")
        put = c("backend_tensor_set", None, pointer, pointer, size, size)
        for tensor, a in zip(tensors, held):
            a = np.ascontiguousarray(a)
            put(tensor, a.ctypes.data, 0, a.nbytes)
        graph = c("new_graph", pointer, pointer)(context)
        c("build_forward_expand", None, pointer, pointer)(graph, out)
        compute = c("backend_graph_compute", ctypes.c_int, pointer, pointer)
        get = c("backend_tensor_get", None, pointer, pointer, size, size)

        def call():
            if status := compute(backend, graph):
                raise RuntimeError(f"ggml_backend_graph_compute: status {status}")

        def answer():
            rows = np.empty((B, Q, H, D), np.float32)
            get(out, rows.ctypes.data, 0, rows.nbytes)
            return rows.transpose(0, 2, 1, 3)

        self.call, self.answer = call, answer
        device = c("backend_get_device", pointer, pointer)(backend)
        described = c("backend_dev_description", ctypes.c_char_p, pointer)(device)
        self.about = {"version": c("version", ctypes.c_char_p)().decode(), "device": described.decode()}


class Torch(Peer):
    def __init__(self, case, q, k, v):
        import torch
        from torch.nn.functional import scaled_dot_product_attention as sdpa

        torch.set_grad_enabled(False)
        q, k, v = (torch.from_numpy(x) for x in (q, k, v))
        grouped, causal, Q, K = q.shape[1] != k.shape[1], case["causal"], q.shape[2], k.shape[2]
        # Its own causal mask lets the first query see the first key alone; ours the last one all keys.
        mask = torch.ones(Q, K, dtype=torch.bool).tril(K - Q) if causal and Q != K else None
        forms = [lambda: sdpa(q, k, v, attn_mask=mask, is_causal=causal and Q == K, enable_gqa=grouped)]
        if grouped and Q == 1:
            folded = q.view(q.shape[0], k.shape[1], -1, q.shape[3])
            forms.append(lambda: sdpa(folded, k, v).view(q.shape))
            forms = [min(forms, key=lambda form: min(clock(form) for _ in range(4)))]
        self.form = forms[0]
        few = torch.zeros_like(q[:, :, :8])
        self.wake = lambda: sdpa(few, few, few)
        self.about = {"version": torch.__version__, "threads": f"{torch.get_num_threads()} threads"}

    def call(self):
        self.out = self.form()

    def answer(self):
        return self.out.float().numpy()


PEERS = {"ort": Ort, "ggml": Ggml, "torch": Torch}


def is_missing(package):
    try:
        importlib.metadata.distribution(package.split("==")[0])
    except importlib.metadata.PackageNotFoundError:
        return True


def speak(name, packages, asked, say):
    say(missing=[package for package in packages if is_missing(package)])
    if not (line := asked.readline()):
        return
    import numpy as np
    from safetensors.numpy import load_file, save_file

    case = json.loads(line)
    number = {"f32": np.float32, "f16": np.float16}[case["storage"]]
    tensors = load_file(case["input"])
    peer = PEERS[name](case, *(tensors[n].astype(number) for n in "qkv"))
    say(first_ms=clock(peer.call), about=peer.about)
    wall = []
    while (line := asked.readline()) and json.loads(line) == "call":
        peer.wake()
        wall.append(clock(peer.call))
        say()
    if not line:
        return
    save_file({"out": np.ascontiguousarray(peer.answer(), np.float32)}, case["output"])
    device = peer.device_times()
    say(clock="device" if device else "host", times_ms=device or wall)


def main(name, *packages):
    # Standard output is for answers: what libraries print there goes to standard error.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    say = lambda **answer: print(json.dumps(answer), file=answers, flush=True)
    try:
        speak(name, packages, sys.stdin, say)
    except Exception as e:
        say(failed=f"{type(e).__name__}: {e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
