"""`Token2Wav`: a directory of weights as one object that makes sound from speech tokens.

    t2w = Token2Wav.load("pretrained/CosyVoice-300M-25Hz")
    speaker = Speaker.from_wav("prompt.wav", t2w)
    samples, rate = t2w.synthesize(tokens, speaker, seed=0)
    for chunk in t2w.stream(token_iterator, speaker): ...

Float32 is the default and equals the recorded numbers; ``dtype="bfloat16"`` runs the U-Net at about twice the speed for
a small difference (docs/token2wav.md has the measured one), except on a CPU that is slow in bfloat16: there it stays
float32, which is said once. The vocoder always runs in float32.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from osum_echat import device as devices
from osum_echat.audio.io import Source
from osum_echat.token2wav import released_yaml
from osum_echat.token2wav.checkpoint import load_into, read_weights, vocoder_state
from osum_echat.token2wav.compat import ReferenceStream, SeededChunkDraws
from osum_echat.token2wav.config import SAMPLE_RATE, Token2WavConfig
from osum_echat.token2wav.draws import Draws
from osum_echat.token2wav.fast_vocoder import FastVocoder
from osum_echat.token2wav.flow import FlowModel
from osum_echat.token2wav.prompt import Frontend, Speaker, read_speakers, tokenizer_wave
from osum_echat.token2wav.streaming import (
    FlowStream,
    PromptState,
    SolverOptions,
    StreamConfig,
    change_speed,
    reply_noise,
)
from osum_echat.token2wav.vocoder import Vocoder
from osum_echat.token2wav.vocoder_stream import VocoderStream, vocode

Samples = npt.NDArray[np.float32]
Tokens = Sequence[int] | Tensor | npt.NDArray[np.integer]

BATCH_FRAMES = 4000
"""Frames (prompts included) that one call of the U-Net takes at most on a CPU, whose cache sets the limit; a batch is
solved in parts of this size."""
_ACCELERATOR_BATCHES = 8
"""An accelerator takes so many times more: its limit is memory."""


class Token2Wav:
    """Speech tokens to 22.05 kHz samples. ``speakers`` holds the voices of ``spk2info.pt``, if any."""

    sample_rate = SAMPLE_RATE

    def __init__(self, config: Token2WavConfig, flow: FlowModel, vocoder: Vocoder, frontend: Frontend) -> None:
        self.config, self.flow, self.vocoder, self.frontend = config, flow, vocoder, frontend
        self.speakers: dict[str, Speaker] = {}
        self._prompts: weakref.WeakKeyDictionary[Speaker, PromptState] = weakref.WeakKeyDictionary()

    @classmethod
    def load(cls, directory: str | os.PathLike[str], device: str = "auto", dtype: str = "float32") -> Token2Wav:
        """Read a directory of the CosyVoice-300M-25Hz shape (other sizes by its ``cosyvoice.yaml``).

        ``dtype``: of the flow's U-Net. "float32"; "tf32": float32 numbers whose products are rounded to 10 bits of
        mantissa, on accelerators that have units for it (elsewhere float32); "bfloat16". docs/speed.md has the errors.

        The ONNX models are opened when a recording is first read; ``llm.pt`` is never touched.
        Raises ValueError for files that are missing, broken or do not fit the configuration.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ValueError(f"token2wav directory not found: {directory}")
        config = released_yaml.load_config(directory / "cosyvoice.yaml")
        target = devices.resolve(device)
        with torch.device("meta"):
            flow = FlowModel(config.flow)
            vocoder = FastVocoder(config.vocoder) if target.type == "cpu" else Vocoder(config.vocoder)
        state, where = read_weights(directory, "flow")
        load_into(flow, state, str(where))
        state, where = read_weights(directory, "hift")
        load_into(vocoder, vocoder_state(state), str(where))
        flow.decoder.short_products = dtype == "tf32"
        kept = devices.dtype("float32" if dtype == "tf32" else dtype, target)
        flow.to(target).eval().prepare(devices.arithmetic(kept, target))
        vocoder.to(target).eval()
        if isinstance(vocoder, FastVocoder):
            vocoder.prepare()
        model = cls(config, flow, vocoder, Frontend(directory, config.flow.vocab_size))
        model.speakers = read_speakers(directory / "spk2info.pt")
        return model

    @property
    def device(self) -> torch.device:
        return self.vocoder.conv_pre.weight.device

    @property
    def batch_frames(self) -> int:
        """Frames that one call of the U-Net takes at most."""
        return BATCH_FRAMES * (_ACCELERATOR_BATCHES if devices.overlaps(self.device) else 1)

    @overload
    def synthesize(
        self,
        tokens: Tokens,
        speaker: Speaker,
        seed: int = ...,
        steps: int | None = ...,
        speed: float = ...,
        guidance: float | None = ...,
        schedule: str | None = ...,
    ) -> tuple[Samples, int]: ...

    @overload
    def synthesize(
        self,
        tokens: Sequence[Tokens],
        speaker: Speaker | Sequence[Speaker],
        seed: int = ...,
        steps: int | None = ...,
        speed: float = ...,
        guidance: float | None = ...,
        schedule: str | None = ...,
    ) -> tuple[list[Samples], int]: ...

    @torch.inference_mode()
    def synthesize(self, tokens, speaker, seed=0, steps=None, speed=1.0, guidance=None, schedule=None):
        """Samples of one reply, or a list of samples for a list of replies, and the rate (22050).

        Args:
            tokens: speech ids of one reply, or a sequence of replies of any lengths. No ids give no samples.
            speaker: the voice, or one for each reply.
            seed: of all random draws; each reply of a batch draws as it would alone.
            steps: Euler steps of the flow, default the directory's (10, fewer if it was distilled).
            speed: above 1 speaks faster (the mel is resampled in time, pitch stays).
            guidance: strength of classifier-free guidance, default the directory's (0.7); 0 halves the cost.
            schedule: "cosine" or "linear" spacing of the steps, default the directory's.

        Raises:
            ValueError: ids outside the codebook, an argument out of range, or steps that a distilled flow was not
                taught.
        """
        if speed <= 0:
            raise ValueError(f"speed must be positive, found {speed}")
        solver = SolverOptions(steps, guidance, schedule)
        single = isinstance(speaker, Speaker) and _is_single(tokens)
        replies = [torch.as_tensor(t, dtype=torch.int64) for t in ([tokens] if single else tokens)]
        speakers = [speaker] * len(replies) if isinstance(speaker, Speaker) else list(speaker)
        if len(speakers) != len(replies):
            raise ValueError(f"{len(replies)} replies need one speaker or {len(replies)}, found {len(speakers)}")
        for index, ids in enumerate(replies):
            if ids.ndim != 1:
                raise ValueError(f"reply {index} has shape {list(ids.shape)}; give a flat list of ids")
            self.flow.check_tokens(ids)
        waves = self._synthesize(replies, speakers, seed, speed, solver)
        return (waves[0] if single else waves), SAMPLE_RATE

    def _synthesize(
        self, replies: list[Tensor], speakers: list[Speaker], seed: int, speed: float, solver: SolverOptions
    ) -> list[Samples]:
        waves: list[Samples] = [np.zeros(0, dtype=np.float32) for _ in replies]
        for rows in self._parts(replies, speakers):
            draws = [self.draws(seed) for _ in rows]
            prompts = [self.prompt_state(speakers[i]) for i in rows]
            conditions = [
                self.flow.condition(replies[i].tolist(), p.tokens_P, p.mel_TM, p.spk_M)
                for i, p in zip(rows, prompts, strict=True)
            ]
            noises = [reply_noise(d, c) for d, c in zip(draws, conditions, strict=True)]
            mels = self.flow.solve(conditions, noises, solver.steps, solver.guidance, solver.schedule)
            for i, mel_TM, draw in zip(rows, mels, draws, strict=True):
                waves[i] = vocode(self.vocoder, change_speed(mel_TM, speed), draw).float().cpu().numpy()
        return waves

    def _parts(self, replies: list[Tensor], speakers: list[Speaker]) -> Iterator[list[int]]:
        """Indices of replies to be solved together: of similar length, and few enough for `batch_frames`."""
        lengths = {
            i: len(s.mel) + self.config.flow.mel_frames(len(t))
            for i, (t, s) in enumerate(zip(replies, speakers, strict=True))
            if len(t)
        }
        part: list[int] = []
        for i in sorted(lengths, key=lambda i: -lengths[i]):
            if part and (len(part) + 1) * lengths[part[0]] > self.batch_frames:
                yield part
                part = []
            part.append(i)
        if part:
            yield part

    def stream(
        self,
        tokens: Iterable[int | Tokens],
        speaker: Speaker,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        schedule: str | None = None,
        config: StreamConfig | None = None,
        compat: bool = False,
    ) -> Iterator[Samples]:
        """Chunks of samples while tokens arrive (one by one, or in groups of any size).

        The first chunk comes after ``config.tokens_to_first_sound`` tokens (24 by default, 0.96 s of speech). Together
        the chunks are as long as `synthesize` makes the reply, and do not depend on how tokens were grouped. ``compat``
        runs the published algorithm instead, faults included (first chunk after 70 tokens). Raises ValueError for ids
        outside the codebook.
        """
        ids = _flatten(tokens)
        if not compat:
            return _pushed(self.open_stream(speaker, seed, steps, guidance, schedule, config), ids)
        with torch.inference_mode():
            prompt = self.prompt_state(speaker)
        chunk_draws = SeededChunkDraws(seed, self.config.flow.output_size, self.config.vocoder.nb_harmonics + 1)
        reference = ReferenceStream(self.flow, self.vocoder, prompt, chunk_draws, SolverOptions(steps, guidance, schedule))
        return _as_samples(chunk.wave_S for chunk in reference.run(ids))

    def open_stream(
        self,
        speaker: Speaker,
        seed: int = 0,
        steps: int | None = None,
        guidance: float | None = None,
        schedule: str | None = None,
        config: StreamConfig | None = None,
    ) -> ReplyStream:
        """What `stream` does, for those who have the tokens in hand one after the other."""
        draws, solver = self.draws(seed), SolverOptions(steps, guidance, schedule)
        self.config.flow.solver.chosen(steps, guidance, schedule)
        with torch.inference_mode():
            flow = FlowStream(self.flow, self.prompt_state(speaker), draws, config or StreamConfig(), solver)
            return ReplyStream(flow, VocoderStream(self.vocoder, draws))

    def tokenize(self, source: Source) -> list[int]:
        """Speech ids at 25 Hz of a recording of at most 30 s. Raises AudioError (a ValueError) for what cannot be read
        or is longer."""
        return self.frontend.tokens(tokenizer_wave(source)).tolist()

    def prompt_state(self, speaker: Speaker) -> PromptState:
        """What depends only on the speaker, computed once for each `Speaker` object."""
        state = self._prompts.get(speaker)
        if state is None:
            self.flow.check_tokens(speaker.tokens)
            if speaker.embedding.shape[0] != self.config.flow.spk_embed_dim or (
                len(speaker.mel) and speaker.mel.shape[1] != self.config.flow.output_size
            ):
                raise ValueError(
                    f"the speaker has an embedding of {len(speaker.embedding)} and {speaker.mel.shape[1]} mel bins, this directory needs "
                    f"{self.config.flow.spk_embed_dim} and {self.config.flow.output_size}; make it with Speaker.from_wav and this directory"
                )
            spk_M = self.flow.speaker(speaker.embedding.to(self.device)[None])[0]
            state = PromptState(speaker.tokens.to(self.device), speaker.mel.to(self.device), spk_M)
            self._prompts[speaker] = state
        return state

    def draws(self, seed: int) -> Draws:
        return Draws(seed, self.config.flow.output_size, self.config.vocoder.source_noises)


