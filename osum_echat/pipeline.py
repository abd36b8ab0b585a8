"""`EChat`: the public object. It joins audio, dialogue, model, generation and token2wav, and holds no logic of theirs.

    echat = EChat.load("checkpoints/mini")
    echat.understand("me.wav", "<TRANSCRIBE> <EMOTION>").text
    reply = echat.chat("me.wav", think="tag", speak=True)
    for event in echat.stream("me.wav", speak=True): ...
    replies = echat.batch([Ask(wav="a.wav"), Ask(text="hello")])

A recording is a path, the bytes of a file, or (samples, rate). What cannot be used is a ValueError that says why (`audio.io.AudioError`).
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.audio.features import LogMel
from osum_echat.audio.io import MAX_SECONDS, Source, to_mono_16k
from osum_echat.cpu_linear import pack_linears
from osum_echat.dialogue.prompts import get_profile
from osum_echat.dialogue.tasks import find_task
from osum_echat.dialogue.think import Think
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.events import Done, Event, SpeechTokens, TextDelta, ThinkDelta, Timings
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request, build_request, listen
from osum_echat.generation.session import Session
from osum_echat.model.checkpoint import load_model
from osum_echat.model.config import ModelConfig
from osum_echat.model.echat import AudioFeatures, EChatModel
from osum_echat.token2wav.config import SAMPLE_RATE

if TYPE_CHECKING:
    from osum_echat.token2wav import Speaker, Token2Wav

GENERATION_FILE = "generation.yaml"
TOKEN2WAV_FOLDER = "token2wav"
SPEAKER_FILE = "speaker.safetensors"
INSTRUCTIONS = Path(__file__).resolve().parents[1] / "conf" / "prompt_config.yaml"

ThinkForm: TypeAlias = Literal["tag", "language"] | None
Voice: TypeAlias = "Speaker | str | Path"
StreamEvent: TypeAlias = "Event | AudioChunk"


@dataclass(frozen=True)
class AudioChunk:
    """More of the reply's sound: samples [n] float32."""

    samples: npt.NDArray[np.float32]
    rate: int


@dataclass(frozen=True)
class Ask:
    """One thing to ask; what is not given is not used.

    Attributes:
        wav: a recording. text: a written question (without a recording), or the text to say (``kind="speak"``).
        kind: ``chat`` (default), ``understand`` or ``speak``.
        task, prompt: of understanding: the task string, and an instruction instead of the task's own.
        think: let the model think first: ``tag`` or ``language``, the form that its checkpoint was trained for.
        speak: answer in speech as well. interleaved: text and speech in turns (6:18) instead of one after the other.
        speaker: another voice than the loaded one.
    """

    wav: Source | None = None
    text: str | None = None
    kind: Literal["chat", "understand", "speak"] = "chat"
    task: str = "<TRANSCRIBE>"
    prompt: str | None = None
    think: ThinkForm = None
    speak: bool = False
    interleaved: bool = False
    seed: int = 0
    greedy: bool = False
    speaker: Voice | None = None

    def output_type(self) -> str:
        """The kind of sequence. Raises ValueError for what does not go together."""
        if self.think not in (None, "tag", "language"):
            raise ValueError(f"think={self.think!r}: use None, 'tag' or 'language'")
        if self.kind == "understand":
            kind = find_task(self.task).output_type
            if kind != "text":
                raise ValueError(f"{self.task} is no understanding task; use chat or speak")
        elif self.kind == "speak":
            kind = "text2token_streaming" if self.interleaved else "text2token"
        elif self.wav is None:
            kind = "text2text"
            if self.think is not None:
                raise ValueError("the model thinks about recordings only; leave think out, or give a recording")
        elif not self.speak:
            kind = "s2t_chat_think" if self.think else "s2t_chat"
        else:
            kind = "speech2text_token" + ("_streaming" if self.interleaved else "") + ("_think" if self.think else "")
        needs_wav = self.kind == "understand" or (self.kind == "chat" and self.wav is not None)
        if needs_wav and self.wav is None:
            raise ValueError(f"{self.kind} needs a recording")
        if not needs_wav and not (self.text or "").strip():
            raise ValueError("there is neither a recording nor a text" if self.kind == "chat" else "there is no text to say")
        if self.wav is not None and self.text is not None:
            raise ValueError("give a recording or a text, not both")
        return kind


