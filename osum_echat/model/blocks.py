"""The transformer block that encoder and adapter share, and how it is run: without padding, with activation
checkpointing.

Recordings of different length stand end to end in one row (`EndToEnd`), so norms and linear layers see valid frames
only, and attention stays inside each recording (`attention.attend`).

N recordings, T frames, D width, H heads, P valid frames of all recordings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from osum_echat import device as devices
from osum_echat.model.attention import Documents, attend
from osum_echat.model.config import Recompute
from osum_echat.model.recompute import checkpoint_options

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

    def forward(self, x_NTD: Tensor, recordings: Documents | None) -> Tensor:
        """``recordings``: where recordings end that stand end to end in one row; None: every row is one recording."""
        n, t, d = x_NTD.shape
        q, k, v = (linear(x_NTD).view(n, t, self.heads, -1).transpose(1, 2) for linear in (self.q, self.k, self.v))
        y_NTHd = F.scaled_dot_product_attention(q, k, v).transpose(1, 2) if recordings is None else attend(q, k, v, recordings)
        return self.out(y_NTHd.reshape(n, t, d))


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

    def forward(self, x_NTD: Tensor, recordings: Documents | None) -> Tensor:
        x_NTD = x_NTD + self.dropout(self.attention(self.attention_norm(x_NTD), recordings))
        return x_NTD + self.dropout(self.ffn(self.ffn_norm(x_NTD)))


def run_block(block: nn.Module, x_NTD: Tensor, recordings: Documents | None, recompute: Recompute) -> Tensor:
    """``block(x, recordings)``, with what ``recompute`` says computed again in the backward pass instead of kept."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, x_NTD, recordings, **checkpoint_options(recompute))
    return block(x_NTD, recordings)


@dataclass
class EndToEnd:
    """Padded rows to recordings end to end in one row, and back. Rows of one length stay as they are.

    Attributes:
        lengths: valid frames of each recording, on the host; ``frames``: of each padded row.
        where_P: index of every valid frame in the flattened padded rows.
        recordings: where they end, None where rows stay as they are.
    """

    lengths: list[int]
    frames: int
    where_P: Tensor
    recordings: Documents | None

    @classmethod
    def of(cls, lengths: Sequence[int], frames: int = 0) -> EndToEnd:
        """For rows of so many frames (default: of the longest recording), on the CPU."""
        frames = frames or max(lengths)
        where = [np.arange(n * frames, n * frames + length) for n, length in enumerate(lengths)]
        documents = None if min(lengths) == frames else Documents.of_lengths(lengths)
        return cls(list(lengths), frames, torch.from_numpy(np.concatenate(where)), documents)

    def to(self, device: torch.device) -> EndToEnd:
        recordings = None if self.recordings is None else self.recordings.to(device)
        return EndToEnd(self.lengths, self.frames, devices.send(self.where_P, device), recordings)

    def join(self, x_NTD: Tensor) -> Tensor:
        """[N, T, D] to [1, P, D] (unchanged when every row is full)."""
        return x_NTD if self.recordings is None else self.valid(x_NTD)[None]

    def part(self, x_1PD: Tensor) -> Tensor:
        """[1, P, D] to [N, T, D], zeros after the end of each recording."""
        if self.recordings is None:
            return x_1PD
        out_FD = x_1PD.new_zeros(len(self.lengths) * self.frames, x_1PD.shape[2])
        return out_FD.index_copy(0, self.where_P, x_1PD[0]).unflatten(0, (len(self.lengths), self.frames))

    def valid(self, x_NTD: Tensor) -> Tensor:
        """The valid frames of padded rows, [N, T, ...] to [P, ...]."""
        assert x_NTD.shape[:2] == (len(self.lengths), self.frames), (
            f"{tuple(x_NTD.shape)} is not {len(self.lengths)} rows of {self.frames}"
        )
        return x_NTD.flatten(0, 1).index_select(0, self.where_P)


def valid_frames(lengths_N: Tensor, frames: int) -> Tensor:
    """True for frames that belong to the recording: [N, T]."""
    return torch.arange(frames, device=lengths_N.device)[None] < lengths_N[:, None]
