"""Two resamplers: soxr for everything that is heard, and the windowed sinc that prompt audio of the vocoder was made
with.

soxr is faster and cleaner. The sinc (Hann window, six zero crossings, roll-off 0.99: torchaudio's default) is kept
because the flow model was trained on prompts resampled so, and numbers can be compared only through the same kernel.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ZERO_CROSSINGS = 6
ROLL_OFF = 0.99


def resample(samples: npt.NDArray[np.float32], rate: int, target: int) -> npt.NDArray[np.float32]:
    """[n] or [channels, n] from ``rate`` to ``target`` Hz by soxr (HQ); the input itself when the rates are equal."""
    if rate == target:
        return samples
    import soxr

    return np.ascontiguousarray(soxr.resample(samples.T, rate, target).T, dtype=np.float32)


def resample_sinc(samples: Tensor, rate: int, target: int) -> Tensor:
    """[..., n] from ``rate`` to ``target`` Hz by the windowed sinc; ceil(n * target / rate) samples."""
    if rate == target:
        return samples
    common = math.gcd(rate, target)
    rate, target = rate // common, target // common
    kernel, width = _sinc_kernel(rate, target)
    flat = samples.reshape(-1, 1, samples.shape[-1]).to(torch.float32)
    padded = torch.nn.functional.pad(flat, (width, width + rate))
    phases = torch.nn.functional.conv1d(padded, kernel.to(flat.device), stride=rate)  # [rows, target, blocks]
    out = phases.transpose(1, 2).reshape(len(flat), -1)
    length = -(-target * samples.shape[-1] // rate)
    return out[:, :length].reshape(*samples.shape[:-1], length)


@functools.lru_cache(maxsize=8)
def _sinc_kernel(rate: int, target: int) -> tuple[Tensor, int]:
    """Filters [target, 1, 2 * width + rate], one for each output phase within a block of ``rate`` input samples."""
    cutoff = min(rate, target) * ROLL_OFF
    width = math.ceil(ZERO_CROSSINGS * rate / cutoff)
    taps = torch.arange(-width, width + rate, dtype=torch.float64) / rate
    phase = (torch.arange(target) / target).double()  # rounded to float32, as the kernel that is to be matched
    # Distance of each tap from the output sample, in zero crossings of the sinc.
    distance = ((taps[None] - phase[:, None]) * cutoff).clamp(-ZERO_CROSSINGS, ZERO_CROSSINGS)
    window = torch.cos(distance * math.pi / ZERO_CROSSINGS / 2).square()
    kernel = torch.sinc(distance) * window * (cutoff / rate)
    return kernel[:, None].to(torch.float32), width
