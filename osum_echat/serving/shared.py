"""One loaded model for several people at once: their requests run in one batch (`generation.engine`), their speech is
made in one pool (`token2wav.pool`). The live server (`serving.live`) and the page (`serving.page`) both stand on it.

    shared = SharedEChat(echat).start()
    for event in shared.stream(Ask(wav="me.wav", speak=True)): ...             # from any thread
    answer = shared.answer(request, on_event, Voice(speaker, seed)); answer.cancel()   # the same, by a callback

One thread owns the language model and the encoder, another one token2wav. Nobody waits for somebody else's whole reply.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from osum_echat.generation.cache import KeptCache
from osum_echat.generation.engine import EngineFull, EngineLimits, Load, Ticket
from osum_echat.generation.events import Done, Event, SpeechToken, TextDelta
from osum_echat.generation.request import Request, TooLong
from osum_echat.model.echat import AudioFeatures
from osum_echat.pipeline import parts
from osum_echat.pipeline.ask import MODES, Ask, AudioChunk, StreamEvent
from osum_echat.pipeline.echat import Dialogue, EChat, said_done

if TYPE_CHECKING:
    from osum_echat.token2wav import Speaker
    from osum_echat.token2wav.pool import PooledVoice, StreamPool

log = logging.getLogger(__name__)
Samples = npt.NDArray[np.float32]
OnEvent = Callable[[StreamEvent], None]
RATE = 16_000
HEARD_TOGETHER_S = 60.0
"""Seconds of recordings that the encoder reads in one call, padding included."""


@dataclass(frozen=True)
class Voice:
    """How an answer sounds: a voice, and the seed of its noise."""

    speaker: Speaker
    seed: int = 0


@dataclass(frozen=True)
class Saying:
    """What says a written answer: the request that does, made on the model's thread of the whole text, and its
    voice."""

    request: Callable[[str], Request]
    voice: Voice


class Answer:
    """One answer in the making.

    ``on_event`` gets the events of the request, `AudioChunk`s between them, and `Done` when the sound has ended too. It
    is called on the model's and on the pool's thread, for one answer possibly by both at once, and must not block.

    Attributes:
        decoded: the end of each request that was made for it, as the model told it.
        failed: why it was given up, where it was.
    """

    def __init__(
        self,
        shared: SharedEChat,
        on_event: OnEvent,
        voice: Voice | None,
        saying: Saying | None,
        on_decoded: Callable[[Done], None] | None,
    ) -> None:
        self._shared, self._on_event, self._saying, self._on_decoded = shared, on_event, saying, on_decoded
        self._voice = None if voice is None else shared.open_voice(voice, self._on_samples)
        self._ticket: Ticket | None = None
        self._words: list[str] = []
        self._codes = 0
        self._began = time.perf_counter()
        self._offset = 0.0
        self._cancelled = self._slow = self._ended = False
        self._requests = 0
        self._lock = threading.Lock()
        self.decoded: list[Done] = []
        self.failed: BaseException | None = None

    def begin(self, request: Request) -> None:
        """Raises EngineFull, TooLong."""
        try:
            self._submit(request)
        except (EngineFull, TooLong):
            self._hush()
            raise

    def cancel(self) -> None:
        """Stop within a step; `Done` still comes."""
        self._cancelled = True
        ticket, voice = self._ticket, self._voice
        if ticket is not None:
            ticket.cancel()
        if voice is not None:
            voice.cancel()

    def slow(self, on: bool) -> None:
        """Make no more for now, or go on."""
        self._slow = on
        ticket, voice = self._ticket, self._voice
        if ticket is not None:
            ticket.hold(on)
        if voice is not None:
            voice.slow(on)

    # ---- the model's thread ------------------------------------------------------------------------------------------

    def _submit(self, request: Request) -> None:
        self._requests += 1
        ticket = self._ticket = self._shared.engine.submit(request, self._on_row_event)
        if self._cancelled:
            ticket.cancel()
        elif self._slow:
            ticket.hold(True)

    def _on_row_event(self, event: Event) -> None:
        if isinstance(event, Done):
            self._on_row_done(event)
            return
        if isinstance(event, SpeechToken):
            self._codes += 1
            if self._voice is not None:
                self._voice.push([event.code])
        elif isinstance(event, TextDelta):
            if self.decoded:
                return  # the text that is said has been told
            if self._saying is not None:
                self._words.append(event.text)
        self._tell(event)

    def _on_row_done(self, done: Done) -> None:
        ticket = self._ticket
        if ticket is not None:  # else its voice has failed already
            self.failed = ticket.failed
        self.decoded.append(done)
        if self._on_decoded is not None:
            self._on_decoded(done)
        text = "".join(self._words).strip()
        saying, voice, goes_on = self._saying, self._voice, done.reason != "cancelled" and not self._cancelled
        if saying is not None and len(self.decoded) == 1 and goes_on and text:
            self._say(saying, text)
        elif voice is not None and goes_on and self._codes:
            voice.finish()
        else:
            self._end()

    def _say(self, saying: Saying, text: str) -> None:
        """The text has been answered: say it."""
        self._offset = time.perf_counter() - self._began
        try:
            self._voice = self._shared.open_voice(saying.voice, self._on_samples)
            self._submit(saying.request(text))
        except (ValueError, RuntimeError) as error:  # not learnt, or full: the answer stays a text
            log.warning("an answer is not said: %s", error)
            self._end()

    # ---- the pool's thread -------------------------------------------------------------------------------------------

    def _on_samples(self, samples: Samples | None) -> None:
        if samples is not None:
            self._tell(AudioChunk(samples, self._shared.sample_rate))
        elif not self._cancelled or len(self.decoded) == self._requests:
            self._end()
        # What is cancelled before it was decoded is ended by the model's thread, which knows what had been made.

    # ---- either ------------------------------------------------------------------------------------------------------

    def _tell(self, event: StreamEvent) -> None:
        if not self._ended:
            self._on_event(event)

    def _end(self) -> None:
        with self._lock:
            if self._ended:
                return
            self._ended = True
        ticket, voice = self._ticket, self._voice
        if voice is not None and self.failed is None:
            self.failed = voice.failed
        if ticket is not None:
            ticket.cancel()  # a voice may fail while its codes are made
        self._hush()
        first, *said = self.decoded or [Done("cancelled")]
        done = said_done(first, said[0], self._offset) if said else first
        self._on_event(replace(done, reason="cancelled") if self._cancelled else done)
        self._ticket = self._saying = self._on_decoded = None  # references in a circle would keep what it has heard

    def _hush(self) -> None:
        if self._voice is not None:
            self._voice.on_samples = lambda _: None
            self._voice.cancel()
            self._voice = None


class SharedEChat:
    """See the module. A reply is what it would be alone. `start` it, and close it to end its threads.

    Args:
        voice_workers: windows of token2wav that are solved side by side, each by a thread of its own.
    """

    def __init__(self, echat: EChat, limits: EngineLimits | None = None, voice_workers: int = 1) -> None:
        self.echat = echat
        self.engine = echat.engine(limits)
        self.pool: StreamPool | None = None
        if echat.token2wav is not None:
            from osum_echat.token2wav.pool import StreamPool

            self.pool = StreamPool(echat.token2wav, workers=voice_workers)
        self._recordings: list[tuple[Samples, Future[AudioFeatures]]] = []
        self._lock = threading.Lock()
        self._started = False

    def start(self) -> SharedEChat:
        """Run its threads; once is enough."""
        if not self._started:
            self._started = True
            self.engine.start()
            if self.pool is not None:
                self.pool.start()
        return self

    def close(self) -> None:
        """End the threads; what runs is cancelled."""
        self.engine.close()
        if self.pool is not None:
            self.pool.close()

    def load(self) -> Load:
        return self.engine.load()

    @property
    def sample_rate(self) -> int:
        """Of the sound that is made."""
        assert self.echat.token2wav is not None
        return self.echat.token2wav.sample_rate

    def open_voice(self, voice: Voice, on_samples: Callable[[Samples | None], None]) -> PooledVoice:
        assert self.pool is not None, "this checkpoint has no token2wav"
        return self.pool.open(voice.speaker, voice.seed, on_samples)

    # ---- what the live server asks -----------------------------------------------------------------------------------

    def hear(self, samples: Samples) -> Future[AudioFeatures]:
        """16 kHz samples as the language model hears them. Recordings that wait at the same time are encoded together.

        Raises:
            EngineFull: the model is closed. The future: ValueError for a recording that cannot be used.
        """
        future: Future[AudioFeatures] = Future()
        with self._lock:
            self._recordings.append((samples, future))
        self.engine.run(self._hear_waiting)
        return future

    def _hear_waiting(self) -> None:
        with self._lock:
            waiting, self._recordings = self._recordings, []
        waiting = [(samples, future) for samples, future in waiting if future.set_running_or_notify_cancel()]
        for group in together(waiting):
            self._encode(group)

    def _encode(self, group: list[tuple[Samples, Future[AudioFeatures]]]) -> None:
        try:
            found = self.echat.hear([(samples, RATE) for samples, _ in group])
        except Exception as error:  # noqa: BLE001  whoever waits for the future gets it, whatever it is
            if len(group) == 1:
                group[0][1].set_exception(error)
                return
            for entry in group:  # one of them cannot be used
                self._encode([entry])
            return
        for (_, future), features in zip(group, found, strict=True):
            future.set_result(features)

    def answer(
        self,
        request: Request,
        on_event: OnEvent,
        voice: Voice | None = None,
        saying: Saying | None = None,
        on_decoded: Callable[[Done], None] | None = None,
    ) -> Answer:
        """Begin an answer; see `Answer`.

        Args:
            voice: of its speech codes; None: they make no sound. saying: how a written answer is said once it is whole.
            on_decoded: called on the model's thread when a request has been decoded, before its sound has ended.

        Raises:
            EngineFull: too many people at once. TooLong: it can never fit. Their texts are sentences for whoever asked.
        """
        made = Answer(self, on_event, voice, saying, on_decoded)
        made.begin(request)
        return made

    def read_past(self, reading: Request, keep: Callable[[KeptCache | None], None]) -> None:
        """Read the past of a dialogue as its next turn will show it, while nobody waits; ``keep`` gets what was read, on
        the model's thread. Where there is no room it is read with that turn."""

        def done(event: Event) -> None:
            if isinstance(event, Done):
                keep(reading.cache)

        try:
            self.engine.submit(reading, done, read_only=True)
        except (EngineFull, TooLong) as error:
            log.info("the past of a dialogue is read with its next turn: %s", error)

    # ---- what the page asks ------------------------------------------------------------------------------------------

    def dialogue(self, max_turns: int = 5) -> Dialogue:
        """Past turns of one person, for `stream`."""
        return self.echat.session(max_turns)

    def stream(self, ask: Ask, dialogue: Dialogue | None = None) -> Generator[StreamEvent, None, None]:
        """The events of a request as they happen, `Done` last. Close it to stop the request within a step.

        Args:
            dialogue: past turns to go on from, and to which the finished turn is added.

        Raises:
            ValueError: what cannot be asked or used. EngineFull: too many people at once (its text is a sentence for
                them).
        """
        echat = self.echat
        asks = echat.parts(ask)  # read here: the model's thread does not wait for a file
        speaker = self.engine.run(lambda: echat.sound.voice_of(ask)).result()
        if not asks:
            yield from parts.silent_events(ask, echat.dialect)
            return
        streams = (self._answered(part, dialogue, speaker) for part in asks)
        yield from next(streams) if len(asks) == 1 else parts.joined_stream(streams)

    def _answered(self, ask: Ask, dialogue: Dialogue | None, speaker: Speaker | None) -> Iterator[StreamEvent]:
        """The events of a request that the model can take as it is."""
        echat = self.echat
        voice = None if speaker is None or self.pool is None else Voice(speaker, ask.seed)
        saying = None
        if ask.mode.then is not None and voice is not None:
            said = replace(ask, kind=MODES[ask.mode.then].kind)
            saying, voice = Saying(lambda text: echat.request(replace(said, text=text)), voice), None

        def prepare() -> tuple[Request, list[AudioFeatures]]:
            heard = echat.hear([ask.wav]) if ask.wav is not None else []
            return (dialogue or echat).request(ask, heard), heard

        request, heard = self.engine.run(prepare).result()
        came: queue.SimpleQueue[StreamEvent] = queue.SimpleQueue()
        answer = self.answer(request, came.put, voice, saying)
        told: list[Event] = []
        try:
            while not told or not isinstance(told[-1], Done):
                event = came.get()
                if not isinstance(event, AudioChunk):
                    told.append(event)
                if isinstance(event, Done):
                    if answer.failed is not None:
                        raise RuntimeError("the model failed on this request") from answer.failed
                    if dialogue is not None:
                        self._remember(dialogue, request, told, heard, ask.text or "")
                yield event
        finally:
            answer.cancel()

    def _remember(self, dialogue: Dialogue, request: Request, events: list[Event], heard: list[AudioFeatures], text: str) -> None:
        """Add the turn to the past, and read it in the form in which the next turn shows it, while nobody waits for
        it."""
        memory = dialogue.memory
        reading = self.engine.run(lambda: memory.record(request, events, heard, text)).result()
        if reading is None:
            return

        def keep(cache: KeptCache | None) -> None:
            memory.kept = cache
            self.engine.remember(memory)

        self.read_past(reading, keep)


def together(waiting: list[tuple[Samples, Future[AudioFeatures]]]) -> Iterator[list[tuple[Samples, Future[AudioFeatures]]]]:
    """Recordings in groups of similar length (padding costs as much as sound), which are not too long together."""
    group: list[tuple[Samples, Future[AudioFeatures]]] = []
    for entry in sorted(waiting, key=lambda entry: len(entry[0])):
        length = len(entry[0])
        if group and (length > 1.25 * len(group[0][0]) or length * (len(group) + 1) > HEARD_TOGETHER_S * RATE):
            yield group
            group = []
        group.append(entry)
    if group:
        yield group
