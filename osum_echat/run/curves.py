"""The curves of a run as one picture."""

from __future__ import annotations

import math
from pathlib import Path

from osum_echat.run.files import write_atomically
from osum_echat.run.progress import read_metrics


def draw_curves(metrics: Path, out: Path) -> Path | None:
    """All curves of a metrics.jsonl as one PNG, a panel per quantity (training and validation together). None when
    there is nothing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_metrics(metrics) if metrics.is_file() else {}
    panels = sorted({name for names in curves.values() for name in names})
    panels = [p for p in panels if any(math.isfinite(v) for names in curves.values() for _, v in names.get(p, []))]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns, 3 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, panels, strict=False):
        for kind, names in sorted(curves.items()):
            if name in names:
                steps, values = zip(*names[name], strict=True)
                axis.plot(steps, values, label=kind, marker="o" if len(steps) < 30 else None, markersize=3, linewidth=1)
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("step", fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    write_atomically(out, lambda path: figure.savefig(path, format="png", dpi=110))
    return out
