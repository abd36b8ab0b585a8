"""Recordings on their way to the device that computes their log-mels (``data.features: device``).

A worker then decodes and draws what the augmentation of features does, and the training process computes log-mels for a
whole batch where it trains: a worker's time falls by what features and their masks cost. Samples travel in 16 bits,
which is exact for 16-bit recordings that no augmentation has changed; others are scaled to their loudest sample first.

N recordings, T frames, F mel bins, S samples with their reflections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from osum_echat import device as devices
from osum_echat.audio.features import REACH, LogMel, num_frames

_STEPS = 32768.0
MASKED = -1
"""In `Sound.source_T`: a frame whose mels are all 0."""
_FRAMES_AT_ONCE = 30_000
"""Of all recordings whose log-mels are computed together: some 150 MB of frames and spectra."""


@dataclass(frozen=True)
class Sound:
    """One recording.

    Attributes:
        pcm_S: its samples in 16 bits, reflected by `REACH` at both ends.
        scale: what a step of them stands for.
        source_T: the frame that stands at each place after augmentation, -1 where all mels are 0; None: all as they
            are.
        hidden_F: mels that are 0; None: none.
        frames: T.
    """

    pcm_S: Tensor
    scale: float
    frames: int
    source_T: npt.NDArray[np.int64] | None = None
    hidden_F: npt.NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        """Frames."""
        return self.frames

    @classmethod
    def of(
        cls,
        samples: npt.NDArray[np.float32],
        source_T: npt.NDArray[np.int64] | None = None,
        hidden_F: npt.NDArray[np.bool_] | None = None,
    ) -> Sound:
        """Of float samples at 16 kHz in [-1, 1].

        Raises:
            ValueError: for less than 12.6 ms, as `LogMel` does.
        """
        if len(samples) <= REACH:
            raise ValueError(f"log-mel needs more than {REACH} samples, found {len(samples)}")
        steps = samples * np.float32(_STEPS)
        pcm = np.rint(steps)
        scale = 1.0 / _STEPS
        if not np.array_equal(pcm, steps) or np.abs(pcm).max() >= _STEPS:
            loudest = float(np.abs(samples).max())
            scale = max(loudest, 1e-12) / (_STEPS - 1)
            pcm = np.rint(samples * np.float32(1.0 / scale))
        # Of samples that are not finite the scale is not either, and the step that meets them names them.
        with np.errstate(invalid="ignore"):
            reflected = np.pad(pcm.astype(np.int16), REACH, mode="reflect")
        return cls(torch.from_numpy(reflected), scale, num_frames(len(samples)), source_T, hidden_F)


@dataclass(frozen=True)
class Sounds:
    """The recordings of a batch, zeros behind each."""

    pcm_NS: Tensor
    scale_N: Tensor
    source_NT: Tensor
    hidden_NF: Tensor

    @classmethod
    def of(cls, sounds: Sequence[Sound], num_mels: int) -> Sounds:
        frames = max(len(sound) for sound in sounds)
        pcm_NS = torch.zeros(len(sounds), max(len(sound.pcm_S) for sound in sounds), dtype=torch.int16)
        source_NT = torch.arange(frames).repeat(len(sounds), 1)
        hidden_NF = torch.zeros(len(sounds), num_mels, dtype=torch.bool)
        for n, sound in enumerate(sounds):
            pcm_NS[n, : len(sound.pcm_S)] = sound.pcm_S
            if sound.source_T is not None:
                source_NT[n, : len(sound)] = torch.from_numpy(sound.source_T)
            if sound.hidden_F is not None:
                hidden_NF[n] = torch.from_numpy(sound.hidden_F)
        return cls(pcm_NS, torch.tensor([sound.scale for sound in sounds]), source_NT, hidden_NF)

    def pin_memory(self) -> Sounds:
        """The same in page-locked memory."""
        return Sounds(**{name: tensor.pin_memory() for name, tensor in vars(self).items()})

    @torch.no_grad()
    def features(self, lengths_N: Tensor, device: torch.device) -> Tensor:
        """Log-mels [N, T, F] on ``device``, computed there; ``lengths_N``: frames of each recording, on the device."""
        count, frames = self.source_NT.shape
        pcm_NS, scale_N, source_NT, hidden_NF = (devices.send(t, device) for t in vars(self).values())
        log_mel = LogMel(hidden_NF.shape[1])
        parts = []
        rows = max(1, _FRAMES_AT_ONCE // max(1, frames))
        for first in range(0, count, rows):
            here = slice(first, first + rows)
            parts.append(log_mel.of_reflected(pcm_NS[here] * scale_N[here, None], lengths_N[here], frames))
        feats_NTF = torch.cat(parts)
        masked_NT1 = (source_NT == MASKED)[..., None]
        index_NTF = source_NT.clamp(min=0)[..., None].expand_as(feats_NTF)
        return feats_NTF.gather(1, index_NTF).masked_fill_(masked_NT1 | hidden_NF[:, None], 0.0)
