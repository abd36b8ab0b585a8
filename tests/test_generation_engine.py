"""The laws of the engine: a seed gives the same reply alone and in any company, whoever joins, leaves, waits or is held; limits are kept."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.dialogue.dialect import Dialect
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.decoder_state import DecoderState
from osum_echat.generation.engine import Engine, EngineFull, EngineLimits, Ticket
from osum_echat.generation.events import Done, Event, SpeechToken, speech_codes
from osum_echat.generation.request import Request, TooLong
from osum_echat.generation.rows import UsualRows
from osum_echat.generation.session import Session
from tests.generation_case import done, every_kind, generator, request, run, tiny


def engine(**limits: int) -> Engine:
    return Engine(generator(), EngineLimits(**limits))


def submit(into: Engine, asked: Request) -> tuple[Ticket, list[Event]]:
    events: list[Event] = []
    return into.submit(asked, events.append), events


def finish(of: Engine, ticks: int = 2000) -> None:
    for _ in range(ticks):
        if not of.tick() and of.load().rows + of.load().reading + of.load().waiting + of.load().held == 0:
            return
    raise AssertionError(f"the engine does not come to an end: {of.load()}")


_ALONE: list[Done] = []


def alone() -> list[Done]:
    if not _ALONE:
        _ALONE.extend(done(run([row])[0]) for row in every_kind(greedy=False))
    return _ALONE


@settings(deadline=None, max_examples=12)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12)), min_size=1, max_size=8, unique_by=lambda a: a[0]),
    piece=st.integers(3, 64),
    rows=st.integers(1, 8),
    holds=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 20), st.integers(1, 9)), max_size=3),
)
def test_a_seed_gives_the_same_reply_in_any_company(
    arrivals: list[tuple[int, int]], piece: int, rows: int, holds: list[tuple[int, int, int]]
) -> None:
    model = engine(piece=piece, rows=rows)
    asked, waiting = every_kind(greedy=False), sorted(arrivals, key=lambda a: a[1])
    running: list[tuple[int, Ticket, list[Event]]] = []
    for tick in range(30):
        while waiting and waiting[0][1] <= tick:
            kind = waiting.pop(0)[0]
            running.append((kind, *submit(model, asked[kind])))
        for number, since, length in holds:
            if number < len(running):
                running[number][1].hold(since <= tick < since + length)
        model.tick()
    finish(model)
    for kind, _, events in running:
        assert done(events).generated == alone()[kind].generated, f"kind {kind}"
        assert (done(events).reason, done(events).guards) == (alone()[kind].reason, alone()[kind].guards)


def test_events_together_are_the_reply_and_done_is_the_last() -> None:
    model = engine()
    rows = [submit(model, asked)[1] for asked in every_kind(greedy=True)]
    finish(model)
    for events in rows:
        assert sum(isinstance(event, Done) for event in events) == 1
        size, delimiter = model.generator.vocab.text_size, model.generator.vocab.speech_delimiter
        assert speech_codes(events) == tuple(i - size for i in done(events).generated if i >= size and i != delimiter)


def test_cancel_stops_within_a_step_and_leaves_the_others() -> None:
    model = engine()
    ticket, events = submit(model, request("text2token", say="你好", max_new=40))
    _, others = submit(model, request("text", recordings=[0], max_new=25))
    while sum(isinstance(event, SpeechToken) for event in events) < 5:
        model.tick()
    count = len(events)
    ticket.cancel()
    model.tick()
    assert [type(event) for event in events[count:]] == [Done] and done(events).reason == "cancelled"
    finish(model)
    assert done(others).generated == done(run([request("text", recordings=[0], max_new=25)])[0]).generated


@pytest.mark.parametrize("when", ["waiting", "reading", "held"])
def test_cancel_reaches_a_request_that_does_not_run(when: str) -> None:
    model = engine(rows=1, piece=2)
    first, first_events = submit(model, request("text2token", say="你好", max_new=30))
    ticket, events = (first, first_events) if when != "waiting" else submit(model, request("text2token", say="好", max_new=5))
    model.tick()
    if when == "held":
        while not any(isinstance(event, SpeechToken) for event in events):
            model.tick()
        ticket.hold()
        model.tick()
        assert model.load().held == 1
    ticket.cancel()
    model.tick()
    assert done(events).reason == "cancelled"
    first.cancel()
    finish(model)


def test_a_held_request_makes_no_step_until_it_is_let_go() -> None:
    model = engine()
    ticket, events = submit(model, request("text2token", say="你好", max_new=30))
    while len(events) < 3:
        model.tick()
    ticket.hold()
    model.tick()
    count = len(events)
    assert not any(model.tick() for _ in range(5)) and len(events) == count, "a held request is no work"
    ticket.hold(False)
    finish(model)
    assert done(events).generated == done(run([request("text2token", say="你好", max_new=30)])[0]).generated


def test_a_long_prompt_is_read_in_pieces_while_others_go_on() -> None:
    model = engine(piece=4)
    _, short = submit(model, request("text2token", say="你好", max_new=40))
    while not short:
        model.tick()
    long = request("text", recordings=[0], prompt_text="写下来" * 20, max_new=4)
    _, events = submit(model, long)
    before = len(short)
    ticks = 0
    while not events:
        model.tick()
        ticks += 1
    assert ticks >= len(long.prompt) // 4, "one piece at a time"
    assert len(short) - before >= ticks - 1, "the other row made a step in every turn"
    finish(model)
    assert (
        done(events).generated == done(run([request("text", recordings=[0], prompt_text="写下来" * 20, max_new=4)])[0]).generated
    )


def test_no_more_rows_than_the_limit_run_and_the_rest_waits_in_order() -> None:
    model = engine(rows=2)
    order: list[int] = []
    for i in range(5):
        model.submit(
            request("text2token", say="你好", max_new=4 + i), lambda e, i=i: order.append(i) if isinstance(e, Done) else None
        )
    most = 0
    while len(order) < 5:
        model.tick()
        most = max(most, model.load().rows + model.load().reading)
    assert most == 2 and order == [0, 1, 2, 3, 4]


def test_a_full_queue_refuses_with_a_sentence() -> None:
    model = engine(rows=1, queue=2)
    for _ in range(2):
        submit(model, request("text2token", say="你好", max_new=3))
    with pytest.raises(EngineFull, match="full: 2 requests wait"):
        submit(model, request("text2token", say="你好", max_new=3))
    model.tick()
    submit(model, request("text2token", say="你好", max_new=3))
    finish(model)


def test_what_can_never_fit_is_refused_at_once_and_what_does_not_fit_now_waits() -> None:
    size = len(request("text2token", say="你好").prompt)
    model = engine(positions=2 * (size + 10) - 1)
    with pytest.raises(TooLong, match="cached positions"):
        submit(model, request("text2token", say="你好", max_new=10 * size + 100))
    rows = [submit(model, request("text2token", say="你好", max_new=10))[1] for _ in range(3)]
    most = 0
    while not all(events and isinstance(events[-1], Done) for events in rows):
        model.tick()
        most = max(most, model.load().positions)
    assert most <= model.limits.positions


def test_sessions_give_their_cache_back_to_make_room_and_answer_the_same_afterwards() -> None:
    _, _, heard = tiny()

    def turns(positions: int) -> tuple[list[tuple[int, ...]], list[int]]:
        model = engine(positions=positions, piece=16)
        sessions = [Session(model.generator) for _ in range(3)]
        replies, reused = [], []
        for turn in range(2):
            for i, session in enumerate(sessions):
                asked = session.request("s2t_chat", [heard[(i + turn) % 4]], seed=i)
                asked.mode = replace(asked.mode, max_new=6)
                reused.append(0 if asked.past is None else asked.past.common(asked.prompt, asked.heard))
                _, events = submit(model, asked)
                finish(model)
                reading = session.record(asked, events, [heard[(i + turn) % 4]])
                model.remember(session)
                assert reading is not None
                model.submit(reading, lambda _: None, read_only=True)
                finish(model)
                session.kept = reading.cache
                model.remember(session)
                assert model.load().positions <= positions
                replies.append(done(events).generated)
        return replies, reused

    roomy, kept = turns(100_000)
    tight, dropped = turns(len(request("s2t_chat", recordings=[0]).prompt) * 3)
    assert tight == roomy
    assert all(kept[3:]) and not all(dropped[3:]), "with little room some caches were gone, with much none"


def test_a_fault_ends_the_rows_it_happened_to_and_the_engine_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine()
    ticket, events = submit(model, request("text2token", say="你好", max_new=9))
    model.tick()

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(UsualRows, "step", broken)
        model.tick()
    assert isinstance(ticket.failed, RuntimeError) and done(events).reason == "cancelled"
    _, after = submit(model, request("text2token", say="你好", max_new=9))
    finish(model)
    assert done(after).reason == "length"


@pytest.mark.parametrize("when", ["it comes", "it was held"])
def test_a_fault_while_a_row_joins_the_others_is_told_to_all_that_are_lost(when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = engine()
    said = ("你好", "好")
    tickets, rows = zip(*(submit(model, request("text2token", say=text, max_new=40)) for text in said), strict=True)
    model.tick()
    if when == "it was held":
        while model.load().rows < 2:
            model.tick()
        tickets[1].hold()
        model.tick()
        assert model.load().held == 1

    def broken(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(DecoderState, "join", broken)
        tickets[1].hold(False)
        model.tick()
    model.tick()
    for ticket, events in zip(tickets, rows, strict=True):
        assert isinstance(ticket.failed, RuntimeError) and done(events).reason == "cancelled"
    _, after = submit(model, request("text2token", say="你好", max_new=9))
    finish(model)
    assert done(after).reason == "length" and model.load().positions == 0


def test_the_thread_serves_many_callers_and_closes() -> None:
    model = engine(rows=3)
    model.start()
    ended = threading.Semaphore(0)
    rows: list[list[Event]] = []
    for asked in every_kind(greedy=False):
        events: list[Event] = []
        rows.append(events)

        def told(event: Event, events: list[Event] = events) -> None:
            events.append(event)
            if isinstance(event, Done):
                ended.release()

        model.submit(asked, told)
    assert all(ended.acquire(timeout=60) for _ in rows)
    assert [done(events).generated for events in rows] == [end.generated for end in alone()]
    assert (
        model.run(lambda: torch.is_inference_mode_enabled() and threading.current_thread().name).result(10) == "osum-echat-model"
    )
    _, last = submit(model, request("text2token", say="你好", max_new=500))
    model.close()
    assert done(last).reason == "cancelled"
    with pytest.raises(EngineFull, match="shutting down"):
        submit(model, request("text2token", say="你好"))


def test_words_are_the_same_in_company() -> None:
    config, dialect = GenerationConfig(max_codes_per_word=4), Dialect(speech_form="word")

    def rows() -> Sequence[Request]:
        return [
            request("text2token", config, say="well I never said that", max_new=200),
            request("text2token", config, say="yes", max_new=200, greedy=False, seed=3),
            request("text", config, recordings=[1], max_new=12),
        ]

    model = Engine(generator(config, dialect), EngineLimits(piece=8))
    told = []
    for asked in rows():
        told.append(submit(model, asked)[1])
        for _ in range(5):
            model.tick()
    finish(model)
    for asked, events in zip(rows(), told, strict=True):
        assert done(events).generated == done(run([asked], config, dialect)[0]).generated
