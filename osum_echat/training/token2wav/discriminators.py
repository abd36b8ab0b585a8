"""Critics of the vocoder: one per period (HiFi-GAN, arXiv 2010.05646) and one per STFT resolution (UnivNet, arXiv
2106.07889).

A period critic folds the waveform into columns of one period and sees pitch; a resolution critic sees a magnitude
spectrogram. Both return a map of scores and the features of every layer, for the feature matching loss.

Shapes: B batch, S samples, C channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm


@dataclass
class CriticConfig:
    """Sizes of the critics. The defaults are small: a CPU can train against them."""

    periods: list[int] = field(default_factory=lambda: [2, 3, 5, 7, 11])
    period_channels: list[int] = field(default_factory=lambda: [16, 32, 64, 128, 128])
    resolutions: list[int] = field(default_factory=lambda: [512, 1024, 2048])  # n_fft; hop is a quarter
    resolution_channels: int = 16


class PeriodCritic(nn.Module):
    def __init__(self, period: int, channels: Sequence[int]) -> None:
        super().__init__()
        self.period = period
        sizes = [1, *channels]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), stride=(3 if i < len(channels) - 1 else 1, 1), padding=(2, 0)))
            for i, (a, b) in enumerate(itertools.pairwise(sizes))
        )
        self.out = weight_norm(nn.Conv2d(sizes[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        missing = -wave_BS.shape[1] % self.period
        x = F.pad(wave_BS[:, None], (0, missing), mode="reflect").unflatten(2, (-1, self.period))
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return self.out(x), features


class ResolutionCritic(nn.Module):
    window: Tensor

    def __init__(self, n_fft: int, channels: int) -> None:
        super().__init__()
        self.n_fft = n_fft
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        shapes = [(1, (3, 9), (1, 2)), (channels, (3, 9), (1, 2)), (channels, (3, 9), (1, 2)), (channels, (3, 3), (1, 1))]
        self.convs = nn.ModuleList(
            weight_norm(nn.Conv2d(c, channels, k, stride=s, padding=(k[0] // 2, k[1] // 2))) for c, k, s in shapes
        )
        self.out = weight_norm(nn.Conv2d(channels, 1, (3, 3), padding=1))

    def forward(self, wave_BS: Tensor) -> tuple[Tensor, list[Tensor]]:
        spectrum = torch.stft(wave_BS.float(), self.n_fft, self.n_fft // 4, window=self.window, return_complex=True)
        # The cube root brings quiet and loud parts within reach of one set of weights.
        x = (spectrum.abs() + 1e-7).pow(0.33).transpose(1, 2)[:, None]
        features = []
        for conv in self.convs:
            x = F.leaky_relu(conv(x), 0.1)
            features.append(x)
        return self.out(x), features


class Critics(nn.Module):
    """All of them."""

    def __init__(self, cfg: CriticConfig) -> None:
        super().__init__()
        self.critics = nn.ModuleList(
            [
                *(PeriodCritic(period, cfg.period_channels) for period in cfg.periods),
                *(ResolutionCritic(n_fft, cfg.resolution_channels) for n_fft in cfg.resolutions),
            ]
        )

    def forward(self, wave_BS: Tensor) -> list[tuple[Tensor, list[Tensor]]]:
        return [critic(wave_BS) for critic in self.critics]


Judgement = list[tuple[Tensor, list[Tensor]]]


def critic_loss(real: Judgement, made: Judgement) -> Tensor:
    """Least squares: real speech is worth 1, made speech 0. Mean over critics."""
    losses = [(r.float() - 1).square().mean() + m.float().square().mean() for (r, _), (m, _) in zip(real, made, strict=True)]
    return torch.stack(losses).mean()


def adversarial_loss(made: Judgement) -> Tensor:
    """What the vocoder loses when its speech is not taken for real."""
    return torch.stack([(m.float() - 1).square().mean() for m, _ in made]).mean()


def feature_loss(real: Judgement, made: Judgement) -> Tensor:
    """L1 between the critics' features, each relative to the size of the real ones."""
    losses = []
    for (_, of_real), (_, of_made) in zip(real, made, strict=True):
        for r, m in zip(of_real, of_made, strict=True):
            losses.append((r.detach().float() - m.float()).abs().mean() / r.detach().float().abs().mean().clamp(min=1e-5))
    return torch.stack(losses).mean()
