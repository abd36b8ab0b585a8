"""What the loader does, as one typed config; `conf/data_*.yaml` are data lists (`lists.DataList`), this is how they are
used.

Defaults are those of the published training: spec-augment 2 x (1..50 frames, 1..10 bins), spec-substitution 3 x (1..30
frames), a shuffle buffer of 1500, recordings of 0.2 to 200 s, labels of 1 to 1200 ids, at most 2000 positions a sample
and about 3700 a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

from osum_echat import config as config_io
from osum_echat.config import InputPath
from osum_echat.data.label_rules import OLDER_NAMES, LabelRules, get_rules

STREAMS = ("s2t", "t2s", "s2s", "t2t")
"""The mixing streams of the published training. A stream of this name takes only the tasks that belong to it; other
names take all."""

ListType = Literal["auto", "raw", "shard"]


@dataclass
class StreamConfig:
    """One of the streams that are mixed.

    Attributes:
        list: a data yaml (``name: {path, weight}``), or a list of records or tars.
        type: ``raw`` (one record a line) or ``shard`` (one tar a line; ``combines_list`` in the name makes it combine);
            ``auto`` looks.
        weight: share of this stream in the mix. None: its number of list lines, as published.
        when_dry: ``leave``: the stream is over until the next epoch; ``restart``: it begins again, in another order,
            until the others end.
    """

    list: InputPath
    type: ListType = "auto"
    weight: float | None = None
    when_dry: Literal["leave", "restart"] = "leave"

    def __post_init__(self) -> None:
        if self.weight is not None and self.weight < 0:
            raise ValueError(f"weight must not be negative, found {self.weight}")


@dataclass
class LimitConfig:
    """Samples outside are dropped and counted (``too_short``, ``too_long``, ...).

    Attributes:
        min_frames, max_frames: log-mel frames (100 a second) of all recordings of a sample together.
        max_audio_seconds: no recording longer than this is even decoded.
        max_label: ids of the text label; max_positions: ids of the whole sequence.
    """

    min_frames: int = 20
    max_frames: int = 20000
    max_audio_seconds: float = 600.0
    max_label: int = 1200
    max_positions: int = 2000


@dataclass
class ProcessingConfig:
    """How a record becomes a sample (see `processing`). Strings, speech form and instructions are the model's
    (`dialogue.dialect`).

    Attributes:
        label_rules: how labels are read: a name of `label_rules.LABEL_RULES`, or `LabelRules` written out.
        tag_alone_rate: how often ``<TRANSCRIBE> <X>`` becomes ``<X>``, and transcript-and-answer the answer. 0 for
            evaluation.
        streaming_tts_rate: how often text to speech is made its interleaved form.
        unknown_rate: how often missing tags of a think are written as unknown rather than as the usual ones.
        drop_none: labels with a ``<NONE>`` tag are dropped.
        expand_dialogues: one sample for every turn of a dialogue instead of one for the last.
        min_turns, max_turns: which turns that gives; 0: no limit.
    """

    RENAMED_KEYS: ClassVar[Mapping[str, str]] = {"profile": "label_rules"}

    label_rules: LabelRules | str = "language_think"
    tag_alone_rate: float = 0.5
    streaming_tts_rate: float = 0.0
    unknown_rate: float = 0.85
    drop_none: bool = True
    expand_dialogues: bool = False
    min_turns: int = 1
    max_turns: int = 0

    def __post_init__(self) -> None:
        get_rules(self.label_rules)
        for name in ("tag_alone_rate", "streaming_tts_rate", "unknown_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a share in [0, 1], found {getattr(self, name)}")

    @classmethod
    def read_older(cls, data: dict[str, Any], where: str) -> dict[str, Any]:
        name = data.get("label_rules")
        if isinstance(name, str) and name in OLDER_NAMES:
            config_io.warn_older(where, f"label_rules: {name}", f"label_rules: {OLDER_NAMES[name]}")
            data["label_rules"] = OLDER_NAMES[name]
        return data


@dataclass
class AugmentConfig:
    """Changes to training samples, drawn anew for every sample and epoch from seed, epoch and the sample's place in its
    list alone.

    Attributes:
        spec_aug, spec_sub: masks on the log-mel, parameters as their names say.
        speeds: factors of speed perturbation, one drawn for each sample; empty: none. Tasks with speech out keep their
            codes.
        noise_list, reverb_list: text lists of wav paths; with ``noise_probability`` (``reverb_probability``) one is
            mixed in, at an SNR drawn from ``snr_db``.
    """

    spec_aug: bool = True
    time_masks: int = 2
    max_time_mask: int = 50
    mel_masks: int = 2
    max_mel_mask: int = 10
    spec_sub: bool = True
    substitutions: int = 3
    max_substitution: int = 30
    speeds: list[float] = field(default_factory=list)
    noise_list: InputPath | None = None
    noise_probability: float = 0.5
    snr_db: tuple[float, float] = (5.0, 25.0)
    reverb_list: InputPath | None = None
    reverb_probability: float = 0.3


@dataclass
class BatchConfig:
    """Batches by cost. Samples of a batch are packed into ``rows`` rows of at most ``row_positions`` positions.

    Attributes:
        max_frames: recordings times frames of the longest one: the size of the padded feature tensor.
        max_samples: upper bound of samples a batch (1 row, 1 sample: a batch as of old). 0: no bound.
        pool: samples that are held back to choose from; more of them pack better and cost memory.
        packing: False: one sample a row, rows still chosen of similar length.
        multiple_of: rows are padded up to a multiple of this.
    """

    rows: int = 2
    row_positions: int = 2048
    max_frames: int = 60000
    max_samples: int = 0
    pool: int = 128
    packing: bool = True
    multiple_of: int = 1

    def __post_init__(self) -> None:
        for name in ("rows", "row_positions", "max_frames", "pool", "multiple_of"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, found {getattr(self, name)}")


@dataclass
class DataConfig:
    """Everything between lists and batches.

    Attributes:
        streams: what is mixed, by name.
        seed: order, mixing and augmentation depend on it and on the epoch only.
        processing: how records become samples.
        split: an epoch reads one of this many slices of every list.
        shuffle: False also turns the shuffle buffer off (validation).
        shuffle_buffer: samples to draw from; what is in it is held undecoded.
        features: who computes log-mels: ``torch``; ``asrfront``, a third of the time, equal to 1e-6 (it must be
            installed; see `LogMel`); ``auto``: asrfront where it is installed, but torch for a run with an
            ``encoder_cache``, whose entries are found by the features; ``device``: the training process, on its device,
            for a whole batch (workers then send 16-bit samples).
        workers: worker processes per rank, kept from epoch to epoch; 0: in the training process.
        prefetch: batches each worker prepares ahead.
        max_bad_fraction: the run stops when more than this share of the samples read was dropped as *bad* (filters do
            not count). None: never.
        drops_file: JSON lines of every dropped sample (key, file, line, reason); with several ranks ``.rankN`` is
            added.
    """

    streams: dict[str, StreamConfig] = field(default_factory=dict)
    seed: int = 0
    processing: ProcessingConfig = field(default_factory=ProcessingConfig)
    limits: LimitConfig = field(default_factory=LimitConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    split: int = 1
    shuffle: bool = True
    shuffle_buffer: int = 1500
    features: Literal["auto", "torch", "asrfront", "device"] = "auto"
    workers: int = 1
    prefetch: int = 4
    max_bad_fraction: float | None = None
    drops_file: str | None = None

    def __post_init__(self) -> None:
        if self.max_bad_fraction is not None and not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is a share in [0, 1], found {self.max_bad_fraction}")
        if self.workers < 0 or self.split < 1 or self.shuffle_buffer < 0 or self.prefetch < 1:
            raise ValueError("workers and shuffle_buffer must be >= 0, split and prefetch >= 1")
        if self.limits.max_positions > self.batch.row_positions:
            raise ValueError(
                f"limits.max_positions={self.limits.max_positions} does not fit into batch.row_positions={self.batch.row_positions}: "
                "raise the second or lower the first"
            )


def older_model_keys(data: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Take out of a data section what older files stated there and a model's config states now.

    Returns:
        The section without those keys, and the changes of the model's config that they come to.

    Raises:
        ConfigError: a file of instruction sentences that cannot be read.
    """
    out, changes = dict(data), dict[str, Any]()
    processing = dict(data["processing"]) if isinstance(data.get("processing"), Mapping) else {}
    for section, key, place in (
        (out, "speech_form", "dialect.speech_form"),
        (out, "num_mels", "encoder.mels"),
        (processing, "dialogue", "dialect.profile"),
        (processing, "prompts", "dialect.instructions"),
    ):
        if key not in section:
            continue
        config_io.warn_older(where, key, f"{place} into the model's config")
        value = section.pop(key)
        part, _, name = place.partition(".")
        if key != "prompts":
            changes = config_io.merge(changes, {part: {name: value}})
        elif not value:
            changes = config_io.merge(changes, {part: {"refuse_unlisted": True}})
        elif value not in _DEFAULT_PROMPTS:
            file = config_io.find_path(str(value), getattr(value, "folder", None))
            changes = config_io.merge(changes, {part: {name: config_io.read_yaml(file)}})
    if "processing" in out:
        out["processing"] = processing
    return out, changes


_DEFAULT_PROMPTS = ("conf/prompt_config.yaml", "package:prompt_config.yaml")
