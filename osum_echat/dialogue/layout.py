"""What a sequence is made of: ordered segments, each supervised or context.

`Layout` is what `tasks.build_layout` returns for one sample; training uses all of it, inference the first
``num_prefix`` segments. `Row` is the flat form once the number of audio positions is known; `packing.pack` puts rows
side by side. Ids only, no tensors of a model.

Masked positions: a ``&&`` filler keeps its slot, its input is text id 0 at position number 1, nothing attends to it, it
counts no position, it is not a target; but the target *after* it is predicted from it. Training of the released weights
did this.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from osum_echat.rates import FRAMES_PER_POSITION

IGNORE = -100
MASKED_POSITION = 1
MASKED_INPUT_ID = 0

Role = Literal["system", "header", "prompt", "history", "audio", "think", "text", "speech"]


@dataclass(frozen=True)
class Segment:
    """A run of unified ids, or one audio slot (``audio`` = index into the sample's list of recordings, ``ids`` empty).

    ``masked``: offsets into ``ids`` that are masked positions. ``supervised``: its ids (but masked ones) are targets.
    """

    role: Role
    ids: tuple[int, ...] = ()
    audio: int | None = None
    supervised: bool = False
    masked: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        assert (self.audio is None) or not (self.ids or self.supervised), f"an audio slot holds no ids: {self}"
        assert all(0 <= m < len(self.ids) for m in self.masked), f"masked offsets outside the ids: {self}"


@dataclass(frozen=True)
class Layout:
    """Segments of one sample. The first ``num_prefix`` are what inference feeds before it generates.

    ``text_softmax``: targets are scored over the text classes only (tasks without speech out), else over text and
    speech together.
    """

    segments: tuple[Segment, ...]
    num_prefix: int
    text_softmax: bool

    @property
    def prefix(self) -> tuple[Segment, ...]:
        return self.segments[: self.num_prefix]


@dataclass
class Row:
    """A sample as flat arrays of length T (numpy int64 / bool), before batching.

    Attributes:
        ids_T: unified input ids; `MASKED_INPUT_ID` at audio and masked positions.
        positions_T: position numbers (masked positions: `MASKED_POSITION`).
        visible_T: False where nothing may attend to the position.
        targets_T: class to predict *at* this position (that is, the next id), or `IGNORE`.
        text_softmax: see `Layout`.
        audio: (recording index, first position, number of positions) of each audio slot, in order.
    """

    ids_T: npt.NDArray[np.int64]
    positions_T: npt.NDArray[np.int64]
    visible_T: npt.NDArray[np.bool_]
    targets_T: npt.NDArray[np.int64]
    text_softmax: bool
    audio: list[tuple[int, int, int]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids_T)


def audio_positions(frames: int) -> int:
    """LLM positions for a log-mel of ``frames`` frames."""
    return -(-frames // FRAMES_PER_POSITION)


def flatten(segments: Sequence[Segment], audio_lengths: Sequence[int], text_softmax: bool = True) -> Row:
    """Lay segments out as a `Row`. ``audio_lengths[i]`` = positions of recording i (see `audio_positions`)."""
    lengths = [len(s.ids) if s.audio is None else audio_lengths[s.audio] for s in segments]
    total = sum(lengths)
    ids_T = np.full(total, MASKED_INPUT_ID, dtype=np.int64)
    visible_T = np.ones(total, dtype=np.bool_)
    supervised_T = np.zeros(total, dtype=np.bool_)
    audio: list[tuple[int, int, int]] = []
    start = 0
    for segment, length in zip(segments, lengths, strict=True):
        end = start + length
        if segment.audio is not None:
            audio.append((segment.audio, start, length))
        else:
            ids_T[start:end] = segment.ids
            supervised_T[start:end] = segment.supervised
            if segment.masked:
                hidden = start + np.asarray(segment.masked)
                ids_T[hidden], visible_T[hidden], supervised_T[hidden] = MASKED_INPUT_ID, False, False
        start = end
    positions_T = np.where(visible_T, np.cumsum(visible_T) - 1, MASKED_POSITION).astype(np.int64)
    targets_T = np.full(total, IGNORE, dtype=np.int64)
    if total > 1:
        targets_T[:-1] = np.where(supervised_T[1:], ids_T[1:], IGNORE)
    return Row(ids_T, positions_T, visible_T, targets_T, text_softmax, audio)
