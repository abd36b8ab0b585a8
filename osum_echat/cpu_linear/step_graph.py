"""A small decoder's step on a CPU as one onnxruntime graph.

A step of a small model is mostly the calls between its products: some 15 a layer, each a Python call and a kernel's
start. As one graph it is one call, with a norm and its residual as one kernel and attention with its rotation as
another (`GroupQueryAttention`), on the cache's own buffers, which are written in place. The numbers are those of the
layers up to rounding, and the graph is believed only after its first two steps have given what transformers gives
(`StepGraph.of`).

The graph has weights of its own, a second copy: `device.cpu.one_graph` says for which sizes that pays. Steps of one new
position take it; prompts and blocks stay with the layers.

B rows, C columns of the cache's buffers, K columns in use, H query heads, G key heads, d head width, D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from osum_echat.cpu_linear.packed import PackedLinear
from osum_echat.device import cpu
from osum_echat.device import onnx as onnx_runtime

log = logging.getLogger(__name__)
_MICROSOFT = "com.microsoft"
_ROPE_BY_LENGTH = ("dynamic", "longrope")
_TOLERANCE = 1e-3


class Columns(Protocol):
    """What the graph needs of a layer's cache."""

    def reserve(self, count: int) -> tuple[Tensor, Tensor]:
        """Buffers of keys and values [B, G, C, d], contiguous, with room for ``count`` columns behind those in use."""
        ...

    def wrote(self, count: int) -> None:
        """So many further columns are in use."""
        ...

    def get_seq_length(self) -> int: ...


@dataclass(frozen=True)
class LayerWeights:
    """Of one layer, float32: norms [D], products as ([out, in], [out] or None). ``qkv`` gives queries, keys, values end
    to end, ``gate_up`` both halves."""

    attention_norm: Tensor
    qkv: tuple[Tensor, Tensor | None]
    out: tuple[Tensor, Tensor | None]
    mlp_norm: Tensor
    gate_up: tuple[Tensor, Tensor | None]
    down: tuple[Tensor, Tensor | None]

    @property
    def count(self) -> int:
        return sum(weight.numel() for weight, _ in (self.qkv, self.out, self.gate_up, self.down))