class ReplyStream:
    """The sound of one reply: `push` a token and get the samples that it settled, if any; `finish` gives the rest."""

    def __init__(self, flow: FlowStream, vocoder: VocoderStream) -> None:
        self._flow, self._vocoder = flow, vocoder

    @torch.inference_mode()
    def push(self, token: int) -> Samples | None:
        """Raises ValueError for an id outside the codebook (when the window that holds it is computed)."""
        mel_TM = self._flow.push(token)
        return None if mel_TM is None else _array(self._vocoder.push(mel_TM))

    @torch.inference_mode()
    def finish(self) -> Samples | None:
        """Call it once, after the last token."""
        return _array(self._vocoder.push(self._flow.finish(), last=True))


def _pushed(reply: ReplyStream, ids: Iterator[int]) -> Iterator[Samples]:
    for token in ids:
        samples = reply.push(token)
        if samples is not None:
            yield samples
    samples = reply.finish()
    if samples is not None:
        yield samples


def _as_samples(chunks: Iterator[Tensor]) -> Iterator[Samples]:
    """Non-empty chunks as arrays. The inference context is left between chunks: it must not leak into the consumer."""
    while True:
        with torch.inference_mode():
            chunk = next(chunks, None)
        if chunk is None:
            return
        samples = _array(chunk)
        if samples is not None:
            yield samples


def _array(wave_S: Tensor) -> Samples | None:
    return devices.fetch(wave_S.float()).wait().numpy() if len(wave_S) else None


def _is_single(tokens: object) -> bool:
    """Whether this is one reply (ids) and not a list of replies."""
    if isinstance(tokens, (Tensor, np.ndarray)):
        return tokens.ndim == 1
    assert isinstance(tokens, Sequence)
    return len(tokens) == 0 or isinstance(tokens[0], (int, np.integer)) or (isinstance(tokens[0], Tensor) and tokens[0].ndim == 0)


def _flatten(tokens: Iterable[int | Tokens]) -> Iterator[int]:
    for item in tokens:
        if isinstance(item, (int, np.integer)):
            yield int(item)
        else:
            yield from torch.as_tensor(item, dtype=torch.int64).flatten().tolist()
