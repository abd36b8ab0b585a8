"""Which weights of a model are rounded to 8 or 4 bits, and putting them there while a checkpoint is read: the whole is
never in memory in float32.

8 bits are for everything that is large: linear layers, token and speech tables, heads. With 4, the LLM's blocks are in
4 bits but for `down_proj`, whose inputs hold the model's few very large numbers: with it SmolLM2-135M loses 4.2 %,
without 2.4 % (docs/speed.md).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from osum_echat.cpu_linear import TOGETHER, Groups, JointLinear, QuantizedEmbedding, QuantizedLinear, group_size, quantize
from osum_echat.cpu_linear.groups import Bits, join
from osum_echat.cpu_linear.packed import joint_bias
from osum_echat.model.released import Shape
from osum_echat.model.storage import SafetensorsSource, TensorSource, stored_groups

Kind = Literal["int8", "int4"]
_PARTS = ("encoder.", "adapter.", "lm.")
_BLOCKS = "lm.llm."  # ... layers
_EIGHT = ("down_proj",)
_FOUR_INPUTS = 512
"""Narrower matrices stay in 8 bits: mini (320 wide) would lose 5.0 % of its loss in 4, and they are small anyhow."""
_SMALL = 2**14  # matrices below this many numbers are left


def bits_of(name: str, shape: Shape, kind: Kind) -> Bits | None:
    """In how many bits a tensor is kept; None: as it is."""
    small = len(shape) != 2 or shape[0] * shape[1] < _SMALL
    if small or not name.startswith(_PARTS) or not name.endswith(".weight") or ".lora_" in name:
        return None
    block = name.startswith(_BLOCKS) and ".layers." in name and not any(part in name for part in _EIGHT)
    if kind == "int4" and block and shape[1] >= _FOUR_INPUTS and group_size(shape[1], 4):
        return 4
    return 8 if group_size(shape[1], 8) else None


def stored_kind(source: TensorSource) -> Kind | None:
    """What a file's weights have been rounded to already."""
    bits = set(source.quantized.values()) if isinstance(source, SafetensorsSource) else set()
    return None if not bits else "int4" if 4 in bits else "int8"


def pieces(kind: Kind) -> Callable[[str, Tensor], dict[str, Tensor]]:
    """What `storage.write_safetensors` writes for each tensor: groups, and half precision for what is not rounded."""

    def of(name: str, tensor: Tensor) -> dict[str, Tensor]:
        bits = bits_of(name, tuple(tensor.shape), kind)
        if bits is not None:
            return stored_groups(name, quantize(tensor, bits))
        return {name: (tensor.half() if tensor.is_floating_point() else tensor).contiguous()}

    return of


class _Reader:
    """Weights and biases of a source under the model's names."""

    def __init__(self, source: TensorSource, keys: Mapping[str, str], kind: Kind) -> None:
        self.source, self.keys, self.kind = source, keys, kind
        counts = Counter(keys.values())
        self._shared: dict[str, Groups | None] = {key: None for key, count in counts.items() if count > 1}

    def bits(self, name: str) -> Bits | None:
        return bits_of(name, self.source.shapes[self.keys[name]], self.kind) if name in self.keys else None

    def groups(self, name: str) -> Groups:
        """As stored, where that is what is wanted; else rounded now. A tied table is read once."""
        key, bits = self.keys[name], self.bits(name)
        assert bits is not None, name
        found = self._shared.get(key)
        if found is None:
            if isinstance(self.source, SafetensorsSource) and self.source.quantized.get(key) == bits:
                found = self.source.groups(key)
            else:
                found = quantize(self.source.get(key), bits)
            if key in self._shared:
                self._shared[key] = found
        return found

    def bias(self, name: str) -> Tensor | None:
        return self.source.get(self.keys[name]).float() if name in self.keys else None


def put(model: nn.Module, source: TensorSource, keys: Mapping[str, str], kind: Kind) -> set[str]:
    """Replace layers of ``model`` (on the meta device) by quantized ones with the weights of ``source``.

    Args:
        keys: the key in the source of each of the model's parameters.

    Returns:
        Names of the parameters that have been placed so.
    """
    reader = _Reader(source, keys, kind)
    placed: set[str] = set()
    for prefix, parent in list(model.named_modules()):
        path = f"{prefix}." if prefix else ""
        for names in TOGETHER:
            children = [getattr(parent, name, None) for name in names]
            bits = {reader.bits(f"{path}{name}.weight") for name in names}
            if all(type(child) is nn.Linear for child in children) and len(bits) == 1 and None not in bits:
                _put_joint(parent, path, names, reader)
                placed |= {f"{path}{name}.{what}" for name in names for what in ("weight", "bias")}
        for name, child in list(parent.named_children()):
            weight = f"{path}{name}.weight"
            if type(child) in (nn.Linear, nn.Embedding) and reader.bits(weight) is not None:
                groups = reader.groups(weight)
                bias = reader.bias(f"{path}{name}.bias")
                setattr(parent, name, QuantizedLinear(groups, bias) if type(child) is nn.Linear else QuantizedEmbedding(groups))
                placed |= {weight, f"{path}{name}.bias"}
    return placed


def _put_joint(parent: nn.Module, path: str, names: tuple[str, ...], reader: _Reader) -> None:
    groups = [reader.groups(f"{path}{name}.weight") for name in names]
    sizes = [part.shape[0] for part in groups]
    biases = [reader.bias(f"{path}{name}.bias") for name in names]
    product = QuantizedLinear(join(groups), joint_bias(list(zip(biases, sizes, strict=True)), torch.zeros(0)))
    for name, part in zip(names, JointLinear(product, sizes, groups[0].shape[1]).parts, strict=True):
        setattr(parent, name, part)
