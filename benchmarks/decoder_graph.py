#!/usr/bin/env python3
"""Would one ONNX graph for the decoder's step be faster than our layers on a CPU? Both do the same steps with the same weights, in turns.

    python benchmarks/decoder_graph.py [--weights int8] [--wide] [--json]

The graph is what onnxruntime has for it: `GroupQueryAttention` with its rotation, over a cache that is bound once and written in place, fused norms with their residuals, and the products as
`MatMul` or `MatMulNBits`; a step is one call with the hidden state bound at both ends. Ours is `cpu_linear.lighten`, as decoding uses it. Heads, embedding, choice and guards are outside both.
``graph_speedup`` is ours over the graph's seconds of a step (CPU time of one thread, the smallest mean of the rounds); the design takes a graph from 1.3 on.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import numpy as np
import sentences  # noqa: F401 - first: it says what is missing
import torch
from decode import _WIDE, about, random_model, rounded
from torch import Tensor

from osum_echat.cpu_linear import group_size, lighten, pack_linears, quantize
from osum_echat.device import cpu, onnx
from osum_echat.generation.cache import BatchCache

_MINI: dict[str, Any] = {  # checkpoints/mini
    "model_type": "qwen2",
    "vocab_size": 800,
    "hidden_size": 320,
    "intermediate_size": 832,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 4096,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
    "use_sliding_window": False,
}
COLUMNS = 512
START = 128
"""Positions that are in the cache before the first step that is timed."""


class Graph:
    """A decoder as one onnxruntime session; see the module."""

    def __init__(self, decoder: Any, bits: dict[str, int] | None) -> None:
        from onnx import TensorProto, helper, numpy_helper

        config = decoder.config
        self.width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self.heads, self.groups = config.num_attention_heads, config.num_key_value_heads
        self.layers, self.hidden = len(decoder.layers), config.hidden_size
        nodes: list[Any] = []
        constants: list[Any] = []

        def constant(name: str, value: Tensor) -> str:
            constants.append(numpy_helper.from_array(value.detach().numpy(), name))
            return name

        def product(name: str, x: str, weight_OI: Tensor, bias_O: Tensor | None, kind: str) -> str:
            out = f"{name}.out"
            if bits is None:
                nodes.append(helper.make_node("MatMul", [x, constant(f"{name}.w", weight_OI.T.contiguous())], [out]))
            else:
                groups = quantize(weight_OI, bits[kind])  # type: ignore[arg-type]
                scales = constant(f"{name}.s", groups.scales_NG.float().flatten())
                inputs = [x, constant(f"{name}.w", groups.codes_NGB), scales]
                sizes = {"K": weight_OI.shape[1], "N": weight_OI.shape[0], "bits": groups.bits, "block_size": groups.size}
                nodes.append(helper.make_node("MatMulNBits", inputs, [out], domain="com.microsoft", accuracy_level=4, **sizes))
            if bias_O is None:
                return out
            nodes.append(helper.make_node("Add", [out, constant(f"{name}.b", bias_O)], [f"{name}.sum"]))
            return f"{name}.sum"

        cos, sin = decoder.rotary_emb(torch.zeros(1, 1, 1), torch.arange(COLUMNS)[None])
        half = self.width // 2
        constant("cos", cos[0, :, :half].contiguous())
        constant("sin", sin[0, :, :half].contiguous())
        eps = float(config.rms_norm_eps)

        def norm(name: str, x: str, skip: str | None, weight: Tensor) -> tuple[str, str]:
            """Norm of ``x``, or of ``x + skip``; the sum too."""
            gamma = constant(f"{name}.g", weight)
            if skip is None:
                nodes.append(helper.make_node("SimplifiedLayerNormalization", [x, gamma], [f"{name}.n"], epsilon=eps, axis=-1))
                return f"{name}.n", x
            ends = [f"{name}.n", "", "", f"{name}.r"]
            nodes.append(
                helper.make_node("SkipSimplifiedLayerNormalization", [x, skip, gamma], ends, domain="com.microsoft", epsilon=eps)
            )
            return f"{name}.n", f"{name}.r"

        residual, pending = "x", None
        for n, layer in enumerate(decoder.layers):
            attention, mlp = layer.self_attn, layer.mlp
            normed, residual = norm(f"{n}.a", residual, pending, layer.input_layernorm.weight)
            three = [attention.q_proj, attention.k_proj, attention.v_proj]
            weight, bias = torch.cat([p.weight for p in three]), torch.cat([p.bias for p in three])
            qkv = product(f"{n}.qkv", normed, weight, bias, "qkv")
            inputs = [qkv, "", "", f"k{n}", f"v{n}", "last", "total", "cos", "sin"]
            sizes = {"num_heads": self.heads, "kv_num_heads": self.groups, "do_rotary": 1}
            nodes.append(
                helper.make_node(
                    "GroupQueryAttention", inputs, [f"{n}.mixed", f"nk{n}", f"nv{n}"], domain="com.microsoft", **sizes
                )
            )
            out = product(f"{n}.o", f"{n}.mixed", attention.o_proj.weight, None, "o")
            normed, residual = norm(f"{n}.m", residual, out, layer.post_attention_layernorm.weight)
            wide = product(f"{n}.gu", normed, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]), None, "gu")
            nodes.append(helper.make_node("Split", [wide], [f"{n}.gate", f"{n}.up"], axis=-1, num_outputs=2))
            nodes.append(helper.make_node("QuickGelu", [f"{n}.gate"], [f"{n}.act"], domain="com.microsoft", alpha=1.0))  # SiLU
            nodes.append(helper.make_node("Mul", [f"{n}.act", f"{n}.up"], [f"{n}.both"]))
            pending = product(f"{n}.d", f"{n}.both", mlp.down_proj.weight, None, "down")
        final, _ = norm("final", residual, pending, decoder.norm.weight)
        nodes.append(helper.make_node("Identity", [final], ["y"]))

        real, whole = TensorProto.FLOAT, TensorProto.INT32
        cache = (1, self.groups, COLUMNS, self.width)
        names = [f"{side}{n}" for n in range(self.layers) for side in "kv"]
        inputs = [helper.make_tensor_value_info("x", real, (1, 1, self.hidden))]
        inputs += [helper.make_tensor_value_info(name, real, cache) for name in names]
        inputs += [helper.make_tensor_value_info("last", whole, (1,)), helper.make_tensor_value_info("total", whole, ())]
        outputs = [helper.make_tensor_value_info("y", real, (1, 1, self.hidden))]
        outputs += [helper.make_tensor_value_info(f"n{name}", real, cache) for name in names]
        graph = helper.make_graph(nodes, "step", inputs, outputs, constants)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        self._session = onnx.session(model.SerializeToString())
        self._caches = {name: torch.zeros(cache) for name in names}
        self._x, self._y = torch.zeros(1, 1, self.hidden), torch.zeros(1, 1, self.hidden)
        self._last, self._total = np.zeros(1, dtype=np.int32), np.zeros((), dtype=np.int32)
        self._binding = self._session.io_binding()
        bind = self._binding
        bind.bind_input("x", "cpu", 0, np.float32, self._x.shape, self._x.data_ptr())
        bind.bind_output("y", "cpu", 0, np.float32, self._y.shape, self._y.data_ptr())
        bind.bind_input("last", "cpu", 0, np.int32, (1,), self._last.ctypes.data)
        bind.bind_input("total", "cpu", 0, np.int32, (), self._total.ctypes.data)
        for name, kept in self._caches.items():
            bind.bind_input(name, "cpu", 0, np.float32, kept.shape, kept.data_ptr())
            bind.bind_output(f"n{name}", "cpu", 0, np.float32, kept.shape, kept.data_ptr())

    def load(self, cache: BatchCache) -> None:
        """Take over the keys and values of our cache."""
        for n, layer in enumerate(cache.layers):
            for side, kept in (("k", layer.keys), ("v", layer.values)):
                assert kept is not None
                self._caches[f"{side}{n}"][:, :, : layer.get_seq_length()] = kept[:, :, : layer.get_seq_length()]

    def step(self, x: Tensor, position: int) -> Tensor:
        self._x.copy_(x)
        self._last[0] = position
        self._total[...] = position + 1
        self._session.run_with_iobinding(self._binding)
        return self._y


class Layers:
    """Our layers."""

    def __init__(self, decoder: Any) -> None:
        self._decoder = decoder
        self.cache = BatchCache(len(decoder.layers), capacity=COLUMNS)

    def step(self, x: Tensor, position: int) -> Tensor:
        where = torch.tensor([[position]])
        return self._decoder(inputs_embeds=x, position_ids=where, past_key_values=self.cache).last_hidden_state

    def back_to(self, position: int) -> None:
        for layer in self.cache.layers:
            layer.length = position


@torch.inference_mode()
def measure(shape: dict[str, Any], layers: int, weights: str, steps: int, rounds: int) -> dict[str, Any]:
    plain = random_model(layers, torch.float32, shape)
    bits = {"qkv": 4, "o": 4, "gu": 4, "down": 8} if weights == "int4" else dict.fromkeys(("qkv", "o", "gu", "down"), 8)
    for side in (shape["hidden_size"], shape["intermediate_size"]):
        assert weights == "float32" or all(group_size(side, n) for n in bits.values()), side
    graph = Graph(plain.lm.llm.get_decoder(), None if weights == "float32" else bits)
    if weights == "float32":
        pack_linears(plain.lm)
        lighten(plain.lm.llm.get_decoder())
        own = plain
    else:
        own = rounded(plain, weights)  # type: ignore[arg-type]
    ours = Layers(own.lm.llm.get_decoder())
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(START + steps, 1, 1, shape["hidden_size"], generator=generator)
    for position in range(START):
        ours.step(inputs[position], position)
    graph.load(ours.cache)
    seconds: dict[str, list[float]] = {"layers": [], "graph": []}
    difference = 0.0
    for _ in range(rounds):
        found = {}
        for name, side in (("layers", ours), ("graph", graph)):
            ours.back_to(START)
            begun = time.process_time()
            for position in range(START, START + steps):
                found[name] = side.step(inputs[position], position)
            seconds[name].append((time.process_time() - begun) / steps)
        difference = float((found["layers"] - found["graph"]).abs().max() / found["layers"].abs().max())
    best = {name: min(values) for name, values in seconds.items()}
    return {
        "model": f"qwen2 {layers} x {shape['hidden_size']}, {weights}",
        "graph_speedup": round(best["layers"] / best["graph"], 3),
        "step_ms": {name: round(1e3 * value, 3) for name, value in best.items()},
        "largest_difference": difference,
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", choices=("float32", *cpu.ROUNDED), default="float32")
    parser.add_argument("--wide", action="store_true", help="2 layers as wide as the released model's, instead of mini's shape")
    parser.add_argument("--layers", type=int, help="default: 6 of mini's, 2 wide ones")
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    shape, layers = (_WIDE, 2) if args.wide else (_MINI, 6)
    result = measure(shape | {"vocab_size": 800}, args.layers or layers, args.weights, args.steps, args.rounds) | about()
    print(json.dumps(result) if args.json else "\n".join(f"{name:<20} {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
