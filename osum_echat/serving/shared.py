"""One loaded model for several people at once: their requests run in one batch (`generation.engine`), each gets its own stream of events.

    shared = SharedEChat(echat)
    for event in shared.stream(Ask(wav="me.wav", speak=True)): ...      # from any thread

One thread owns the model. Decoding and sound of all people are done there by turns, so nobody waits for somebody else's whole reply.
"""

from __future__ import annotations

import queue
from collections.abc import Generator, Iterator
from concurrent.futures import Future
from dataclasses import replace
from functools import partial

from osum_echat.generation.engine import Engine, EngineLimits
from osum_echat.generation.events import Done, Event, SpeechToken, TextDelta
from osum_echat.generation.request import Request
from osum_echat.model.echat import AudioFeatures
from osum_echat.pipeline import parts
from osum_echat.pipeline.ask import MODES, Ask, AudioChunk, StreamEvent
from osum_echat.pipeline.echat import Dialogue, EChat
from osum_echat.token2wav import Speaker
from osum_echat.token2wav.model import ReplyStream


class SharedEChat:
    """See the module. A reply is what it would be alone. Close it to end its thread."""

    def __init__(self, echat: EChat, limits: EngineLimits | None = None) -> None:
        self.echat = echat
        self.engine = Engine(echat.generator, limits)
        self.engine.start()

    def close(self) -> None:
        self.engine.close()

    def dialogue(self, max_turns: int = 5) -> Dialogue:
        """Past turns of one person, for `stream`."""
        return self.echat.session(max_turns)

    def stream(self, ask: Ask, dialogue: Dialogue | None = None) -> Generator[StreamEvent, None, None]:
        """The events of a request as they happen, `Done` last. Close it to stop the request within a step.

        Args:
            dialogue: past turns to go on from, and to which the finished turn is added.

        Raises:
            ValueError: what cannot be asked or used. EngineFull: too many people at once (its text is a sentence for them).
        """
        echat = self.echat
        voice, asks = self.engine.run(lambda: (echat.sound.voice_of(ask), echat.parts(ask))).result()
        if not asks:
            yield from parts.silent_events(ask, echat.dialect)
            return
        streams = (self._answer(part, dialogue, voice) for part in asks)
        yield from next(streams) if len(asks) == 1 else parts.joined_stream(streams)

    def _answer(self, ask: Ask, dialogue: Dialogue | None, voice: Speaker | None) -> Iterator[StreamEvent]:
        """The events of a request that the model can take as it is."""
        if ask.mode.then is None:
            yield from self._with_sound(self._decode(ask, dialogue), ask.seed, voice)
            return
        words: list[str] = []
        answered = Done("stop")
        for event in self._decode(ask, dialogue):
            if isinstance(event, Done):
                answered = event
                break
            words += [event.text] if isinstance(event, TextDelta) else []
            yield event
        answer = "".join(words).strip()
        if not answer or answered.reason == "cancelled":
            yield answered
            return
        said = replace(ask, kind=MODES[ask.mode.then].kind, text=answer)
        for spoken in self._with_sound(self._decode(said), ask.seed, voice):
            if not isinstance(spoken, TextDelta):
                yield spoken

    def _decode(self, ask: Ask, dialogue: Dialogue | None = None) -> Iterator[Event]:
        def prepare() -> tuple[Request, list[AudioFeatures]]:
            heard = self.echat.hear([ask.wav]) if ask.wav is not None else []
            return (dialogue or self.echat).request(ask, heard), heard

        request, heard = self.engine.run(prepare).result()
        came: queue.SimpleQueue[Event] = queue.SimpleQueue()
        ticket = self.engine.submit(request, came.put)
        events: list[Event] = []
        try:
            while not events or not isinstance(events[-1], Done):
                events.append(came.get())
                if ticket.failed is not None:
                    raise RuntimeError("the model failed on this request") from ticket.failed
                if isinstance(events[-1], Done) and dialogue is not None:
                    self._remember(dialogue, request, events, heard, ask.text or "")
                yield events[-1]
        finally:
            ticket.cancel()

    def _remember(self, dialogue: Dialogue, request: Request, events: list[Event], heard: list[AudioFeatures], text: str) -> None:
        """Add the turn to the past, and read it in the form in which the next turn shows it, while nobody waits for it."""
        memory = dialogue.memory
        reading = self.engine.run(lambda: memory.record(request, events, heard, text)).result()
        if reading is None:
            return

        def keep(_: Event) -> None:
            memory.kept = reading.cache
            self.engine.remember(memory)

        self.engine.submit(reading, keep, read_only=True)

    def _with_sound(self, events: Iterator[Event], seed: int, voice: Speaker | None) -> Iterator[StreamEvent]:
        """`AudioChunk`s between the events: sound is made of the codes that have come, between two steps of the model's thread."""
        token2wav = self.echat.token2wav
        if voice is None or token2wav is None:
            yield from events
            return
        rate = token2wav.sample_rate
        vocoder: ReplyStream | None = None
        working: Future[list[AudioChunk]] | None = None
        codes: list[int] = []
        for event in events:
            if isinstance(event, SpeechToken):
                codes.append(event.code)
                if vocoder is None:
                    vocoder = self.engine.run(lambda: token2wav.open_stream(voice, seed)).result()
            if vocoder is not None and (working is None or working.done() or isinstance(event, Done)):
                yield from working.result() if working is not None else []
                working = self.engine.run(partial(_push, vocoder, codes, rate, last=isinstance(event, Done)))
                codes = []
            if isinstance(event, Done) and working is not None:
                yield from working.result()
            yield event


def _push(vocoder: ReplyStream, codes: list[int], rate: int, last: bool) -> list[AudioChunk]:
    """What these codes settle, as chunks of sound."""
    waves = [vocoder.push(code) for code in codes]
    if last:
        waves.append(vocoder.finish())
    return [AudioChunk(samples, rate) for samples in waves if samples is not None]
