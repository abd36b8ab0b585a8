"""`EChat` and `Dialogue`: requests go in as `Ask`, events come out of the generator, sound is made of them, and they
become a `Reply`."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from typing_extensions import Unpack

from osum_echat import device as devices
from osum_echat.audio.features import LogMel
from osum_echat.audio.io import MAX_SECONDS, Source, to_mono_16k
from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.tasks import begins_with_words
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.engine import Engine, EngineLimits, LlmEngine
from osum_echat.generation.events import Done, Event, TextDelta, ThinkDelta, speech_codes
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request, build_request, encode_recordings, split_audio
from osum_echat.generation.session import Session
from osum_echat.generation.vllm.engine import VllmGenerator
from osum_echat.locations import find_checkpoint
from osum_echat.model.checkpoint import local_path
from osum_echat.model.config import ModelConfig
from osum_echat.model.echat import AudioFeatures, EChatModel
from osum_echat.pipeline import load, parts
from osum_echat.pipeline.ask import MODES, Ask, AskOptions, AudioChunk, Reply, StreamEvent, Voice
from osum_echat.pipeline.sound import Sound
from osum_echat.pipeline.stages import ahead
from osum_echat.token2wav.config import SAMPLE_RATE

if TYPE_CHECKING:
    from osum_echat.token2wav import Speaker, Token2Wav


class EChat:
    """A loaded model with its voice. Not for several threads at the same moment; requests that come together belong in
    `batch`."""

    def __init__(
        self,
        model: EChatModel,
        tokenizer: Any,
        config: GenerationConfig | None = None,
        token2wav: Token2Wav | None = None,
        speaker: Speaker | None = None,
        dialect: Dialect | None = None,
        generator: Generator | None = None,
    ) -> None:
        """``generator``: what decodes, when not a `Generator` of this model with these settings."""
        self.model, self.tokenizer = model, tokenizer
        self.config = config or GenerationConfig()
        self.generator = generator or Generator(model, tokenizer, self.config, dialect)
        self.sound = Sound(token2wav, speaker)
        self._log_mel = LogMel(model.config.encoder.mels)
        self.max_seconds = min(MAX_SECONDS, model.config.max_seconds)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        config: str | Path | ModelConfig | None = None,
        token2wav: str | Path | Token2Wav | None = None,
        device: str = "auto",
        dtype: str = "auto",
        weights: str = "auto",
        profile: str | None = None,
        speaker: Voice | None = None,
        generation: str | Path | GenerationConfig | None = None,
        pack: bool = True,
        compile: bool = False,
        voice_dtype: str = "float32",
        llm_engine: str = "own",
        vllm_folder: str | Path | None = None,
    ) -> EChat:
        """Load everything.

        Args:
            checkpoint: a folder, a released ``.pt`` or ``.safetensors``, a hub name, or ``mini`` (see `locations`).
            config: model config; needed where the checkpoint does not bring its own.
            token2wav: a folder of the CosyVoice-300M-25Hz shape (default: the checkpoint's own, if it has one; else
                replies have speech tokens and no sound).
            dtype: ``auto``, float32, bfloat16 or float16: what to compute in.
            weights: ``auto``, ``float32``, ``bf16``, ``int8`` or ``int4``: how to keep the weights. ``auto`` is
                bfloat16 on accelerators. On a CPU it is what ``weights:`` of the model config says, else what the
                checkpoint holds if it is rounded already (`osum-echat quantize`), else float32; for a large one
                bfloat16 where the CPU does that well, else int8. int8 and int4 are for CPUs: docs/speed.md has what
                they cost and gain.
            profile: a published prompt profile, ``as_trained`` or ``as_released``, instead of the checkpoint's own
                strings.
            speaker: the reply's voice: a `Speaker`, a saved one, a recording of 1 to 30 s, or a name of ``spk2info.pt``
                (default: the checkpoint's ``token2wav/speaker.safetensors``, else the first name).
            generation: settings (default: the checkpoint's ``generation.yaml``, else `GenerationConfig`).
            pack: reorder the weights for decoding on a CPU (`cpu_linear`); the model cannot be trained or saved then.
            compile: `torch.compile` the LLM (see `Generator.compile`).
            voice_dtype: what token2wav computes in: ``float32``, ``tf32`` or ``bfloat16`` (see `Token2Wav.load`).
            llm_engine: ``own``, or ``vllm``: the LLM runs in a process of vLLM's, which starts with the first request
                (docs/scale.md).
            vllm_folder: what ``osum-echat export --for vllm`` wrote (default: it is written to a temporary folder now).

        Raises:
            ValueError: what is missing or does not fit together.
        """
        target, path = devices.resolve(device), local_path(find_checkpoint(checkpoint))
        folder: Path | None = None
        if load.uses_vllm(llm_engine, vllm_folder, weights):
            model, tokenizer, folder = load.load_for_vllm(path, config, target, dtype, vllm_folder)
        else:
            model, tokenizer = load.load_llm(path, config, target, dtype, weights, pack)
        sound = load.load_token2wav(path, token2wav, target, voice_dtype)
        settings, dialect = load.read_settings(path, generation, model.config.dialect, profile)
        generator = load.load_generator(model, tokenizer, settings, dialect, folder)
        echat = cls(model, tokenizer, settings, sound, dialect=dialect, generator=generator)
        if compile:
            echat.generator.compile()
        if sound is not None:
            echat.voice = echat.speaker(speaker) if speaker is not None else load.default_voice(path, sound)
        return echat

    @property
    def dialect(self) -> Dialect:
        """How the model is spoken to, and what it has learnt."""
        return self.generator.dialect

    @property
    def token2wav(self) -> Token2Wav | None:
        return self.sound.token2wav

    @property
    def voice(self) -> Speaker | None:
        """The voice of replies whose `Ask` names no other."""
        return self.sound.voice

    @voice.setter
    def voice(self, voice: Speaker | None) -> None:
        self.sound.voice = voice

    def speaker(self, voice: Voice) -> Speaker:
        """A voice for ``speaker=``; see `Sound.speaker`."""
        return self.sound.speaker(voice)

    def engine(self, limits: EngineLimits | None = None) -> LlmEngine:
        """What decodes the requests of several people together; `start` it. vLLM's exists once, with the limits of the
        first call."""
        generator = self.generator
        return generator.engine(limits) if isinstance(generator, VllmGenerator) else Engine(generator, limits)

    # ---- one request -------------------------------------------------------------------------------------------------

    def understand(
        self, wav: Source, task: str = "<TRANSCRIBE>", prompt: str | None = None, **options: Unpack[AskOptions]
    ) -> Reply:
        """Transcript, tags or caption of a recording; ``task`` is one of the prompted tasks (`dialogue.tasks`)."""
        return self.batch([Ask(wav, kind="understand", task=task, prompt=prompt, **options)])[0]

    def chat(self, wav: Source | None = None, text: str | None = None, **options: Unpack[AskOptions]) -> Reply:
        """Answer a recording or a text; see `Ask`."""
        return self.batch([Ask(wav, text, **options)])[0]

    def speak(self, text: str, **options: Unpack[AskOptions]) -> Reply:
        """Say a text."""
        return self.batch([Ask(text=text, kind="speak", **options)])[0]

    def stream(self, wav: Source | None = None, text: str | None = None, **options: Unpack[AskOptions]) -> Iterator[StreamEvent]:
        """The events of `chat` as they happen, with `AudioChunk` between them when there is sound; `Done` is the last.
        Close it to stop."""
        return self.stream_ask(Ask(wav, text, **options))

    def stream_ask(self, ask: Ask) -> Iterator[StreamEvent]:
        """The events of anything that can be asked. Raises ValueError for what cannot, before the first event."""
        voice, asks = self.sound.voice_of(ask), self.parts(ask)
        if not asks:
            return iter(parts.silent_events(ask, self.dialect))
        streams = (self.sound.stream((e for _, e in self._events([part])), ask.seed, voice) for part in asks)
        return next(streams) if len(asks) == 1 else parts.joined_stream(streams)

    def refusal(self, ask: Ask, past_turns: int = 0) -> str | None:
        """Why this checkpoint cannot do what is asked behind so many past turns, in a sentence; None when it can.
        Nothing is computed."""
        return parts.refusal(ask, self.dialect, past_turns)

    def parts(self, ask: Ask) -> list[Ask]:
        """The ask as the model can take it (see `pipeline.parts`). Raises ValueError for what it cannot do or use."""
        return parts.parts(ask, self.dialect, self.max_seconds)

    def session(self, max_turns: int = 5, max_tokens: int = 2000) -> Dialogue:
        """A dialogue that remembers its past turns: ``max_turns`` of them, or as many as the checkpoint has learnt,
        where that is less. A checkpoint that has learnt none refuses the second turn; with ``max_turns=0`` each turn
        stands by itself."""
        learnt = self.dialect.learnt.past_turns
        if learnt:
            max_turns = min(max_turns, learnt)
        return Dialogue(self, Session(self.generator, max_turns, max_tokens))

    # ---- many requests -----------------------------------------------------------------------------------------------

    def batch(self, asks: Sequence[Ask], size: int = 16) -> list[Reply]:
        """Answer many at once, of any kinds, ``size`` at a time. Each reply is what it would be alone.

        Raises:
            ValueError: one of them has not been learnt (nothing is computed then), or its recording cannot be used
                (recordings are read ``size`` at a time).
        """
        for ask in asks:
            parts.check(ask, self.dialect)
        replies: list[Reply] = []
        for found in self.answers((asks[start : start + size] for start in range(0, len(asks), size)), size):
            if isinstance(found, ValueError):
                raise found
            replies += found
        return replies

    def answers(self, groups: Iterable[Sequence[Ask]], size: int = 16) -> Iterator[list[Reply] | ValueError]:
        """Replies to groups of asks, group by group, ``size`` asks at a time within each; why, in place of a group that
        holds an ask which cannot be answered. Where the device does both at once, the next group is decoded while sound
        is made of the one before it."""
        decoded = (self._decoded(group, size) for group in groups)
        if not self.sound.overlap:
            yield from (found if isinstance(found, ValueError) else self._sounded(found) for found in decoded)
            return
        assert self.token2wav is not None
        context = devices.side_stream(self.token2wav.device)
        with closing(ahead(decoded, 1)) as early:
            for found in early:
                if isinstance(found, ValueError):
                    yield found
                    continue
                with context():
                    replies = self._sounded(found)
                yield replies

    def _decoded(self, asks: Sequence[Ask], size: int) -> _Decoded | ValueError:
        """A group with the events of its parts, without sound; ``size`` parts are decoded at a time. Why, if one cannot
        be answered."""
        found = _Decoded(asks, time.perf_counter())
        try:
            for ask in asks:
                parts.check(ask, self.dialect)
            split = [self.parts(ask) for ask in asks]
            found.counts = [len(some) for some in split]
            flat = [part for some in split for part in some]
            for start in range(0, len(flat), size):
                found.batches.append(self._decoded_batch(flat[start : start + size]))
        except ValueError as error:
            return error
        return found

    def _decoded_batch(self, asks: Sequence[Ask]) -> _Batch:
        voices = [self.sound.voice_of(ask) for ask in asks]  # what is missing is said before anything is computed
        batch = _Batch(asks, voices, [[] for _ in asks], time.perf_counter())
        for row, event in self._events(asks):
            batch.rows[row].append(event)
        return batch

    def _sounded(self, found: _Decoded) -> list[Reply]:
        """The replies of a decoded group."""
        made: list[Reply] = []
        for batch in found.batches:
            rows = self.sound.render(batch.rows, [ask.seed for ask in batch.asks], batch.voices, batch.started)
            made += [self.reply(row, ask) for row, ask in zip(rows, batch.asks, strict=True)]
        parts_of, total = iter(made), time.perf_counter() - found.started
        split = [[next(parts_of) for _ in range(count)] for count in found.counts]
        return [
            parts.joined_reply(ask, some, total) if some else self.reply(parts.silent_events(ask, self.dialect), ask)
            for ask, some in zip(found.asks, split, strict=True)
        ]

    def reply(self, events: Sequence[StreamEvent], ask: Ask) -> Reply:
        """What a row's events come to."""
        done = events[-1]
        assert isinstance(done, Done), f"a row's last event is Done, found {done}"
        thought = "".join(e.text for e in events if isinstance(e, ThinkDelta))
        template = self.dialect.strings.template(ask.think or "language")
        chunks = [e for e in events if isinstance(e, AudioChunk)]
        text = (ask.text or "") if ask.kind == "speak" else "".join(e.text for e in events if isinstance(e, TextDelta))
        return Reply(
            text=text.strip(),
            think=template.parse(thought) if thought else None,
            speech_tokens=speech_codes(events),
            audio=np.concatenate([chunk.samples for chunk in chunks]) if chunks else None,
            sample_rate=chunks[0].rate if chunks else SAMPLE_RATE,
            finish_reason=done.reason,
            guards=done.guards,
            timings=done.timings,
        )

    # ---- decoding ----------------------------------------------------------------------------------------------------

    def _events(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Event]]:
        """(row, event) of all asks as they happen, `Done` last for each. A text that is answered in speech is answered
        by one request and said by another, after the others are through."""
        began = time.perf_counter()
        answers: dict[int, tuple[Done, str]] = {}
        words: dict[int, list[str]] = {row: [] for row, ask in enumerate(asks) if ask.mode.then is not None}
        for row, event in self._generate(asks):
            if row in words and isinstance(event, Done):
                answers[row] = event, "".join(words[row]).strip()
                continue
            if row in words and isinstance(event, TextDelta):
                words[row].append(event.text)
            yield row, event
        yield from ((row, done) for row, (done, answer) in answers.items() if not answer)
        rows = [row for row, (_, answer) in answers.items() if answer]
        offset = time.perf_counter() - began
        for number, event in self._generate([_said(asks[row], answers[row][1]) for row in rows]):
            if isinstance(event, Done):
                yield rows[number], said_done(answers[rows[number]][0], event, offset)
            elif not isinstance(event, TextDelta):  # the text to say has been told
                yield rows[number], event

    def _generate(self, asks: Sequence[Ask]) -> Iterator[tuple[int, Event]]:
        wavs = [ask.wav for ask in asks if ask.wav is not None]
        audio = encode_recordings(self.model, self._features(wavs))
        heard = iter([] if audio is None else split_audio(audio))
        lengths = iter([] if audio is None else audio.lengths_N.tolist())
        requests = [
            self._request(ask, [next(heard)], [next(lengths)]) if ask.wav is not None else self._request(ask) for ask in asks
        ]
        return self.generator.generate(requests, audio=audio)

    def hear(self, wavs: Sequence[Source]) -> list[AudioFeatures]:
        """Recordings as the LLM hears them, each by itself. Raises AudioError for what cannot be used."""
        audio = encode_recordings(self.model, self._features(wavs))
        return [] if audio is None else split_audio(audio)

    def _features(self, wavs: Sequence[Source]) -> list[Any]:
        return [self._log_mel(to_mono_16k(wav, max_seconds=self.max_seconds)) for wav in wavs]

    def request(self, ask: Ask, heard: Sequence[AudioFeatures] = ()) -> Request:
        """The request of an ask, for those who decode it themselves (`generation.engine`). ``heard``: its recording,
        from `hear`."""
        parts.check(ask, self.dialect)
        return self._request(ask, heard)

    def _request(self, ask: Ask, heard: Sequence[AudioFeatures] = (), lengths: Sequence[int] | None = None) -> Request:
        """The request of an ask. ``lengths``: positions of its recording in the LLM, where the host knows them
        already."""
        prompt = ask.text or "" if ask.kind == "chat" else ""
        if ask.kind == "understand":
            prompt = ask.prompt or self.dialect.instruction(ask.task)
        request = build_request(
            ask.mode.output_type,
            self.config,
            self.tokenizer,
            self.model.vocabulary,
            prompt_text=prompt,
            say=ask.text or "" if ask.kind == "speak" else "",
            heard=heard,
            lengths=lengths,
            seed=ask.seed,
            dialect=self.dialect,
            think=ask.think,
            transcribes=ask.kind == "understand" and not ask.prompt and begins_with_words(ask.task),
        )
        return tuned(request, ask)


class Dialogue:
    """A dialogue of several turns; see `generation.session` for what is kept."""

    def __init__(self, echat: EChat, session: Session) -> None:
        self.echat, self.memory = echat, session

    def __len__(self) -> int:
        """Past turns that are remembered."""
        return len(self.memory)

    @property
    def max_turns(self) -> int:
        """Past turns that are kept at most."""
        return self.memory.max_turns

    def clear(self) -> None:
        """Forget everything."""
        self.memory.clear()

    def chat(self, wav: Source | None = None, text: str | None = None, **options: Unpack[AskOptions]) -> Reply:
        """The answer to the next turn."""
        started, ask, sound = time.perf_counter(), Ask(wav, text, **options), self.echat.sound
        voice, turn = sound.voice_of(ask), self._turn(ask)
        if turn is None:
            return self.echat.reply(parts.silent_events(ask, self.echat.dialect), ask)
        [row] = sound.render([list(turn.events)], [ask.seed], [voice], started)
        list(self._remembered(iter(row), turn))
        return self.echat.reply(row, ask)

    def stream(self, wav: Source | None = None, text: str | None = None, **options: Unpack[AskOptions]) -> Iterator[StreamEvent]:
        """The events of the next turn as they happen. A stream that is closed before its end leaves no trace in the
        dialogue."""
        ask = Ask(wav, text, **options)
        voice, turn = self.echat.sound.voice_of(ask), self._turn(ask)
        if turn is None:
            return iter(parts.silent_events(ask, self.echat.dialect))
        return self._remembered(self.echat.sound.stream(turn.events, ask.seed, voice), turn)

    def request(self, ask: Ask, heard: Sequence[AudioFeatures] = ()) -> Request:
        """The request of the next turn, with the past in front; see `EChat.request`."""
        if ask.mode.then is not None:
            raise ValueError("a dialogue answers written turns in text; give a recording, or leave speak out")
        self._check(ask)
        return tuned(self.memory.request(ask.mode.output_type, heard, ask.text or "", ask.seed, think=ask.think), ask)

    def _check(self, ask: Ask) -> None:
        """Raises NotLearnt for what the checkpoint has not learnt."""
        parts.check(ask, self.echat.dialect, min(len(self.memory), self.memory.max_turns))

    def _turn(self, ask: Ask) -> _Turn | None:
        """The turn to be made; None when nothing is heard, which leaves no trace in the dialogue."""
        self._check(ask)
        asks = self.echat.parts(ask)
        if not asks:
            return None
        [ask] = asks
        heard, text = self.echat.hear([ask.wav]) if ask.wav is not None else [], ask.text or ""
        request = self.request(ask, heard)
        return _Turn(request, heard, text, (event for _, event in self.echat.generator.generate([request])))

    def _remembered(self, events: Iterator[StreamEvent], turn: _Turn) -> Iterator[StreamEvent]:
        """The events; the turn is the past of the next one as soon as its end has been told."""
        told: list[Event] = []
        for event in events:
            if not isinstance(event, AudioChunk):
                told.append(event)
            if isinstance(event, Done):
                self.memory.commit(turn.request, told, turn.heard, turn.text)
            yield event


@dataclass
class _Batch:
    """Asks that were decoded together: their voices, the events of each, and when that began."""

    asks: Sequence[Ask]
    voices: Sequence[Speaker | None]
    rows: list[list[StreamEvent]]
    started: float


@dataclass
class _Decoded:
    """A group of asks: how many parts each came to, and these parts, decoded in batches."""

    asks: Sequence[Ask]
    started: float
    counts: list[int] = field(default_factory=list)
    batches: list[_Batch] = field(default_factory=list)


@dataclass(frozen=True)
class _Turn:
    """The turn in work: its request, what the user said or wrote, and the events that it makes."""

    request: Request
    heard: Sequence[AudioFeatures]
    text: str
    events: Iterator[Event]


def tuned(request: Request, ask: Ask) -> Request:
    """The request with the sampling and the limit that the ask wants instead of the checkpoint's own."""
    request.mode = request.mode.tuned(ask.greedy, ask.temperature, ask.max_tokens)
    return request


def _said(ask: Ask, answer: str) -> Ask:
    assert ask.mode.then is not None
    return replace(ask, kind=MODES[ask.mode.then].kind, text=answer)


def said_done(text: Done, speech: Done, offset: float) -> Done:
    """One end for a text that was answered and then said; the second began ``offset`` seconds after the first."""
    first_speech = speech.timings.first_speech
    return replace(
        text,
        reason=text.reason if text.reason != "stop" else speech.reason,
        generated=text.generated + speech.generated,
        guards={name: text.guards.get(name, 0) + speech.guards.get(name, 0) for name in {*text.guards, *speech.guards}},
        timings=replace(
            text.timings,
            first_speech=None if first_speech is None else offset + first_speech,
            total=offset + speech.timings.total,
        ),
    )
