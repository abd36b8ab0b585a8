"""The mean of several training checkpoints of one run, as a checkpoint folder.

    osum-echat average out/stage1 averaged/                 # the newest 3
    osum-echat average out/stage1 averaged/ --last 5
    osum-echat average out/stage1/checkpoints/step_00001250 out/stage1/checkpoints/step_00002500 averaged/
    osum-echat average out/stage1 averaged/ --best 3        # lowest validation loss

Sums are kept in float64. Keep as many checkpoints as you want to average: the run's ``keep``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from osum_echat.run.progress import METRICS, read_metrics
from osum_echat.training.export import export_average
from osum_echat.training.folder import CHECKPOINTS, STATE_FILE, complete_steps


def choose(sources: list[Path], last: int, best: int | None) -> list[Path]:
    """The ``step_*`` folders to average. Raises ValueError when there are too few."""
    if len(sources) > 1 or (sources[0] / STATE_FILE).is_file():
        return sources
    run = sources[0]
    steps = complete_steps(run / CHECKPOINTS)
    if best is not None:
        losses = dict(read_metrics(run / METRICS).get("validation", {}).get("loss", []))
        known = [p for p in steps if int(p.name.removeprefix("step_")) in losses]
        if len(known) < best:
            raise ValueError(
                f"{run}: {len(known)} kept checkpoints have a validation loss, {best} wanted; save and validate at the same steps"
            )
        return sorted(known, key=lambda p: losses[int(p.name.removeprefix("step_"))])[:best]
    if len(steps) < last:
        raise ValueError(f"{run} has {len(steps)} checkpoints, {last} wanted; raise keep in the training config, or lower --last")
    return steps[-last:]


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", type=Path, nargs="+", help="a training folder, or several step_* folders")
    parser.add_argument("target", type=Path, help="the checkpoint folder to write")
    parser.add_argument("--last", type=int, default=3, help="how many of the newest (default 3)")
    parser.add_argument("--best", type=int, help="instead: how many of those with the lowest validation loss")
    parser.add_argument(
        "--storage", default="keep", choices=["keep", "float32", "bfloat16", "float16", "int8"], help="data type on disk"
    )
    args = parser.parse_args(argv)
    try:
        chosen = choose(args.sources, args.last, args.best)
        export_average(chosen, args.target, args.storage)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{args.target}: mean of {', '.join(p.name for p in chosen)}")
    return 0
