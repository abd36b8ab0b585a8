"""Augmentation of samples (speed, noise, reverberation) and of log-mels (masked and swapped stretches).

Every function takes its random generator, so a data pipeline that saves the generator's state repeats its augmentation
to the bit. The defaults of the log-mel functions are those of the published configuration.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from osum_echat.audio.resample import resample

Samples = npt.NDArray[np.float32]


def change_speed(samples: Samples, rate: int, factor: float) -> Samples:
    """Play ``factor`` times as fast, pitch moving along: [n] -> about [n / factor]."""
    return samples if factor == 1.0 else resample(samples, round(rate * factor), rate)


def add_noise(samples: Samples, snr_db: float, rng: np.random.Generator, noise: Samples | None = None) -> Samples:
    """Mix in ``noise`` (a random part of it, repeated when short; default Gaussian) at ``snr_db`` over the whole
    recording."""
    if noise is None:
        noise = rng.standard_normal(len(samples), dtype=np.float32)
    else:
        noise = np.resize(np.roll(noise, -int(rng.integers(len(noise)))), len(samples))
    signal_power, noise_power = float(np.mean(samples**2)), float(np.mean(noise**2))
    if signal_power == 0 or noise_power == 0:
        return samples
    gain = np.sqrt(signal_power / noise_power / 10 ** (snr_db / 10))
    return (samples + np.float32(gain) * noise).astype(np.float32)


def reverberate(samples: Samples, rate: int, seconds: float, rng: np.random.Generator, impulse: Samples | None = None) -> Samples:
    """Convolve with a room that decays by 60 dB in ``seconds`` (or with ``impulse``); length and power stay."""
    if impulse is None:
        tail = np.arange(max(1, round(seconds * rate))) / rate
        impulse = (rng.standard_normal(len(tail)) * 10 ** (-3 * tail / seconds) * 0.1).astype(np.float32)
        impulse[0] = 1.0  # the direct sound
    length = len(samples) + len(impulse) - 1
    size = 1 << (length - 1).bit_length()
    wet = np.fft.irfft(np.fft.rfft(samples, size) * np.fft.rfft(impulse, size), size)[: len(samples)]
    dry_power, wet_power = float(np.mean(samples**2)), float(np.mean(wet**2))
    return (wet * np.sqrt(dry_power / wet_power)).astype(np.float32) if wet_power > 0 else samples


def spec_augment(
    feats_TF: Samples,
    rng: np.random.Generator,
    num_time_masks: int = 2,
    max_time_mask: int = 50,
    num_mel_masks: int = 2,
    max_mel_mask: int = 10,
) -> Samples:
    """Set random stretches of frames and bands of mels to 0 (Park et al. 2019); lengths are drawn from 1..max."""
    out = feats_TF.copy()
    frames, mels = out.shape
    for start, stop in stretches(frames, num_time_masks, max_time_mask, rng):
        out[start:stop] = 0
    for start, stop in stretches(mels, num_mel_masks, max_mel_mask, rng):
        out[:, start:stop] = 0
    return out


def spec_substitute(feats_TF: Samples, rng: np.random.Generator, count: int = 3, longest: int = 30) -> Samples:
    """Replace random stretches of frames by what stood a random time before them (WeNet's spec_sub)."""
    out = feats_TF.copy()
    for start, stop, back in substitutions(len(out), count, longest, rng):
        out[start:stop] = feats_TF[start - back : stop - back]
    return out


def substitutions(frames: int, count: int, longest: int, rng: np.random.Generator) -> list[tuple[int, int, int]]:
    """What `spec_substitute` draws: (start, stop, how far back the frames come from), later ones over earlier ones."""
    return [(start, stop, int(rng.integers(start + 1))) for start, stop in stretches(frames, count, longest, rng)]


def stretches(size: int, count: int, longest: int, rng: np.random.Generator) -> Sequence[tuple[int, int]]:
    """``count`` random intervals inside [0, size), each 1..longest long."""
    if size < 1 or longest < 1:
        return []
    starts = rng.integers(size, size=count)
    lengths = rng.integers(1, longest + 1, size=count)
    return [(int(s), int(min(size, s + n))) for s, n in zip(starts, lengths, strict=True)]