@dataclass
class Reply:
    """An answer.

    Attributes:
        text: the reply (the transcript, the tags ...), without the think.
        think: raw and parsed; None when there was none.
        speech_tokens: 25 a second, no delimiters.
        audio: samples [n] float32 at ``sample_rate``; None without speech, or without token2wav.
        finish_reason: ``stop``, ``length`` (cut off by a limit) or ``cancelled``.
        guards: how often each guard acted.
    """

    text: str
    think: Think | None = None
    speech_tokens: tuple[int, ...] = ()
    audio: npt.NDArray[np.float32] | None = None
    sample_rate: int = SAMPLE_RATE
    finish_reason: str = "stop"
    guards: Mapping[str, int] = field(default_factory=dict)
    timings: Timings = field(default_factory=Timings)

    def as_json(self) -> dict[str, Any]:
        """Plain data for JSON, without the samples."""
        return {
            "text": self.text,
            "think": None if self.think is None else dataclasses.asdict(self.think),
            "speech_tokens": list(self.speech_tokens),
            "sample_rate": self.sample_rate if self.audio is not None else None,
            "finish_reason": self.finish_reason,
            "guards": dict(self.guards),
            "timings": {name: _rounded(value) for name, value in dataclasses.asdict(self.timings).items()},
        }


class EChat:
    """A loaded model with its voice. Not for several threads at the same moment; requests that come together belong in `batch`."""

    def __init__(
        self,
        model: EChatModel,
        tokenizer: Any,
        config: GenerationConfig | None = None,
        token2wav: Token2Wav | None = None,
        speaker: Speaker | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.config = config or GenerationConfig()
        self.generator = Generator(model, tokenizer, self.config)
        self.token2wav = token2wav
        self.voice = speaker
        self._log_mel = LogMel(model.config.encoder.mels)
        # What the position tables hold: 50 encoder frames and 12.5 adapter positions a second.
        self.max_seconds = min(MAX_SECONDS, model.config.encoder.max_positions / 50, model.config.adapter.max_positions / 12.5)

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        config: str | Path | ModelConfig | None = None,
        token2wav: str | Path | Token2Wav | None = None,
        device: str = "auto",
        dtype: str = "auto",
        profile: str | None = None,
        speaker: Voice | None = None,
        generation: str | Path | GenerationConfig | None = None,
        pack: bool = True,
        compile: bool = False,
    ) -> EChat:
        """Load everything.

        Args:
            checkpoint: a folder, a released ``.pt`` or ``.safetensors``, or a hub name (see `model.checkpoint.load_model`).
            config: model config; needed where the checkpoint does not bring its own.
            token2wav: a folder of the CosyVoice-300M-25Hz shape (default: the checkpoint's own, if it has one; else replies have speech tokens
                and no sound).
            dtype: ``auto`` is bfloat16 on accelerators. On a CPU it is float32, but bfloat16 for a large checkpoint where the CPU does that well or
                float32 would not fit into memory (`device.cpu`).
            profile: prompt profile, other than the one in the generation settings.
            speaker: the reply's voice: a `Speaker`, a saved one, a recording of 1 to 30 s, or a name of ``spk2info.pt`` (default: the
                checkpoint's ``token2wav/speaker.safetensors``, else the first name).
            generation: settings (default: the checkpoint's ``generation.yaml``, else `GenerationConfig`).
            pack: reorder the weights for decoding on a CPU (`cpu_linear`); the model cannot be trained or saved then.
            compile: `torch.compile` the LLM (see `Generator.compile`).

        Raises:
            ValueError: what is missing or does not fit together.
        """
        target = devices.resolve(device)
        path = Path(checkpoint)
        chosen = functools.partial(devices.model_dtype, dtype, target)
        model, tokenizer = load_model(checkpoint, config, device=target, dtype=chosen)
        if model.lm.llm.config._attn_implementation == "eager":
            model.lm.llm.set_attn_implementation("sdpa")  # eager is a choice for training; a step of one id is faster without
        if pack:
            pack_linears(model.lm)
        settings = generation if isinstance(generation, GenerationConfig) else _settings(path, generation)
        if profile is not None:
            settings = settings.with_profile(profile)
        sound = _token2wav(path, token2wav, target)
        echat = cls(model, tokenizer, settings, sound)
        if compile:
            echat.generator.compile()
        if sound is not None:
            echat.voice = echat.speaker(speaker) if speaker is not None else _default_voice(path / TOKEN2WAV_FOLDER, sound)
        return echat

    # ---- one request --------------------------------------------------------------------------------------------------------------

    def understand(
        self, wav: Source, task: str = "<TRANSCRIBE>", prompt: str | None = None, seed: int = 0, greedy: bool = False
    ) -> Reply:
        """Transcript, tags or caption of a recording; ``task`` is one of the prompted tasks (`dialogue.tasks`)."""
        return self.batch([Ask(wav=wav, kind="understand", task=task, prompt=prompt, seed=seed, greedy=greedy)])[0]

    def chat(
        self,
        wav: Source | None = None,
        text: str | None = None,
        think: ThinkForm = None,
        speak: bool = False,
        seed: int = 0,
        greedy: bool = False,
        speaker: Voice | None = None,
        interleaved: bool = False,
    ) -> Reply:
        """Answer a recording or a text; see `Ask`."""
        ask = Ask(wav, text, think=think, speak=speak, interleaved=interleaved, seed=seed, greedy=greedy, speaker=speaker)
        return self.batch([ask])[0]

    def speak(self, text: str, seed: int = 0, greedy: bool = False, speaker: Voice | None = None) -> Reply:
        """Say a text."""
        return self.batch([Ask(text=text, kind="speak", seed=seed, greedy=greedy, speaker=speaker)])[0]

    def stream(
        self,
        wav: Source | None = None,
        text: str | None = None,
        think: ThinkForm = None,
        speak: bool = False,
        seed: int = 0,
        greedy: bool = False,
        speaker: Voice | None = None,
        interleaved: bool = False,
    ) -> Iterator[StreamEvent]:
        """The events of `chat` as they happen, with `AudioChunk` between them when there is sound; `Done` is the last. Close it to stop."""
        return self.stream_ask(
            Ask(wav, text, think=think, speak=speak, interleaved=interleaved, seed=seed, greedy=greedy, speaker=speaker)
        )

    def stream_ask(self, ask: Ask) -> Iterator[StreamEvent]:
        """The events of anything that can be asked."""
        events: Iterator[StreamEvent] = (event for _, event in self.generator.generate([self._request(ask)]))
        if not (ask.kind == "chat" and ask.wav is None and ask.speak):
            yield from self.with_sound(events, ask)
            return
        # A text is answered by one request and said by another.
        done, parts = Done("stop"), list[str]()
        for event in events:
            if isinstance(event, Done):
                done = event
                break
            parts += [event.text] if isinstance(event, TextDelta) else []
            yield event
        answer = "".join(parts).strip()
        if not answer:
            yield done
            return
        said = replace(ask, kind="speak", text=answer)
        for event in self.with_sound((e for _, e in self.generator.generate([self._request(said)])), said):
            yield _joined(done, event) if isinstance(event, Done) else event

    def session(self, max_turns: int = 5, max_tokens: int = 2000) -> Dialogue:
        """A dialogue that remembers its past turns."""
        return Dialogue(self, Session(self.generator, max_turns, max_tokens))

    # ---- many requests ------------------------------------------------------------------------------------------------------------

    def batch(self, asks: Sequence[Ask], size: int = 16) -> list[Reply]:
        """Answer many at once, of any kinds, ``size`` at a time. Each reply is what it would be alone."""
        replies: list[Reply] = []
        for start in range(0, len(asks), size):
            replies += self._batch(asks[start : start + size])
        return replies

    def _batch(self, asks: Sequence[Ask]) -> list[Reply]:
        started = time.perf_counter()
        heard = self._listen(asks)
        replies = self._collect([self._request(ask, audio) for ask, audio in zip(asks, heard, strict=True)], asks)
        to_say = [i for i, ask in enumerate(asks) if ask.kind == "chat" and ask.wav is None and ask.speak and replies[i].text]
        if to_say:
            said = [replace(asks[i], kind="speak", text=replies[i].text) for i in to_say]
            for i, spoken in zip(to_say, self._collect([self._request(ask) for ask in said], said), strict=True):
                replies[i].speech_tokens = spoken.speech_tokens
                if replies[i].finish_reason == "stop":
                    replies[i].finish_reason = spoken.finish_reason
        self._add_sound(replies, asks, started)
        return replies

    def _collect(self, requests: Sequence[Request], asks: Sequence[Ask]) -> list[Reply]:
        events: list[list[Event]] = [[] for _ in requests]
        for row, event in self.generator.generate(requests):
            events[row].append(event)
        return [self.reply(row, ask.think) for row, ask in zip(events, asks, strict=True)]

    def reply(self, events: Sequence[StreamEvent], think: ThinkForm = None) -> Reply:
        """What a row's events come to. ``think``: the form to parse a think by."""
        done = events[-1]
        assert isinstance(done, Done), f"a row's last event is Done, found {done}"
        thought = "".join(e.text for e in events if isinstance(e, ThinkDelta))
        profile = get_profile(self.config.profile)
        template = profile.tag_think if think == "tag" else profile.natural_think
        chunks = [e.samples for e in events if isinstance(e, AudioChunk)]
        return Reply(
            text="".join(e.text for e in events if isinstance(e, TextDelta)).strip(),
            think=template.parse(thought) if thought else None,
            speech_tokens=done.speech_codes,
            audio=np.concatenate(chunks) if chunks else None,
            finish_reason=done.reason,
            guards=done.guards,
            timings=done.timings,
        )

    # ---- sound --------------------------------------------------------------------------------------------------------------------

    def speaker(self, voice: Voice) -> Speaker:
        """A voice: a `Speaker`, a saved one (``.safetensors``), a name of ``spk2info.pt``, or a recording. Raises ValueError."""
        from osum_echat.token2wav import Speaker

        if isinstance(voice, Speaker):
            return voice
        if self.token2wav is None:
            raise ValueError("a voice needs token2wav: load with token2wav=FOLDER")
        if str(voice) in self.token2wav.speakers:
            return self.token2wav.speakers[str(voice)]
        if Path(voice).suffix == ".safetensors":
            return Speaker.load(voice)
        return Speaker.from_wav(str(voice), self.token2wav)

    def with_sound(self, events: Iterator[StreamEvent], ask: Ask) -> Iterator[StreamEvent]:
        """Put `AudioChunk`s between the events of one row.

        Sound is made from the codes as they come; an event that comes while a chunk is in the making is told right before it.
        """
        voice = self._voice(ask)
        if voice is None or self.token2wav is None:
            yield from events
            return
        for first in events:
            yield first
            if isinstance(first, SpeechTokens):
                break
        else:
            return
        waiting: list[StreamEvent] = []

        def codes() -> Iterator[int]:
            yield from first.codes
            for event in events:
                waiting.append(event)
                if isinstance(event, SpeechTokens):
                    yield from event.codes

        for samples in self.token2wav.stream(codes(), voice, seed=ask.seed):
            done = [event for event in waiting if isinstance(event, Done)]
            yield from (event for event in waiting if not isinstance(event, Done))
            waiting[:] = done
            yield AudioChunk(samples, self.token2wav.sample_rate)
        yield from waiting

    def _add_sound(self, replies: Sequence[Reply], asks: Sequence[Ask], started: float) -> None:
        voices = [self._voice(ask) for ask in asks]
        spoken = [i for i, reply in enumerate(replies) if reply.speech_tokens and voices[i] is not None]
        began = time.perf_counter()
        for seed in sorted({asks[i].seed for i in spoken}):
            rows = [i for i in spoken if asks[i].seed == seed]
            assert self.token2wav is not None
            tokens = [replies[i].speech_tokens for i in rows]
            waves, rate = self.token2wav.synthesize(tokens, [v for i in rows if (v := voices[i]) is not None], seed=seed)
            for i, samples in zip(rows, waves, strict=True):
                replies[i].audio, replies[i].sample_rate = samples, rate
        now = time.perf_counter()
        for i in spoken:
            replies[i].timings = replace(replies[i].timings, synthesis=now - began, total=now - started)

    def _voice(self, ask: Ask) -> Speaker | None:
        if self.token2wav is None:
            return None
        voice = self.speaker(ask.speaker) if ask.speaker is not None else self.voice
        if voice is None and (ask.speak or ask.kind == "speak"):
            raise ValueError("no voice is loaded: give speaker= (a recording of 1 to 30 s, or a saved speaker)")
        return voice

    # ---- requests -----------------------------------------------------------------------------------------------------------------

    def hear(self, wavs: Sequence[Source]) -> list[AudioFeatures]:
        """Recordings as the LLM hears them. Raises AudioError for what cannot be used."""
        return listen(self.model, [self._log_mel(to_mono_16k(wav, max_seconds=self.max_seconds)) for wav in wavs])

    def _listen(self, asks: Sequence[Ask]) -> list[AudioFeatures | None]:
        for ask in asks:
            ask.output_type()  # what cannot be asked is refused before anything is computed
        found = iter(self.hear([ask.wav for ask in asks if ask.wav is not None]))
        return [next(found) if ask.wav is not None else None for ask in asks]

    def _request(self, ask: Ask, audio: AudioFeatures | None = None) -> Request:
        output_type = ask.output_type()
        if ask.wav is not None and audio is None:
            audio = self.hear([ask.wav])[0]
        prompt = ask.text or ""
        if ask.kind == "understand":
            prompt = ask.prompt or self._instruction(ask.task)
        return build_request(
            output_type,
            self.config,
            self.tokenizer,
            self.model.vocabulary,
            prompt_text=prompt if ask.kind != "speak" else "",
            say=ask.text or "" if ask.kind == "speak" else "",
            heard=[audio] if audio is not None else [],
            seed=ask.seed,
            greedy=ask.greedy,
            natural_think=ask.think == "language",
        )

    def _instruction(self, task: str) -> str:
        """What the user asks for. A task without an instruction of its own is asked without one, as in training."""
        known = self.config.instructions
        if task in known:
            return known[task]
        if self.config.only_instructed and find_task(task).prompted:
            raise ValueError(f"this checkpoint has not learnt {task}, only {', '.join(known)}; prompt= asks in words of your own")
        sentences = config_io.read_yaml(INSTRUCTIONS).get(task) if INSTRUCTIONS.is_file() else None
        if sentences is None and find_task(task).prompted:
            raise ValueError(f"there is no instruction for {task}: give prompt=, or instructions in {GENERATION_FILE}")
        return str(sentences[0]) if sentences else ""


