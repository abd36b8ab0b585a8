"""The static step on the shipped model: a think that it closes, a text that it ends, words and codes in turns, hidden positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from osum_echat.generation.events import Done, Event
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request
from osum_echat.generation.static_rows import Sizes
from osum_echat.pipeline import EChat, find_mode

MINI = Path("checkpoints/mini")
RECORDING = Path("assets/demo/2_old_male_sad.ogg")


@pytest.fixture(scope="module")
def echat() -> EChat:
    return EChat.load(MINI, device="cpu")


def requests(echat: EChat, names: Sequence[str]) -> list[Request]:
    """Ways to ask, the second of each two greedy."""
    made = []
    for number, name in enumerate(names):
        mode = find_mode(name)
        ask = mode.ask(
            wav=RECORDING if mode.hears else None,
            text="the dog is old" if mode.reads else None,
            seed=number,
            greedy=number % 2 == 1,
        )
        made.append(echat.request(ask, echat.hear([RECORDING]) if mode.hears else []))
    return made


def decoded(made: Generator, asked: Sequence[Request]) -> list[Done]:
    done: dict[int, Event] = {n: event for n, event in made.generate(asked) if isinstance(event, Done)}
    return [done[n] for n in range(len(asked))]  # type: ignore[misc]


@pytest.mark.parametrize(
    "sizes",
    [Sizes(exact=True, late=False, record=False), Sizes(exact=False, late=True, record=False)],
    ids=["cpu", "accelerator"],
)
def test_mini_gives_the_ids_of_the_usual_way(echat: EChat, sizes: Sizes) -> None:
    names = ["s2s_think", "tts", "asr", "tts"]
    config = replace(echat.config, ctc_weight=0.0)
    usual = Generator(echat.model, echat.tokenizer, replace(config, static_step="never"), echat.dialect)
    static = Generator(echat.model, echat.tokenizer, config, echat.dialect)
    static.use_static_step(sizes)
    expected = decoded(usual, requests(echat, names))
    assert any(done.timings.think_tokens for done in expected)
    assert all(done.reason == "stop" for done in expected)
    for mine, theirs in zip(decoded(static, requests(echat, names)), expected, strict=True):
        assert (mine.generated, mine.text_ids, mine.guards) == (theirs.generated, theirs.text_ids, theirs.guards)
