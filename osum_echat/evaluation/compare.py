"""Two runs of one suite side by side: paired bootstrap over the items that both answered."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osum_echat.evaluation import judge as judges
from osum_echat.evaluation import score as scores
from osum_echat.evaluation.results import Lines
from osum_echat.evaluation.statistics import Difference, macro_f1, paired_difference, paired_statistic

REPORT = "report.json"
Key = tuple[str, str]
"""Part and id of an item."""
Pairs = dict[Key, tuple[float, float]]
Labels = dict[Key, tuple[str, str]]


@dataclass(frozen=True)
class Compared:
    """One measure of one part (or of a group of it) in both runs; values in the measure's unit."""

    name: str
    measure: str
    a: float
    b: float
    difference: Difference
    unit: str
    better: str

    @property
    def verdict(self) -> str:
        """``B is better``, ``A is better``, ``differs`` (no direction is good), or ``no difference seen``."""
        if not self.difference.is_clear:
            return "no difference seen"
        if not self.better:
            return "differs"
        return "B is better" if (self.difference.value > 0) == (self.better == "higher") else "A is better"


def compare(a: Path, b: Path) -> tuple[list[Compared], list[str]]:
    """Measures of two runs, and remarks on what was not the same.

    Raises:
        ValueError: a folder is no run, the suites differ, or no item was answered in both.
    """
    reports = [_report(a), _report(b)]
    if reports[0]["suite"] != reports[1]["suite"]:
        raise ValueError(f"{a} is a run of suite {reports[0]['suite']}, {b} of {reports[1]['suite']}: nothing to compare")
    (one, one_labels), (two, two_labels) = _values(a), _values(b)
    meanings = {(s["part"], name): n for report in reports for s in report["summaries"] for name, n in s["numbers"].items()}
    out = []
    for (name, part, measure), mine in one.items():
        theirs = two.get((name, part, measure), {})
        both = [key for key in mine if key in theirs]
        if len(both) < 2:
            continue
        meaning = meanings.get((part, measure), {"unit": "", "better": ""})
        scale = 100.0 if meaning["unit"] == "%" else 1.0
        left, right = [mine[key] for key in both], [theirs[key] for key in both]
        if not (sum(p[1] for p in left) and sum(p[1] for p in right)):
            continue
        found = paired_difference(left, right)
        found = Difference(found.value * scale, found.low * scale, found.high * scale, found.p, found.count)
        values = [scale * sum(p[0] for p in side) / sum(p[1] for p in side) for side in (left, right)]
        out.append(Compared(name, measure, values[0], values[1], found, meaning["unit"], meaning["better"]))
        both_labels = [
            key for key in one_labels.get((name, part, measure), ()) if key in two_labels.get((name, part, measure), {})
        ]
        if len(both_labels) > 1:
            sides = [[side[name, part, measure][key] for key in both_labels] for side in (one_labels, two_labels)]
            out.append(_f1(name, measure, *sides))
    if not out:
        raise ValueError(f"{a} and {b} have no two items in common that were scored in both")
    return out, _remarks(reports)


def _report(folder: Path) -> dict[str, Any]:
    path = folder / REPORT
    if not path.is_file():
        inside = sorted(report.parent.name for report in folder.glob(f"*/{REPORT}"))
        hint = f"; it holds runs of several suites, name one: {', '.join(inside)}" if inside else ""
        raise ValueError(f"{folder} is not the folder of a run: {REPORT} is not there{hint}")
    return dict(json.loads(path.read_text(encoding="utf-8")))


def _f1(name: str, kind: str, a: Sequence[tuple[str, str]], b: Sequence[tuple[str, str]]) -> Compared:
    """Macro-F1 of a kind of label in both runs, in percent."""
    found = paired_statistic(
        len(a), lambda index: 100 * macro_f1([a[i] for i in index]), lambda index: 100 * macro_f1([b[i] for i in index])
    )
    return Compared(name, f"{kind}_f1", 100 * macro_f1(a), 100 * macro_f1(b), found, "%", "higher")


