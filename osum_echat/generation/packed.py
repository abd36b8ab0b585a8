"""Weights in the memory order that the CPU's matrix kernels want (oneDNN), for decoding.

A step at batch 1 reads every weight once, so its time is reading. PyTorch's `linear` keeps the rows of a weight as they are in the file: on the
machine of `benchmarks/results` it reads 60 % of what the memory gives in bfloat16 at batch 1, and less with more rows. The same weights in oneDNN's
blocked order are read at the memory's speed, and at batch 16 a step is twice as fast. Results differ from `linear` by the order of a sum only.

Small float32 matrices are the exception: they stay in the processor's cache, where PyTorch's own kernel is faster at batch 1, so they are left.

`pack_linears` swaps the `nn.Linear` modules of a model that only decodes; the model cannot be trained or saved afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16)
_FLOAT32_WEIGHTS = 2**19  # fewest weights, and fewest inputs, for which packing float32 pays at batch 1 (measured)
_FLOAT32_INPUTS = 128


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine has the kernels: a CPU with oneDNN, and for bfloat16 one that computes in it."""
    if device.type != "cpu" or dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    ops: Any = torch.ops.mkldnn
    if not all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")):
        return False
    return dtype == torch.float32 or bool(ops._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """`nn.Linear` for inference with a packed weight [out, in]; input [..., in] of the weight's dtype."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Plain attributes: a packed weight is no parameter and has no place in a state dict.
        self._bias = None if linear.bias is None else linear.bias.detach()
        self._weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"


def pays(linear: nn.Linear) -> bool:
    """Whether this machine can pack the layer, and a step at batch 1 gains by it."""
    weight = linear.weight
    if weight.is_meta or not can_pack(weight.device, weight.dtype):
        return False
    return weight.dtype != torch.float32 or (weight.numel() >= _FLOAT32_WEIGHTS and linear.in_features >= _FLOAT32_INPUTS)


def pack_linears(module: nn.Module) -> int:
    """Replace each `nn.Linear` inside ``module`` that it `pays` for, in place, one at a time (a weight exists twice only for that moment).

    A weight that something else uses too (an LM head tied to the token table) is packed beside the original. Returns how many were packed.
    """
    packed = 0
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and pays(child):
                setattr(parent, name, PackedLinear(child))
                packed += 1
    return packed
