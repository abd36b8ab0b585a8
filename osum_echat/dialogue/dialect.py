"""A checkpoint's dialect: the fixed strings, forms and instructions that it was trained with, and what it has learnt.

It is one section (``dialect:``) of a checkpoint's config.yaml. The data loader, the trainer and the generator read it
there and nowhere else, so a model cannot be asked in other words than those it was trained with, and everybody who
offers or refuses a mode asks `Dialect.refusal`.
"""

from __future__ import annotations

import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import yaml

from osum_echat.dialogue.layout import Layout
from osum_echat.dialogue.prompts import AS_RELEASED, Profile, get_profile
from osum_echat.dialogue.tasks import OUTPUTS, Sample, SpeechForm, build_layout, find_task
from osum_echat.dialogue.think import ThinkForm
from osum_echat.dialogue.tokens import Tokenizer
from osum_echat.dialogue.vocabulary import Vocabulary


@dataclass(frozen=True)
class Learnt:
    """What a checkpoint has learnt. None: not stated, so nothing is refused.

    Attributes:
        modes: kinds of sequence, keys of `tasks.OUTPUTS` (understanding tasks: see `Dialect.refuse_unlisted`).
        think: forms of a think.
        past_turns: how many past turns may stand in front of a dialogue's turn; 0: none.
        hears, says: languages, as ISO 639-1 codes.
        seconds: the longest recordings. say_words: the longest texts to say, in words (a Chinese character counts a
            third).
    """

    modes: tuple[str, ...] | None = None
    think: tuple[ThinkForm, ...] | None = None
    past_turns: int | None = None
    hears: tuple[str, ...] | None = None
    says: tuple[str, ...] | None = None
    seconds: float | None = None
    say_words: int | None = None

    def __post_init__(self) -> None:
        unknown = sorted(set(self.modes or ()) - set(OUTPUTS))
        if unknown:
            raise ValueError(f"learnt.modes: unknown mode {unknown[0]!r}; use {', '.join(OUTPUTS)}")
        if self.past_turns is not None and self.past_turns < 0:
            raise ValueError(f"learnt.past_turns must be 0 (none) or more, found {self.past_turns}")
        if (self.seconds is not None and self.seconds < 2) or (self.say_words is not None and self.say_words < 1):
            raise ValueError(
                f"learnt.seconds must be 2 or more and say_words 1 or more, found {self.seconds} and {self.say_words}"
            )


