"""Random draws as fields over absolute time: frame t gets the same numbers whatever was asked for before or after.

Streaming and offline synthesis of the same seed therefore start from the same noise. Everything is drawn on the CPU, so
that a seed means the same on every device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from osum_echat.token2wav.config import MEL_HOP


class NoiseField:
    """Standard normal values [time, width], one row per frame, drawn in order and kept only as far back as asked for.

    ``width`` must be a multiple of 16: torch draws normals in groups of 16, and only then one long draw equals many
    short ones.
    """

    def __init__(self, width: int, seed: int) -> None:
        if width % 16:
            raise ValueError(f"width must be a multiple of 16, found {width}")
        self.width = width
        self._generator = torch.Generator().manual_seed(seed)
        self._start = 0
        self._rows = torch.empty(0, width)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows start .. stop, [stop - start, width]. Rows before ``start`` are forgotten; asking for them later is our
        mistake."""
        assert start >= self._start, f"noise rows from {start} were forgotten (kept from {self._start})"
        end = self._start + len(self._rows)
        if stop > end:
            fresh = torch.randn(stop - end, self.width, generator=self._generator)
            self._rows = torch.cat((self._rows, fresh))
        self._rows = self._rows[start - self._start :]
        self._start = start
        return self._rows[: stop - start]


class Draws:
    """All draws of one reply, from one seed.

    ``prompt`` and ``reply`` are the ODE's starting noise for either part (so that the reply's does not depend on the
    prompt's length), ``source`` the vocoder's noise and ``phase_1H`` its harmonic phases, both for ``harmonics``
    numbers (`VocoderConfig.source_noises`).
    """

    def __init__(self, seed: int, mel_bins: int, harmonics: int) -> None:
        if seed < 0:
            raise ValueError(f"seed must not be negative, found {seed}")
        first = (seed * 4) % 2**62
        self.harmonics = harmonics
        self.prompt = NoiseField(mel_bins, first)
        self.reply = NoiseField(mel_bins, first + 1)
        self._source = NoiseField(MEL_HOP * harmonics, first + 2)
        generator = torch.Generator().manual_seed(first + 3)
        self.phase_1H = (torch.rand(1, harmonics, generator=generator) * 2.0 - 1.0) * math.pi

    def source(self, start: int, stop: int) -> Tensor:
        """Vocoder noise of mel frames start .. stop, [1, 256 * frames, harmonics]."""
        return self._source.rows(start, stop).view(1, -1, self.harmonics)
