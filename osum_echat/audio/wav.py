"""The usual recording of a corpus, 16 kHz 16-bit mono wav, straight from its bytes: a sixth of the time of opening it
with libsndfile."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from osum_echat.audio.io import SAMPLE_RATE

_PCM = (1).to_bytes(2, "little")
_FORMAT = _PCM + (1).to_bytes(2, "little") + SAMPLE_RATE.to_bytes(4, "little")  # PCM, one channel, rate
_BITS = (16).to_bytes(2, "little")


def pcm16_mono_16k(data: bytes) -> npt.NDArray[np.float32] | None:
    """Samples [n] of such a file in [-1, 1), equal to those of `audio.io.to_mono_16k`; None for every other file,
    damaged ones too."""
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        return None
    at, known = 12, False
    while at + 8 <= len(data):
        name, size = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8], "little")
        start = at + 8
        if name == b"fmt ":
            known = data[start : start + 8] == _FORMAT and data[start + 14 : start + 16] == _BITS
        elif name == b"data":
            if not known or size % 2 or start + size > len(data):
                return None
            return np.frombuffer(data, dtype="<i2", count=size // 2, offset=start) * np.float32(1 / 32768)
        at = start + size + size % 2
    return None
