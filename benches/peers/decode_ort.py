#!/usr/bin/env python3
"""Seconds of a step of a GGUF model of the Llama family in ONNX Runtime on WebGPU, in f32: the median.

    pip install -r decode-ort-requirements.txt
    python decode_ort.py MODEL.gguf BATCH CONTEXT STEPS

The model is written as ONNX from the weights that transformers reads, with ONNX Runtime's own operators for its norms and its
attention (GroupQueryAttention with rotary positions, on a cache shared by past and present). Its keys and values of the
context are transformers', repeated for the batch; each step takes a token a sequence. The first step's logits are held
against transformers'. Weights and cache stay on the device, which is the one that the Vulkan loader offers.
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import AutoModelForCausalLM

CHUNK = 256  # tokens of a call that reads the context
TOLERANCE = 1e-3  # of the largest logit

path, (batch, context, steps) = Path(sys.argv[1]), map(int, sys.argv[2:])
model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
config, weights = model.config, model.state_dict()
layers, hidden, vocab = config.num_hidden_layers, config.hidden_size, config.vocab_size
heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
head_dim = getattr(config, "head_dim", None) or hidden // heads
capacity = context + steps + 1


def token(at):
    return at * 2_654_435_761 % 2**32 % vocab


# The context, read by transformers, and what it says of the first step.
with torch.no_grad():
    past = None
    for start in range(0, context, CHUNK):
        ids = torch.tensor([[token(at) for at in range(start, min(start + CHUNK, context))]])
        past = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1).past_key_values
    cached = [[layer.keys.numpy(), layer.values.numpy()] for layer in past.layers]
    rope = [table[0, :, : head_dim // 2].numpy() for table in model.model.rotary_emb(torch.zeros(1), torch.arange(capacity)[None])]
    first = [token(1_000_000 + s) for s in range(batch)]
    want = model(torch.tensor([first[:1]]), past_key_values=past).logits[0, -1].numpy()


nodes, constants = [], []


def node(op, inputs, domain="", outputs=1, **attributes):
    names = [f"{op}.{len(nodes)}.{ix}" for ix in range(outputs)]
    nodes.append(helper.make_node(op, inputs, names, domain=domain, **attributes))
    return names[0] if outputs == 1 else names


def constant(name, array):
    constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
    return name


def weight(name):
    return weights[name].numpy()


def linear(x, *names):
    if any(name.replace("weight", "bias") in weights for name in names):
        sys.exit(f"{names[0]} has a bias: this script writes products without")
    return [node("MatMul", [x, constant(name, weight(name).T)]) for name in names]


def norm(x, name):
    scale = constant(name, weight(name))
    return node("SimplifiedLayerNormalization", [x, scale], axis=-1, epsilon=config.rms_norm_eps)


value = helper.make_tensor_value_info
cache_shape = [batch, kv_heads, capacity, head_dim]
inputs = [value("ids", TensorProto.INT64, [batch, 1]), value("ends", TensorProto.INT32, [batch]), value("total", TensorProto.INT32, [1])]
outputs = [value("logits", TensorProto.FLOAT, [batch, vocab])]
tables = [constant(name, table) for name, table in zip(("cos", "sin"), rope)]
embedding = constant("embedding", weight("model.embed_tokens.weight"))
x = node("Gather", [embedding, "ids"])
for layer in range(layers):
    of = f"model.layers.{layer}."
    h = norm(x, of + "input_layernorm.weight")
    q, k, v = linear(h, *(of + f"self_attn.{name}_proj.weight" for name in "qkv"))
    names = [f"{kind}.{layer}" for kind in ("past_k", "past_v", "new_k", "new_v")]
    inputs += [value(name, TensorProto.FLOAT, cache_shape) for name in names[:2]]
    outputs += [value(name, TensorProto.FLOAT, cache_shape) for name in names[2:]]
    attended = f"attended.{layer}"
    nodes.append(
        helper.make_node(
            "GroupQueryAttention", [q, k, v, *names[:2], "ends", "total", *tables], [attended, *names[2:]],
            domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads, do_rotary=1, scale=head_dim**-0.5,
        )
    )  # fmt: skip
    x = node("Add", [x, *linear(attended, of + "self_attn.o_proj.weight")])
    h = norm(x, of + "post_attention_layernorm.weight")
    gate, up = linear(h, of + "mlp.gate_proj.weight", of + "mlp.up_proj.weight")
    gated = node("Mul", [node("Mul", [gate, node("Sigmoid", [gate])]), up])
    x = node("Add", [x, *linear(gated, of + "mlp.down_proj.weight")])
rows = node("Reshape", [norm(x, "model.norm.weight"), constant("rows", np.array([batch, hidden], np.int64))])
head = embedding if config.tie_word_embeddings else constant("head", weight("lm_head.weight"))
nodes.append(helper.make_node("Gemm", [rows, head], ["logits"], transB=1))


def session(nodes, inputs, outputs, constants=()):
    """On the WebGPU provider alone."""
    graph = helper.make_graph(nodes, "g", inputs, outputs, list(constants))
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_session_config_entry("ep.webgpuexecutionprovider.dawnBackendType", "Vulkan")
    options.add_session_config_entry("ep.webgpuexecutionprovider.validationMode", "disabled")
    with tempfile.NamedTemporaryFile(suffix=".onnx") as file:
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), file.name)
        return ort.InferenceSession(file.name, options, providers=["WebGpuExecutionProvider"], enable_fallback=False)


# Python cannot allocate on this device, but a session's outputs may stay there: the cache is copied through one.
past_names = [name for layer in range(layers) for name in (f"past_k.{layer}", f"past_v.{layer}")]
loader = session([helper.make_node("Identity", ["x"], ["y"])], [value("x", TensorProto.FLOAT, cache_shape)], [value("y", TensorProto.FLOAT, cache_shape)])
held = {}
for name, array in zip(past_names, (array for pair in cached for array in pair)):
    block = np.zeros(cache_shape, np.float32)
    block[:, :, :context] = array[:, :, :context]
    loading = loader.io_binding()
    loading.bind_cpu_input("x", block)
    loading.bind_output("y", "webgpu")
    loader.run_with_iobinding(loading)
    held[name] = loading.get_outputs()[0]

runner = session(nodes, inputs, outputs, constants)
times = []
for step in range(steps + 1):
    binding = runner.io_binding()
    ids = np.array([[token(1_000_000 + 1000 * step + s)] for s in range(batch)], np.int64)
    binding.bind_cpu_input("ids", ids)
    binding.bind_cpu_input("ends", np.full(batch, context + step, np.int32))
    binding.bind_cpu_input("total", np.array([context + step + 1], np.int32))
    binding.bind_output("logits", "cpu")
    for name in past_names:  # past and present are one buffer
        binding.bind_ortvalue_input(name, held[name])
        binding.bind_ortvalue_output(name.replace("past", "new"), held[name])
    started = time.perf_counter()
    runner.run_with_iobinding(binding)
    times.append(time.perf_counter() - started)
    if step == 0:
        got = binding.get_outputs()[0].numpy()[0]
        off = np.abs(got - want).max() / np.abs(want).max()
        if not off <= TOLERANCE:
            sys.exit(f"ONNX Runtime's logits are off by {off:.2g} of the largest")
print(statistics.median(times[1:]))
