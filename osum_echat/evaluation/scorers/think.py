"""What the model noted before it answered: words, labels, form."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from osum_echat import metrics
from osum_echat.config import ConfigError
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.labels import KINDS, canonical
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.scorers import ERRORS, PERCENT, Measure, Score, Tools
from osum_echat.evaluation.scorers.words import NONE, word_errors

OPEN = ("unsure", "unknown")
"""What a think says for a label that it leaves open."""


class ThinkWords:
    """Word error rate of the think's transcript; a think that is missing has lost all its words."""

    measures: Mapping[str, Measure] = {"wer": ERRORS}

    def __init__(self, tools: Tools, _: str = "") -> None:
        self.tools = tools

    def score(self, item: Item, result: Result) -> Score | None:
        if not item.text:
            return None
        heard = str(result.think.get("transcript") or "")
        return Score({"wer": word_errors(self.tools, item, item.text, heard)}, notes={"heard": heard})


class ThinkTags:
    """The think's labels."""

    measures: Mapping[str, Measure] = dict.fromkeys(KINDS, PERCENT)

    def __init__(self, tools: Tools, _: str = "") -> None:
        pass

    def score(self, item: Item, result: Result) -> Score | None:
        pairs = {}
        for kind, true in item.labels.items():
            said = result.think.get(kind)
            pairs[kind] = (true, canonical(kind, said) if said else NONE)
        return Score(pairs=pairs) if pairs else None


class ThinkParsed:
    """Thinks that hold every field, with values that the set knows."""

    measures: Mapping[str, Measure] = {"think_parsed": PERCENT}

    def __init__(self, tools: Tools, _: str = "") -> None:
        self.allowed = {kind: sorted({item.labels[kind] for item in tools.items if kind in item.labels}) for kind in KINDS}
        self.fields = ("transcript", *(kind for kind in KINDS if self.allowed[kind]))

    def score(self, item: Item, result: Result) -> Score | None:
        think = {name: result.think.get(name) for name in self.fields}
        think |= {kind: canonical(kind, value) for kind in KINDS if (value := think.get(kind))}
        found = metrics.think_validity(
            [think if result.think else None], self.fields, {k: v for k, v in self.allowed.items() if v}
        )
        return Score({"think_parsed": (found.complete, found.total)})


class ThinkRecall:
    """Share of the words that must be heard (the item's ``slots``: the words of an order that matter) that stand in the
    think's transcript; a word counts as often as it is wanted."""

    measures: Mapping[str, Measure] = {"recall": PERCENT}

    def __init__(self, tools: Tools, _: str = "") -> None:
        self.normal = tools.normalizer

    def score(self, item: Item, result: Result) -> Score | None:
        wanted = Counter(metrics.units(self.normal(str(item.extra.get("slots") or ""), item)))
        if not wanted:
            return None
        words = str(result.think.get("transcript") or "")
        found = wanted & Counter(metrics.units(self.normal(words, item)))
        return Score({"recall": (found.total(), wanted.total())}, notes={"heard": words})


class ThinkUnsure:
    """Thinks that leave a label open (``think_unsure:emotion``): they say *unsure* or *unknown*, or nothing."""

    def __init__(self, tools: Tools, kind: str = "") -> None:
        if kind not in KINDS:
            raise ConfigError(f"scorer think_unsure:{kind}: use one of {', '.join(f'think_unsure:{name}' for name in KINDS)}")
        self.kind = kind

    @property
    def measures(self) -> Mapping[str, Measure]:
        return {f"{self.kind}_unsure": Measure(better="lower")}

    def score(self, item: Item, result: Result) -> Score | None:
        said = result.think.get(self.kind)
        is_open = not said or metrics.bare_tag(str(said)) in OPEN
        return Score({f"{self.kind}_unsure": (is_open, 1)})


class ThinkClosed:
    """Thinks (of any form) that came to their end, and answers that have none."""

    measures: Mapping[str, Measure] = {"think_closed": PERCENT, "think_missing": Measure(better="lower")}

    def __init__(self, tools: Tools, _: str = "") -> None:
        pass

    def score(self, item: Item, result: Result) -> Score | None:
        closed = bool(result.think.get("raw"))
        return Score({"think_closed": (closed, 1), "think_missing": (not closed, 1)})


class ThinkText:
    """Word error rate of a natural-language think against the one that the item wants."""

    measures: Mapping[str, Measure] = {"think_wer": ERRORS}

    def __init__(self, tools: Tools, _: str = "") -> None:
        self.tools = tools

    def score(self, item: Item, result: Result) -> Score | None:
        wanted = item.extra.get("think_str")
        if not wanted:
            return None
        raw = str(result.think.get("raw") or "")
        return Score({"think_wer": word_errors(self.tools, item, str(wanted), raw)})
