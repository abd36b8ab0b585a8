"""The transformer block that encoder and adapter share, and how it is run: without padding, with activation checkpointing.

Recordings of different length stand end to end in one row (`EndToEnd`), so norms and linear layers see valid frames only, and attention runs
recording by recording. The price is a kernel launch a recording and layer.

N recordings, T frames, D width, H heads, P valid frames of all recordings.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

NORM_EPS = 1e-5


class Attention(nn.Module):
    """Multi-head self-attention inside each recording, full context. ``key_bias`` False is Whisper's."""

    def __init__(self, dim: int, heads: int, key_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=key_bias)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x_NTD: Tensor, lengths: list[int] | None) -> Tensor:
        """``lengths``: of recordings that stand end to end in one row; None: every row is one recording."""
        n, t, d = x_NTD.shape
        q, k, v = (linear(x_NTD).view(n, t, self.heads, -1).transpose(1, 2) for linear in (self.q, self.k, self.v))
        pieces = zip(*(tensor.split(lengths or t, dim=2) for tensor in (q, k, v)), strict=True)
        y_NHTd = torch.cat([F.scaled_dot_product_attention(*piece) for piece in pieces], dim=2)
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

    def forward(self, x_NTD: Tensor, lengths: list[int] | None) -> Tensor:
        x_NTD = x_NTD + self.dropout(self.attention(self.attention_norm(x_NTD), lengths))
        return x_NTD + self.dropout(self.ffn(self.ffn_norm(x_NTD)))


def run_block(block: nn.Module, x_NTD: Tensor, lengths: list[int] | None, recompute: bool) -> Tensor:
    """``block(x, lengths)``, keeping only its input for the backward pass when ``recompute`` is set and gradients are wanted."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x_NTD, lengths, use_reentrant=False)
    return block(x_NTD, lengths)


class EndToEnd:
    """Padded rows to recordings end to end in one row, and back. Rows of one length stay as they are."""

    def __init__(self, lengths_N: Tensor, frames: int) -> None:
        self.valid_NT = valid_frames(lengths_N, frames)
        plain = bool(self.valid_NT.all())
        self.lengths: list[int] | None = None if plain else lengths_N.tolist()
        self.where_P = torch.nonzero(self.valid_NT.flatten())[:, 0]

    def join(self, x_NTD: Tensor) -> Tensor:
        """[N, T, D] to [1, P, D] (unchanged when every row is full)."""
        return x_NTD if self.lengths is None else x_NTD.flatten(0, 1).index_select(0, self.where_P)[None]

    def part(self, x_1PD: Tensor) -> Tensor:
        """[1, P, D] to [N, T, D], zeros after the end of each recording."""
        if self.lengths is None:
            return x_1PD
        out_FD = x_1PD.new_zeros(self.valid_NT.numel(), x_1PD.shape[2])
        return out_FD.index_copy(0, self.where_P, x_1PD[0]).unflatten(0, self.valid_NT.shape)


def valid_frames(lengths_N: Tensor, frames: int) -> Tensor:
    """True for frames that belong to the recording: [N, T]."""
    return torch.arange(frames, device=lengths_N.device)[None] < lengths_N[:, None]
