"""Guards: the published numbers, each row by itself, and how often they acted."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.generation.config import (
    AgeGuard,
    GenerationConfig,
    Guards,
    LengthGuard,
    RepetitionGuard,
    SilenceGuard,
    ThinkGuard,
)
from osum_echat.generation.events import speech_codes
from osum_echat.generation.guards import AgeChoice, Silence, ban_ids, repetition_bans
from tests.generation_case import done, request, run, tiny


def banned_slowly(ids: list[int], guard: RepetitionGuard) -> set[int]:
    """The rule in plain Python: text ids are negative."""
    if not ids or ids[-1] < 0:
        return set()
    run_length = next((i for i, token in enumerate(reversed(ids)) if token != ids[-1]), len(ids))
    out = set()
    if run_length >= (guard.frequent_run if ids[-1] in guard.frequent_codes else guard.run):
        out.add(ids[-1])
    for token in {t for t in ids[-guard.memory :] if t >= 0}:
        frequent = token in guard.frequent_codes
        window, count = (guard.frequent_window, guard.frequent_count) if frequent else (guard.window, guard.count)
        if ids[-window:].count(token) >= count:
            out.add(token)
    return out


@settings(deadline=None, max_examples=200)
@given(st.lists(st.lists(st.sampled_from([-7, 0, 1, 2, 1446]), max_size=30), min_size=1, max_size=4), st.booleans())
def test_repetition_bans_what_the_rule_says(rows: list[list[int]], one_more: bool) -> None:
    guard = replace(RepetitionGuard(), count=4) if one_more else RepetitionGuard()
    memory = guard.memory
    recent = torch.tensor([([-1] * memory + ids)[-memory:] for ids in rows])
    logits = ban_ids(torch.zeros(len(rows), 1500), recent, repetition_bans(recent, guard))
    for ids, row in zip(rows, logits, strict=True):
        assert set(torch.isinf(row).nonzero()[:, 0].tolist()) == banned_slowly(ids[-memory:], guard)


def test_age_guard_looks_at_each_row_and_acts_once() -> None:
    model, tokenizer, _ = tiny()
    age = AgeChoice.compile(AgeGuard(), tokenizer, model.vocabulary)
    assert age is not None
    recent = torch.tensor([list(age.trigger_ids), [1, 2, 3], list(age.trigger_ids)])
    logits, acted = age(torch.randn(3, model.vocabulary.text_size), recent, torch.tensor([True, True, False]))
    assert acted.tolist() == [True, False, False]
    assert torch.isfinite(logits).sum(1).tolist() == [len(age.choice_ids), model.vocabulary.text_size, model.vocabulary.text_size]


def test_age_guard_is_off_for_a_tokenizer_that_cannot_tell_the_field() -> None:
    model, tokenizer, _ = tiny()
    assert AgeChoice.compile(AgeGuard(trigger=""), tokenizer, model.vocabulary) is None


def test_age_is_chosen_in_a_think_and_counted() -> None:
    model, tokenizer, _ = tiny()
    written = tokenizer.encode("<think>用户说的话是:你好,年龄为:<")
    config = GenerationConfig(guards=replace(Guards.off(), age=AgeGuard()))
    plan = dict(enumerate(written))
    rows = [request("speech2text_token_think", config, recordings=[0], plan=plan), request("s2t_chat", config, recordings=[0])]
    rows.append(request("s2t_chat", config, recordings=[1], plan=plan))
    results = [done(events) for events in run(rows, config)]
    spoken = GenerationConfig(guards=Guards.as_released())
    assert [done(events).guards for events in run([replace(row, plan=plan) for row in rows], spoken)] == [{"age": 1}, {}, {}]
    assert results[2].guards == {"age": 1}
    age = AgeChoice.compile(AgeGuard(), tokenizer, model.vocabulary)
    assert age is not None and results[0].text_ids[len(written)] in age.choice_ids
    assert results[0].guards == {"age": 1} and results[1].guards == {}


def test_silence_is_cut_after_its_longest_run() -> None:
    guard = Silence(SilenceGuard(codes=(3, 5), longest=4))
    recent = torch.tensor([[3, 5, 3, 3], [3, 3, 1, 3], [-1, 3, 3, 3]])
    logits, acted = guard(torch.zeros(3, 8), recent)
    assert acted.tolist() == [True, False, False]
    assert torch.isinf(logits[0]).nonzero()[:, 0].tolist() == [3, 5] and torch.isfinite(logits[1:]).all()


def test_repetition_guard_acts_on_a_planned_loop_and_is_off_as_released() -> None:
    model, _, _ = tiny()
    code = model.vocabulary.speech_id(9)
    loop = dict.fromkeys(range(6), code)
    on, off = (
        GenerationConfig(guards=replace(Guards.off(), repetition=RepetitionGuard())),
        GenerationConfig().as_released(),
    )
    acted = done(run([request("text2token", on, say="你好", plan=loop, max_new=8)], on)[0])
    left = done(run([request("text2token", off, say="你好", plan=loop, max_new=8)], off)[0])
    assert acted.guards["repetition"] >= 1 and left.guards == {}


def test_speech_that_outgrows_its_text_ends_and_is_counted() -> None:
    config = GenerationConfig(guards=replace(Guards.off(), length=LengthGuard(base=2, per_text_id=3)))
    _, tokenizer, _ = tiny()
    says = "你好，我是你的语音助手。"
    [events] = run([request("text2token", config, say=says, max_new=200)], config)
    result = done(events)
    assert len(speech_codes(events)) == 2 + 3 * len(tokenizer.encode(says))
    assert result.guards == {"length": 1} and result.reason == "stop"


def test_a_think_that_never_closes_is_closed_and_the_reply_goes_on() -> None:
    _, tokenizer, _ = tiny()
    config = GenerationConfig(guards=replace(Guards.off(), think=ThinkGuard(longest=9)))
    opening = dict(enumerate(tokenizer.encode("<think>嗯")))
    row = request("s2t_chat_think", config, recordings=[0], plan=opening, max_new=30)
    result = done(run([row], config)[0])
    assert result.guards["think"] >= 1
    text = tokenizer.decode(result.text_ids)
    assert text.count("<think end>") == 1 and not text.endswith("<think end>")
    assert result.timings.think_tokens == 9 + len(tokenizer.encode("<think end>"))


def test_a_text_cannot_end_inside_its_think() -> None:
    model, tokenizer, _ = tiny()
    config = GenerationConfig(guards=replace(Guards.off(), think=ThinkGuard(longest=400)))
    logits_seen: list[torch.Tensor] = []
    opening = dict(enumerate(tokenizer.encode("<think>嗯")))
    eos = model.vocabulary.eos_id
    head = model.lm.text_head.weight
    before = head[eos].clone()
    row = request("s2t_chat_think", config, recordings=[0], plan=opening, max_new=12)
    try:
        with torch.no_grad():  # make the end of text the most likely id wherever it was not
            head[eos] = 100 * head[134449]
        result = done(run([row], config, on_logits=lambda _, v: logits_seen.append(v))[0])
    finally:
        with torch.no_grad():
            head[eos] = before
    wanted_to_end = sum(int(v.argmax()) == eos for v in logits_seen)
    assert wanted_to_end > 0, "the case is about a model that wants to end"
    assert eos not in result.generated and result.reason == "length"
    assert result.guards["think"] == wanted_to_end
