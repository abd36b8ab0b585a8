"""What a run reports while it runs: metrics.jsonl, TensorBoard and a progress bar.

``metrics.jsonl`` holds one JSON object a line: kind (``train``, ``validation``, ``skipped``), step, time, and the
values. A run that is continued drops the lines of steps that it is going to make again, so each step stands there once.
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

from osum_echat.run.files import write_atomically

log = logging.getLogger(__name__)

METRICS = "metrics.jsonl"


class Progress:
    """Reports of rank 0. Methods do nothing when ``enabled`` is False (other ranks).

    Args:
        out: folder of the run.
        total_steps: for the bar; None: unknown.
        start_step: the last step that has been made already.
    """

    def __init__(
        self,
        out: Path,
        total_steps: int | None,
        start_step: int,
        enabled: bool = True,
        bar: bool = True,
        tensorboard: bool = True,
    ):
        self.out, self.enabled = out, enabled
        if not enabled:
            return
        out.mkdir(parents=True, exist_ok=True)
        drop_lines_after(out / METRICS, start_step)
        self._file = (out / METRICS).open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=start_step + 1)
        self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, mininterval=1.0, disable=not bar)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        if self._board is None:
            return
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
            self._file.close()
            if self._board is not None:
                self._board.close()


def _lines(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Text and content of the readable lines; a process that is killed may leave half a line."""
    out = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            out.append((text, json.loads(text)))
        except json.JSONDecodeError:
            log.warning("%s: skipped a broken line (a process was killed while writing it)", path)
    return out


def drop_lines_after(path: Path, step: int) -> None:
    """Remove the lines of later steps from a metrics.jsonl, and broken ones."""
    if not path.is_file():
        return
    kept = "".join(text + "\n" for text, line in _lines(path) if line["step"] <= step)
    if len(kept.encode()) != path.stat().st_size:
        write_atomically(path, lambda temporary: temporary.write_text(kept, encoding="utf-8"))


def read_metrics(path: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """metrics.jsonl as ``kind -> name -> [(step, value)]``; where a step stands there twice the later line counts."""
    points: dict[str, dict[str, dict[int, float]]] = {}
    for _, line in _lines(path):
        kind = {"valid": "validation"}.get(line["kind"], line["kind"])  # as token2wav's trainings wrote before 0.2
        for name, value in line.items():
            if name not in ("kind", "step", "time") and isinstance(value, (int, float)) and not isinstance(value, bool):
                points.setdefault(kind, {}).setdefault(name, {})[line["step"]] = float(value)
    return {kind: {name: sorted(p.items()) for name, p in names.items()} for kind, names in points.items()}
