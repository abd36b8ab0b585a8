"""``report.html``: one file that needs no other; pictures and the examples' sound are inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import soundfile

from osum_echat.audio import io as audio_io
from osum_echat.evaluation.report import chosen_examples, example, pictures
from osum_echat.evaluation.report.markdown import interval, shown

if TYPE_CHECKING:
    from osum_echat.evaluation.report import Report

_SECONDS = 30.0
"""Longer sound is cut in the page; files stay whole."""


def render(report: Report, data: Mapping[str, Any]) -> str:
    import jinja2

    made = pictures.of_report(report.summaries, report.headline, report.suite.bars, report.rows)
    missing = [f"not scored by {name}: {why}" for name, why in report.unavailable.items()]
    missing += [hole["message"] for hole in data["holes"]["first"]]
    if data["holes"]["count"] > len(data["holes"]["first"]):
        missing.append(f"... {data['holes']['count']} holes in all (report.json)")
    template = jinja2.Environment(autoescape=True).from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.render(
        suite=report.suite.name,
        system=report.system,
        about_suite=" ".join(report.suite.about.split()),
        about=report.about,
        bars=report.suite.bars,
        numbers=[_number(report, name) for name in report.headline],
        paper=report.paper,
        pictures={name: base64.b64encode(png).decode() for name, png in made.items()},
        sets=list(_sets(report)),
        agreement=[
            f"{s.name}: " + ", ".join(f"{k} {v:.3g}" for k, v in s.agreement.items()) for s in report.summaries if s.agreement
        ],
        examples=[_example(row) for row in chosen_examples(report.rows)],
        missing=missing,
    )


def _number(report: Report, name: str) -> dict[str, Any]:
    number = report.headline[name]
    out: dict[str, Any] = {"name": name, "value": shown(number), "interval": interval(number), "count": number.count}
    bar = report.suite.bars.get(name)
    if bar is not None:
        out |= {"bar": f"{bar.bar:g}", "aim": f"{bar.aim:g}", "verdict": bar.verdict(number.value)}
    return out


def _sets(report: Report) -> Any:
    for summary in report.summaries:
        for name, number in summary.numbers.items():
            yield {
                "set": summary.name,
                "items": summary.items,
                "holes": sum(summary.holes.values()),
                "name": name,
                "value": shown(number),
                "interval": interval(number),
                "spread": "" if number.median is None else f"{number.median:.3f}, {number.p90:.3f}",
                "count": number.count,
            }


def _example(row: Any) -> dict[str, Any]:
    one = example(row)
    beside = [f"heard: {one['heard']}"] if one.get("heard") else []
    beside += [f"noted: {' '.join(one['noted'].values())}"] if one.get("noted") else []
    beside += [
        f"judge {name}: {judged['score']:g}{judged['reason'] and ': '}{judged['reason']}"
        for name, judged in one.get("judged", {}).items()
    ]
    said = row.item.wav if row.item.wav is not None else row.item.prompt_wav
    return {
        **one,
        "how": ", ".join(f"{kind}: {label}" for kind, label in one["labels"].items()),
        "beside": beside,
        "reply": one.get("reply", ""),
        "said_audio": _player(said, row.item.start, row.item.end),
        "reply_audio": _player(row.result.wav if row.result is not None else None),
    }


def _player(source: Any, start: float | None = None, end: float | None = None) -> str:
    """A recording as a data address, Ogg Opus at 16 kHz; empty for none or one that cannot be read."""
    if source is None:
        return ""
    try:
        audio = audio_io.read(source, start, end)
        samples = audio_io.to_mono_16k(audio)[: int(_SECONDS * audio_io.SAMPLE_RATE)]
    except ValueError:
        return ""
    out = io.BytesIO()
    soundfile.write(out, np.clip(samples, -1, 1), audio_io.SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.9)
    return "data:audio/ogg;base64," + base64.b64encode(out.getvalue()).decode()