class Dialogue:
    """A dialogue of several turns; see `generation.session` for what is kept."""

    def __init__(self, echat: EChat, session: Session) -> None:
        self.echat, self.memory = echat, session

    def __len__(self) -> int:
        """Past turns that are remembered."""
        return len(self.memory)

    def clear(self) -> None:
        """Forget everything."""
        self.memory.clear()

    def chat(
        self,
        wav: Source | None = None,
        text: str | None = None,
        think: ThinkForm = None,
        speak: bool = False,
        seed: int = 0,
        greedy: bool = False,
        speaker: Voice | None = None,
    ) -> Reply:
        """The answer to the next turn."""
        started = time.perf_counter()
        ask = Ask(wav, text, think=think, speak=speak, seed=seed, greedy=greedy, speaker=speaker)
        reply = self.echat.reply(list(self._events(ask)), think)
        self.echat._add_sound([reply], [ask], started)
        return reply

    def stream(
        self,
        wav: Source | None = None,
        text: str | None = None,
        think: ThinkForm = None,
        speak: bool = False,
        seed: int = 0,
        greedy: bool = False,
        speaker: Voice | None = None,
    ) -> Iterator[StreamEvent]:
        """The events of the next turn as they happen. A stream that is closed before its end leaves no trace in the dialogue."""
        ask = Ask(wav, text, think=think, speak=speak, seed=seed, greedy=greedy, speaker=speaker)
        return self.echat.with_sound(self._events(ask), ask)

    def _events(self, ask: Ask) -> Iterator[StreamEvent]:
        output_type = ask.output_type()
        if ask.wav is None and ask.speak:
            raise ValueError("a dialogue answers written turns in text; give a recording, or leave speak out")
        heard = self.echat.hear([ask.wav]) if ask.wav is not None else []
        request = self.memory.request(output_type, heard, ask.text or "", ask.seed, ask.greedy, ask.think == "language")
        for _, event in self.echat.generator.generate([request]):
            if isinstance(event, Done):
                self.memory.commit(request, event, heard, ask.text or "")
            yield event


