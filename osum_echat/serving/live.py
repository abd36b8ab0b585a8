"""The model behind the live server: a `SharedEChat`, in the words of the session machine (`backend`).

Three threads work: the event loop of the server, the engine's (the language model and the encoder) and the pool's
(token2wav). Events cross to the loop by `call_soon_threadsafe`; nothing blocks it. No path and no URL of a client is
opened here: voices are names that the server knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from osum_echat.audio.pauses import is_silent
from osum_echat.dialogue.tasks import OUTPUTS, PastTurn
from osum_echat.dialogue.think import ThinkForm
from osum_echat.dialogue.tokens import encode
from osum_echat.generation.cache import KeptCache
from osum_echat.generation.engine import EngineFull, Load
from osum_echat.generation.events import Done, SpeechToken, TextDelta, ThinkDelta
from osum_echat.generation.request import Request, TooLong, build_request
from osum_echat.generation.session import Session
from osum_echat.pipeline import Ask, parts
from osum_echat.pipeline.ask import AudioChunk, StreamEvent
from osum_echat.rates import CODES_PER_SECOND
from osum_echat.serving.backend import (
    Ended,
    Event,
    Exchange,
    Heard,
    Memory,
    Refused,
    Samples,
    Sound,
    Text,
    Thought,
    ThoughtDone,
    Turn,
)
from osum_echat.serving.shared import RATE, Answer, Saying, SharedEChat, Voice
from osum_echat.serving.turn_head import TurnHeadDetector

if TYPE_CHECKING:
    from osum_echat.token2wav import Speaker

log = logging.getLogger(__name__)
TAGS = ("transcript", "age", "gender", "emotion", "event")
MAX_TURNS, MAX_POSITIONS = 5, 2000


class LiveMemory:
    """What the model keeps of one dialogue."""

    def __init__(self, model: LiveModel) -> None:
        self._model = model
        self.session = model.new_session()
        self.last: Request | None = None
        self._closed = False

    def keep(self, cache: KeptCache | None) -> None:
        """What has been read; on the model's thread. What ends after the dialogue did (an answer that was cut off, a
        past that was read) is not kept."""
        if cache is not None and not self._closed:
            self.session.kept = cache
            self._model.engine.remember(self.session)

    def close(self) -> None:
        self._closed = True  # before the engine forgets, so that nothing is kept behind that
        with contextlib.suppress(EngineFull):  # the engine has closed, and its memory is gone
            self._model.engine.forget(self.session)


class LiveModel:
    """See `backend.Backend`.

    Args:
        interleaved: text and speech in turns, where nothing says whether the checkpoint has learnt it. One that states
            it is always asked so.
    """

    codes_per_second = float(CODES_PER_SECOND)

    def __init__(self, shared: SharedEChat, name: str = "osum-echat", interleaved: bool = False) -> None:
        echat = shared.echat
        self.shared, self.echat, self.name = shared, echat, name
        self.engine, self.pool = shared.engine, shared.pool
        learnt = echat.dialect.learnt
        self.max_seconds = echat.max_seconds
        self.interleaved = interleaved if learnt.modes is None else "speech2text_token_streaming" in learnt.modes
        forms: tuple[ThinkForm, ...] = ("tag", "language")
        kinds = ("speech2text_token_think", "speech2text_token_streaming_think")
        self.thinks: Sequence[str] = [f for f in forms if any(echat.dialect.refusal(kind, think=f) is None for kind in kinds)]
        self.past_turns = MAX_TURNS if learnt.past_turns is None else min(learnt.past_turns, MAX_TURNS)
        self.warnings = self._warnings()
        turn = echat.model.turn
        self.turn_head = None if turn is None else TurnHeadDetector(shared.hear, turn.labels)
        self.loop: asyncio.AbstractEventLoop | None = None

    def _warnings(self) -> Mapping[str, str]:
        found = {
            "instructions": "this checkpoint follows no instructions; they are kept in the session and have no effect",
            "tools": "this checkpoint calls no tools; they are kept in the session and never called",
            "think": f"this checkpoint thinks in these forms only: {', '.join(self.thinks) or 'none'}",
        }
        if self.past_turns == 0:
            found["history"] = "this checkpoint has not learnt past turns: every turn is answered from itself alone"
        return found

    # ---- life --------------------------------------------------------------------------------------------------------

    def start_threads(self) -> None:
        """Call it on the running event loop, once."""
        self.loop = asyncio.get_running_loop()
        self.shared.start()

    def close(self) -> None:
        """End the threads; what runs is cancelled."""
        self.shared.close()

    def load(self) -> Load:
        return self.shared.load()

    # ---- backend -----------------------------------------------------------------------------------------------------

    @property
    def voices(self) -> list[str]:
        token2wav = self.echat.token2wav
        return [] if token2wav is None else ["default", *token2wav.speakers]

    def speaker(self, name: str | None) -> Speaker | None:
        """A voice by its name; the usual one for names that are not known here."""
        token2wav = self.echat.token2wav
        if token2wav is None:
            return None
        return token2wav.speakers.get(name or "", self.echat.voice)

    def open(self) -> LiveMemory:
        return LiveMemory(self)

    async def hear(self, samples: Samples) -> Heard:
        if is_silent(samples):
            return Heard(None, len(samples) / RATE)  # answered without the model
        kept = None if self.turn_head is None else self.turn_head.take(samples)
        try:
            features = await asyncio.wrap_future(self.shared.hear(samples)) if kept is None else kept
        except EngineFull as error:
            raise Refused(str(error)) from error
        return Heard(features, len(samples) / RATE, int(features.lengths_N[0]))

    async def transcribe(self, heard: Heard) -> str:
        if heard.features is None:
            return ""
        refusal = self.echat.dialect.refusal("<TRANSCRIBE>")
        if refusal is not None:
            raise Refused(refusal, "not_learnt")
        request = self._build("text", heard=[heard.features], prompt_text=self.echat.dialect.instruction("<TRANSCRIBE>"))
        job = LiveJob(self, Turn(heard=heard, speak=False))
        job.begin(request)
        parts = [event.text async for event in job if isinstance(event, Text)]
        return "".join(parts).strip()

    def start(self, turn: Turn, memory: Memory | None = None) -> LiveJob:
        assert memory is None or isinstance(memory, LiveMemory), memory
        if turn.heard is not None and turn.heard.features is None:
            return self._nothing_heard(turn)
        job = LiveJob(self, turn, memory)
        job.begin(self.request(turn, memory))
        return job

    def _nothing_heard(self, turn: Turn) -> LiveJob:
        """Silence is answered as silence, in the checkpoint's language."""
        [told, _] = parts.silent_events(Ask(wav=b""), self.echat.dialect)
        assert isinstance(told, TextDelta), told
        text = told.text
        job = LiveJob(self, Turn(say=text, voice=turn.voice, seed=turn.seed))
        job.tell(text)
        if not turn.speak or self.pool is None:
            job.end()
            return job
        try:
            request = self.request(Turn(say=text), None)
        except Refused:  # a checkpoint that says no texts: it stays a text
            job.end()
        else:
            job.begin(request)
        return job

    def remember(self, memory: Memory, past: Sequence[Exchange], turn: Turn) -> None:
        """Read the past as the next turn will show it, while nobody waits. A new turn does not wait for it."""
        assert isinstance(memory, LiveMemory), memory
        last, session = memory.last, memory.session
        if self.past_turns == 0 or last is None:
            return
        session.replace_past(*self._past(past))
        reading = session.past_request(last)
        if reading is not None:
            self.shared.read_past(reading, memory.keep)

    # ---- requests ----------------------------------------------------------------------------------------------------

    def _build(self, output_type: str, **options: Any) -> Request:
        echat = self.echat
        return build_request(output_type, echat.config, echat.tokenizer, echat.model.vocabulary, dialect=echat.dialect, **options)

    def output_type(self, turn: Turn) -> str:
        """The kind of sequence that answers a turn."""
        if turn.say:
            learnt = self.echat.dialect.learnt.modes
            streams = self.interleaved and (learnt is None or "text2token_streaming" in learnt)
            return "text2token_streaming" if streams else "text2token"
        if turn.heard is None:
            return "text2text"
        if not turn.speak:
            return "s2t_chat_think" if turn.think else "s2t_chat"
        return "speech2text_token" + ("_streaming" if self.interleaved else "") + ("_think" if turn.think else "")

    def request(self, turn: Turn, memory: LiveMemory | None) -> Request:
        """Raises Refused for what this checkpoint cannot do."""
        kind = self.output_type(turn)
        refusal = self.echat.dialect.refusal(kind, think=turn.think)
        if refusal is None and turn.heard is None:
            written = Ask(text=turn.say or turn.text, kind="speak" if turn.say else "chat")
            refusal = parts.refusal(written, self.echat.dialect)
        if refusal is not None:
            raise Refused(refusal, "not_learnt")
        heard = [] if turn.heard is None else [turn.heard.features]
        try:
            if not OUTPUTS[kind].history or self.past_turns == 0:
                options: dict[str, Any] = {"say": turn.say} if turn.say else {"prompt_text": turn.text, "heard": heard}
                request = self._build(kind, seed=turn.seed, think=turn.think, **options)
            else:
                session = memory.session if memory is not None else self.new_session()
                session.replace_past(*self._past(turn.past))
                request = session.request(kind, heard, turn.text, turn.seed, think=turn.think)
                request.keep_cache = memory is not None
                if memory is not None:
                    memory.last = request
        except TooLong as error:
            raise Refused(str(error), "too_long") from error
        except ValueError as error:
            raise Refused(str(error), "invalid_input") from error
        limit = request.mode.max_new if turn.max_tokens is None else min(turn.max_tokens, request.mode.max_new)
        request.mode = request.mode.tuned(temperature=turn.temperature, max_new=limit)
        return request

    def new_session(self) -> Session:
        """Of past turns there are none yet."""
        return Session(self.echat.generator, self.past_turns, MAX_POSITIONS)

    def _past(self, past: Sequence[Exchange]) -> tuple[list[PastTurn], list[tuple[Any, ...]]]:
        tokenizer = self.echat.tokenizer
        past = [exchange for exchange in past if all(h.features is not None for h in exchange.heard)]
        past = past[-self.past_turns :] if self.past_turns else []
        turns = [
            PastTurn(
                encode(tokenizer, exchange.reply_text),
                exchange.codes,
                has_audio=bool(exchange.heard),
                user_ids=encode(tokenizer, exchange.user_text) if exchange.user_text else (),
            )
            for exchange in past
        ]
        return turns, [tuple(h.features for h in exchange.heard) for exchange in past]

    def tags(self, thought: str, form: ThinkForm | None) -> dict[str, str]:
        """What a thought says, as far as it says it."""
        strings = self.echat.dialect.strings
        template = strings.tag_think if form == "tag" else strings.language_think
        found = asdict(template.parse(thought))
        return {name: found[name] for name in TAGS if found.get(name)}

    def word_ends(self, generated: Sequence[int], kind: str) -> tuple[int, ...]:
        """Number of codes after each word that was said; empty where speech has no words in it."""
        if self.echat.dialect.speech_form != "word" or OUTPUTS[kind].speech != "after":
            return ()
        vocabulary = self.echat.model.vocabulary
        begun, codes, ends = not OUTPUTS[kind].reply_text, 0, []
        for token in generated:
            if token == vocabulary.speech_delimiter:
                if begun:
                    ends.append(codes)
                begun = True
            elif token >= vocabulary.text_size:
                codes += 1
        return tuple(ends if not ends or ends[-1] == codes else [*ends, codes])


