"""Pictures of a report: confusions, numbers beside their bars, times. Each is PNG bytes, for a file or for a page that
holds them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from osum_echat import metrics
from osum_echat.evaluation.score import Row
from osum_echat.evaluation.suite import Bar
from osum_echat.evaluation.summary import Number, Summary

_TIMES = ("first_token", "think", "first_text", "first_speech", "first_audio", "total")


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _png(figure: Any) -> bytes:
    out = io.BytesIO()
    figure.tight_layout()
    figure.savefig(out, dpi=110, format="png")
    _pyplot().close(figure)
    return out.getvalue()


def of_report(
    summaries: Sequence[Summary], headline: Mapping[str, Number], bars: Mapping[str, Bar], rows: Sequence[Row]
) -> dict[str, bytes]:
    """All pictures by their file name without its end."""
    out = {}
    for summary in summaries:
        if summary.confusions and not summary.group:
            out[f"confusion_{summary.part}"] = confusions(summary.confusions, summary.part)
    if any(name in bars for name in headline):
        out["bars"] = beside_bars(headline, bars)
    timed = {part: times for part in dict.fromkeys(row.part for row in rows) if (times := _times(rows, part))}
    if timed:
        out["latency"] = latency(timed)
    return out


def confusions(found: Mapping[str, metrics.Confusion], title: str) -> bytes:
    """One matrix a kind of label, rows true, columns predicted, coloured by percent of the row."""
    figure, axes = _pyplot().subplots(1, len(found), figsize=(3.6 * len(found), 3.6), squeeze=False)
    for axis, (kind, confusion) in zip(axes[0], found.items(), strict=True):
        counts = confusion.matrix()
        shares = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        ticks = range(len(confusion.labels))
        axis.set_xticks(ticks, confusion.labels, rotation=60, fontsize=7)
        axis.set_yticks(ticks, confusion.labels, fontsize=7)
        for i in ticks:
            for j in ticks:
                if counts[i, j]:
                    colour = "white" if shares[i, j] > 55 else "black"
                    axis.text(j, i, counts[i, j], ha="center", va="center", fontsize=7, color=colour)
        axis.set_title(f"{kind}: {100 * confusion.accuracy:.1f} %", fontsize=9)
    figure.suptitle(title, fontsize=10)
    return _png(figure)


def beside_bars(values: Mapping[str, Number], bars: Mapping[str, Bar]) -> bytes:
    """Percentages beside what they should reach."""
    names = [name for name in values if name in bars and bars[name].bar > 5]
    figure, axis = _pyplot().subplots(figsize=(8, 0.32 * len(names) + 1))
    for at, name in enumerate(names):
        good = bars[name].verdict(values[name].value) != "below the bar"
        axis.barh(at, values[name].value, color="tab:green" if good else "tab:red", height=0.6)
        axis.plot([bars[name].bar] * 2, [at - 0.4, at + 0.4], color="black")
        axis.plot([bars[name].aim] * 2, [at - 0.4, at + 0.4], color="black", linestyle=":")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("percent; solid line: bar, dotted: aim")
    return _png(figure)


def _times(rows: Sequence[Row], part: str) -> dict[str, list[float]]:
    out: dict[str, list[float]] = {}
    for name in _TIMES:
        values = [row.score.values[name][0] for row in rows if row.part == part and name in row.score.values]
        if values:
            out[name] = values
    return out


def latency(timed: Mapping[str, Mapping[str, Sequence[float]]]) -> bytes:
    """Box plots of the times of each part: middle half, median, and all but the furthest."""
    names = [name for name in _TIMES if any(name in times for times in timed.values())]
    figure, axis = _pyplot().subplots(figsize=(8, 0.5 * len(names) * len(timed) + 1.2))
    at, ticks, labels = 0.0, [], []
    colours = _pyplot().cm.tab10.colors
    for name in names:
        for number, (part, times) in enumerate(timed.items()):
            if name in times:
                box = axis.boxplot([times[name]], positions=[at], orientation="horizontal", widths=0.6, patch_artist=True)
                box["boxes"][0].set_facecolor(colours[number % len(colours)])
                ticks.append(at)
                labels.append(f"{name}, {part}")
                at += 0.8
        at += 0.5
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("seconds since the request")
    return _png(figure)
