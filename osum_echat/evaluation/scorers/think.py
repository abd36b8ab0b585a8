"""What the model noted before it answered: words, labels, form."""

from __future__ import annotations

from collections.abc import Mapping

from osum_echat import metrics
from osum_echat.evaluation.items import Item
from osum_echat.evaluation.labels import KINDS, canonical
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.scorers import ERRORS, PERCENT, Measure, Score, Tools
from osum_echat.evaluation.scorers.words import NONE, word_errors


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


class ThinkClosed:
    """Thinks (of any form) that came to their end."""

    measures: Mapping[str, Measure] = {"think_closed": PERCENT}

    def __init__(self, tools: Tools, _: str = "") -> None:
        pass

    def score(self, item: Item, result: Result) -> Score | None:
        return Score({"think_closed": (bool(result.think.get("raw")), 1)})


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
