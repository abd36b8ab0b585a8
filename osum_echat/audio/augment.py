"""Augmentation of samples (speed, noise, reverberation) and of log-mels (masked and swapped stretches).

Every function takes its random generator, so a data pipeline that saves the generator's state repeats its augmentation to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from osum_echat.audio.resample import resample

Samples = npt.NDArray[np.float32]


@dataclass(frozen=True)
class AugmentConfig:
    """What a training pipeline does to a recording; the defaults are those of the published configuration.

    Attributes:
        spec_augment, spec_substitute: mask and swap stretches of the log-mel.
        speeds: factors to draw from; one value of 1.0 is no change.
        noise_probability, noise_snr_db: mix in noise at a signal-to-noise ratio drawn from the range.
        reverb_probability, reverb_seconds: convolve with a decaying room of a reverberation time drawn from the range.
    """

    spec_augment: bool = True
    num_time_masks: int = 2
    max_time_mask: int = 50
    num_mel_masks: int = 2
    max_mel_mask: int = 10
    spec_substitute: bool = True
    num_substitutes: int = 3
    max_substitute: int = 30
    speeds: list[float] = field(default_factory=lambda: [1.0])
    noise_probability: float = 0.0
    noise_snr_db: tuple[float, float] = (5.0, 25.0)
    reverb_probability: float = 0.0
    reverb_seconds: tuple[float, float] = (0.1, 0.5)

    def __post_init__(self) -> None:
        if not self.speeds or min(self.speeds) <= 0:
            raise ValueError(f"speeds must be positive factors, found {self.speeds}")
        for name in ("noise_probability", "reverb_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, found {getattr(self, name)}")


def augment_samples(samples: Samples, rate: int, config: AugmentConfig, rng: np.random.Generator) -> Samples:
    """The sample-level part of ``config``: speed, then reverberation, then noise."""
    if list(config.speeds) != [1.0]:
        samples = change_speed(samples, rate, float(rng.choice(np.asarray(config.speeds))))
    if config.reverb_probability and rng.random() < config.reverb_probability:
        samples = reverberate(samples, rate, rng.uniform(*config.reverb_seconds), rng)
    if config.noise_probability and rng.random() < config.noise_probability:
        samples = add_noise(samples, rng.uniform(*config.noise_snr_db), rng)
    return samples


def augment_features(feats_TF: Samples, config: AugmentConfig, rng: np.random.Generator) -> Samples:
    """The log-mel part of ``config``; returns a new array when anything changes."""
    if config.spec_augment:
        feats_TF = spec_augment(
            feats_TF, rng, config.num_time_masks, config.max_time_mask, config.num_mel_masks, config.max_mel_mask
        )
    if config.spec_substitute:
        feats_TF = spec_substitute(feats_TF, rng, config.num_substitutes, config.max_substitute)
    return feats_TF


def change_speed(samples: Samples, rate: int, factor: float) -> Samples:
    """Play ``factor`` times as fast, pitch moving along: [n] -> about [n / factor]."""
    return samples if factor == 1.0 else resample(samples, round(rate * factor), rate)


def add_noise(samples: Samples, snr_db: float, rng: np.random.Generator, noise: Samples | None = None) -> Samples:
    """Mix in ``noise`` (a random part of it, repeated when short; default Gaussian) at ``snr_db`` over the whole recording."""
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
    for start, stop in _stretches(frames, num_time_masks, max_time_mask, rng):
        out[start:stop] = 0
    for start, stop in _stretches(mels, num_mel_masks, max_mel_mask, rng):
        out[:, start:stop] = 0
    return out


def spec_substitute(feats_TF: Samples, rng: np.random.Generator, count: int = 3, longest: int = 30) -> Samples:
    """Replace random stretches of frames by what stood a random time before them (WeNet's spec_sub)."""
    out = feats_TF.copy()
    for start, stop in _stretches(len(out), count, longest, rng):
        back = int(rng.integers(start + 1))
        out[start:stop] = feats_TF[start - back : stop - back]
    return out


def _stretches(size: int, count: int, longest: int, rng: np.random.Generator) -> Sequence[tuple[int, int]]:
    """``count`` random intervals inside [0, size), each 1..longest long."""
    if size < 1 or longest < 1:
        return []
    starts = rng.integers(size, size=count)
    lengths = rng.integers(1, longest + 1, size=count)
    return [(int(s), int(min(size, s + n))) for s, n in zip(starts, lengths, strict=True)]
