"""From scores of items to numbers of a set: values with intervals, confusions, percentiles of times, by part and by
group."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from osum_echat import metrics
from osum_echat.evaluation.score import Row, Scored
from osum_echat.evaluation.scorers import Measure
from osum_echat.evaluation.scorers.words import NONE
from osum_echat.evaluation.statistics import Estimate, macro_f1, macro_recall, ratio_interval, statistic_interval, weighted_kappa
from osum_echat.evaluation.statistics import spearman as rank_correlation

JUDGE = Measure("", 1.0, "higher")


@dataclass
class Number:
    """A measure of a set, in its unit. ``median``, ``p90``: of the items, for times."""

    value: float
    low: float | None
    high: float | None
    count: int
    unit: str = ""
    better: str = ""
    median: float | None = None
    p90: float | None = None


@dataclass
class Summary:
    """Numbers of a part, or of one group of it."""

    part: str
    group: str = ""
    items: int = 0
    holes: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, Number] = field(default_factory=dict)
    confusions: dict[str, metrics.Confusion] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.part}/{self.group}" if self.group else self.part


def summarise(scored: Scored) -> list[Summary]:
    """A summary of each part, followed by those of its groups when it has several."""
    out = []
    for part in dict.fromkeys(row.part for row in scored.rows):
        rows = [row for row in scored.rows if row.part == part]
        measures = scored.measures.get(part, {})
        out.append(_summary(part, "", rows, measures))
        groups = list(dict.fromkeys(row.item.group for row in rows))
        if len(groups) > 1:
            out += [_summary(part, group, [row for row in rows if row.item.group == group], measures) for group in groups]
    return out


def _summary(part: str, group: str, rows: Sequence[Row], measures: Mapping[str, Measure]) -> Summary:
    summary = Summary(part, group, len(rows), dict(Counter(row.hole.partition(":")[0] for row in rows if row.hole)))
    answered = [row for row in rows if not row.hole]
    for name, measure in measures.items():
        values = [row.score.values[name] for row in answered if name in row.score.values]
        if values and sum(below for _, below in values) > 0:
            summary.numbers[name] = number(values, measure)
    for kind in dict.fromkeys(kind for row in answered for kind in row.score.pairs):
        pairs = [row.score.pairs[kind] for row in answered if kind in row.score.pairs]
        _labels(summary, kind, pairs)
    _judged(summary, answered)
    return summary


def number(values: Sequence[tuple[float, float]], measure: Measure) -> Number:
    """The ratio of sums with its interval, in the measure's unit."""
    above, below = [v[0] for v in values], [v[1] for v in values]
    found = _scaled(ratio_interval(above, below), measure)
    if measure.spread:
        each = [measure.scale * a / b for a, b in values if b]
        found.median, found.p90 = float(np.percentile(each, 50)), float(np.percentile(each, 90))
    return found


def _scaled(found: Estimate, measure: Measure) -> Number:
    low, high = (None if bound is None else bound * measure.scale for bound in (found.low, found.high))
    return Number(found.value * measure.scale, low, high, found.count, measure.unit, measure.better)


def _labels(summary: Summary, kind: str, pairs: Sequence[tuple[str, str]]) -> None:
    """Accuracy (``emotion``), macro-F1 (``emotion_f1``) and mean recall (``emotion_recall``) of a kind of label, and
    its confusion."""
    table = metrics.confusion([true for true, _ in pairs], [said if said != NONE else None for _, said in pairs], NONE)
    summary.confusions[kind] = table
    right = [(float(true == said), 1.0) for true, said in pairs]
    summary.numbers[kind] = number(right, Measure())
    f1 = statistic_interval(len(pairs), lambda index: macro_f1([pairs[i] for i in index]))
    recall = statistic_interval(len(pairs), lambda index: macro_recall([pairs[i] for i in index]))
    summary.numbers |= {f"{kind}_f1": _scaled(f1, Measure()), f"{kind}_recall": _scaled(recall, Measure())}


def _judged(summary: Summary, rows: Sequence[Row]) -> None:
    """Mean score of each judge; with two, how far they agree."""
    judges = list(dict.fromkeys(name for row in rows for name in row.judged))
    for name in judges:
        values = [(float(row.judged[name]["score"]), 1.0) for row in rows if row.judged.get(name, {}).get("score") is not None]
        missing = sum(row.judged[name].get("score") is None for row in rows if name in row.judged)
        if missing:
            summary.holes[f"judge {name}"] = missing
        if values:
            label = "judge" if len(judges) == 1 else f"judge {name}"
            summary.numbers[label] = number(values, JUDGE)
            summary.numbers[f"{label}_100"] = number([((score - 1) / 4, 1.0) for score, _ in values], Measure())
    if len(judges) >= 2:
        one, two = judges[:2]
        both = [
            (row.judged[one]["score"], row.judged[two]["score"])
            for row in rows
            if row.judged.get(one, {}).get("score") is not None and row.judged.get(two, {}).get("score") is not None
        ]
        if len(both) > 1:
            a, b = [round(x) for x, _ in both], [round(y) for _, y in both]
            found = {
                "same score, percent": 100 * float(np.mean(np.equal(a, b))),
                "quadratic kappa": weighted_kappa(a, b),
                "Spearman": rank_correlation([x for x, _ in both], [y for _, y in both]),
            }
            summary.agreement = {name: value for name, value in found.items() if not math.isnan(value)} | {"items": len(both)}


def find(summaries: Sequence[Summary], path: str) -> Number | None:
    """``part.measure`` or ``part/group.measure``; None when it was not measured."""
    name, _, measure = path.rpartition(".")
    return next((s.numbers.get(measure) for s in summaries if s.name == name), None)


def plain(summary: Summary) -> dict[str, Any]:
    """A summary for JSON."""
    return {
        "part": summary.part,
        "group": summary.group,
        "items": summary.items,
        "holes": summary.holes,
        "numbers": {name: _plain_number(value) for name, value in summary.numbers.items()},
        "confusions": {kind: _plain_confusion(table) for kind, table in summary.confusions.items()},
        "agreement": {name: round(value, 4) for name, value in summary.agreement.items()},
    }


def _plain_number(found: Number) -> dict[str, Any]:
    values = {name: getattr(found, name) for name in ("value", "low", "high", "median", "p90")}
    out = {name: round(value, 4) for name, value in values.items() if value is not None}
    return out | {"count": found.count, "unit": found.unit, "better": found.better}


def _plain_confusion(table: metrics.Confusion) -> dict[str, Any]:
    def share(value: float) -> float | None:
        return None if math.isnan(value) else round(value, 4)

    each = {label: {"recall": share(table.recall(label)), "precision": share(table.precision(label))} for label in table.labels}
    return {"labels": list(table.labels), "matrix": table.matrix().tolist(), "each": each}
