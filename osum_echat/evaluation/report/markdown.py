"""``report.md``: what was measured and how, the chosen numbers, every set, holes, examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat.evaluation.report import pictures
from osum_echat.evaluation.summary import Number

if TYPE_CHECKING:
    from osum_echat.evaluation.report import Report


def render(report: Report, data: Mapping[str, Any], out: Path) -> str:
    """The text; its pictures are written beside it."""
    lines = [f"# {report.suite.name}: {report.system}", ""]
    if report.suite.about:
        lines += [" ".join(report.suite.about.split()), ""]
    lines += [*(f"- {line}" for line in report.about), ""]
    lines += ["## Numbers", "", *numbers_table(report), "", *paper_table(report), "## Every set", "", *sets_table(report), ""]
    lines += agreement(report)
    made = pictures.of_report(report.summaries, report.headline, report.suite.bars, report.rows)
    for name, png in made.items():
        (out / f"{name}.png").write_bytes(png)
    if made:
        lines += ["## Pictures", "", *(line for name in made for line in (f"![{name.replace('_', ' ')}]({name}.png)", ""))]
    lines += holes(report, data)
    lines += ["## Examples: the worst, then the best", "", *examples(data["examples"])]
    return "\n".join(lines).rstrip() + "\n"


def shown(number: Number, digits: int = 2) -> str:
    return f"{number.value:.{digits}f}" + (f" {number.unit}" if number.unit not in ("", "%") else "")


def interval(number: Number, digits: int = 2) -> str:
    return "" if number.low is None or number.high is None else f"{number.low:.{digits}f} to {number.high:.{digits}f}"


def numbers_table(report: Report) -> list[str]:
    bars = report.suite.bars
    lines = [
        "| measure | value | 95 % | n |" + (" bar | aim | |" if bars else ""),
        "|---|---|---|---|" + ("---|---|---|" if bars else ""),
    ]
    for name, number in report.headline.items():
        line = f"| {name} | {shown(number)} | {interval(number)} | {number.count} |"
        if bars:
            bar = bars.get(name)
            line += f" {bar.bar:g} | {bar.aim:g} | {bar.verdict(number.value)} |" if bar else " | | |"
        lines.append(line)
    return lines


def paper_table(report: Report) -> list[str]:
    """Published numbers, where the suite names a table."""
    if not report.paper:
        return []
    columns = [str(column) for column in report.paper["columns"]]
    lines = [
        f"### Published: {report.paper['title']}",
        "",
        f"| model | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for model, values in report.paper["rows"].items():
        lines.append(f"| {model} | {' | '.join('-' if value is None else f'{value:g}' for value in values)} |")
    return [*lines, "", " ".join(str(report.paper.get("note", "")).split()), ""]


def sets_table(report: Report) -> list[str]:
    """Every measure of every set, with its interval."""
    lines = ["| set | items | holes | measure | value | 95 % | median, p90 | n |", "|---|---|---|---|---|---|---|---|"]
    for summary in report.summaries:
        missing = sum(summary.holes.values())
        for name, number in summary.numbers.items():
            spread = "" if number.median is None else f"{number.median:.3f}, {number.p90:.3f}"
            lines.append(
                f"| {summary.name} | {summary.items} | {missing or ''} | {name} | {shown(number)} | {interval(number)} | {spread} | {number.count} |"
            )
        if not summary.numbers:
            lines.append(f"| {summary.name} | {summary.items} | {missing or ''} | nothing could be measured | | | | |")
    return lines


def agreement(report: Report) -> list[str]:
    lines = []
    for summary in report.summaries:
        if summary.agreement:
            found = ", ".join(f"{name} {value:.3g}" for name, value in summary.agreement.items())
            lines.append(f"- {summary.name}: {found}")
    return ["## Agreement of the judges", "", *lines, ""] if lines else []


def holes(report: Report, data: Mapping[str, Any]) -> list[str]:
    count, first = data["holes"]["count"], data["holes"]["first"]
    lines = [f"- not scored by {name}: {why}" for name, why in report.unavailable.items()]
    if count:
        lines += [f"- {count} holes" + (f", the first {len(first)}:" if count > len(first) else ":")]
        lines += [f"  - {hole['message']}" for hole in first]
    return ["## What is missing", "", *lines, ""] if lines else []


def examples(chosen: Sequence[Mapping[str, Any]]) -> list[str]:
    if not chosen:
        return ["None."]
    lines = ["| part | said (truth) | how | heard | noted | answer | good |", "|---|---|---|---|---|---|---|"]
    for one in chosen:
        how, noted = " ".join(one["labels"].values()), " ".join(one.get("noted", {}).values())
        cells = [one["part"], one["text"], how, one.get("heard", ""), noted, one.get("reply", ""), one["goodness"]]
        lines.append("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ")[:200] for cell in cells) + " |")
    return lines
