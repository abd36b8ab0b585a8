"""Fundamental frequency per mel frame, the target of the vocoder's pitch predictor, by WORLD's DIO and StoneMask (package pyworld)."""

from __future__ import annotations

import numpy as np

from osum_echat.token2wav.config import MEL_HOP, SAMPLE_RATE

FLOOR_HZ, CEILING_HZ = 60.0, 500.0


def fundamental(samples: np.ndarray, frames: int) -> np.ndarray:
    """F0 in Hz, [frames] float32, 0 where unvoiced. ``samples`` at 22.05 kHz; entry t belongs to the middle of mel frame t.

    Raises ValueError when pyworld is not installed.
    """
    try:
        import pyworld
    except ImportError as error:
        raise ValueError("training a vocoder needs the pitch tracker pyworld: pip install pyworld") from error
    # A little noise keeps digital silence from being called periodic; it is the same on every run.
    noise = np.random.default_rng(0).standard_normal(len(samples)) * 1e-4
    x = samples.astype(np.float64) + noise
    x = x[MEL_HOP // 2 :]  # frame t of the mel is centred half a hop after sample 256 t
    period_ms = 1000.0 * MEL_HOP / SAMPLE_RATE
    rough, times = pyworld.dio(x, SAMPLE_RATE, f0_floor=FLOOR_HZ, f0_ceil=CEILING_HZ, frame_period=period_ms)
    f0 = pyworld.stonemask(x, rough, times, SAMPLE_RATE)[:frames]
    return np.pad(f0, (0, frames - len(f0))).astype(np.float32)
