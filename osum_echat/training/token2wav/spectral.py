"""Spectral losses of the vocoder: multi-resolution STFT (Parallel WaveGAN, arXiv 1910.11480) and log-mel.

Shapes: B batch, S samples, F frequency bins, T frames, M mel bins.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

FLOOR = 1e-5


class SpectralLoss(nn.Module):
    """Distance of two waveforms over several STFT sizes (hop a quarter of each).

    Per size: L1 of log magnitudes, plus the Frobenius norm of the magnitudes' difference relative to the target's
    (spectral convergence), which is about the loud parts.
    """

    def __init__(self, sizes: Sequence[int] = (256, 512, 1024, 2048)) -> None:
        super().__init__()
        self.sizes = list(sizes)
        for n_fft in self.sizes:
            self.register_buffer(f"window_{n_fft}", torch.hann_window(n_fft), persistent=False)

    def _magnitude(self, wave_BS: Tensor, n_fft: int) -> Tensor:
        spectrum = torch.stft(wave_BS, n_fft, n_fft // 4, window=getattr(self, f"window_{n_fft}"), return_complex=True)
        return (spectrum.real.square() + spectrum.imag.square() + FLOOR**2).sqrt()

    def forward(self, made_BS: Tensor, real_BS: Tensor) -> Tensor:
        losses = []
        for n_fft in self.sizes:
            made, real = self._magnitude(made_BS.float(), n_fft), self._magnitude(real_BS.float(), n_fft)
            losses.append((made.log() - real.log()).abs().mean())
            losses.append((made - real).norm() / real.norm().clamp(min=FLOOR))
        return torch.stack(losses).sum() / len(self.sizes)


class MelLoss(nn.Module):
    """L1 between log-mels of two waveforms, with the filters of the prompt mel (rows of a magnitude spectrogram, [M,
    F])."""

    window: Tensor
    filters_MF: Tensor

    def __init__(self, filters_MF: Tensor, n_fft: int, hop: int) -> None:
        super().__init__()
        self.n_fft, self.hop = n_fft, hop
        self.register_buffer("window", torch.hann_window(n_fft), persistent=False)
        self.register_buffer("filters_MF", filters_MF.float(), persistent=False)

    def log_mel(self, wave_BS: Tensor) -> Tensor:
        spectrum = torch.stft(wave_BS.float(), self.n_fft, self.hop, window=self.window, return_complex=True)
        magnitude = (spectrum.real.square() + spectrum.imag.square() + 1e-9).sqrt()
        return (self.filters_MF @ magnitude).clamp(min=FLOOR).log()

    def forward(self, made_BS: Tensor, real_BS: Tensor) -> Tensor:
        return (self.log_mel(made_BS) - self.log_mel(real_BS)).abs().mean()
