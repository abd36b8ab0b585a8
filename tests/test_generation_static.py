"""The static step gives the ids of the usual way: greedy and sampled, with penalties and guards, in all forms, however rows join, leave and wait."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.dialogue.dialect import Dialect
from osum_echat.generation.config import GenerationConfig, Guards, RepetitionGuard, Sampling, SilenceGuard
from osum_echat.generation.decoder_step import differs, refusal
from osum_echat.generation.engine import Engine, EngineLimits, Ticket
from osum_echat.generation.events import Done, Event, SpeechToken
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request
from osum_echat.generation.rows import UsualRows
from osum_echat.generation.session import Session
from osum_echat.generation.static_rows import Sizes, StaticRows
from tests.generation_case import every_kind, generator, request, run, tiny

SIZES = {
    "as on a CPU": Sizes(exact=True, late=False, record=False),
    "as on an accelerator": Sizes(exact=False, late=True, record=False),
    "recorded": Sizes(exact=False, late=True, record=True),
}
EACH = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())


def static(sizes: Sizes, config: GenerationConfig | None = None, dialect: Dialect | None = None) -> Generator:
    made = generator(config, dialect)
    made.use_static_step(sizes)
    return made


def replies(made: Generator, requests: Sequence[Request]) -> list[list[Event]]:
    events: list[list[Event]] = [[] for _ in requests]
    for row, event in made.generate(requests):
        events[row].append(event)
    return events


def told(events: Sequence[Event]) -> list[object]:
    """What a caller sees, without times."""
    return [(e.reason, e.text_ids, e.generated, e.guards) if isinstance(e, Done) else e for e in events]


def same(found: list[list[Event]], expected: list[list[Event]]) -> None:
    for row, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert told(mine) == told(theirs), f"row {row}"


PENALTIES = Sampling(temperature=1.3, top_k=7, top_p=0.9, repetition_penalty=1.3)


def mixed(config: GenerationConfig | None = None) -> list[Request]:
    """Rows of every form: greedy ones, sampled ones, some with a penalty or without top_k or top_p."""
    rows = [row for i, row in enumerate(every_kind(False, config)) if i in (0, 2, 4, 6, 7)]
    for i, row in enumerate(rows):
        row.mode = replace(row.mode, max_new=36 if i == 3 else 15)
    rows[0].mode = rows[0].mode.greedy()
    rows[1].mode = replace(rows[1].mode, speech=replace(PENALTIES, top_p=1.0, top_k=0))
    rows[3].mode = replace(rows[3].mode, text=PENALTIES, speech=PENALTIES)
    return rows


@lru_cache(maxsize=1)
def expected() -> list[list[Event]]:
    """What the usual way makes of `mixed`."""
    return run(mixed())


@EACH
def test_a_mixed_batch_is_that_of_the_usual_way(sizes: Sizes) -> None:
    same(replies(static(sizes), mixed()), expected())


@EACH
def test_a_row_alone_is_what_it_is_in_company(sizes: Sizes) -> None:
    made = static(sizes)
    for number in (1, 2, 3):
        same(replies(made, [mixed()[number]]), [expected()[number]])


TIGHT = RepetitionGuard(run=1, window=3, count=2, frequent_codes=(1,), frequent_run=2, frequent_window=3, frequent_count=2)


@EACH
def test_guards_act_where_they_do_in_the_usual_way(sizes: Sizes) -> None:
    spoken = {event.code for events in expected() for event in events if isinstance(event, SpeechToken)}
    silent = SilenceGuard(codes=tuple(sorted(spoken)), longest=2)
    config = GenerationConfig(guards=replace(Guards(), repetition=TIGHT, silence=silent))
    usual = run(mixed(config), config)
    acted = set().union(*(events[-1].guards for events in usual if isinstance(events[-1], Done)))
    assert {"silence", "repetition"} <= acted
    same(replies(static(sizes, config), mixed(config)), usual)


@EACH
def test_words_and_codes_side_by_side(sizes: Sizes) -> None:
    config, dialect = GenerationConfig(max_codes_per_word=4), Dialect(speech_form="word")
    eos = tiny()[0].vocabulary.eos_id

    def rows() -> list[Request]:
        return [
            request("text2token", config, say="well I never said that", max_new=40, greedy=False, seed=3),
            request("text2token", config, say="yes", max_new=20),
            request("speech2text_token", config, recordings=[0], plan={4: eos}, max_new=30, greedy=False, seed=5),
            request("text", config, recordings=[1], max_new=12),
        ]

    same(replies(static(sizes, config, dialect), rows()), run(rows(), config, dialect))


@EACH
def test_without_a_given_begin_the_model_chooses_it_itself(sizes: Sizes) -> None:
    config = replace(GenerationConfig(), force_speech_begin=False)
    asked = [mixed(config)[2] for _ in range(2)]
    same(replies(static(sizes, config), asked[:1]), run(asked[1:], config))


@EACH
def test_a_session_goes_on_from_the_cache_of_a_slot(sizes: Sizes) -> None:
    def turns(made: Generator) -> list[object]:
        heard, session, out = tiny()[2], Session(made), list[object]()
        for i in range(2):
            asked = session.request("speech2text_token", heard=[heard[i]], seed=i)
            asked.mode = replace(asked.mode, max_new=14)
            asked.plan = {5: tiny()[0].vocabulary.eos_id}
            events = [event for _, event in made.generate([asked])]
            assert asked.cache is not None
            out += told(events)
            session.commit(asked, events, heard=[heard[i]])
        return out

    assert turns(static(sizes)) == turns(generator())


@settings(deadline=None, max_examples=5)
@given(
    arrivals=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 12)), min_size=2, max_size=5, unique_by=lambda a: a[0]),
    late=st.booleans(),
    holds=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 20), st.integers(1, 9)), max_size=3),
    cancel=st.one_of(st.none(), st.tuples(st.integers(0, 4), st.integers(3, 20))),
)
def test_rows_that_join_leave_and_wait_in_the_engine(
    arrivals: list[tuple[int, int]], late: bool, holds: list[tuple[int, int, int]], cancel: tuple[int, int] | None
) -> None:
    engine = Engine(static(Sizes(exact=not late, late=late, record=False)), EngineLimits(piece=40, rows=3))
    asked, waiting = mixed(), sorted(arrivals, key=lambda a: a[1])
    running: list[tuple[int, Ticket, list[Event]]] = []
    for turn in range(400):
        while waiting and waiting[0][1] <= turn:
            number, _ = waiting.pop(0)
            events: list[Event] = []
            running.append((number, engine.submit(asked[number], events.append), events))
        for which, start, length in holds:
            if which < len(running):
                running[which][1].hold(start <= turn < start + length)
        if cancel is not None and cancel[1] == turn and cancel[0] < len(running):
            running[cancel[0]][1].cancel()
        if not engine.tick() and not waiting and all(events and isinstance(events[-1], Done) for _, _, events in running):
            break
    for number, _, events in running:
        found, whole = told(events), told(expected()[number])
        if events[-1].reason == "cancelled":  # type: ignore[union-attr]
            assert found[:-1] == whole[: len(found) - 1]
        else:
            assert found == whole, f"row {number}"


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_a_compiled_step_gives_the_same_ids() -> None:
    made = static(SIZES["as on an accelerator"])
    made.compile(backend="eager")
    same(replies(made, [mixed()[2]]), [expected()[2]])


def test_a_step_is_taken_by_settings_and_by_device() -> None:
    assert isinstance(generator().rows(), UsualRows)
    assert isinstance(generator(GenerationConfig(static_step="always")).rows(), StaticRows)
    made = static(SIZES["recorded"])
    assert isinstance(made.rows(), StaticRows)
    assert isinstance(made.rows(on_logits=lambda *_: None), UsualRows)
    with pytest.raises(ValueError, match="auto, always or never"):
        GenerationConfig(static_step="sometimes")  # type: ignore[arg-type]


def test_a_decoder_of_another_kind_is_decoded_as_usual_and_that_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, tokenizer, _ = tiny()
    layer = model.lm.llm.get_decoder().layers[0]
    made = Generator(model, tokenizer, GenerationConfig(static_step="always"))
    layer.add_module("another", torch.nn.Identity())
    try:
        assert "other parts" in str(refusal(model))
        assert isinstance(made.rows(), UsualRows) and isinstance(made.rows(), UsualRows)
    finally:
        del layer.another
    assert [r.message for r in caplog.records if "usual way" in r.message] == [
        "decoding takes the usual way: layer 0 of the LLM has other parts than those of Llama and Qwen"
    ]


def test_layers_of_the_same_names_that_compute_something_else_are_found_by_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _, _ = tiny()
    from osum_echat.generation import decoder_step

    step = decoder_step.build_step(model)
    assert differs(model, step) < 1e-4
    attention = model.lm.llm.get_decoder().layers[0].self_attn
    monkeypatch.setattr(attention, "scaling", attention.scaling * 3)
    assert differs(model, step) > 1e-3
