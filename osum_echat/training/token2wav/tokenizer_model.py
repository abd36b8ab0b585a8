"""The speech tokenizer: whisper log-mel (100 Hz) to one of a few hundred or thousand codes, 25 times a second.

Convolutions only, each position sees about half a second around it: a code says what is heard here, for any length of
recording and without attention that would have to generalise over lengths. The decoder exists for training: it must
tell from the codes which phone (or letter) is spoken and what the spectrum is, while a *style* vector (the mean
spectrum of the recording) tells it for free what is the same all along, so that codes need not spend themselves on the
voice.

Shapes: B batch, T frames at 100 Hz, H = ceil(T/2) at 50 Hz, Q = ceil(H/2) at 25 Hz, M mel bins, D width, S symbols.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from osum_echat.training.token2wav.fsq import FSQ


@dataclass
class TokenizerConfig:
    """Sizes. The defaults have 1.8 M parameters in what is exported."""

    num_mels: int = 128
    levels: list[int] = field(default_factory=lambda: [4, 4, 4, 4])
    width: int = 192
    expansion: int = 3
    kernel: int = 7
    blocks_50: int = 3
    blocks_25: int = 4
    decoder_blocks: int = 3


def halved(lengths_B: Tensor) -> Tensor:
    """ceil(n / 2): what a convolution of stride 2, kernel 3, padding 1 leaves."""
    return (lengths_B + 1) // 2


def mask_of(lengths_B: Tensor, size: int) -> Tensor:
    """1.0 at valid positions, [B, size, 1]."""
    return (torch.arange(size, device=lengths_B.device)[None] < lengths_B[:, None]).unsqueeze(-1).float()


class Block(nn.Module):
    """Depth-wise convolution over time, then a two-layer net per position (ConvNeXt, arXiv 2201.03545), masked: padding
    never leaks."""

    def __init__(self, width: int, expansion: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel, padding=kernel // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, expansion * width)
        self.down = nn.Linear(expansion * width, width)
        self.gain = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x_BTD: Tensor, mask_BT1: Tensor) -> Tensor:
        y_BTD = self.conv(x_BTD.transpose(1, 2)).transpose(1, 2)
        y_BTD = self.down(F.gelu(self.up(self.norm(y_BTD))))
        return (x_BTD + self.gain * y_BTD) * mask_BT1


class Encoder(nn.Module):
    """What is exported: log-mel and frame counts to code indices."""

    def __init__(self, cfg: TokenizerConfig) -> None:
        super().__init__()
        self.conv1 = nn.Conv1d(cfg.num_mels, cfg.width, 3, stride=2, padding=1)
        self.blocks_50 = nn.ModuleList(Block(cfg.width, cfg.expansion, cfg.kernel) for _ in range(cfg.blocks_50))
        self.conv2 = nn.Conv1d(cfg.width, cfg.width, 3, stride=2, padding=1)
        self.blocks_25 = nn.ModuleList(Block(cfg.width, cfg.expansion, cfg.kernel) for _ in range(cfg.blocks_25))
        self.norm = nn.LayerNorm(cfg.width)
        self.fsq = FSQ(cfg.width, cfg.levels)

    def features(self, feats_BMT: Tensor, lengths_B: Tensor) -> Tensor:
        """[B, M, T] log-mel to [B, Q, D] before quantisation."""
        x_BMT = feats_BMT * mask_of(lengths_B, feats_BMT.shape[2]).transpose(1, 2)
        lengths_B = halved(lengths_B)
        x_BHD = F.gelu(self.conv1(x_BMT)).transpose(1, 2)
        mask_BH1 = mask_of(lengths_B, x_BHD.shape[1])
        x_BHD = x_BHD * mask_BH1
        for block in self.blocks_50:
            x_BHD = block(x_BHD, mask_BH1)
        lengths_B = halved(lengths_B)
        x_BQD = F.gelu(self.conv2(x_BHD.transpose(1, 2))).transpose(1, 2)
        mask_BQ1 = mask_of(lengths_B, x_BQD.shape[1])
        x_BQD = x_BQD * mask_BQ1
        for block in self.blocks_25:
            x_BQD = block(x_BQD, mask_BQ1)
        return self.norm(x_BQD)

    def forward(self, feats_BMT: Tensor, lengths_B: Tensor) -> Tensor:
        """The contract of speech_tokenizer_v1.onnx: float32 [B, M, T], int32 [B] frame counts -> indices [B, Q].

        Row b has ceil(ceil(lengths[b] / 2) / 2) codes; what follows them is padding.
        """
        return self.fsq.indices(self.features(feats_BMT, lengths_B))


class Decoder(nn.Module):
    """Training only: from codes to phone logits, letter logits and the log-mel, all at 50 Hz (two per code)."""

    def __init__(self, cfg: TokenizerConfig, phones: int, letters: int) -> None:
        super().__init__()
        self.style = nn.Linear(cfg.num_mels, cfg.width)
        self.blocks = nn.ModuleList(Block(cfg.width, cfg.expansion, cfg.kernel) for _ in range(cfg.decoder_blocks))
        self.norm = nn.LayerNorm(cfg.width)
        self.sizes = [phones, letters, cfg.num_mels]
        self.heads = nn.Linear(cfg.width, 2 * sum(self.sizes))

    def forward(self, codes_BQD: Tensor, lengths_B: Tensor, mean_BM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``lengths_B`` in codes. Phones [B, 2Q, S], letters [B, 2Q, S'] (logits), log-mel [B, 2Q, M]."""
        mask_BQ1 = mask_of(lengths_B, codes_BQD.shape[1])
        x_BQD = (codes_BQD + self.style(mean_BM)[:, None]) * mask_BQ1
        for block in self.blocks:
            x_BQD = block(x_BQD, mask_BQ1)
        out_BHS = self.heads(self.norm(x_BQD)).reshape(x_BQD.shape[0], -1, sum(self.sizes)).float()
        phones_BHS, letters_BHS, mel_BHM = out_BHS.split(self.sizes, dim=-1)
        return phones_BHS, letters_BHS, mel_BHM
