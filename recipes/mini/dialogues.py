"""Conversations of three or four turns whose later question can only be answered with an earlier turn, and the rule that judges the answer.

A dialogue states a fact ("i live in oslo"), goes on to something else (a second fact, a topic of the grammar), and asks for the fact. Two facts of different
kinds may be stated, so that the right one has to be found. `fits` is the rule: the answer holds the value of the fact that was asked for and no other value
of its kind. Which combinations of facts, values and fillers are drawn is seeded; the held-out hundred use value pairs that training never has.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osum_echat.config import read_yaml
from recipes.mini import texts

HELD_OUT = 100
_TIMES = ("morning", "afternoon", "evening", "night")
_HELD_OUT_VALUES = 5  # every fifth combination of values is kept for tests


@dataclass(frozen=True)
class Turn:
    """What a user says and what is answered. ``openings``, ``clauses``: of answers that need the past or note a fact (empty: the rule of all other
    sentences); ``topic``: of the twenty, or None."""

    said: str
    openings: tuple[str, ...]
    clauses: tuple[str, ...]
    topic: str | None = None

    def reply(self, labels: texts.Labels, rng: random.Random) -> str:
        """An answer of the form of all others: opening, address, clause."""
        if not self.openings:
            return texts.reply(self.topic, labels, rng, self.said)
        address = texts.reply_parts("exam", labels).address
        return f"{rng.choice(self.openings)}, {address}. {rng.choice(self.clauses)}."


@dataclass(frozen=True)
class Dialogue:
    """Turns in their order; the last asks for ``value``, which is of kind ``fact`` (both empty for a turn that stands alone)."""

    turns: tuple[Turn, ...]
    fact: str
    value: str

    def fits(self, reply: str) -> bool:
        """Whether an answer to the last turn uses the fact: its value as words, and no other value of that kind."""
        words = f" {texts.normalise(reply)} "
        others = [value for value in facts()[self.fact]["values"] if value != self.value]
        return f" {self.value} " in words and not any(f" {other} " in words for other in others)


@functools.cache
def _rules() -> dict[str, Any]:
    return read_yaml(Path(__file__).parent / "dialogues.yaml")


def facts() -> dict[str, Any]:
    return dict(_rules()["facts"])


def _capital(text: str, value: str) -> str:
    """Names are written with capital letters (a time of the day is none)."""
    if value not in _names():
        return text
    words = [word if word in _TIMES else word.capitalize() for word in value.split()]
    return text.replace(value, " ".join(words))


@functools.cache
def _names() -> frozenset[str]:
    named = ("name", "pet_name", "town", "day")
    return frozenset(
        value for kind in named for value in (*facts()[kind]["values"], *facts()[kind]["more"]) if "the " not in value
    )


def _filled(template: str, value: str) -> str:
    """``template`` with its value; "a" in front of a vowel becomes "an"."""
    text = template.replace("{value}", value)
    return text.replace(f" a {value}", f" an {value}") if value[0] in "aeio" else text


def _stated(kind: str, value: str, rng: random.Random) -> Turn:
    rule = facts()[kind]
    answers = tuple(_capital(_filled(answer, value), value) for answer in rule["answer"])
    return Turn(_filled(rng.choice(rule["say"]), value), tuple(_rules()["noted"]), answers)


def _asked(kind: str, value: str, rng: random.Random) -> Turn:
    rule = facts()[kind]
    answers = tuple(_capital(_filled(answer, value), value) for answer in rule["answer"])
    return Turn(rng.choice(rule["ask"]), tuple(_rules()["remember"]), answers)


def _chat(rng: random.Random, sentences: Sequence[tuple[str, str]]) -> Turn:
    sentence, topic = rng.choice(sentences)
    return Turn(sentence, (), (), topic)


def _value(kind: str, rng: random.Random, test: bool) -> str:
    """One of ``values``; in training half of the time one of ``more``."""
    name = "values" if test or rng.random() < 0.5 else "more"
    return str(rng.choice(facts()[kind][name]))


def _kept_for_tests(kind: str, value: str, other: str, other_value: str) -> bool:
    """A fifth of the pairs of values, whatever the order in which they are said."""
    if any(v not in facts()[name]["values"] for name, v in ((kind, value), (other, other_value))):
        return False  # of no test
    first, second = sorted([(kind, value), (other, other_value)])
    at = [facts()[name]["values"].index(v) for name, v in (first, second)]
    return (at[0] + 2 * at[1] + len(first[0])) % _HELD_OUT_VALUES == 0


def dialogue(rng: random.Random, sentences: Sequence[tuple[str, str]], test: bool = False, turns: int | None = None) -> Dialogue:
    """Three or four turns. With ``test``: only pairs of values that training never has (and the other way round without)."""
    count = turns or rng.choice((3, 3, 4))
    while True:
        kind, other = rng.sample(sorted(facts()), 2)
        value, other_value = _value(kind, rng, test), _value(other, rng, test)
        if _kept_for_tests(kind, value, other, other_value) == test:
            break
    stated = [_stated(kind, value, rng), _stated(other, other_value, rng)]
    if count == 3 and rng.random() < 0.5:
        middle = [stated[0], _chat(rng, sentences)]
    elif count == 3:
        middle = stated if rng.random() < 0.5 else stated[::-1]
    else:
        middle = [*(stated if rng.random() < 0.5 else stated[::-1]), _chat(rng, sentences)]
    return Dialogue((*middle, _asked(kind, value, rng)), kind, value)


def single(rng: random.Random) -> Dialogue:
    """One turn outside the topics, for spoken answers that take up what was said."""
    source = rng.choices(("open", "commands", "orders"), (0.7, 0.15, 0.15))[0]
    return Dialogue((Turn(texts.said(source, rng), (), ()),), "", "")


def training_dialogues(count: int, seed: int = 0, singles: float = 0.4) -> list[Dialogue]:
    """Conversations, and a share of ``singles``."""
    rng = random.Random(f"dialogues {seed}")
    sentences = texts.training_user_sentences()
    return [single(rng) if rng.random() < singles else dialogue(rng, sentences) for _ in range(count)]


def held_out_dialogues(count: int = HELD_OUT) -> list[Dialogue]:
    """Of three turns, the fact always in the first: what ``reply_fit_turns`` is counted on."""
    rng = random.Random("held-out dialogues")
    sentences = texts.held_out_user_sentences()
    found: list[Dialogue] = []
    while len(found) < count:
        drawn = dialogue(rng, sentences, test=True, turns=3)
        first = drawn.turns[0]
        if f" {drawn.value}" in f" {first.said}" and first.clauses == _asked(drawn.fact, drawn.value, random.Random(0)).clauses:
            found.append(drawn)
    return found
