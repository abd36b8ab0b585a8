"""A run as files: ``report.json`` (everything), ``report.md`` (to read) and ``report.html`` (one file: tables,
pictures, sound)."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osum_echat.evaluation.items import ItemError
from osum_echat.evaluation.score import Row
from osum_echat.evaluation.suite import Suite
from osum_echat.evaluation.summary import Number, Summary, find, plain

HOLES_SHOWN = 50
EXAMPLES = 20
"""The worst answers that are shown, and as many of the best."""


@dataclass
class Report:
    """What a run found.

    Attributes:
        system: name of what was measured. about: lines on how (recogniser, normalisation, judge, versions).
        faults: entries of data and results that could not be used. unavailable: scorers that could not be had, and why.
        paper: published numbers to show beside: {model: {column: value}}.
        reached: number of answers that were scored; 0: everything failed.
    """

    suite: Suite
    system: str
    summaries: Sequence[Summary] = ()
    rows: Sequence[Row] = ()
    about: Sequence[str] = ()
    faults: Sequence[ItemError] = ()
    unavailable: Mapping[str, str] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)

    @property
    def reached(self) -> int:
        return sum(not row.hole and not row.refusal for row in self.rows)

    @property
    def headline(self) -> dict[str, Number]:
        """The suite's chosen numbers; without a choice, the first two measures of every part."""
        chosen = self.suite.headline or {
            f"{s.name}.{name}": f"{s.name}.{name}" for s in self.summaries if not s.group for name in list(s.numbers)[:2]
        }
        found: dict[str, Number | None] = {}
        for name, path in chosen.items():
            several = self._by_judge(path)
            found.update((f"{name}, {judge}", number) for judge, number in several.items())
            if not several:
                found[name] = find(self.summaries, path)
        return {name: number for name, number in found.items() if number is not None}

    def _by_judge(self, path: str) -> dict[str, Number]:
        """The number of each judge that a path such as ``reply.judge_100`` stands for, where there are several."""
        place, _, measure = path.rpartition(".")
        if measure not in ("judge", "judge_100"):
            return {}
        ending = measure.removeprefix("judge")
        numbers = next((s.numbers for s in self.summaries if s.name == place), {})
        judges = dict.fromkeys(judge for row in self.rows for judge in row.judged)
        return {judge: numbers[f"judge {judge}{ending}"] for judge in judges if f"judge {judge}{ending}" in numbers}

    def holes(self) -> list[dict[str, Any]]:
        """Everything that is missing: faults of files, unanswered and refused items, judge's holes."""
        out = [_hole(f"{f.source}:{f.line}" if f.line else f.source, f.id, f.reason, str(f)) for f in self.faults]
        for row in self.rows:
            where = f"{row.item.source}:{row.item.line}" if row.item.line else row.item.source or row.part
            about = f"{where}: {row.part}, id {row.item.id!r}: "
            if row.hole:
                out.append(_hole(where, row.item.id, row.hole.partition(":")[0], about + row.hole))
            if row.refusal:
                out.append(_hole(where, row.item.id, "refused", about + row.refusal))
            for fault in row.score.notes.get("faults", ()):
                out.append(_hole(where, row.item.id, "not scored", about + fault))
            for name, judged in row.judged.items():
                if judged.get("score") is None:
                    out.append(_hole(where, row.item.id, "judge", f"{about}judge {name}: {judged.get('hole', 'no score')}"))
        return out

    def to_json(self) -> dict[str, Any]:
        holes = self.holes()
        return {
            "suite": self.suite.name,
            "system": self.system,
            "date": time.strftime("%Y-%m-%d"),
            "about": list(self.about),
            "headline": {name: round(number.value, 4) for name, number in self.headline.items()},
            "summaries": [plain(summary) for summary in self.summaries],
            "unavailable": dict(self.unavailable),
            "holes": {"count": len(holes), "first": holes[:HOLES_SHOWN]},
            "examples": [example(row) for row in chosen_examples(self.rows)],
        }

    def write(self, out: Path) -> Path:
        """The three files; returns report.md."""
        from osum_echat.evaluation.report import html, markdown

        out.mkdir(parents=True, exist_ok=True)
        data = self.to_json()
        (out / "report.json").write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        path = out / "report.md"
        path.write_text(markdown.render(self, data, out), encoding="utf-8")
        (out / "report.html").write_text(html.render(self, data), encoding="utf-8")
        return path


def _hole(where: str, id: str, reason: str, message: str) -> dict[str, Any]:
    return {"where": where, "id": id, "reason": reason, "message": message}


def goodness(row: Row) -> float | None:
    """How good an answer is, from 0 to 1, for choosing examples: the judge's score, else right labels and answers and
    few errors; None: unknown."""
    scores = [judged["score"] for judged in row.judged.values() if judged.get("score") is not None]
    if scores:
        return (sum(scores) / len(scores) - 1) / 4
    parts = [float(true == said) for true, said in row.score.pairs.values()]
    for name in ("reply_fit", "accuracy", "contains", "refusal", "prompt_strict"):
        if name in row.score.values:
            parts.append(row.score.values[name][0] / row.score.values[name][1])
    for name in ("wer", "think_wer"):
        if name in row.score.values and row.score.values[name][1]:
            parts.append(1 - min(1.0, row.score.values[name][0] / row.score.values[name][1]))
    return sum(parts) / len(parts) if parts else None


def chosen_examples(rows: Sequence[Row], each: int = EXAMPLES) -> list[Row]:
    """The worst and the best answers of the run, as many of each; of equal ones those that come first."""
    known = [(value, at) for at, row in enumerate(rows) if not row.hole and (value := goodness(row)) is not None]
    worst = sorted(known)[:each]
    best = [pair for pair in sorted(known, key=lambda pair: (-pair[0], pair[1])) if pair not in worst][:each]
    return [rows[at] for _, at in worst + best]


def example(row: Row) -> dict[str, Any]:
    """One answer as plain data."""
    value = goodness(row)
    out: dict[str, Any] = {
        "part": row.part,
        "id": row.item.id,
        "goodness": None if value is None else round(value, 3),
        "text": row.item.text,
    }
    out["labels"] = dict(row.item.labels)
    if row.result is not None:
        out["reply"] = row.result.text
        out["noted"] = dict(row.result.tags)
    heard = row.score.notes.get("heard")
    if heard is not None:
        out["heard"] = heard
    judged = {
        name: {"score": j["score"], "reason": j.get("reason", "")} for name, j in row.judged.items() if j.get("score") is not None
    }
    return out | ({"judged": judged} if judged else {})
