"""What a run says while it runs: metrics.jsonl, TensorBoard, a progress bar, and the curves as a picture at the end.

``metrics.jsonl`` is the plain truth: one JSON object per line, never rewritten; a resumed run appends, and lines of steps that will be
repeated are told apart by their later place in the file.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

log = logging.getLogger(__name__)


class Progress:
    """Reports of rank 0. Methods do nothing when ``enabled`` is False (other ranks)."""

    def __init__(self, out: Path, total_steps: int | None, start_step: int, enabled: bool = True, bar: bool = True):
        self.out, self.enabled = out, enabled
        if not enabled:
            return
        from torch.utils.tensorboard import SummaryWriter

        out.mkdir(parents=True, exist_ok=True)
        self._file = (out / "metrics.jsonl").open("a", encoding="utf-8")
        self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=1.0, disable=not bar)

    def advance(self, shown: Mapping[str, str] | None = None) -> None:
        """One step further; ``shown`` stands behind the bar."""
        if self.enabled:
            self._bar.update(1)
            if shown is not None:
                self._bar.set_postfix(shown, refresh=False)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl and its numbers to TensorBoard under ``kind/name``."""
        if not self.enabled:
            return
        line = {"kind": kind, "step": step, "time": round(time.time(), 3), **values}
        self._file.write(json.dumps(line, ensure_ascii=False, allow_nan=True) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
                self._board.add_scalar(f"{kind}/{name}", value, step)

    def say(self, text: str) -> None:
        """A line for people, above the bar."""
        if self.enabled:
            tqdm.write(text)

    def close(self) -> None:
        if self.enabled:
            self._bar.close()
            self._board.close()
            self._file.close()


def read_metrics(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """metrics.jsonl as ``kind -> name -> [(step, value)]``; of steps that were repeated after a resume the later ones count."""
    points: dict[str, dict[str, dict[int, float]]] = {}
    with path.open(encoding="utf-8") as lines:
        for text in lines:
            try:
                line = json.loads(text)
            except json.JSONDecodeError:
                log.warning("%s: skipped a broken line (a process was killed while writing it)", path)
                continue
            for name, value in line.items():
                if name not in ("kind", "step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool):
                    points.setdefault(line["kind"], {}).setdefault(name, {})[line["step"]] = float(value)
    return {kind: {name: sorted(p.items()) for name, p in names.items()} for kind, names in points.items()}


def draw_curves(metrics: Path, out: Path) -> Path | None:
    """All curves of a metrics.jsonl as one PNG, a panel per quantity (training and validation together). None when there is nothing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    curves = read_metrics(metrics)
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
    figure.savefig(out, dpi=110)
    return out