@dataclass(frozen=True)
class Dialect:
    """How a checkpoint is spoken to.

    Attributes:
        profile: the fixed strings of sequences: the name of a published profile (`prompts.PROFILES`), or a `Profile`
            written out.
        speech_form: how speech behind the text is written: ``plain``, or ``word`` for word by word (see `interleave`).
        instructions: sentences that ask for an understanding task, by task string: training draws one (see
            `sentences`), inference takes one (see `instruction`).
        refuse_unlisted: tasks that `instructions` does not name have no instruction, and are refused at inference.
        learnt: see `Learnt`.
    """

    profile: Profile | str = "as_trained"
    speech_form: SpeechForm = "plain"
    instructions: Mapping[str, tuple[str, ...] | str] = field(default_factory=dict)
    refuse_unlisted: bool = False
    learnt: Learnt = field(default_factory=Learnt)

    def __post_init__(self) -> None:
        missing = sorted(set(OUTPUTS) - set(self.strings.system))
        if missing:
            raise ValueError(f"profile.system lacks the opening of {', '.join(missing)}")
        for task in self.instructions:
            sentences = self.sentences(task)
            if not sentences or not all(sentence.strip() for sentence in sentences):
                raise ValueError(f"instructions: {task!r} must be a sentence or a list of sentences, found {sentences!r}")

    @cached_property
    def strings(self) -> Profile:
        """The fixed strings. Raises ValueError for a name that is not published."""
        return get_profile(self.profile)

    def with_profile(self, name: str) -> Dialect:
        """The same with a published profile. Raises ValueError for a name that is not published."""
        return replace(self, profile=name)

    @property
    def as_released(self) -> bool:
        """Sequences are those of the published inference code."""
        return self.strings is AS_RELEASED

    def sentences(self, task: str) -> Sequence[str]:
        """Sentences of which training draws one: the checkpoint's own, else the default ones; empty: the task has
        none."""
        own = self.instructions.get(task)
        if own is not None:
            return (own,) if isinstance(own, str) else own
        return () if self.refuse_unlisted else default_instructions().get(task, ())

    def instruction(self, task: str) -> str:
        """The sentence that inference asks a task in; "" for none: the checkpoint's own first one, else the profile's,
        else the default's."""
        fixed = self.strings.asks.get(task)
        if fixed is not None and task not in self.instructions and not self.refuse_unlisted:
            return fixed
        return next(iter(self.sentences(task)), "")

    def layout(self, sample: Sample, tokenizer: Tokenizer, vocab: Vocabulary, prefix_only: bool = False) -> Layout:
        """The sequence of a sample in this dialect (see `tasks.build_layout`)."""
        return build_layout(sample, tokenizer, vocab, self.strings, self.speech_form, prefix_only)

    def refusal(self, asked: str, past_turns: int = 0, think: ThinkForm | None = None) -> str | None:
        """Why this checkpoint cannot do what is asked, and what it can, in a sentence; None when it can.

        Args:
            asked: a kind of sequence (a key of `tasks.OUTPUTS`) or a task string of records.
            past_turns: how many past turns shall stand in front.
            think: the form of think that is wanted.
        """
        if asked in OUTPUTS:
            output = OUTPUTS[asked]
        else:
            task = find_task(asked)
            output = task.output
            if task.prompted and self.refuse_unlisted and asked not in self.instructions:
                return f"this checkpoint has not learnt {asked}, only {', '.join(self.instructions) or 'no such task'}"
        learnt = self.learnt
        if learnt.modes is not None and output.name not in learnt.modes:
            known = "; ".join(OUTPUTS[name].about for name in learnt.modes)
            return f"this checkpoint has not learnt {output.about}, only: {known or 'nothing'}"
        if think is not None and learnt.think is not None and think not in learnt.think:
            return f"this checkpoint has not learnt to think in {_FORMS[think]}, only: {_forms(learnt.think)}"
        if learnt.past_turns is not None and past_turns > learnt.past_turns:
            most = f"at most {learnt.past_turns} of them" if learnt.past_turns else "each turn has to stand by itself"
            return f"this checkpoint has not learnt dialogues with {past_turns} past turns: {most}"
        return None

    def summary(self) -> dict[str, str]:
        """What the checkpoint has learnt, by heading, for people."""
        learnt = self.learnt
        listed = {
            "modes": learnt.modes and "; ".join(OUTPUTS[name].about for name in learnt.modes),
            "understanding": ", ".join(self.instructions) if self.refuse_unlisted else None,
            "think": None if learnt.think is None else _forms(learnt.think),
            "past turns": None if learnt.past_turns is None else str(learnt.past_turns or "none"),
            "hears": learnt.hears and ", ".join(learnt.hears),
            "says": learnt.says and ", ".join(learnt.says),
        }
        return {name: value or "not stated" for name, value in listed.items()}


_FORMS: Mapping[ThinkForm, str] = {"tag": "tags", "language": "natural language"}


def _forms(forms: Sequence[ThinkForm]) -> str:
    return ", ".join(_FORMS[form] for form in forms) or "no think at all"


@lru_cache(maxsize=1)
def default_instructions() -> Mapping[str, tuple[str, ...]]:
    """The sentences that come with the package (`osum_echat/conf/prompt_config.yaml`) and fit the published
    checkpoints, by task string."""
    file = importlib.resources.files("osum_echat") / "conf" / "prompt_config.yaml"
    data: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {task: tuple(sentences) for task, sentences in data.items()}
