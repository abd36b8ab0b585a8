"""From a record to an example: task and ids, recordings, augmentation, log-mel, flat row."""

from __future__ import annotations

import dataclasses
import os
import random
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from osum_echat.audio import augment
from osum_echat.audio.features import HOP, LogMel, has_native, num_frames
from osum_echat.audio.io import MIN_SECONDS, SAMPLE_RATE, AudioError, to_mono_16k
from osum_echat.audio.wav import pcm16_mono_16k
from osum_echat.data import paths
from osum_echat.data.batch import TAGS, Example, SampleInfo
from osum_echat.data.config import STREAMS, AugmentConfig, DataConfig
from osum_echat.data.processing import Processed, Processor, check_limits, expand_dialogue
from osum_echat.data.sound import MASKED, Sound
from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.interleave import ImpossibleInterleave
from osum_echat.dialogue.layout import audio_positions, flatten
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.dialogue.tokens import Tokenizer, encode
from osum_echat.dialogue.vocabulary import Vocabulary

_READ_WHOLE = 1 << 25  # bytes; of longer files only what is asked for is read
Samples = npt.NDArray[np.float32]


class ExampleBuilder:
    """Makes examples of records; the same record and random generator give the same example.

    Args:
        train: with augmentation and with randomly changed tasks; else every record as it is.
        dialect: strings, forms and instructions of the model that the examples are for (its config's section).
        mels: what its encoder takes.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Tokenizer,
        vocab: Vocabulary,
        train: bool = True,
        dialect: Dialect | None = None,
        mels: int = 80,
    ) -> None:
        settings = config.processing
        if not train:
            settings = dataclasses.replace(settings, tag_alone_rate=0.0, streaming_tts_rate=0.0)
        self.config, self.settings, self.mels = config, settings, mels
        self.dialect = dialect or Dialect()
        self.processor = Processor(settings, tokenizer, vocab, self.dialect)
        self._tokenizer, self._vocab = tokenizer, vocab
        self._log_mel = None if config.features == "device" else LogMel(mels, native=has_native(config.features))
        self._augment = Augmenter(config.augment) if train else None

    def build(
        self, record: Record, resolve: paths.Resolver, stream: str, rng: random.Random
    ) -> tuple[list[Example], list[RecordError]]:
        """Examples of a record (several where dialogues are expanded), and why others were left out.

        Args:
            resolve: finds the recordings that the record names.
            stream: of the published four, takes only its own tasks; another name takes all.
        """
        examples: list[Example] = []
        errors: list[RecordError] = []
        try:
            turns = [record]
            if self.settings.expand_dialogues:
                turns = expand_dialogue(record, self.settings.min_turns, self.settings.max_turns)
                if not turns:
                    raise record.error(
                        "turn_limit", f"a dialogue of {len(record.history) + 1} turns is outside min_turns and max_turns"
                    )
        except RecordError as error:
            return [], [error]
        for turn in turns:
            try:
                examples.append(self._example(turn, resolve, stream, rng))
            except RecordError as error:
                errors.append(error)
        return examples, errors

    def _example(self, record: Record, resolve: paths.Resolver, stream: str, rng: random.Random) -> Example:
        processed = self.processor(record, rng)
        own = OUTPUTS[processed.sample.output_type].stream
        if stream in STREAMS and stream != own:
            raise record.error("other_stream", f"task {processed.task} belongs to stream {own}, not {stream}")
        recordings = self._recordings(processed, resolve)
        check_limits(processed, [len(samples) / HOP for samples in recordings], self.config.limits)
        feats = self._feats(recordings, rng)
        try:
            layout = self.dialect.layout(processed.sample, self._tokenizer, self._vocab)
        except ImpossibleInterleave as error:
            raise record.error("interleave", str(error)) from error
        except ValueError as error:
            raise record.error("bad_sample", str(error)) from error
        row = flatten(layout.segments, [audio_positions(len(f)) for f in feats], layout.text_softmax)
        if len(row) > self.config.batch.row_positions:
            raise record.error("sequence_too_long", f"{len(row)} positions, a row holds {self.config.batch.row_positions}")
        info = SampleInfo(
            record.key,
            processed.task,
            own,
            processed.label,
            tags={name: value for name, value in processed.tags.items() if name in TAGS},
            transcripts=tuple(encode(self._tokenizer, said) if said else () for said in processed.transcripts),
        )
        return Example(info, row, feats)

    def _feats(self, recordings: list[Samples], rng: random.Random) -> Sequence[Tensor] | Sequence[Sound]:
        """Augmented log-mels; or, where the device computes them, the recordings with what augmentation does to them
        there."""
        noise = None
        if self._augment is not None and recordings:
            noise = np.random.Generator(np.random.PCG64(rng.getrandbits(64)))
            recordings = self._augment.samples(recordings, noise)
        if self._log_mel is not None:
            feats = [self._log_mel(samples) for samples in recordings]
            return feats if self._augment is None or noise is None else [self._augment.features(f, noise) for f in feats]
        if self._augment is None or noise is None:
            return [Sound.of(samples) for samples in recordings]
        return [Sound.of(x, *self._augment.changes(num_frames(len(x)), self.mels, noise)) for x in recordings]

    def _recordings(self, processed: Processed, resolve: paths.Resolver) -> list[Samples]:
        """16 kHz samples of each recording. Raises RecordError with ``audio_...`` for one that cannot be used."""
        record, out = processed.record, []
        longest = self.config.limits.max_audio_seconds * SAMPLE_RATE
        for n, wav in enumerate(processed.recordings):
            current = n == len(processed.recordings) - 1
            if wav is None:
                raise record.error("audio_missing", f"task {processed.task} needs a recording, the record has none")
            try:
                start, end = (record.start, record.end) if current else (None, None)
                if isinstance(wav, str):
                    path = resolve(wav)
                    small = paths.is_url(path) or os.path.getsize(path) <= _READ_WHOLE
                    wav = paths.read_bytes(path) if small else path
                samples = pcm16_mono_16k(wav) if isinstance(wav, bytes) and start is None and end is None else None
                if samples is None or not MIN_SECONDS * SAMPLE_RATE <= len(samples) <= longest:
                    samples = to_mono_16k(wav, start, end, max_seconds=self.config.limits.max_audio_seconds)
                out.append(samples)
            except AudioError as error:
                raise record.error(f"audio_{error.reason}", str(error)) from error
            except OSError as error:
                raise record.error("audio_missing", str(error)) from error
        return out


class Augmenter:
    """The changes that `AugmentConfig` asks for, drawn from a generator."""

    def __init__(self, config: AugmentConfig) -> None:
        self.config = config
        self._noises = paths.read_lines(config.noise_list) if config.noise_list else []
        self._impulses = paths.read_lines(config.reverb_list) if config.reverb_list else []

    def samples(self, recordings: Sequence[Samples], rng: np.random.Generator) -> list[Samples]:
        """Speed, reverberation and noise, the same speed and reverberation for all recordings of a sample."""
        config, out = self.config, list(recordings)
        if config.speeds:
            factor = config.speeds[int(rng.integers(len(config.speeds)))]
            out = [augment.change_speed(x, SAMPLE_RATE, factor) for x in out]
        if self._impulses and rng.random() < config.reverb_probability:
            impulse = to_mono_16k(self._impulses[int(rng.integers(len(self._impulses)))], min_seconds=0.0)
            out = [augment.reverberate(x, SAMPLE_RATE, 0.0, rng, impulse) for x in out]
        if self._noises and rng.random() < config.noise_probability:
            noise = to_mono_16k(self._noises[int(rng.integers(len(self._noises)))])
            out = [augment.add_noise(x, float(rng.uniform(*config.snr_db)), rng, noise) for x in out]
        return out

    def features(self, feats_TF: Tensor, rng: np.random.Generator) -> Tensor:
        """Substituted and masked stretches of a log-mel [frames, mels]."""
        config, out = self.config, feats_TF.numpy()
        if config.spec_sub:
            out = augment.spec_substitute(out, rng, config.substitutions, config.max_substitution)
        if config.spec_aug:
            out = augment.spec_augment(out, rng, config.time_masks, config.max_time_mask, config.mel_masks, config.max_mel_mask)
        return torch.from_numpy(out)

    def changes(self, frames: int, mels: int, rng: np.random.Generator) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """What `features` would do to a log-mel of this size, drawn alike: where each frame comes from
        (`Sound.source_T`), and which mels are 0."""
        config = self.config
        source_T, hidden_F = np.arange(frames), np.zeros(mels, dtype=np.bool_)
        if config.spec_sub:
            for start, stop, back in augment.substitutions(frames, config.substitutions, config.max_substitution, rng):
                source_T[start:stop] = np.arange(start - back, stop - back)
        if config.spec_aug:
            for start, stop in augment.stretches(frames, config.time_masks, config.max_time_mask, rng):
                source_T[start:stop] = MASKED
            for start, stop in augment.stretches(mels, config.mel_masks, config.max_mel_mask, rng):
                hidden_F[start:stop] = True
        return source_T, hidden_F
