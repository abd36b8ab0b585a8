"""Decoder and vocoder as two stages: order, cancel, errors, bounded memory; with fakes, and with the tiny model."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.generation.events import Done, SpeechToken, TextDelta
from osum_echat.pipeline import Ask, AudioChunk, EChat
from osum_echat.pipeline.ask import StreamEvent
from osum_echat.pipeline.stages import ahead, speak_along
from tests.test_pipeline_echat import DATA, SHORT, recorded_speaker, recording, write_directory

RATE = 22050


class FakeVocoder:
    """A chunk after every ``window`` codes, the rest at the end; the chunk holds the codes."""

    def __init__(self, window: int = 3, fails_at: int | None = None) -> None:
        self.window, self.fails_at = window, fails_at
        self.codes: list[int] = []
        self.held: list[int] = []

    def push(self, token: int) -> np.ndarray | None:
        if len(self.codes) == self.fails_at:
            raise ValueError("the vocoder broke")
        self.codes.append(token)
        self.held.append(token)
        return self.finish() if len(self.held) == self.window else None

    def finish(self) -> np.ndarray | None:
        held, self.held = self.held, []
        return np.array(held, np.float32) if held else None


def reply(codes: int, made: list[int] | None = None, fails_at: int | None = None) -> Iterator[StreamEvent]:
    """Events as the decoder makes them; ``made`` counts them."""
    for number in range(codes):
        if number == fails_at:
            raise ValueError("the decoder broke")
        if made is not None:
            made.append(number)
        if number % 4 == 0:
            yield TextDelta(str(number))
        yield SpeechToken(number)
    yield Done("stop")


def plain(events: list[StreamEvent]) -> list[object]:
    return [("sound", *event.samples.tolist()) if isinstance(event, AudioChunk) else event for event in events]


@given(st.integers(0, 30), st.integers(1, 7), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_order_and_sound_are_the_same_with_and_without_a_thread(codes: int, window: int, size: int) -> None:
    direct = plain(list(speak_along(reply(codes), FakeVocoder(window), RATE)))
    threaded = plain(list(speak_along(ahead(reply(codes), size), FakeVocoder(window), RATE)))
    assert direct == threaded and isinstance(direct[-1], Done)
    spoken = [code for event in direct if isinstance(event, tuple) for code in event[1:]]
    assert spoken == list(range(codes))
    for at, event in enumerate(direct):
        if isinstance(event, tuple) and not isinstance(direct[at + 1], Done):
            assert direct[at - 1] == SpeechToken(int(event[-1])), "a chunk stands right behind the code that completed it"


def test_the_decoder_is_at_most_the_queue_ahead() -> None:
    made: list[int] = []
    stream = ahead(reply(10_000, made), size=8)
    seen = [next(stream) for _ in range(20)]
    time.sleep(0.05)
    assert len(seen) == 20 and len(made) <= 20 + 8 + 1
    stream.close()


def test_the_decoder_works_while_sound_is_made() -> None:
    decoded = threading.Event()

    def events() -> Iterator[StreamEvent]:
        yield SpeechToken(0)
        decoded.set()
        yield Done("stop")

    class Waits(FakeVocoder):
        def push(self, token: int) -> np.ndarray | None:
            assert decoded.wait(5), "the decoder waited for the vocoder"
            return super().push(token)

    assert len(list(speak_along(ahead(events()), Waits(1), RATE))) == 3


def test_closing_the_stream_stops_both_stages() -> None:
    made: list[int] = []
    closed = threading.Event()

    def events() -> Iterator[StreamEvent]:
        with contextmanager(lambda: _note(closed))():
            yield from reply(1_000_000, made)

    before = threading.active_count()
    stream = speak_along(ahead(events(), size=4), FakeVocoder(), RATE)
    for _ in range(5):
        next(stream)
    stream.close()
    assert closed.is_set() and threading.active_count() == before
    count = len(made)
    time.sleep(0.02)
    assert len(made) == count < 20


def _note(event: threading.Event) -> Iterator[None]:
    try:
        yield
    finally:
        event.set()


def test_an_error_of_the_decoder_comes_after_what_was_made_before_it() -> None:
    seen = []
    with pytest.raises(ValueError, match="the decoder broke"):  # noqa: PT012 - what came before is asserted below
        for event in speak_along(ahead(reply(9, fails_at=6), size=2), FakeVocoder(), RATE):
            seen.append(event)
    assert [e.code for e in seen if isinstance(e, SpeechToken)] == list(range(6))
    assert sum(isinstance(e, AudioChunk) for e in seen) == 2


def test_an_error_of_the_vocoder_stops_the_decoder() -> None:
    made: list[int] = []
    before = threading.active_count()
    with pytest.raises(ValueError, match="the vocoder broke"), closing(ahead(reply(1_000_000, made), size=4)) as events:
        list(speak_along(events, FakeVocoder(fails_at=5), RATE))
    assert len(made) < 20 and threading.active_count() == before


def test_nothing_runs_before_the_first_event_is_asked_for() -> None:
    made: list[int] = []
    stream = ahead(reply(5, made))
    assert made == []
    stream.close()
    assert made == []


@pytest.fixture(scope="module")
def echat(tmp_path_factory: pytest.TempPathFactory) -> EChat:
    folder = write_directory(tmp_path_factory.mktemp("voice") / "token2wav")
    return EChat.load(
        DATA / "tiny.safetensors",
        DATA / "tiny_config.yaml",
        token2wav=folder,
        generation=SHORT,
        speaker=recorded_speaker(),
        device="cpu",
    )


def test_a_model_streams_the_same_with_and_without_overlap(echat: EChat) -> None:
    ask = Ask(recording(), speak=True, interleaved=True, seed=4, max_tokens=60)
    streams = []
    for overlap in (False, True):
        echat.sound.overlap = overlap
        streams.append([event for event in echat.stream_ask(ask)])
    echat.sound.overlap = False
    one, other = ([e if not isinstance(e, Done) else e.generated for e in plain(events)] for events in streams)
    assert one == other and any(isinstance(event, AudioChunk) for event in streams[0])


def test_a_dialogue_whose_stream_is_closed_early_forgets_the_turn_though_the_decoder_was_ahead(echat: EChat) -> None:
    echat.sound.overlap = True
    try:
        dialogue = echat.session()
        stream = dialogue.stream(recording(), speak=True, interleaved=True, max_tokens=60)
        for event in stream:
            if isinstance(event, AudioChunk):
                break
        time.sleep(0.2)  # the decoder may come to its end
        stream.close()
        assert len(dialogue) == 0
        assert isinstance(list(dialogue.stream(recording(), speak=True, max_tokens=30))[-1], Done) and len(dialogue) == 1
    finally:
        echat.sound.overlap = False
