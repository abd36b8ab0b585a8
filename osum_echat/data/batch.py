"""What training gets: examples packed side by side, with their recordings padded into one feature tensor.

An `Example` is one sample after tokenising and feature extraction; `collate` packs a list of them. A sample's arrays
are not changed by its neighbours: positions, documents and masks are per sample, so its loss does not depend on what it
was batched with.

Shapes: N recordings of the batch, T frames (of `feats_NTF`) or positions (of `rows`), F mel bins, B batch rows, D
samples (documents).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from osum_echat import device as devices
from osum_echat.data.sound import Sound, Sounds
from osum_echat.dialogue.layout import IGNORE, Row
from osum_echat.dialogue.packing import PackedRows, pack

TAGS = ("age", "gender", "emotion", "event", "style")


@dataclass(frozen=True)
class SampleInfo:
    """What is known of a sample beside its tensors.

    Attributes:
        key: the record's key (with ``#turn`` appended where a dialogue was expanded into several samples).
        task: the record's task string, as it is after processing.
        stream: mixing stream that it belongs to (s2t, t2s, s2s, t2t; "" outside a mix).
        text: the label, for people to read.
        tags: labels of the user's recording, without angle brackets: a subset of `TAGS`.
        transcripts: text ids of what is said in each recording, empty where the record does not say: the target of a
            CTC loss.
    """

    key: str = ""
    task: str = ""
    stream: str = ""
    text: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    transcripts: tuple[tuple[int, ...], ...] = ()


@dataclass
class Example:
    """One sample, ready to be packed.

    Attributes:
        row: flat ids, positions and targets.
        feats: log-mel of each recording, float32 [frames, mels], in the order in which ``row.audio`` refers to them; or
            the recordings themselves, for log-mels that are computed on the training device.
    """

    info: SampleInfo
    row: Row
    feats: Sequence[Tensor] | Sequence[Sound] = field(default_factory=list)

    def __post_init__(self) -> None:
        assert len(self.info.transcripts) in (0, len(self.feats)), f"{self.info.key}: a transcript for each recording, or none"

    @property
    def positions(self) -> int:
        return len(self.row)


@dataclass
class Batch:
    """D samples in B rows.

    Attributes:
        rows: the packed ids and masks; ``rows.documents_BT`` numbers samples 0..D-1 in the order of ``samples``.
        feats_NTF: log-mel features of all recordings, zeros after the end of each; [0, 0, F] without recordings. [N, T,
            0] while they are still ``sounds``.
        feats_lengths_N: frames of each recording. ``rows.audio_index_BT`` counts the audio positions of recording 0,
            then 1, ...
        samples: what is known of each sample.
        sample_N: the sample that each recording belongs to.
        sounds: the recordings, where log-mels are computed on the device (`to`).
    """

    rows: PackedRows
    feats_NTF: Tensor
    feats_lengths_N: Tensor
    samples: list[SampleInfo]
    sample_N: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    sounds: Sounds | None = None

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def keys(self) -> list[str]:
        return [sample.key for sample in self.samples]

    def transcripts(self) -> list[Tensor]:
        """Text ids of what is said in each recording (length N), empty where unknown."""
        ids: list[tuple[int, ...]] = [()] * len(self.feats_lengths_N)
        at = 0
        for sample, count in zip(self.samples, torch.bincount(self.sample_N, minlength=len(self)).tolist(), strict=True):
            ids[at : at + count] = sample.transcripts or [()] * count
            at += count
        return [torch.tensor(one, dtype=torch.long) for one in ids]

    @property
    def num_targets(self) -> int:
        return int((self.rows.targets_BT != IGNORE).sum())

    @property
    def num_positions(self) -> int:
        return self.rows.ids_BT.numel()

    def tag_ids(self, name: str, classes: Sequence[str]) -> Tensor:
        """Class number of tag ``name`` for each sample, `IGNORE` where the record has none or one that is not in
        ``classes``: [D].

        Case does not matter.
        """
        table = {label.casefold(): number for number, label in enumerate(classes)}
        return torch.tensor([table.get(s.tags.get(name, "").casefold(), IGNORE) for s in self.samples], dtype=torch.long)

    def last_recording(self) -> Tensor:
        """Index of each sample's last recording (the user's current turn), -1 for a sample without: [D]."""
        out = torch.full((len(self),), -1, dtype=torch.long)
        for n, sample in enumerate(self.sample_N.tolist()):
            out[sample] = n
        return out

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``, where log-mels are computed that have not been yet."""
        batch = self.with_features(device)
        return replace(batch, sample_N=self.sample_N.to(device, non_blocking=True), rows=self.rows.to(device))

    def with_features(self, device: torch.device) -> Batch:
        """The same batch with its log-mels and their lengths on ``device``, where those are computed that have not been
        yet."""
        lengths_N = devices.send(self.feats_lengths_N, device)
        sounds = self.sounds
        feats_NTF = devices.send(self.feats_NTF, device) if sounds is None else sounds.features(lengths_N, device)
        return replace(self, feats_NTF=feats_NTF, feats_lengths_N=lengths_N, sounds=None)

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory (used by torch's DataLoader when ``pin_memory`` is on)."""
        rows = PackedRows(**{name: tensor.pin_memory() for name, tensor in vars(self.rows).items()})
        tensors = {name: getattr(self, name).pin_memory() for name in ("feats_NTF", "feats_lengths_N", "sample_N")}
        sounds = None if self.sounds is None else self.sounds.pin_memory()
        return Batch(**{**vars(self), **tensors, "sounds": sounds, "rows": rows})


def pad_features(feats: Sequence[Tensor], num_mels: int) -> tuple[Tensor, Tensor]:
    """Recordings [frames, F] of different length as ([N, T, F] zero-padded, lengths [N])."""
    lengths = [int(f.shape[0]) for f in feats]
    out_NTF = torch.zeros(len(feats), max(lengths, default=0), num_mels)
    for i, feat in enumerate(feats):
        assert feat.shape[1] == num_mels, f"a recording has {feat.shape[1]} mel bins, expected {num_mels}"
        out_NTF[i, : lengths[i]] = feat
    return out_NTF, torch.tensor(lengths, dtype=torch.long)


def collate(
    examples: Iterable[Example],
    num_mels: int,
    plan: Sequence[Sequence[int]] | None = None,
    multiple_of: int = 1,
) -> Batch:
    """Pack examples into a batch.

    Args:
        num_mels: F of the features (needed when no example has a recording).
        plan: which examples stand in which row of the batch (see `dialogue.packing.pack`); default one a row.
        multiple_of: the row length is rounded up to a multiple of this.

    Raises:
        ValueError: for an empty list.
    """
    items = list(examples)
    if not items:
        raise ValueError("a batch needs at least one example")
    recordings = [one for e in items for one in e.feats]
    sounds = [one for one in recordings if isinstance(one, Sound)]
    assert len(sounds) in (0, len(recordings)), "recordings and log-mels in one batch"
    if sounds:
        lengths_N = torch.tensor([len(one) for one in sounds])
        feats_NTF = torch.zeros(len(sounds), int(lengths_N.max()), 0)
    else:
        feats_NTF, lengths_N = pad_features([one for one in recordings if isinstance(one, Tensor)], num_mels)
    return Batch(
        rows=pack([e.row for e in items], plan, multiple_of),
        feats_NTF=feats_NTF,
        feats_lengths_N=lengths_N,
        samples=[e.info for e in items],
        sample_N=torch.tensor([d for d, e in enumerate(items) for _ in e.feats], dtype=torch.long),
        sounds=Sounds.of(sounds, num_mels) if sounds else None,
    )