def dense(product: object) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias of a linear layer in float32; None for one that has them in another form."""
    if isinstance(product, PackedLinear):
        weight, bias = product.dense()
    elif type(product) is nn.Linear:
        weight, bias = product.weight.detach(), None if product.bias is None else product.bias.detach()
    else:
        return None
    return (weight, bias) if weight.dtype == torch.float32 and not weight.is_meta else None


class StepGraph:
    """See the module. Not for two threads at the same moment.

    Raises:
        ImportError, RuntimeError, ValueError: where onnx or onnxruntime are missing or cannot run such a graph.
    """

    def __init__(self, decoder: Any, layers: Sequence[LayerWeights]) -> None:
        config = decoder.config
        self._heads, self._groups = int(config.num_attention_heads), int(config.num_key_value_heads)
        self._width = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
        self._count, self._positions = len(layers), int(config.max_position_embeddings)
        self._session = onnx_runtime.session(_model(decoder, layers, self._heads, self._groups, self._width))
        self._binding = self._session.io_binding()
        self._bound: list[tuple[int, torch.Size]] = []
        self._last_B = np.zeros(0, dtype=np.int32)
        self._total = np.zeros((), dtype=np.int32)
        self._no_bias = torch.zeros(0)

    @classmethod
    def of(cls, decoder: Any, layers: Sequence[LayerWeights] | None, forward: Callable[..., Any]) -> StepGraph | None:
        """The graph of a decoder, None where it does not pay or does not give what ``forward``, transformers' own,
        gives.

        Args:
            layers: None for a decoder whose weights are in another form.
        """
        rope = getattr(decoder.rotary_emb, "rope_type", "default")
        if layers is None or not isinstance(rope, str) or rope in _ROPE_BY_LENGTH:
            return None
        if not cpu.one_graph(sum(layer.count for layer in layers)):
            return None
        try:
            graph = cls(decoder, layers)
            error = graph._error(forward)
        except (ImportError, RuntimeError, ValueError) as refused:
            log.info("the decoder's step is not run as one graph: %s", str(refused).splitlines()[0])
            return None
        if error > _TOLERANCE:
            log.warning("the decoder's step as one graph is %.1e away from transformers': it is not used", error)
            return None
        return graph

    def takes(self, x_BnD: Tensor, positions_Bn: Tensor, cache: Sequence[Any]) -> bool:
        """Whether this call is a step of the kind that the graph knows, within the positions that it has rotations
        for."""
        return (
            x_BnD.shape[1] == 1
            and x_BnD.dtype == torch.float32
            and len(cache) == self._count
            and all(hasattr(layer, "reserve") for layer in cache)
            and max(int(cache[0].get_seq_length()), int(positions_Bn.max())) < self._positions
        )

    def step(self, x_B1D: Tensor, positions_B1: Tensor, bias_B11K: Tensor | None, cache: Sequence[Columns]) -> Tensor:
        """Hidden states [B, 1, D] after the final norm; the cache has the new column then.

        Args:
            bias_B11K: added to the scores; None: everything may be seen.
        """
        rows, total = len(x_B1D), cache[0].get_seq_length() + 1
        buffers = [buffer for layer in cache for buffer in layer.reserve(1)]
        bind = self._binding
        places = [(buffer.data_ptr(), buffer.shape) for buffer in buffers]
        if places != self._bound:  # else they are bound already: a cache grows seldom
            for n, (place, shape) in enumerate(places):
                name = f"{'kv'[n % 2]}{n // 2}"
                bind.bind_input(name, "cpu", 0, np.float32, shape, place)
                bind.bind_output(f"new_{name}", "cpu", 0, np.float32, shape, place)
            self._bound = places
        if len(self._last_B) != rows:
            self._last_B = np.zeros(rows, dtype=np.int32)
            bind.bind_input("last", "cpu", 0, np.int32, (rows,), self._last_B.ctypes.data)
            bind.bind_input("total", "cpu", 0, np.int32, (), self._total.ctypes.data)
        self._last_B[:] = total - 1
        self._total[...] = total
        if bias_B11K is None:
            if self._no_bias.numel() < total:
                self._no_bias = torch.zeros(2 * total)
            bias_B11K = self._no_bias[:total].view(1, 1, 1, total)
        bias_B11K = bias_B11K.float().contiguous()
        x_B1D, positions_B1 = x_B1D.contiguous(), positions_B1.expand(rows, 1).contiguous()
        out_B1D = torch.empty_like(x_B1D)
        bind.bind_input("x", "cpu", 0, np.float32, x_B1D.shape, x_B1D.data_ptr())
        bind.bind_input("positions", "cpu", 0, np.int64, positions_B1.shape, positions_B1.data_ptr())
        bind.bind_input("bias", "cpu", 0, np.float32, bias_B11K.shape, bias_B11K.data_ptr())
        bind.bind_output("y", "cpu", 0, np.float32, out_B1D.shape, out_B1D.data_ptr())
        self._session.run_with_iobinding(bind)
        for layer in cache:
            layer.wrote(1)
        return out_B1D

    @torch.no_grad()
    def _error(self, forward: Callable[..., Any]) -> float:
        """Largest difference of two steps from transformers' own, over the largest number."""
        size = self._session.get_inputs()[0].shape[2]
        x_12D = torch.randn(1, 2, size, generator=torch.Generator().manual_seed(0))
        positions_12 = torch.tensor([[3, 5]])
        # Without a mask transformers takes a jump of the positions for the beginning of another sequence.
        mask_112K = torch.zeros(1, 1, 2, 2).masked_fill_(
            torch.ones(2, 2, dtype=torch.bool).triu(1), torch.finfo(torch.float32).min
        )
        inputs = {"inputs_embeds": x_12D, "position_ids": positions_12, "attention_mask": mask_112K}
        wanted = forward(**inputs, use_cache=False).last_hidden_state
        cache = [TwoColumnCache((1, self._groups, 2, self._width)) for _ in range(self._count)]
        found = [self.step(x_12D[:, n : n + 1], positions_12[:, n : n + 1], None, cache) for n in range(2)]
        return float((torch.cat(found, dim=1) - wanted).abs().max() / wanted.abs().max())


