"""The laws of decoding: a row is what it is alone, a kept cache changes nothing, a seed decides, cancelling stops, nothing is lost."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.tasks import PastTurn
from osum_echat.generation.cache import GrowingLayer
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.decoder_state import DecoderState
from osum_echat.generation.events import Done, SpeechToken, TextDelta, ThinkDelta, speech_codes
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import TooLong, build_request
from osum_echat.generation.session import Session
from recipes.mini.dialect import DIALECT
from tests.generation_case import done, every_kind, generator, request, run, tiny


@pytest.mark.parametrize("greedy", [True, False], ids=["greedy", "seeded"])
def test_every_row_of_a_mixed_batch_is_what_it_is_alone(greedy: bool) -> None:
    together = run(every_kind(greedy))
    for i, row in enumerate(every_kind(greedy)):
        alone, batched = done(run([row])[0]), done(together[i])
        assert batched.generated == alone.generated, f"row {i}"
        assert (batched.reason, batched.guards, batched.text_ids) == (alone.reason, alone.guards, alone.text_ids)


@settings(deadline=None, max_examples=6)
@given(st.permutations(range(9)), st.integers(1, 9))
def test_neighbours_and_order_do_not_matter(order: list[int], count: int) -> None:
    expected = _expected()
    chosen = order[:count]
    rows = every_kind(greedy=False)
    for i, events in zip(chosen, run([rows[i] for i in chosen]), strict=True):
        assert done(events).generated == expected[i]


_EXPECTED: list[tuple[int, ...]] = []


def _expected() -> list[tuple[int, ...]]:
    if not _EXPECTED:
        _EXPECTED.extend(done(events).generated for events in run(every_kind(greedy=False)))
    return _EXPECTED


def test_the_seed_decides() -> None:
    def reply(seed: int) -> tuple[int, ...]:
        return done(run([request("text2token", say="你好", greedy=False, seed=seed)])[0]).generated

    assert reply(1) == reply(1)
    assert len({reply(seed) for seed in range(4)}) > 1


def test_words_are_the_same_batched_and_alone_though_several_ids_are_fed_at_once() -> None:
    config, dialect = GenerationConfig(max_codes_per_word=4), Dialect(speech_form="word")

    def rows() -> list:
        eos = tiny()[0].vocabulary.eos_id
        return [
            request("text2token", config, say="well I never said that", max_new=200),
            request("text2token", config, say="yes", max_new=200),
            request("speech2text_token", config, recordings=[0], plan={4: eos}, max_new=60),
            request("text", config, recordings=[1], max_new=12),
        ]

    together = run(rows(), config, dialect)
    for row, events in zip(rows(), together, strict=True):
        assert done(events).generated == done(run([row], config, dialect)[0]).generated
    assert done(together[0]).reason == "stop" and len(speech_codes(together[0])) <= 20


def test_events_together_are_the_reply() -> None:
    model, tokenizer, _ = tiny()
    size, delimiter = model.vocabulary.text_size, model.vocabulary.speech_delimiter
    for events in run(every_kind(greedy=True)):
        end = done(events)
        text = "".join(e.text for e in events if isinstance(e, (TextDelta, ThinkDelta)))
        assert text == tokenizer.decode(end.text_ids)
        assert speech_codes(events) == tuple(i - size for i in end.generated if i >= size and i != delimiter)


def test_cancel_stops_a_row_within_one_step_and_leaves_the_others() -> None:
    rows = [request("text2token", say="你好", max_new=40), request("text", recordings=[0], max_new=25)]
    expected = done(run([request("text", recordings=[0], max_new=25)])[0]).generated
    ends: dict[int, Done] = {}
    codes = 0
    for row, event in generator().generate(rows):
        if isinstance(event, SpeechToken):
            assert not rows[0].cancelled.is_set(), "a step was made after the cancel"
            codes += 1
            if codes == 5:
                rows[0].cancel()
        if isinstance(event, Done):
            ends[row] = event
    assert ends[0].reason == "cancelled" and codes == 5 == len(ends[0].generated)
    assert ends[1].generated == expected


def test_closing_the_iterator_stops_decoding() -> None:
    steps = 0

    def count(_: int, __: torch.Tensor) -> None:
        nonlocal steps
        steps += 1

    stream = generator().generate([request("text2token", say="你好", max_new=500)], on_logits=count)
    for _ in range(3):
        next(stream)
    stream.close()
    assert steps <= 4
    assert not torch.is_inference_mode_enabled(), "the caller's mode is its own"


@pytest.mark.parametrize(
    "dialect", [Dialect(), Dialect("as_released"), replace(DIALECT, speech_form="plain")], ids=lambda d: d.strings.name
)
def test_a_session_answers_as_if_everything_were_read_anew(dialect: Dialect) -> None:
    model, _, heard = tiny()
    config = GenerationConfig().as_released() if dialect.as_released else GenerationConfig()
    vocab = model.vocabulary
    session = Session(generator(config, dialect), max_turns=2)
    kept = []
    for turn in range(4):
        row = session.request("speech2text_token", [heard[turn]], greedy=True)
        row.mode = replace(row.mode, max_new=24)
        row.plan = {4 + turn: vocab.eos_id, 5 + turn: vocab.speech_delimiter, 18: vocab.speech_delimiter}
        fresh = replace(row, past=None, keep_cache=False)
        kept.append(row.past.common(row.prompt, row.heard) / len(row.prompt) if row.past else 0.0)
        [events] = run([row], config, dialect)
        answer, anew = done(events), done(run([fresh], config, dialect)[0])
        assert answer.generated == anew.generated and answer.reason == "stop"
        session.commit(row, events, [heard[turn]])
        assert len(session) <= 2
    assert min(kept[1:]) > 0.5, "only the new turn is read"


def test_a_kept_cache_serves_rows_of_a_batch_with_different_pasts() -> None:
    model, _, _ = tiny()
    rows = []
    for length in (3, 6):
        first = request("speech2text_token", recordings=[0], max_new=30, plan={length: model.vocabulary.eos_id})
        first.keep_cache = True
        first.mode = replace(first.mode, max_new=12)
        [events] = run([first])
        past = [PastTurn(done(events).text_ids, speech_codes(events))]
        following = request("speech2text_token", recordings=[0, 1], history=past, max_new=10)
        following.past = first.cache
        rows.append(following)
    rows.append(request("text", recordings=[2], max_new=10))
    alone = [done(run([replace(row, past=None)])[0]).generated for row in rows]
    with torch.inference_mode():
        assert min(row.reused for row in DecoderState(model, rows, spare=0).rows[:2]) > 0
    assert [done(events).generated for events in run(rows)] == alone


def test_a_session_drops_old_turns_to_fit_its_limit_and_refuses_what_never_fits() -> None:
    _, _, heard = tiny()
    session = Session(generator(), max_turns=5, max_tokens=190)
    for _ in range(3):
        row = session.request("speech2text_token", [heard[1]], greedy=True)
        row.mode = replace(row.mode, max_new=20)
        assert len(row.prompt) <= 190
        session.commit(row, run([row])[0], [heard[1]])
    assert 0 < len(session) < 4
    with pytest.raises(TooLong, match="max_tokens"):
        Session(generator(), max_tokens=20).request("speech2text_token", [heard[1]])
    with pytest.raises(ValueError, match="no past turns"):
        session.request("text", [heard[1]])
    session.clear()
    assert len(session) == 0


def test_prompts_that_hide_positions_are_the_same_batched_and_alone() -> None:
    """As CTC compression hides frames of a recording."""
    rows = [request("speech2text_token", recordings=[0]), request("text", recordings=[1])]
    plain = done(run([rows[0]])[0]).generated
    for row, step in zip(rows, (2, 3), strict=True):
        visible_P = torch.arange(len(row.heard[0].visible_P)) % step == 0
        row.heard = (replace(row.heard[0], visible_P=visible_P),)
    alone = [done(run([row])[0]).generated for row in rows]
    assert alone[0] != plain, "hiding positions must change something"
    assert [done(events).generated for events in run(rows)] == alone


def test_hidden_positions_equal_positions_that_are_not_there() -> None:
    model, _, _ = tiny()
    hidden, shorter = (request("s2t_chat", recordings=[0]) for _ in range(2))
    keep_P = torch.arange(len(hidden.heard[0].visible_P)) % 2 == 0
    hidden.heard = (replace(hidden.heard[0], visible_P=keep_P),)
    kept = replace(
        hidden.heard[0], embeds_PD=hidden.heard[0].embeds_PD[keep_P], visible_P=keep_P[keep_P], lengths_N=keep_P.sum()[None]
    )
    config, (_, tokenizer, _) = GenerationConfig(), tiny()
    without = build_request("s2t_chat", config, tokenizer, model.vocabulary, heard=[kept], greedy=True)
    without.mode = shorter.mode
    assert done(run([hidden])[0]).generated == done(run([without])[0]).generated


def test_the_cache_layer_grows_and_selects_without_loss() -> None:
    layer = GrowingLayer(capacity=3)
    parts = [torch.randn(3, 2, n, 4) for n in (2, 1, 5, 200, 1)]
    for part in parts:
        keys, values = layer.update(part, part + 1)
    expected = torch.cat(parts, dim=2)
    assert torch.equal(keys, expected) and torch.equal(values, expected + 1) and layer.get_seq_length() == 209
    layer.select(torch.tensor([2, 0]), first=4)
    keys, _ = layer.update(parts[0][:2], parts[0][:2])
    assert torch.equal(keys, torch.cat([expected[[2, 0], :, 4:], parts[0][:2]], dim=2))


def test_no_requests_no_events() -> None:
    assert list(generator().generate([])) == []


def test_a_compiled_decoder_gives_the_same_ids() -> None:
    """With the back end that compiles nothing: what is tested is that the graphs are captured right as the cache grows."""
    model, tokenizer, _ = tiny()
    expected = done(run([request("s2t_chat", recordings=[1], max_new=12)])[0]).generated
    compiled = Generator(copy.deepcopy(model), tokenizer)
    compiled.compile(backend="eager")
    events = [event for _, event in compiled.generate([request("s2t_chat", recordings=[1], max_new=12)])]
    assert done(events).generated == expected
