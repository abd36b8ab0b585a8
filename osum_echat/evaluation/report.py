"""Reports: numbers as Markdown tables with their bars, confusion matrices and bars as pictures, examples to read.

A report is one folder: ``report.md``, ``metrics.json`` and the pictures it shows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from osum_echat import metrics
from osum_echat.evaluation.suites import Row, Summary


@dataclass(frozen=True)
class Bar:
    """What a number should reach. ``lower_is_better`` for error rates."""

    bar: float
    aim: float
    lower_is_better: bool = False

    def verdict(self, value: float) -> str:
        def reached(limit: float) -> bool:
            return value <= limit if self.lower_is_better else value >= limit

        return "aim reached" if reached(self.aim) else "bar reached" if reached(self.bar) else "below the bar"


@dataclass
class Report:
    """Collects sections; `write` makes the folder."""

    title: str
    about: Sequence[str]
    headline: Mapping[str, float] = field(default_factory=dict)
    bars: Mapping[str, Bar] = field(default_factory=dict)
    sizes: Mapping[str, int] = field(default_factory=dict)
    summaries: Sequence[Summary] = ()
    examples: Sequence[tuple[str, Sequence[Row]]] = ()

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.json").write_text(json.dumps(dict(self.headline), indent=1) + "\n", encoding="utf-8")
        lines = [f"# {self.title}", "", *(f"- {line}" for line in self.about), ""]
        lines += ["## Numbers", "", *self._headline_table(), "", "## Every set", "", *self._summary_table(), ""]
        lines += self._pictures(folder)
        for name, rows in self.examples:
            lines += ["", f"## Examples: {name}", "", *_examples(rows)]
        path = folder / "report.md"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    def _headline_table(self) -> list[str]:
        lines = ["| measure | value | n | bar | aim | |", "|---|---|---|---|---|---|"]
        for name, value in self.headline.items():
            bar = self.bars.get(name)
            limits = f"{bar.bar:g} | {bar.aim:g} | {bar.verdict(value)}" if bar else " | | "
            lines.append(f"| {name} | {value:.2f} | {self.sizes.get(name, '')} | {limits} |")
        return lines

    def _summary_table(self) -> list[str]:
        columns = list(dict.fromkeys(name for summary in self.summaries for name in summary.values))
        lines = [f"| set | n | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
        for summary in self.summaries:
            cells = (f"{summary.values[name]:.2f}" if name in summary.values else "" for name in columns)
            lines.append(f"| {summary.name} | {summary.count} | {' | '.join(cells)} |")
        return lines

    def _pictures(self, folder: Path) -> list[str]:
        lines = []
        for summary in self.summaries:
            if summary.confusions:
                name = f"confusion_{summary.name.replace(' ', '_')}.png"
                draw_confusions(summary.confusions, summary.name, folder / name)
                lines += [f"![tags of the set {summary.name}]({name})", ""]
        if self.bars:
            draw_bars(self.headline, self.bars, folder / "bars.png")
            lines += ["![values beside their bars](bars.png)", ""]
        return ["## Pictures", "", *lines] if lines else []


def _examples(rows: Sequence[Row]) -> list[str]:
    lines = ["| said (truth) | how | heard | noted | answer | fits |", "|---|---|---|---|---|---|"]
    for row in rows:
        truth = " ".join(row.item.tags.get(name, "?") for name in ("age", "gender", "emotion", "event"))
        noted = " ".join(row.think.get(name) or "-" for name in ("age", "gender", "emotion", "event"))
        heard = row.think.get("transcript") or ""
        fits = {True: "yes", False: "no", None: ""}[row.fits]
        lines.append(f"| {row.item.txt} | {truth} | {heard} | {noted} | {row.reply.text} | {fits} |".replace("\n", " "))
    return lines


def draw_confusions(found: Mapping[str, metrics.Confusion], title: str, path: Path) -> None:
    """One matrix a tag, rows true, columns predicted, in percent of the row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(found), figsize=(3.6 * len(found), 3.6), squeeze=False)
    for axis, (tag, confusion) in zip(axes[0], found.items(), strict=True):
        counts = confusion.matrix()
        shares = 100 * counts / counts.sum(axis=1, keepdims=True).clip(min=1)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        ticks = range(len(confusion.labels))
        axis.set_xticks(ticks, confusion.labels, rotation=60, fontsize=7)
        axis.set_yticks(ticks, confusion.labels, fontsize=7)
        for i in ticks:
            for j in ticks:
                if counts[i, j]:
                    axis.text(
                        j, i, counts[i, j], ha="center", va="center", fontsize=7, color="white" if shares[i, j] > 55 else "black"
                    )
        axis.set_title(f"{tag}: {100 * confusion.accuracy:.1f} %", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_bars(values: Mapping[str, float], bars: Mapping[str, Bar], path: Path) -> None:
    """Percentages beside what they should reach."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [name for name in values if name in bars and bars[name].bar > 5]
    if not names:
        return
    figure, axis = pyplot.subplots(figsize=(8, 0.32 * len(names) + 1))
    for at, name in enumerate(names):
        good = bars[name].verdict(values[name]) != "below the bar"
        axis.barh(at, values[name], color="tab:green" if good else "tab:red", height=0.6)
        axis.plot([bars[name].bar] * 2, [at - 0.4, at + 0.4], color="black")
        axis.plot([bars[name].aim] * 2, [at - 0.4, at + 0.4], color="black", linestyle=":")
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_xlabel("percent; solid line: bar, dotted: aim")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
