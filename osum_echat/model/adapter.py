"""From encoder frames to LLM positions: down-sampler (rate 4) and adapter blocks.

One position is 80 ms of audio. Options that the published model does not use, all in the config: several encoder layers
side by side (`encoder_layers`), a CTC head and tag heads (`ctc.py`, `tags.py`; they are attached by
`echat.EChatModel`).

N recordings, S encoder frames (50/s), P positions (12.5/s, P = ceil(ceil(S / 2) / 2)), V valid positions of all
recordings, E encoder width, A adapter width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.model.blocks import NORM_EPS, Block, EndToEnd, run_block
from osum_echat.model.config import AdapterConfig, Recompute
from osum_echat.rates import POSITIONS_PER_SECOND


class DownSampler(nn.Module):
    """Three causal convolutions (kernel 3, strides 1, 2, 2): looks back only, so padding after the end cannot reach a
    valid frame."""

    strides = (1, 2, 2)

    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv1d(in_dim if i == 0 else dim, dim, kernel_size=3, stride=stride) for i, stride in enumerate(self.strides)
        )

    def forward(self, x_NSE: Tensor, lengths_N: Tensor) -> tuple[Tensor, Tensor]:
        """[N, S, E] to [N, P, A] and the number of valid positions."""
        x_NES = x_NSE.transpose(1, 2)
        for conv, stride in zip(self.convs, self.strides, strict=True):
            x_NES = F.gelu(conv(F.pad(x_NES, (2, 0))))
            lengths_N = -(-lengths_N // stride)
        return x_NES.transpose(1, 2), lengths_N


def interleaved_positions(length: int, dim: int) -> Tensor:
    """The table [length, dim] of "Attention is all you need": sine and cosine take turns."""
    inverse = torch.exp(torch.arange(0, dim, 2) * -(math.log(10000.0) / dim))
    angles = torch.arange(length)[:, None] * inverse[None]
    return torch.stack([angles.sin(), angles.cos()], dim=2).flatten(1)


class LayerMix(nn.Module):
    """Encoder layers side by side, each under its own LayerNorm. Lower layers hold the prosody that the last one has
    dropped."""

    def __init__(self, encoder_dim: int, layers: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(encoder_dim, eps=NORM_EPS) for _ in range(layers))

    def forward(self, layers: list[Tensor]) -> Tensor:
        return torch.cat([norm(layer) for norm, layer in zip(self.norms, layers, strict=True)], dim=2)


class Adapter(nn.Module):
    """Down-sampler, input layer, fixed positions and pre-LN blocks."""

    positions_PA: Tensor

    def __init__(self, config: AdapterConfig, encoder_dim: int, recompute: Recompute = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.mix = LayerMix(encoder_dim, len(config.encoder_layers)) if config.encoder_layers else None
        self.down = DownSampler(encoder_dim * max(len(config.encoder_layers), 1), config.dim)
        self.input = nn.Linear(config.dim, config.dim)
        self.input_norm = nn.LayerNorm(config.dim, eps=NORM_EPS)
        self.register_buffer("positions_PA", interleaved_positions(config.max_positions, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.ffn, activation=F.relu, key_bias=True, dropout=config.dropout)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)

    def forward(self, layers: list[Tensor], lengths_N: Tensor, rows: EndToEnd | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Adapt.

        Args:
            layers: encoder layers, each [N, S, E] (one, or those of ``encoder_layers``).
            lengths_N: valid encoder frames.
            rows: where its positions are valid (`plan.Plan.adapter`); worked out from the lengths, which are read to
                the host, when not given.

        Returns:
            Adapter output [N, P, A], down-sampler output [N, P, A], valid positions [N].
        """
        down_NPA, lengths_N = self.down(layers[0] if self.mix is None else self.mix(layers), lengths_N)
        if down_NPA.shape[1] > self.config.max_positions:
            raise ValueError(
                f"a recording of {down_NPA.shape[1] / POSITIONS_PER_SECOND:.1f} s is longer than the adapter's {self.config.max_positions / POSITIONS_PER_SECOND:.1f} s; "
                "cut it, or raise adapter.max_positions"
            )
        rows = rows or EndToEnd.of(lengths_N.tolist(), down_NPA.shape[1]).to(down_NPA.device)
        positions_NPA = self.positions_PA[: down_NPA.shape[1]].to(down_NPA.dtype).expand_as(down_NPA)
        x_1VA = self.dropout(self.input_norm(self.input(rows.join(down_NPA))))
        x_1VA = self.dropout(x_1VA * math.sqrt(self.config.dim) + rows.join(positions_NPA))
        for block in self.blocks:
            x_1VA = run_block(block, x_1VA, rows.recordings, self.training and self.recompute)
        return rows.part(self.norm(x_1VA)), down_NPA, lengths_N
