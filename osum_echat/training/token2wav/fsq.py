"""Finite scalar quantisation (Mentzer et al., arXiv 2309.15505): a code is a few rounded numbers, and its index their
mixed-radix number.

No codebook is learned, so no code can die of neglect as in vector quantisation; the price is a box-shaped code space.

Shapes: B batch, T positions, D width, K = number of levels (dimensions of a code).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class FSQ(nn.Module):
    """[4, 4, 4, 4] makes 256 codes, [8, 8, 8, 8] 4096."""

    levels_K: Tensor
    basis_K: Tensor

    def __init__(self, width: int, levels: Sequence[int]) -> None:
        super().__init__()
        if not levels or min(levels) < 2:
            raise ValueError(f"FSQ levels must be a list of numbers of at least 2, found {list(levels)}")
        self.size = math.prod(levels)
        self.register_buffer("levels_K", torch.tensor(levels, dtype=torch.float32), persistent=False)
        self.register_buffer(
            "basis_K", torch.tensor([math.prod(levels[:i]) for i in range(len(levels))], dtype=torch.float32), persistent=False
        )
        self.project_in = nn.Linear(width, len(levels))
        self.project_out = nn.Linear(len(levels), width)

    def scores(self, x_BTD: Tensor) -> Tensor:
        """Positions on each axis before rounding, in [0, level - 1]. Always float32: a bf16 value would round across a
        boundary."""
        with torch.autocast(x_BTD.device.type, enabled=False):
            return torch.sigmoid(self.project_in(x_BTD.float())) * (self.levels_K - 1)

    def indices(self, x_BTD: Tensor) -> Tensor:
        """The code index of each position, [B, T] int64."""
        return (torch.round(self.scores(x_BTD)) * self.basis_K).sum(-1).long()

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Quantised features [B, T, D] (the gradient passes the rounding unchanged) and indices [B, T]."""
        scores_BTK = self.scores(x_BTD)
        rounded_BTK = torch.round(scores_BTK)
        indices_BT = (rounded_BTK * self.basis_K).sum(-1).long()
        straight_BTK = scores_BTK + (rounded_BTK - scores_BTK).detach()
        return self.project_out(straight_BTK / (self.levels_K - 1) * 2 - 1), indices_BT
