"""The audio encoder: Whisper's architecture at any size, without the 30 s padding.

A recording gives the same frames alone and in a padded batch: activations after its end are zeroed between the
convolutions, as the zero padding of the convolution does for a recording alone. (The published code lets them leak,
which costs recordings of an odd length a frame.)

N recordings, T feature frames (100/s), S encoder frames (50/s, S = ceil(T / 2)), P encoder frames of all recordings, F
mel bins, E width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.model.blocks import NORM_EPS, Block, EndToEnd, run_block, valid_frames
from osum_echat.model.config import EncoderConfig, Recompute
from osum_echat.rates import ENCODER_FRAMES_PER_SECOND, FRAMES_PER_SECOND


def whisper_positions(length: int, dim: int) -> Tensor:
    """Whisper's fixed table [length, dim]: sines in the first half, cosines in the second, periods from 2 pi to 20,000
    pi."""
    half = dim // 2
    inverse = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half))
    angles = torch.arange(length)[:, None] * inverse[None]
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class AudioEncoder(nn.Module):
    """Log-mel to frames at 50 a second."""

    positions_SE: Tensor

    def __init__(self, config: EncoderConfig, recompute: Recompute = False) -> None:
        super().__init__()
        self.config = config
        self.recompute = recompute
        self.conv1 = nn.Conv1d(config.mels, config.dim, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.dim, config.dim, kernel_size=3, stride=2, padding=1)
        # In the state dict, because a checkpoint's (rounded) table is the one that its weights were trained with.
        self.register_buffer("positions_SE", whisper_positions(config.max_positions, config.dim))
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(
            Block(config.dim, config.heads, config.ffn, activation=F.gelu, key_bias=False, dropout=config.dropout)
            for _ in range(config.layers)
        )
        self.norm = nn.LayerNorm(config.dim, eps=NORM_EPS)

    def forward(
        self, feats_NTF: Tensor, lengths_N: Tensor, layers: tuple[int, ...] = (), rows: EndToEnd | None = None
    ) -> tuple[list[Tensor], Tensor]:
        """Encode.

        Args:
            feats_NTF: log-mel features; what stands after a recording's end has no effect.
            lengths_N: frames of each recording.
            layers: which layers to return: k for the output of block k, the number of blocks for the final (normed)
                output, 0 for the input of the first block. Default: the final output.
            rows: where its frames are valid (`plan.Plan.encoder`); worked out from ``lengths_N``, which are read to the
                host, when not given.

        Returns:
            The layers, each [N, S, E], in the order asked for, and the number of valid encoder frames of each
            recording.

        Raises:
            ValueError: for a recording that is longer than the position table.
        """
        layers = layers or (self.config.layers,)
        dtype = self.conv1.weight.dtype
        x_NFT = feats_NTF.to(dtype).transpose(1, 2) * valid_frames(lengths_N, feats_NTF.shape[1])[:, None]
        x_NET = F.gelu(self.conv1(x_NFT))
        x_NET = x_NET * valid_frames(lengths_N, x_NET.shape[2])[:, None]
        x_NSE = F.gelu(self.conv2(x_NET)).transpose(1, 2)
        lengths_N = (lengths_N + 1) // 2
        if x_NSE.shape[1] > self.config.max_positions:
            raise ValueError(
                f"a recording of {feats_NTF.shape[1] / FRAMES_PER_SECOND:.1f} s is longer than the encoder's {self.config.max_positions / ENCODER_FRAMES_PER_SECOND:.1f} s; "
                "cut it, or raise encoder.max_positions"
            )
        x_NSE = x_NSE + self.positions_SE[: x_NSE.shape[1]].to(x_NSE.dtype)
        rows = rows or EndToEnd.of(lengths_N.tolist(), x_NSE.shape[1]).to(x_NSE.device)
        x_1PE = self.dropout(rows.join(x_NSE))
        kept = {0: rows.part(x_1PE)} if 0 in layers else {}
        for number, block in enumerate(self.blocks, start=1):
            if number > max(layers):
                break
            x_1PE = run_block(block, x_1PE, rows.recordings, self.training and self.recompute)
            if number in layers:
                kept[number] = rows.part(self.norm(x_1PE) if number == self.config.layers else x_1PE)
        return [kept[layer] for layer in layers], lengths_N