class TwoColumnCache:
    """A cache of two columns."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._keys, self._values, self._length = torch.zeros(shape), torch.zeros(shape), 0

    def reserve(self, count: int) -> tuple[Tensor, Tensor]:
        return self._keys, self._values

    def wrote(self, count: int) -> None:
        self._length += count

    def get_seq_length(self) -> int:
        return self._length


def _model(decoder: Any, layers: Sequence[LayerWeights], heads: int, groups: int, width: int) -> bytes:
    """The graph, serialized."""
    from onnx import TensorProto, helper, numpy_helper

    config = decoder.config
    size, eps = int(config.hidden_size), float(config.rms_norm_eps)
    nodes: list[Any] = []
    constants: list[Any] = []

    def constant(name: str, value: Tensor) -> str:
        constants.append(numpy_helper.from_array(value.detach().contiguous().numpy(), name))
        return name

    def node(kind: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> None:
        nodes.append(helper.make_node(kind, inputs, outputs, domain=domain, **attributes))

    def product(name: str, x: str, weights: tuple[Tensor, Tensor | None]) -> str:
        weight_OI, bias_O = weights
        node("MatMul", [x, constant(f"{name}.weight", weight_OI.T)], [name])
        if bias_O is None:
            return name
        node("Add", [name, constant(f"{name}.bias", bias_O)], [f"{name}.sum"])
        return f"{name}.sum"

    def norm(name: str, x: str, added: str, weight: Tensor) -> tuple[str, str]:
        """Norm of ``x + added`` ("" for nothing), and that sum."""
        gamma = constant(f"{name}.weight", weight)
        if not added:
            node("SimplifiedLayerNormalization", [x, gamma], [name], epsilon=eps, axis=-1)
            return name, x
        node("SkipSimplifiedLayerNormalization", [x, added, gamma], [name, "", "", f"{name}.sum"], _MICROSOFT, epsilon=eps)
        return name, f"{name}.sum"

    cos, sin = decoder.rotary_emb(torch.zeros(1, 1, 1), torch.arange(int(config.max_position_embeddings))[None])
    cos_sin = [constant(name, table[0, :, : width // 2]) for name, table in (("cos", cos), ("sin", sin))]
    total, added = "x", ""
    for n, layer in enumerate(layers):
        normed, total = norm(f"attention_norm{n}", total, added, layer.attention_norm)
        qkv = product(f"qkv{n}", normed, layer.qkv)
        inputs = [qkv, "", "", f"k{n}", f"v{n}", "last", "total", *cos_sin, "positions", "bias"]
        sizes = {"num_heads": heads, "kv_num_heads": groups, "do_rotary": 1}
        node("GroupQueryAttention", inputs, [f"mixed{n}", f"new_k{n}", f"new_v{n}"], _MICROSOFT, **sizes)
        added = product(f"out{n}", f"mixed{n}", layer.out)
        normed, total = norm(f"mlp_norm{n}", total, added, layer.mlp_norm)
        both = product(f"gate_up{n}", normed, layer.gate_up)
        node("Split", [both], [f"gate{n}", f"up{n}"], axis=-1, num_outputs=2)
        node("QuickGelu", [f"gate{n}"], [f"act{n}"], _MICROSOFT, alpha=1.0)  # x sigmoid(x)
        node("Mul", [f"act{n}", f"up{n}"], [f"wide{n}"])
        added = product(f"down{n}", f"wide{n}", layer.down)
    last, _ = norm("norm", total, added, decoder.norm.weight)
    node("Identity", [last], ["y"])

    real, whole = TensorProto.FLOAT, TensorProto.INT32
    value = helper.make_tensor_value_info
    kept = ("B", groups, "C", width)
    names = [f"{side}{n}" for n in range(len(layers)) for side in "kv"]
    taken = [value("x", real, ("B", 1, size)), *(value(name, real, kept) for name in names)]
    taken += [value("last", whole, ("B",)), value("total", whole, ())]
    taken += [value("positions", TensorProto.INT64, ("B", 1)), value("bias", real, ("A", 1, 1, "K"))]
    given = [value("y", real, ("B", 1, size)), *(value(f"new_{name}", real, kept) for name in names)]
    graph = helper.make_graph(nodes, "step", taken, given, constants)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_MICROSOFT, 1)]
    return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
