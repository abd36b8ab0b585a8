"""Words against words, and tags that a reply names."""

from __future__ import annotations

from collections.abc import Mapping

from osum_echat import metrics
from osum_echat.config import ConfigError
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.labels import KINDS, read_label
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.scorers import ERRORS, PERCENT, Measure, Score, Tools

NONE = "(none)"


class WordErrors:
    """Word error rate of the reply against the item's text; characters are the words of Chinese."""

    measures: Mapping[str, Measure] = {"wer": ERRORS}

    def __init__(self, tools: Tools, _: str = "") -> None:
        self.tools = tools

    def score(self, item: Item, result: Result) -> Score | None:
        return None if not item.text else Score({"wer": word_errors(self.tools, item, item.text, result.text)})


class CharErrors:
    """Character error rate, blanks left out."""

    measures: Mapping[str, Measure] = {"cer": ERRORS}

    def __init__(self, tools: Tools, _: str = "") -> None:
        self.tools = tools

    def score(self, item: Item, result: Result) -> Score | None:
        if not item.text:
            return None
        normal = self.tools.normalizer
        found = metrics.char_errors(normal(item.text, item), normal(result.text, item), normalized=False)
        return Score({"cer": (found.errors, found.units)}) if found.units else None


def word_errors(tools: Tools, item: Item, reference: str, hypothesis: str) -> tuple[float, float]:
    """(errors, words) after normalisation; tags in the hypothesis are no words."""
    normal = tools.normalizer
    found = metrics.word_errors(normal(reference, item), normal(hypothesis, item), normalized=False)
    return found.errors, found.units


class Tag:
    """A label that the reply names: ``tag:emotion``."""

    def __init__(self, tools: Tools, kind: str = "") -> None:
        if kind not in KINDS:
            raise ConfigError(f"scorer tag:{kind}: use one of {', '.join(f'tag:{name}' for name in KINDS)}")
        self.kind = kind
        self.among = frozenset(item.labels[kind] for item in tools.items if kind in item.labels)

    @property
    def measures(self) -> Mapping[str, Measure]:
        return {self.kind: PERCENT}

    def score(self, item: Item, result: Result) -> Score | None:
        if self.kind not in item.labels:
            return None
        found = result.tags.get(self.kind) if not result.text else read_label(self.kind, result.text, self.among)
        return Score(pairs={self.kind: (item.labels[self.kind], found or NONE)})
