"""Linear layers of the U-Net in the memory order of oneDNN's matrix kernels, with GELU applied as the product is written (CPU inference).

Some 10 % of a float32 step on the machine of benchmarks/results; results differ from `nn.Linear` by the order of a sum. The operators are
those that torch.compile uses for frozen weights; where a build of PyTorch has none, nothing is packed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

ROWS_HINT = 512
"""Rows that the packed order is tuned for; any number works."""


def can_pack(device: torch.device) -> bool:
    """Whether this is a CPU whose PyTorch has the operators."""
    ops: Any = torch.ops.mkldnn
    names = ("_reorder_linear_weight", "_linear_pointwise")
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and all(hasattr(ops, n) for n in names)


class PackedLinear(nn.Module):
    """``nn.Linear`` followed by nothing or by exact GELU. Not trainable, and not part of a state dict."""

    def __init__(self, weight_OI: Tensor, bias_O: Tensor | None, gelu: bool = False) -> None:
        super().__init__()
        ops: Any = torch.ops.mkldnn
        self._weight = ops._reorder_linear_weight(weight_OI.detach().contiguous(), ROWS_HINT)
        self._bias = None if bias_O is None else bias_O.detach()
        self._after = "gelu" if gelu else "none"

    def forward(self, x: Tensor) -> Tensor:
        ops: Any = torch.ops.mkldnn
        return ops._linear_pointwise(x, self._weight, self._bias, self._after, [], "none")
