"""Weights in 8 or 4 bits: groups of neighbouring inputs share a scale, so one large number spoils few others.

The form is that of onnxruntime's `MatMulNBits`: a code c stands for (c - 2^(bits - 1)) x scale, two codes of 4 bits lie
in a byte, the first in its low half. Scales are half precision on disk and are rounded to it before the codes are
chosen.

N outputs, K inputs, G groups of a row, B bytes of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Bits = Literal[4, 8]
SIZES: dict[int, tuple[int, ...]] = {8: (128, 64, 32, 16), 4: (32, 16)}
"""Numbers of a group by the bits of a code, the first that divides the row: what MatMulNBits takes."""
_SHRINK = (1.0, 0.975, 0.95, 0.925, 0.9, 0.875, 0.85, 0.825, 0.8, 1.05, -1.0, -0.95, -0.9, -0.85, -0.8)
"""Scales that are tried for 4 bits, over the one that reaches the largest number exactly. A negative one turns the
range -8 .. 7 round."""
_AT_ONCE = 2**16  # numbers that are worked on at once, so that the passes over them stay in the processor's cache
_TINY = 2.0**-24


@dataclass(frozen=True)
class Groups:
    """A matrix [N, K] in groups: ``codes_NGB`` uint8, ``scales_NG`` float16."""

    codes_NGB: Tensor
    scales_NG: Tensor
    bits: Bits

    @property
    def size(self) -> int:
        """Numbers of a group."""
        return self.codes_NGB.shape[2] * 8 // self.bits

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes_NGB.shape[0], self.codes_NGB.shape[1] * self.size

    def rows(self, index: Tensor) -> Tensor:
        """Some rows in float32: [...] to [..., K]."""
        codes = self.codes_NGB[index]
        if self.bits == 4:
            codes = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        return ((codes.float() - 2 ** (self.bits - 1)) * self.scales_NG[index].float()[..., None]).flatten(-2)

    def expand(self) -> Tensor:
        """The matrix in float32, [N, K]."""
        (count, inputs), parts = self.shape, []
        rows = max(1, _AT_ONCE // inputs)
        for start in range(0, count, rows):
            parts.append(self.rows(torch.arange(start, min(start + rows, count))))
        return torch.cat(parts) if parts else torch.zeros(self.shape)


def group_size(inputs: int, bits: int) -> int | None:
    """The size of group for rows of so many numbers, None where none divides them."""
    return next((size for size in SIZES[bits] if inputs % size == 0), None)


def quantize(weight_NK: Tensor, bits: Bits) -> Groups:
    """Round a matrix to groups. For 4 bits the scale of each group is the one of `_SHRINK` with the smallest squared
    error.

    Raises:
        ValueError: when no size of group divides the rows.
    """
    size = group_size(weight_NK.shape[1], bits)
    if size is None:
        raise ValueError(f"rows of {weight_NK.shape[1]} numbers cannot be cut into groups of {SIZES[bits]}")
    rows = max(1, _AT_ONCE // weight_NK.shape[1])
    parts = [_quantize(part.detach().float().unflatten(1, (-1, size)), bits) for part in weight_NK.split(rows)]
    return Groups(torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts]), bits)


def _quantize(weight_NGS: Tensor, bits: Bits) -> tuple[Tensor, Tensor]:
    middle = 2 ** (bits - 1)
    largest_NG1 = weight_NGS.gather(-1, weight_NGS.abs().argmax(-1, keepdim=True))
    scale_NG1 = _usable(largest_NG1 / -middle)
    if bits == 4:
        work_NGS = torch.empty_like(weight_NGS)
        error_NG1 = torch.full_like(largest_NG1, torch.inf)
        for factor in _SHRINK:
            tried_NG1 = _usable(largest_NG1 * (-factor / middle))
            torch.mul(weight_NGS, 1.0 / tried_NG1, out=work_NGS).round_().clamp_(-middle, middle - 1).mul_(tried_NG1)
            found_NG1 = work_NGS.sub_(weight_NGS).square_().sum(-1, keepdim=True)
            better_NG1 = found_NG1 < error_NG1
            scale_NG1 = torch.where(better_NG1, tried_NG1, scale_NG1)
            error_NG1 = torch.minimum(found_NG1, error_NG1)
    bytes_NGS = (weight_NGS / scale_NG1).round_().clamp_(-middle, middle - 1).add_(middle).to(torch.uint8)
    if bits == 4:
        bytes_NGS = bytes_NGS[..., 0::2] | (bytes_NGS[..., 1::2] << 4)
    return bytes_NGS.contiguous(), scale_NG1[..., 0].half()


def _usable(scale: Tensor) -> Tensor:
    """As half precision holds it, and not zero."""
    scale = scale.half().float()
    return torch.where(scale.abs() < _TINY, torch.full_like(scale, _TINY), scale)


def join(parts: Sequence[Groups]) -> Groups:
    """Matrices over the same inputs below one another."""
    first = parts[0]
    assert all((part.bits, part.shape[1]) == (first.bits, first.shape[1]) for part in parts), parts
    return Groups(torch.cat([p.codes_NGB for p in parts]), torch.cat([p.scales_NG for p in parts]), first.bits)