def _values(folder: Path) -> tuple[dict[tuple[str, str, str], Pairs], dict[tuple[str, str, str], Labels]]:
    """(part or part/group, part, measure) -> values of its items; and the same for labels: (true, said)."""
    out: dict[tuple[str, str, str], Pairs] = {}
    labels: dict[tuple[str, str, str], Labels] = {}
    groups: dict[tuple[str, str], str] = {}

    def add(part: str, group: str, measure: str, id: str, value: tuple[float, float]) -> None:
        for name in dict.fromkeys((part, f"{part}/{group}" if group else part)):
            out.setdefault((name, part, measure), {})[part, id] = value

    last = {(row["part"], row["id"]): row for row in Lines(folder / scores.FILE).rows()}
    for (part, id), row in last.items():
        groups[part, id] = row["group"]
        for measure, pair in row["values"].items():
            add(part, row["group"], measure, id, (pair[0], pair[1]))
        for kind, (true, said) in row["pairs"].items():
            add(part, row["group"], kind, id, (float(true == said), 1.0))
            for name in dict.fromkeys((part, f"{part}/{row['group']}" if row["group"] else part)):
                labels.setdefault((name, part, kind), {})[part, id] = (true, said)
    verdicts = {(row["part"], row["id"], row["judge"]): row for row in Lines(folder / judges.FILE).rows()}
    several = len({judge for _, _, judge in verdicts}) > 1
    for (part, id, judge), row in verdicts.items():
        if row.get("score") is not None:
            add(part, groups.get((part, id), ""), f"judge {judge}" if several else "judge", id, (float(row["score"]), 1.0))
    return out, labels


def _remarks(reports: Sequence[dict[str, Any]]) -> list[str]:
    """Lines on how the runs were made that are not the same in both."""
    sides = [set(map(str, report["about"])) for report in reports]
    return [
        f"{side} only: {line}"
        for side, mine, other in (("A", sides[0], sides[1]), ("B", sides[1], sides[0]))
        for line in sorted(mine - other)
    ]


def write(a: Path, b: Path, out: Path) -> Path:
    """``compare.json``, ``compare.md`` and ``compare.html`` in ``out``; returns the Markdown. Raises ValueError as
    `compare`."""
    found, remarks = compare(a, b)
    out.mkdir(parents=True, exist_ok=True)
    names = [_report(folder)["system"] for folder in (a, b)]
    rows = [
        {
            "set": one.name,
            "measure": one.measure,
            "a": round(one.a, 4),
            "b": round(one.b, 4),
            "difference": round(one.difference.value, 4),
            "low": round(one.difference.low, 4),
            "high": round(one.difference.high, 4),
            "p": round(one.difference.p, 4),
            "items": one.difference.count,
            "unit": one.unit,
            "verdict": one.verdict,
        }
        for one in found
    ]
    data = {
        "a": {"folder": a.name, "system": names[0]},
        "b": {"folder": b.name, "system": names[1]},
        "measures": rows,
        "remarks": remarks,
    }
    (out / "compare.json").write_text(json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    lines = [
        f"# A: {names[0]} ({a.name}), B: {names[1]} ({b.name})",
        "",
        "Difference is B minus A on the items that both answered; 95 % paired bootstrap.",
        "",
    ]
    lines += ["| set | measure | A | B | difference | 95 % | p | n | |", "|---|---|---|---|---|---|---|---|---|"]
    for r in rows:
        unit = f" {r['unit']}" if r["unit"] not in ("", "%") else ""
        lines.append(
            f"| {r['set']} | {r['measure']}{unit} | {r['a']:.3f} | {r['b']:.3f} | {r['difference']:+.3f} | {r['low']:+.3f} to {r['high']:+.3f} "
            f"| {r['p']:.3f} | {r['items']} | {r['verdict']} |"
        )
    lines += ["", *(f"- {remark}" for remark in remarks)]
    path = out / "compare.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    (out / "compare.html").write_text(_page(data), encoding="utf-8")
    return path


_PAGE = """<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{{ a.system }} and {{ b.system }}</title>
<style>body{font:15px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}table{border-collapse:collapse}
th,td{border-bottom:1px solid #8884;padding:.25rem .6rem;text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}</style></head>
<body><h1>A: {{ a.system }} ({{ a.folder }}), B: {{ b.system }} ({{ b.folder }})</h1>
<p>Difference is B minus A on the items that both answered; 95 % paired bootstrap.</p>
<table><tr><th>set</th><th>measure</th><th>A</th><th>B</th><th>difference</th><th>95 %</th><th>p</th><th>n</th><th></th></tr>
{% for r in measures %}<tr><td>{{ r.set }}</td><td>{{ r.measure }} {{ r.unit if r.unit != "%" else "" }}</td><td class="n">{{ "%.3f"|format(r.a) }}</td>
<td class="n">{{ "%.3f"|format(r.b) }}</td><td class="n">{{ "%+.3f"|format(r.difference) }}</td>
<td class="n">{{ "%+.3f"|format(r.low) }} to {{ "%+.3f"|format(r.high) }}</td><td class="n">{{ "%.3f"|format(r.p) }}</td>
<td class="n">{{ r["items"] }}</td><td>{{ r.verdict }}</td></tr>{% endfor %}</table>
<ul>{% for line in remarks %}<li>{{ line }}</li>{% endfor %}</ul></body></html>
"""


def _page(data: dict[str, Any]) -> str:
    import jinja2

    return jinja2.Environment(autoescape=True).from_string(_PAGE).render(**data)
