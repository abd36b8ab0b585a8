"""Step two: put each answer beside its item and let the suite's scorers look; ``scores.jsonl``, one line an answer.

A line keeps a digest of what it was made from (item, answer, scorers, normalisation), so a run that was stopped goes
on, and one whose answers changed scores those again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from osum_echat.evaluation import ScorerUnavailable
from osum_echat.evaluation.items import Item, ItemError
from osum_echat.evaluation.maker import MADE_OF
from osum_echat.evaluation.results import Lines, Result
from osum_echat.evaluation.scorers import Measure, Score, Scorer, Tools, make
from osum_echat.evaluation.suite import Part, Suite

log = logging.getLogger(__name__)
FILE = "scores.jsonl"


@dataclass
class Row:
    """An item, its answer, and what was found.

    Attributes:
        hole: why there is no answer that counts.
        refusal: why one without words counts (`Part.count_refusals`).
    """

    part: str
    item: Item
    result: Result | None = None
    score: Score = field(default_factory=Score)
    hole: str = ""
    refusal: str = ""
    judged: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Scored:
    """What the step found: rows, the measures by part, scorers that could not be had, and faults of the results file.

    ``made_with``: recognisers and normalisations by which the scores were made, those of earlier runs too.
    """

    rows: list[Row] = field(default_factory=list)
    measures: dict[str, dict[str, Measure]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)
    faults: list[ItemError] = field(default_factory=list)
    made_with: dict[str, set[str]] = field(default_factory=dict)

    def note(self, made_with: Mapping[str, str]) -> None:
        for name, value in made_with.items():
            self.made_with.setdefault(name, set()).add(value)


def join(
    suite: Suite, sets: Mapping[str, Sequence[Item]], results: Sequence[Result], source: Path
) -> tuple[list[Row], list[ItemError]]:
    """Items with their answers. An answer without a part belongs to every part that has its id, one to a recording to
    every item that was made of it (`maker.by_label`); one that fits nowhere is a fault."""
    by_part: dict[tuple[str, str], Result] = {(result.part, result.id): result for result in results}
    rows, used = [], set[tuple[str, str]]()
    for name, part in suite.parts.items():
        asked = part.same_as or name
        for item in sets.get(name, ()):
            ids = (item.id, str(item.extra.get(MADE_OF) or item.id))
            key = next((key for id in ids for key in ((asked, id), ("", id)) if key in by_part), None)
            if key is None:
                rows.append(Row(name, item, hole="no result"))
                continue
            used.add(key)
            result = by_part[key]
            rows.append(_row(name, item, result, part))
    strange = [result for key, result in by_part.items() if key not in used]
    faults = [
        ItemError("unknown_id", f"the suite has no such item (part {r.part or 'any'})", str(source), 0, r.id) for r in strange
    ]
    return rows, faults


def _row(name: str, item: Item, result: Result, part: Part) -> Row:
    if result.error is None:
        return Row(name, item, result)
    if part.count_refusals and result.refused:
        return Row(
            name, item, dataclasses.replace(result, error=None), refusal=f"counts as an answer without words: {result.error}"
        )
    return Row(name, item, result, hole=f"not answered: {result.error}")


def score(
    suite: Suite,
    rows: Sequence[Row],
    out: Path,
    tools: Callable[[Sequence[Item]], Tools],
    progress: Callable[[str], None] = lambda line: None,
    known_only: bool = False,
) -> Scored:
    """Score the rows (in place) and write the file.

    Args:
        tools: makes what scorers need, for the items of a part.
        known_only: take what an earlier run wrote for the very same answers, and score nothing else.
    """
    if known_only and not (out / FILE).is_file():
        return Scored(rows=list(rows))
    found = Scored(rows=list(rows))
    lines = Lines(out / FILE)
    before = {(row["part"], row["id"]): row for row in lines.rows()}
    with lines:
        for name, part in suite.parts.items():
            mine = [row for row in rows if row.part == name]
            if not mine:
                continue
            kit = tools([row.item for row in mine])
            scorers = _make(part.scorers, kit, found.unavailable)
            for count, row in enumerate(mine, start=1):
                if row.result is None or row.hole:
                    continue
                mark = _digest(row, scorers, suite)
                old = before.get((name, row.item.id))
                if old is not None and old.get("digest") == mark:
                    row.score = Score(_pairs(old["values"]), {k: (v[0], v[1]) for k, v in old["pairs"].items()}, old["notes"])
                    found.note(old.get("made_with", {}))
                    continue
                if known_only:
                    continue
                row.score = _score(row, scorers, found.unavailable)
                made_with = kit.made_with()
                found.note(made_with)
                lines.write(_written(row, mark) | ({"made_with": made_with} if made_with else {}))
                progress(f"{suite.name}, scores of {name}: {count}/{len(mine)}")
            found.measures[name] = {n: m for scorer in scorers.values() for n, m in scorer.measures.items()}
    return found


def _make(specs: Sequence[str], tools: Tools, unavailable: dict[str, str]) -> dict[str, Scorer]:
    out: dict[str, Scorer] = {}
    for spec in specs:
        if spec in unavailable:
            continue
        try:
            out |= make([spec], tools)
        except ScorerUnavailable as error:
            _missing(spec, error, unavailable)
    return out


def _missing(spec: str, error: ScorerUnavailable, unavailable: dict[str, str]) -> None:
    unavailable[spec] = str(error)
    log.warning("not scored by %s: %s", spec, error)


def _score(row: Row, scorers: dict[str, Scorer], unavailable: dict[str, str]) -> Score:
    whole = Score()
    assert row.result is not None
    for spec, scorer in list(scorers.items()):
        try:
            one = scorer.score(row.item, row.result)
        except ScorerUnavailable as error:
            _missing(spec, error, unavailable)
            del scorers[spec]
            continue
        except ValueError as error:  # a reply that is no audio, a prompt that cannot be read
            whole.notes.setdefault("faults", []).append(f"{spec}: {error}")
            continue
        if one is not None:
            whole.values |= one.values
            whole.pairs |= one.pairs
            whole.notes |= one.notes
    return whole


def _digest(row: Row, scorers: Mapping[str, Scorer], suite: Suite) -> str:
    assert row.result is not None
    made_of = [row.item.to_dict(), row.result.to_dict(), sorted(scorers), suite.normalizer, suite.recogniser, suite.speaker_net]
    return hashlib.sha256(json.dumps(made_of, sort_keys=True, ensure_ascii=False, default=str).encode()).hexdigest()[:16]


def _written(row: Row, digest: str) -> dict[str, Any]:
    values = {name: [float(above), float(below)] for name, (above, below) in row.score.values.items()}
    pairs = {kind: list(pair) for kind, pair in row.score.pairs.items()}
    return {
        "part": row.part,
        "id": row.item.id,
        "group": row.item.group,
        "digest": digest,
        "values": values,
        "pairs": pairs,
        "notes": row.score.notes,
    }


def _pairs(values: Mapping[str, Sequence[float]]) -> dict[str, tuple[float, float]]:
    return {name: (float(pair[0]), float(pair[1])) for name, pair in values.items()}
