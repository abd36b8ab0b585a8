"""G.711: 8 kHz telephone audio, one byte a sample, µ-law (``audio/pcmu``) and A-law (``audio/pcma``).

Decoding is a table of 256 values, encoding a search for the nearest of them, so that a byte that was decoded is encoded
to itself. Source: ITU-T recommendation G.711 (1988), tables 1a to 2b.
"""

from __future__ import annotations

import functools
from typing import Literal

import numpy as np
import numpy.typing as npt

RATE = 8_000
Law = Literal["mu", "a"]
Samples = npt.NDArray[np.float32]


@functools.lru_cache(maxsize=2)
def _table(law: Law) -> npt.NDArray[np.int16]:
    """The 16-bit value of each byte."""
    code = np.arange(256)
    if law == "mu":
        code = ~code & 0xFF
        segment, step = (code >> 4) & 7, code & 15
        size = (((step << 3) + 0x84) << segment) - 0x84
        return np.where(code & 0x80, -size, size).astype(np.int16)
    code = code ^ 0x55
    segment, step = (code >> 4) & 7, code & 15
    size = np.where(segment == 0, (step << 4) + 8, ((step << 4) + 0x108) << np.maximum(segment - 1, 0))
    return np.where(code & 0x80, size, -size).astype(np.int16)


@functools.lru_cache(maxsize=2)
def _borders(law: Law) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8]]:
    """Borders between neighbouring values, and the byte of each value, in rising order. Of two bytes for zero the
    positive one is taken."""
    table = _table(law)
    bytes_in_order = np.argsort(table, kind="stable").astype(np.uint8)
    values = table[bytes_in_order].astype(np.float64)
    keep = np.append(np.diff(values) > 0, True)
    values, bytes_in_order = values[keep], bytes_in_order[keep]
    return (values[1:] + values[:-1]) / 2, bytes_in_order


def decode(data: bytes, law: Law) -> Samples:
    """[n] float32 in [-1, 1] of n bytes."""
    return _table(law)[np.frombuffer(data, dtype=np.uint8)].astype(np.float32) / np.float32(32768)


def encode(samples: Samples, law: Law) -> bytes:
    """One byte for each of the samples [n], the nearest value."""
    borders, bytes_in_order = _borders(law)
    return bytes_in_order[np.searchsorted(borders, samples.astype(np.float64) * 32768)].tobytes()
