"""A linear layer in the memory order that the CPU's matrix kernels want (oneDNN's blocked one), for inference.

The operators are those that torch.compile uses for frozen weights. Results differ from `nn.Linear` by the order of a
sum only. Not every machine and build of PyTorch has them: ask `device.linear_kernel` first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

_BFLOAT16_ROWS = 4
"""A single row is given this often: oneDNN's bfloat16 kernel for 4 rows reads the weights 10 to 18 % faster than that
for one (measured)."""


class PackedLinear(nn.Module):
    """`nn.Linear`, followed by nothing or by exact GELU as the product is written. Not trainable, and not part of a
    state dict.

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
        self._product: Any = ops._linear_pointwise.default  # looked up once: a step makes hundreds of calls

    def dense(self) -> tuple[Tensor, Tensor | None]:
        """Weight [out, in] in the usual order, a copy, and bias."""
        return self._weight.to_dense(), self._bias

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.bfloat16 and x.numel() == self.in_features:
            copies = x.reshape(1, -1).repeat(_BFLOAT16_ROWS, 1)
            one = self._product(copies, self._weight, self._bias, self._after, [], "none")[:1]
            return one.view(*x.shape[:-1], self.out_features)
        return self._product(x, self._weight, self._bias, self._after, [], "none")

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self._bias is not None}"


class JointLinear:
    """Several linear layers with the same input as one product: fewer and larger reads, which is most of the time of a
    step at batch 1.

    The first of the `parts` that is called with a tensor computes all, the others find their outputs. An input is known
    by being the same object, so it must not be changed in place before all parts were called. A part that is called by
    itself computes all the same.

    Args:
        product: the layer that computes all outputs, one part's after the other's.
        sizes: how many outputs each part has.
    """

    def __init__(self, product: nn.Module, sizes: Sequence[int], in_features: int) -> None:
        self.product, self._sizes = product, list(sizes)
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}
        self.parts = [JointPart(self, index, size, in_features) for index, size in enumerate(sizes)]

    @classmethod
    def packed(cls, linears: Sequence[nn.Linear]) -> JointLinear:
        """Of layers with the same input, with packed weights."""
        weight_OI = torch.cat([linear.weight.detach() for linear in linears])
        product = PackedLinear(weight_OI, joint_bias([(x.bias, x.out_features) for x in linears], weight_OI))
        return cls(product, [x.out_features for x in linears], linears[0].in_features)

    def output(self, index: int, x: Tensor) -> Tensor:
        """Output of one layer; it is handed out once, so nothing stays alive."""
        if x is not self._input or index not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(self.product(x).split(self._sizes, dim=-1)))
        found = self._outputs.pop(index)
        if not self._outputs:
            self._input = None
        return found


def joint_bias(biases: Sequence[tuple[Tensor | None, int]], like: Tensor) -> Tensor | None:
    """Biases (or None, for so many outputs) end to end; None when there is none at all."""
    if all(bias is None for bias, _ in biases):
        return None
    return torch.cat([like.new_zeros(size) if bias is None else bias.detach() for bias, size in biases])


class JointPart(nn.Module):
    """One layer of a `JointLinear`, in the place of its `nn.Linear`."""

    def __init__(self, joint: JointLinear, index: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.out_features, self.in_features = out_features, in_features
        self.joint, self._index = joint, index

    def forward(self, x: Tensor) -> Tensor:
        return self.joint.output(self._index, x)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, part {self._index} of a joint product"
