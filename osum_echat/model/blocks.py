"""The transformer block that encoder and adapter share, and how it is run with activation checkpointing.

N recordings, T frames, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-5


class Attention(nn.Module):
    """Multi-head self-attention over valid frames, full context. ``key_bias`` False is Whisper's."""

    def __init__(self, dim: int, heads: int, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=key_bias)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_NTD: Tensor, mask_N11T: Tensor | None) -> Tensor:
        n, t, d = x_NTD.shape
        q, k, v = (linear(x_NTD).view(n, t, self.heads, -1).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y_NHTd = F.scaled_dot_product_attention(q, k, v, attn_mask=mask_N11T)
        return self.out(y_NHTd.transpose(1, 2).reshape(n, t, d))


class FeedForward(nn.Module):
    def __init__(self, dim: int, hidden: int, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Linear(hidden, dim)
        self.activation = activation

    def forward(self, x_NTD: Tensor) -> Tensor:
        return self.down(self.activation(self.up(x_NTD)))


class Block(nn.Module):
    """Pre-LN transformer block."""

    def __init__(
        self, dim: int, heads: int, ffn: int, *, activation: Callable[[Tensor], Tensor], key_bias: bool, dropout: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = Attention(dim, heads, key_bias)
        self.ffn_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.ffn = FeedForward(dim, ffn, activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_NTD: Tensor, mask_N11T: Tensor | None) -> Tensor:
        x_NTD = x_NTD + self.dropout(self.attention(self.attention_norm(x_NTD), mask_N11T))
        return x_NTD + self.dropout(self.ffn(self.ffn_norm(x_NTD)))


def run_block(block: nn.Module, x_NTD: Tensor, mask_N11T: Tensor | None, recompute: bool) -> Tensor:
    """``block(x, mask)``, keeping only its input for the backward pass when ``recompute`` is set and gradients are wanted."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x_NTD, mask_N11T, use_reentrant=False)
    return block(x_NTD, mask_N11T)


def valid_frames(lengths_N: Tensor, frames: int) -> Tensor:
    """True for frames that belong to the recording: [N, T]."""
    return torch.arange(frames, device=lengths_N.device)[None] < lengths_N[:, None]


def attention_mask(valid_NT: Tensor) -> Tensor | None:
    """Keys that may be attended, as [N, 1, 1, T]; None when all may (the faster path of SDPA)."""
    return None if bool(valid_NT.all()) else valid_NT[:, None, None]
