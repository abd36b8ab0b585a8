"""A linear layer in the memory order that the CPU's matrix kernels want (oneDNN's blocked one), for inference.

The operators are those that torch.compile uses for frozen weights. Results differ from `nn.Linear` by the order of a sum only. Where a build of
PyTorch has no such operators, nothing is packed: ask `can_pack` first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16)


def can_pack(device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Whether this machine has the kernels: a CPU with oneDNN, and for bfloat16 one that computes in it."""
    if device.type != "cpu" or dtype not in _DTYPES or not torch.backends.mkldnn.is_available():
        return False
    ops: Any = torch.ops.mkldnn
    if not all(hasattr(ops, name) for name in ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")):
        return False
    return dtype == torch.float32 or bool(ops._is_mkldnn_bf16_supported())


class PackedLinear(nn.Module):
    """`nn.Linear`, followed by nothing or by exact GELU as the product is written. Not trainable, and not part of a state dict.

    Args:
        weight_OI: weight [out, in]; the input has its dtype.
        rows_hint: number of input rows that the order is tuned for; any number works.
    """

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, gelu: bool = False, rows_hint: int | None = None) -> None:
        super().__init__()
        ops: Any = torch.ops.mkldnn
        self.out_features, self.in_features = weight_OI.shape
        # Plain attributes: a packed weight is no parameter.
        self._weight: Tensor = ops._reorder_linear_weight(weight_OI.detach().contiguous(), rows_hint)
        self._bias = None if bias_O is None else bias_O.detach()
        self._after = "gelu" if gelu else "none"

    def forward(self, x: Tensor) -> Tensor:
        ops: Any = torch.ops.mkldnn
        return ops._linear_pointwise(x, self._weight, self._bias, self._after, [], "none")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"
