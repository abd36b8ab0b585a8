"""Rows side by side: several samples in one row of a batch, each its own document.

A document attends only to itself, so a sample's loss is the same alone, batched and packed. Padding is at the right end
of a row only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from osum_echat.dialogue.layout import IGNORE, Row

PAD_DOCUMENT = -1


@dataclass
class PackedRows:
    """Ids of a batch [B, T]; recordings are numbered through all samples in the order of ``audio_BT``.

    Attributes:
        ids_BT: unified input ids, 0 at audio, masked and padding positions.
        positions_BT: position numbers, starting at 0 in every document.
        documents_BT: number of the sample that a position belongs to (0, 1, 2 ... over the batch), `PAD_DOCUMENT` for
            padding.
        visible_BT: False where nothing may attend to a position (masked and padding positions).
        targets_BT: class to predict at the position or `IGNORE`.
        text_softmax_BT: True where the target is scored over text classes only.
        audio_index_BT: index into the concatenated audio positions of the batch (recording after recording), -1
            elsewhere.
    """

    ids_BT: Tensor
    positions_BT: Tensor
    documents_BT: Tensor
    visible_BT: Tensor
    targets_BT: Tensor
    text_softmax_BT: Tensor
    audio_index_BT: Tensor

    @property
    def padding_fraction(self) -> float:
        return float((self.documents_BT == PAD_DOCUMENT).float().mean())

    def to(self, device: torch.device) -> PackedRows:
        return PackedRows(**{k: v.to(device, non_blocking=True) for k, v in vars(self).items()})


def pack(rows: Sequence[Row], plan: Sequence[Sequence[int]] | None = None, multiple_of: int = 1) -> PackedRows:
    """Put ``rows`` into a batch.

    Args:
        rows: samples; their recordings are numbered in this order (all of row 0, then of row 1, ...).
        plan: which samples stand in which batch row, for example ``[[0, 2], [1]]``; default one sample a batch row.
        multiple_of: T is rounded up to a multiple of this.
    """
    plan = plan if plan is not None else [[i] for i in range(len(rows))]
    assert sorted(i for group in plan for i in group) == list(range(len(rows))), f"plan must hold each sample once: {plan}"
    length = max((sum(len(rows[i]) for i in group) for group in plan), default=0)
    length = -(-length // multiple_of) * multiple_of
    shape = (len(plan), length)
    ids = np.zeros(shape, np.int64)
    positions = np.zeros(shape, np.int64)
    documents = np.full(shape, PAD_DOCUMENT, np.int64)
    visible = np.zeros(shape, np.bool_)
    targets = np.full(shape, IGNORE, np.int64)
    text_softmax = np.zeros(shape, np.bool_)
    audio_index = np.full(shape, -1, np.int64)
    audio_start, offset = [], 0
    for row in rows:
        audio_start.append(offset)
        offset += sum(length for _, _, length in row.audio)
    for b, group in enumerate(plan):
        start = 0
        for i in group:
            row, end = rows[i], start + len(rows[i])
            ids[b, start:end] = row.ids_T
            positions[b, start:end] = row.positions_T
            documents[b, start:end] = i
            visible[b, start:end] = row.visible_T
            targets[b, start:end] = row.targets_T
            text_softmax[b, start:end] = row.text_softmax
            audio = audio_start[i]
            for _, first, count in row.audio:
                audio_index[b, start + first : start + first + count] = np.arange(audio, audio + count)
                audio += count
            start = end
    arrays = (ids, positions, documents, visible, targets, text_softmax, audio_index)
    return PackedRows(*(torch.from_numpy(array) for array in arrays))
