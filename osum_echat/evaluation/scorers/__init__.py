"""Scorers: rules that look at one answer and give numbers that add up over a set.

Each measure of an item is a pair (numerator, denominator): errors and words, 1 and 1 for a right answer, seconds and 1.
A set's value is the sum of the first over the sum of the second, so that rates are never means of rates and one
bootstrap fits all. Labels are kept as pairs (true, predicted), from which accuracy, macro-F1 and confusion pictures are
made.

A suite names scorers as ``name`` or ``name:argument``; `make` builds them. A scorer that does not apply to an item
returns None.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol

from osum_echat.config import ConfigError
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.suite import Suite

if TYPE_CHECKING:
    from osum_echat.evaluation.dnsmos import Dnsmos
    from osum_echat.evaluation.normalizer import Normalizer
    from osum_echat.evaluation.recogniser import SpeechRecogniser
    from osum_echat.evaluation.voices import SpeakerNet


@dataclass(frozen=True)
class Measure:
    """What a number means. ``scale`` is applied to the ratio (100: percent); ``better``: which way is good, if any.

    ``spread``: median and 90th percentile are told beside the mean (times).
    """

    unit: str = "%"
    scale: float = 100.0
    better: Literal["higher", "lower", ""] = "higher"
    spread: bool = False


PERCENT = Measure()
ERRORS = Measure(better="lower")
SECONDS = Measure("s", 1.0, "lower", spread=True)


@dataclass
class Score:
    """What a scorer says of one item. ``pairs``: (true, predicted) labels by kind; ``notes``: what a reader wants to
    see beside."""

    values: dict[str, tuple[float, float]] = field(default_factory=dict)
    pairs: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)


class Scorer(Protocol):
    """A rule. ``measures`` names what ``score`` can give."""

    @property
    def measures(self) -> Mapping[str, Measure]: ...

    def score(self, item: Item, result: Result) -> Score | None: ...


@dataclass
class Tools:
    """What scorers share: models that are loaded on first use. ``speaker_nets``: by the name of their measure."""

    suite: Suite
    items: Sequence[Item] = ()
    token2wav: str | None = None
    wheels: Any = None
    recognisers: dict[str, SpeechRecogniser] = field(default_factory=dict)
    heard_by: set[str] = field(default_factory=set)

    def made_with(self) -> dict[str, str]:
        """What these tools were when they were used, for the report: a score that is kept keeps it."""
        out = {"recogniser of spoken replies": ", ".join(sorted(self.heard_by))} if self.heard_by else {}
        return out | ({"text normalisation": self.normalizer.name} if "normalizer" in self.__dict__ else {})

    @cached_property
    def normalizer(self) -> Normalizer:
        from osum_echat.evaluation.normalizer import Normalizer

        return Normalizer(self.suite.normalizer)

    @cached_property
    def dnsmos(self) -> Dnsmos:
        from osum_echat.evaluation.dnsmos import Dnsmos

        found = Dnsmos()
        found.check()
        return found

    @cached_property
    def speaker_nets(self) -> dict[str, SpeakerNet]:
        from osum_echat.evaluation.voices import find_nets

        return find_nets(self.suite.speaker_net, self.token2wav)

    def recogniser(self, language: str) -> SpeechRecogniser:
        from osum_echat.evaluation import recogniser

        name = self.suite.recogniser.get(language) or self.suite.recogniser.get("en", "whisper-base")
        if name not in self.recognisers:
            self.recognisers[name] = recogniser.load(name, wheels=self.wheels)
        self.heard_by.add(self.recognisers[name].name)
        return self.recognisers[name]


SCORERS = {
    "wer": "words:WordErrors",
    "cer": "words:CharErrors",
    "think_words": "think:ThinkWords",
    "think_tags": "think:ThinkTags",
    "think_parsed": "think:ThinkParsed",
    "think_recall": "think:ThinkRecall",
    "think_unsure": "think:ThinkUnsure",
    "think_closed": "think:ThinkClosed",
    "think_text": "think:ThinkText",
    "tag": "words:Tag",
    "replies": "answers:AllowedReplies",
    "choice": "answers:Choice",
    "bbh": "answers:YesNo",
    "refusal": "answers:Refusal",
    "contains": "answers:Contains",
    "ifeval": "ifeval:InstructionFollowing",
    "own_speech": "speech:OwnSpeech",
    "dnsmos": "speech:Mos",
    "similarity": "speech:Similarity",
    "speech_faults": "speech:SpeechFaults",
    "latency": "latency:Latency",
    "seconds": "latency:Seconds",
    "live": "live:Live",
}


def scorer_class(spec: str) -> Callable[[Tools, str], Scorer]:
    """The class that a spec names. Raises ConfigError for an unknown one."""
    name = spec.partition(":")[0]
    if name not in SCORERS:
        raise ConfigError(f"there is no scorer {name!r}: use {', '.join(SCORERS)}")
    module, _, cls = SCORERS[name].partition(":")
    found: Callable[[Tools, str], Scorer] = getattr(importlib.import_module(f"{__name__}.{module}"), cls)
    return found


def make(specs: Sequence[str], tools: Tools) -> dict[str, Scorer]:
    """The scorers of a part, by their spec. Raises ConfigError for an unknown one."""
    return {spec: scorer_class(spec)(tools, spec.partition(":")[2]) for spec in specs}
