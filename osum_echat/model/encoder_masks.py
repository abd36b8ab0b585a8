"""Masks on the encoder's outputs during training: SpecAugment one level higher.

With a frozen encoder whose outputs are kept on disk (`encoder_cache`) no two epochs may differ in the log-mel, and a
small adapter soon knows its recordings by heart. Here spans of frames and single channels of what the *adapter* is
given are set to zero instead, drawn anew at every step.

After wav2vec 2.0's fine-tuning (Baevski et al. 2020, arXiv 2006.11477) and SpecAugment (Park et al. 2019). Off in the
published model.

N recordings, S encoder frames (50/s), E encoder width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class EncoderMasks:
    """How much is masked.

    Attributes:
        spans_per_second: mean number of spans in a second of audio.
        longest_span: frames of 20 ms; lengths are drawn evenly from 1 to this.
        channels: share of the channels that is zero through a recording.
    """

    spans_per_second: float = 0.7
    longest_span: int = 10
    channels: float = 0.1

    def __post_init__(self) -> None:
        if self.spans_per_second < 0 or self.longest_span < 1 or not 0 <= self.channels < 1:
            raise ValueError(
                f"encoder_masks: spans_per_second >= 0, longest_span >= 1 and channels in [0, 1) are needed, found {self}"
            )

    def __call__(self, layers: list[Tensor], lengths_N: Tensor) -> list[Tensor]:
        """``layers``, each [N, S, E], with the same frames and channels zero in all of them. Draws from torch's
        generator of the CPU."""
        n, frames, width = layers[0].shape
        keep_NS = torch.ones(n, frames, dtype=torch.bool)
        for row, length in enumerate(lengths_N.tolist()):
            count = int(torch.poisson(torch.tensor(self.spans_per_second * length / 50)))
            starts = torch.randint(max(length, 1), (count,))
            sizes = torch.randint(1, self.longest_span + 1, (count,))
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                keep_NS[row, start : start + size] = False
        keep_NE = torch.rand(n, width) >= self.channels
        keep_NSE = (keep_NS[:, :, None] & keep_NE[:, None, :]).to(layers[0].device)
        return [layer * keep_NSE for layer in layers]
