"""Past turns in the live server, with a tiny model that states no limit: what was said stands in front of the next turn and is not read again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.engine import EngineLimits
from osum_echat.pipeline import EChat
from osum_echat.serving.backend import Ended, Exchange, Heard, Refused, Text, Turn
from osum_echat.serving.live import LiveMemory, LiveModel
from osum_echat.serving.shared import SharedEChat
from osum_echat.token2wav import Token2Wav
from tests.generation_case import tiny
from tests.live_case import at_rest, live
from tests.token2wav_case import recorded_speaker, write_directory

SHORT = GenerationConfig(modes={name: replace(GenerationConfig().mode(name), max_new=12) for name in OUTPUTS})


@pytest.fixture
def model() -> Iterator[LiveModel]:
    weights, tokenizer, _ = tiny()
    made = LiveModel(SharedEChat(EChat(weights, tokenizer, SHORT)))
    yield made
    made.close()


async def heard(model: LiveModel, seed: int) -> Heard:
    return await model.hear(np.random.default_rng(seed).normal(0, 0.1, 12000).astype(np.float32))


async def answer(model: LiveModel, turn: Turn, memory: LiveMemory | None) -> tuple[str, Ended]:
    text = ""
    async for event in model.start(turn, memory):
        if isinstance(event, Text):
            text += event.text
        elif isinstance(event, Ended):
            return text, event
    raise AssertionError("a job ends with Ended")


@live
async def test_the_next_turn_stands_behind_the_past_which_is_read_only_once(model: LiveModel) -> None:
    model.start_threads()
    first, second = await heard(model, 1), await heard(model, 2)
    memory = model.open()
    asked = Turn(heard=first, speak=False, seed=3)
    _, ended = await answer(model, asked, memory)
    assert ended.reason in ("stop", "length")
    past = (Exchange((first,), "", "Hello there."),)
    model.remember(memory, past, asked)
    await at_rest(model)
    turn = Turn(past=past, heard=second, speak=False, seed=4)
    text, ended = await answer(model, turn, memory)
    alone, afresh = await answer(model, turn, model.open())
    assert (text, ended.tokens["text"]) == (alone, afresh.tokens["text"]), "what is kept changes the time and not the answer"
    bare = await answer(model, replace(turn, past=()), model.open())
    length, without = ended.tokens["read"], bare[1].tokens["read"]
    assert length == afresh.tokens["read"] > without + first.positions
    assert ended.tokens["cached"] >= length - without and afresh.tokens["cached"] == bare[1].tokens["cached"] == 0


@live
async def test_a_checkpoint_that_has_learnt_no_past_answers_from_the_turn_alone_and_says_so_once(model: LiveModel) -> None:
    learnt = replace(model.echat.dialect.learnt, past_turns=0)
    model.echat.generator.dialect = replace(model.echat.dialect, learnt=learnt)
    model = LiveModel(model.shared)
    assert "history" in model.warnings
    model.start_threads()
    first, second = await heard(model, 1), await heard(model, 2)
    turn = Turn(past=(Exchange((first,), "", "Hello there."),), heard=second, speak=False, seed=4)
    memory = model.open()
    with_past, without = await answer(model, turn, memory), await answer(model, replace(turn, past=()), model.open())
    assert with_past[0] == without[0] and with_past[1].tokens["read"] == without[1].tokens["read"]
    model.remember(memory, turn.past, turn)
    assert model.load().kept == 0


@pytest.fixture
def speaking(tmp_path: Path) -> Iterator[LiveModel]:
    """With a token2wav."""
    weights, tokenizer, _ = tiny()
    token2wav = Token2Wav.load(write_directory(tmp_path / "tiny"), device="cpu")
    made = LiveModel(SharedEChat(EChat(weights, tokenizer, SHORT, token2wav, recorded_speaker())))
    yield made
    made.close()


@live
async def test_a_written_answer_that_is_said_tells_what_was_read_of_the_question(speaking: LiveModel) -> None:
    speaking.start_threads()
    turn = Turn(text="how are you?")
    _, said = await answer(speaking, turn, None)
    _, written = await answer(speaking, replace(turn, speak=False), None)
    assert said.codes and said.tokens["read"] == written.tokens["read"]
    _, short = await answer(speaking, replace(turn, max_tokens=4), None)
    assert len(short.codes) <= 4 < len(said.codes), "the limit holds for what is said as well"


@live
async def test_silence_is_answered_in_writing_by_a_checkpoint_that_says_no_texts(speaking: LiveModel) -> None:
    learnt = replace(speaking.echat.dialect.learnt, modes=("speech2text_token",))
    speaking.echat.generator.dialect = replace(speaking.echat.dialect, learnt=learnt)
    model = LiveModel(speaking.shared)
    model.start_threads()
    text, ended = await answer(model, Turn(heard=await model.hear(np.zeros(16000, dtype=np.float32))), None)
    assert text == "I heard nothing." and ended.reason == "stop" and not ended.codes


@live
async def test_a_request_that_brings_its_past_is_answered_from_it(model: LiveModel) -> None:
    """As chat completions come, which have no session."""
    model.start_threads()
    first, second = await heard(model, 1), await heard(model, 2)
    turn = Turn(past=(Exchange((first,), "", "Hello there."),), heard=second, speak=False, seed=4)
    memory = model.open()
    found, expected = await answer(model, turn, None), await answer(model, turn, memory)
    memory.close()
    assert found[0] == expected[0] and found[1].tokens == expected[1].tokens
    assert found[1].tokens["read"] > (await answer(model, replace(turn, past=()), None))[1].tokens["read"] + first.positions
    await at_rest(model)
    assert model.load().kept == 0


@live
async def test_a_turn_that_can_never_fit_is_refused_as_too_long(model: LiveModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the limit of a dialogue, or by that of the engine: it is no use to come back later."""
    model.start_threads()
    turn = Turn(heard=await heard(model, 1), speak=False)
    memory = model.open()
    memory.session.max_tokens = 20
    monkeypatch.setattr(model.engine, "limits", EngineLimits(positions=8))
    for asked, limit in ((memory, "the session allows 20"), (None, "the server has 8")):
        with pytest.raises(Refused, match=limit) as refused:
            model.start(turn, asked)
        assert refused.value.code == "too_long"


@pytest.mark.parametrize("reads", [True, False])
@live
async def test_nothing_is_kept_of_a_dialogue_that_ends_while_the_model_works_for_it(model: LiveModel, reads: bool) -> None:
    """``reads``: it ends while its past is read, else while it is answered."""
    model.start_threads()
    first = await heard(model, 1)
    asked = Turn(heard=first, speak=False, seed=3)
    memory = model.open()
    if reads:
        await answer(model, asked, memory)
    job = None
    model.engine.run(lambda: time.sleep(0.2))  # both come before the model does anything
    if reads:
        model.remember(memory, (Exchange((first,), "", "Hello there."),), asked)
    else:
        job = model.start(asked, memory)
    memory.close()
    if job is not None:
        async for _ in job:
            pass
    await at_rest(model)
    assert model.load().kept == 0 and memory.session.kept is None