class LiveJob:
    """See `backend.Job`: the events of a `shared.Answer`, on the event loop and in the words of the session machine."""

    def __init__(self, model: LiveModel, turn: Turn, memory: LiveMemory | None = None) -> None:
        assert model.loop is not None, "call start_threads first"
        self._model, self._turn, self._memory = model, turn, memory
        self._loop = model.loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._request: Request | None = None
        self._saying: Request | None = None  # what says the answer, where another request does
        self._answer: Answer | None = None
        self._thought = ""
        self._thought_open = True
        self._codes: list[int] = []
        self._cached = 0

    def begin(self, request: Request) -> None:
        """Raises Refused when the engine does not take it."""
        turn, model = self._turn, self._model
        self._request = request
        if request.past is not None:
            self._cached = min(request.past.common(request.prompt, request.heard), len(request.prompt) - 1)
        speaker = model.speaker(turn.voice) if turn.speak else None
        voice = None if speaker is None or model.pool is None else Voice(speaker, turn.seed)
        saying = None
        if voice is not None and request.output_type == "text2text":
            saying, voice = Saying(self._say, voice), None
        elif OUTPUTS[request.output_type].speech == "none":
            voice = None
        try:
            self._answer = model.shared.answer(request, self._on_event, voice, saying, self._on_decoded)
        except EngineFull as error:
            raise Refused(str(error)) from error
        except TooLong as error:
            raise Refused(str(error), "too_long") from error

    def tell(self, text: str) -> None:
        """A text that is known before anything is asked."""
        self._events.put_nowait(Text(text))

    def end(self) -> None:
        """Nothing is asked."""
        self._events.put_nowait(Ended("stop"))

    def cancel(self) -> None:
        if self._answer is not None:
            self._answer.cancel()

    def slow(self, on: bool) -> None:
        if self._answer is not None:
            self._answer.slow(on)

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = await self._events.get()
            yield event
            if isinstance(event, Ended):
                return

    # ---- the model's and the pool's thread ---------------------------------------------------------------------------

    def _post(self, event: Event) -> None:
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:
            log.debug("an event came after the server had stopped")

    def _on_event(self, event: StreamEvent) -> None:
        if isinstance(event, AudioChunk):
            self._post(Sound(event.samples, event.rate))
        elif isinstance(event, SpeechToken):
            self._codes.append(event.code)
        elif isinstance(event, ThinkDelta):
            self._thought += event.text
            self._post(Thought(event.text))
        elif isinstance(event, TextDelta):
            self._close_thought()
            if not self._turn.say:  # the text of text to speech is known
                self._post(Text(event.text))
        else:
            self._close_thought()
            self._finish(event)

    def _close_thought(self) -> None:
        if self._thought and self._thought_open:
            self._thought_open = False
            self._post(ThoughtDone(self._thought, self._model.tags(self._thought, self._turn.think)))

    def _on_decoded(self, done: Done) -> None:
        """The dialogue keeps what was read as soon as it can."""
        request, memory = self._request, self._memory
        if memory is not None and request is not None:
            memory.keep(request.cache)

    def _say(self, text: str) -> Request:
        """What says a written answer."""
        turn = self._turn
        said = Turn(say=text, voice=turn.voice, seed=turn.seed, max_tokens=turn.max_tokens, temperature=turn.temperature)
        self._saying = self._model.request(said, None)
        return self._saying

    def _finish(self, done: Done) -> None:
        answer, request = self._answer, self._request
        assert request is not None
        first, last = (answer.decoded[0], answer.decoded[-1]) if answer is not None and answer.decoded else (done, done)
        failed = None if answer is None else answer.failed
        tokens = {
            "read": len(request.prompt),
            "cached": self._cached,
            "heard": 0 if self._turn.heard is None else self._turn.heard.positions,
            "text": len(first.text_ids) - first.timings.think_tokens,
            "thought": first.timings.think_tokens,
            "speech": len(self._codes),
        }
        timings = {name: float(v) for name, v in asdict(first.timings).items() if isinstance(v, (int, float))}
        message = "" if failed is None else "the model failed in this answer; ask again"
        ends = self._model.word_ends(last.generated, (self._saying or request).output_type)
        reason = "failed" if failed is not None else done.reason
        self._post(Ended(reason, tuple(self._codes), ends, tokens, timings, dict(done.guards), message))
        self._answer = self._memory = None  # references in a circle would keep what it has heard