# ---- loading -------------------------------------------------------------------------------------------------------------------------


def _settings(checkpoint: Path, generation: str | Path | None) -> GenerationConfig:
    own = checkpoint / GENERATION_FILE
    if generation is None and own.is_file():
        generation = own
    return config_io.load(GenerationConfig, generation)


def _token2wav(checkpoint: Path, given: str | Path | Token2Wav | None, device: torch.device) -> Token2Wav | None:
    if given is None and (checkpoint / TOKEN2WAV_FOLDER).is_dir():
        given = checkpoint / TOKEN2WAV_FOLDER
    if given is None or not isinstance(given, (str, Path)):
        return given
    from osum_echat.token2wav import Token2Wav

    return Token2Wav.load(given, device=str(device))


def _default_voice(folder: Path, token2wav: Token2Wav) -> Speaker | None:
    from osum_echat.token2wav import Speaker

    if (folder / SPEAKER_FILE).is_file():
        return Speaker.load(folder / SPEAKER_FILE)
    return next(iter(token2wav.speakers.values()), None)


def _joined(text: Done, speech: Done) -> Done:
    """One end for a text that was answered and then said."""
    return replace(
        text,
        reason=text.reason if text.reason != "stop" else speech.reason,
        speech_codes=speech.speech_codes,
        generated=text.generated + speech.generated,
        guards={name: text.guards.get(name, 0) + speech.guards.get(name, 0) for name in {*text.guards, *speech.guards}},
        timings=replace(
            text.timings,
            first_speech=None if speech.timings.first_speech is None else text.timings.total + speech.timings.first_speech,
            total=text.timings.total + speech.timings.total,
        ),
    )


def _rounded(value: Any) -> Any:
    return round(value, 4) if isinstance(value, float) else value
