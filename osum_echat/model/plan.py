"""What is known of a batch on the CPU: lengths, and the indices that its tensors are gathered by.

An accelerator computes while the program goes on; each value that the program reads from it ("how many targets are
there?") makes both wait for each other. All that a batch's shapes depend on is in the arrays that the loader made, so
it is worked out from them before they are sent: `Plan.of`. The model then reads nothing back, but for one thing that
only it knows: which positions CTC compression hides.

B batch rows, T positions of a row, P positions of all documents end to end, M supervised positions, N recordings, A
audio positions of all recordings, D documents (samples).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from osum_echat import device as devices
from osum_echat.dialogue.layout import IGNORE, MASKED_POSITION
from osum_echat.dialogue.packing import PAD_DOCUMENT, PackedRows
from osum_echat.model.attention import Documents
from osum_echat.model.blocks import EndToEnd
from osum_echat.rates import ENCODER_FRAMES_PER_SECOND, FRAMES_PER_POSITION, FRAMES_PER_SECOND

Ints = npt.NDArray[np.int64]


@dataclass
class RowPlan:
    """Packed rows as the LLM gets them: documents end to end, without padding and without positions that nobody looks
    at.

    Attributes:
        ids_P, positions_P: unified ids and position numbers.
        documents: where documents end.
        audio_at_A, audio_from_A: which of the P positions take an audio embedding, and which one.
        markers_at, markers_from: which positions take the tag vector of a recording, and of which.
        supervised_M: which of the P positions have a target; those scored over the text classes alone come first.
        targets_M, documents_M: their classes and samples.
        text_only: how many of them are scored over the text classes alone.
        targets: of each sample, on the host.
    """

    ids_P: Tensor
    positions_P: Tensor
    audio_at_A: Tensor
    audio_from_A: Tensor
    markers_at: Tensor
    markers_from: Tensor
    supervised_M: Tensor
    targets_M: Tensor
    documents_M: Tensor
    documents: Documents
    text_only: int
    targets: list[int]

    def to(self, device: torch.device) -> RowPlan:
        """The same with its tensors on ``device``, in one copy."""
        names = [name for name, value in vars(self).items() if isinstance(value, Tensor)]
        sent = devices.send_together([getattr(self, name) for name in names], device)
        moved: dict[str, Any] = dict(zip(names, sent, strict=True))
        return replace(self, **moved, documents=self.documents.to(device))


@dataclass
class RecordingPlan:
    """Recordings' frames end to end: behind the encoder's convolutions (50 a second), and behind the down-sampler
    (positions)."""

    encoder: EndToEnd
    adapter: EndToEnd

    @classmethod
    def of(cls, frames: Sequence[int], longest: int = 0) -> RecordingPlan:
        """Of log-mel frames, padded to ``longest`` (default: to the longest recording).

        Raises:
            ValueError: for an empty recording.
        """
        if min(frames) < 1:
            raise ValueError("a recording without a single frame (10 ms) cannot be encoded; leave it out")
        rates = (FRAMES_PER_SECOND // ENCODER_FRAMES_PER_SECOND, FRAMES_PER_POSITION)
        return cls(*(EndToEnd.of([-(-n // rate) for n in frames], -(-longest // rate)) for rate in rates))

    def to(self, device: torch.device) -> RecordingPlan:
        return RecordingPlan(self.encoder.to(device), self.adapter.to(device))


@dataclass
class Plan:
    """Of one batch: its rows for the LLM, and its recordings, if there are any."""

    rows: RowPlan
    recordings: RecordingPlan | None
    source: _Rows

    @property
    def audio_positions(self) -> int:
        """That the rows leave room for."""
        return int(self.source.audio.max(initial=-1)) + 1

    @classmethod
    def of(cls, rows: PackedRows, frames: Sequence[int] = (), markers: tuple[int, int] | None = None) -> Plan:
        """The plan of packed rows and their recordings.

        Args:
            rows: on the host; from elsewhere they are fetched.
            frames: of each recording.
            markers: ids of the begin and end marker of a recording, for a model that adds something there.
        """
        recordings = RecordingPlan.of(frames) if len(frames) else None
        source = _Rows.of(rows, recordings, markers)
        return cls(source.plan(None), recordings, source)

    def hide(self, visible_A: Sequence[bool]) -> RowPlan:
        """The plan of the rows, on the host, when only these audio positions are visible."""
        return self.source.plan(np.asarray(visible_A, dtype=np.bool_))

    def to(self, device: torch.device) -> Plan:
        """The same with its tensors on ``device``; what `hide` needs stays on the host."""
        recordings = None if self.recordings is None else self.recordings.to(device)
        return Plan(self.rows.to(device), recordings, self.source)


@dataclass
class _Rows:
    """Packed rows on the host, flat [B x T], and what is derived of them once."""

    ids: Ints
    documents: Ints
    visible: npt.NDArray[np.bool_]
    targets: Ints
    text: npt.NDArray[np.bool_]
    audio: Ints
    recording: Ints  # that the position of a marker belongs to, -1 elsewhere

    @classmethod
    def of(cls, rows: PackedRows, recordings: RecordingPlan | None, markers: tuple[int, int] | None) -> _Rows:
        arrays: dict[str, Any] = {name: tensor.cpu().numpy() for name, tensor in vars(rows).items()}
        recording = _marked(arrays["ids_BT"], arrays["audio_index_BT"], recordings, markers)
        names = ("ids_BT", "documents_BT", "visible_BT", "targets_BT", "text_softmax_BT", "audio_index_BT")
        ids, documents, visible, targets, text, audio = (arrays[name].reshape(-1) for name in names)
        return cls(ids, documents, visible, targets, text, audio, recording.reshape(-1))

    def plan(self, visible_A: npt.NDArray[np.bool_] | None) -> RowPlan:
        visible, heard = self.visible, np.flatnonzero(self.audio >= 0)
        if visible_A is not None:
            visible = visible.copy()
            visible[heard] = visible_A[self.audio[heard]]
        supervised = self.targets != IGNORE
        kept = np.flatnonzero((self.documents != PAD_DOCUMENT) & (visible | supervised))
        at = np.full(len(visible), -1)
        at[kept] = np.arange(len(kept))
        documents, seen = self.documents[kept], visible[kept]
        heard = heard[at[heard] >= 0]
        marked = np.flatnonzero((self.recording >= 0) & (at >= 0))
        asked = np.flatnonzero(supervised)
        asked = asked[np.argsort(~self.text[asked], kind="stable")]
        counted = np.bincount(self.documents[asked], minlength=int(self.documents.max(initial=-1)) + 1)
        indices: dict[str, Ints] = {
            "ids_P": self.ids[kept],
            "positions_P": _numbers(documents, seen),
            "audio_at_A": at[heard],
            "audio_from_A": self.audio[heard],
            "markers_at": at[marked],
            "markers_from": self.recording[marked],
            "supervised_M": at[asked],
            "targets_M": self.targets[asked],
            "documents_M": self.documents[asked],
        }
        rest: dict[str, Any] = {"documents": Documents.of(documents, seen), "targets": counted.tolist()}
        tensors: dict[str, Any] = {
            name: torch.from_numpy(np.ascontiguousarray(index, dtype=np.int64)) for name, index in indices.items()
        }
        return RowPlan(**tensors, **rest, text_only=int(self.text[asked].sum()))


def _numbers(documents: Ints, visible: npt.NDArray[np.bool_]) -> Ints:
    """Visible positions count from 0 in each document, hidden ones have `MASKED_POSITION`."""
    total = np.cumsum(visible)
    first = np.flatnonzero(np.diff(documents, prepend=PAD_DOCUMENT))
    before: Ints = np.repeat((total - visible)[first], np.diff(first, append=len(documents)))
    return np.where(visible, total - before - 1, MASKED_POSITION)


def _marked(ids_BT: Ints, audio_BT: Ints, recordings: RecordingPlan | None, markers: tuple[int, int] | None) -> Ints:
    """Number of the recording that begins after a begin marker or ends before an end marker, -1 elsewhere: [B, T]."""
    out = np.full(ids_BT.shape, -1, dtype=np.int64)
    if markers is None or recordings is None:
        return out
    lengths = recordings.adapter.lengths
    recording_A = np.repeat(np.arange(len(lengths)), lengths)
    recording_BT = np.where(audio_BT >= 0, recording_A[np.maximum(audio_BT, 0)], -1)
    begin, end = markers
    out[:, :-1] = np.where(ids_BT[:, :-1] == begin, recording_BT[:, 1:], -1)
    out[:, 1:] = np.where(ids_BT[:, 1:] == end, recording_BT[:, :-1], out[:, 1:])
    return out
