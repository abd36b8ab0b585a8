"""Everything that this project does on an accelerator, checked and measured there by one command.

    python tools/gpu_check.py                                   # on a machine with an accelerator, 8 minutes at most
    python tools/gpu_check.py --device cpu --tiny               # the same code on small models
    python tools/gpu_check.py --only box,train --out results

Exit code 1: a section stopped, took too long, found numbers that differ from the CPU's by more than rounding, or had too little memory.
Each section is a process with a limit of its own; its result is written before the next one begins, so a crash or a limit costs that section alone. The last thing
printed is a table. `tools/pack_tree.py` makes the smallest copy of the tree that it needs. This file itself needs nothing but Python.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {
    "box": 40,
    "correctness": 60,
    "waits": 45,
    "decode": 100,
    "token2wav": 60,
    "first_sound": 40,
    "train": 120,
    "mini": 45,
}
"""Section -> seconds, in the order of their worth."""


def run(section: str, args: argparse.Namespace, out: Path, left: float) -> dict[str, Any]:
    """A section in a process of its own: its result (``failed`` in it: what is wrong there), or the end of what it printed."""
    result = out / f"{section}.json"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(ROOT / "benchmarks/on_accelerator.py"), section, "--device", args.device, "--out", str(result)]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}
    limit = min(LIMITS[section] * args.slower, left)
    try:
        done = subprocess.run(
            [*command, "--tiny"] if args.tiny else command,
            env=env,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
        printed, problem = done.stdout + done.stderr, f"exit code {done.returncode}" if done.returncode else ""
    except subprocess.TimeoutExpired as error:
        pieces = [p.decode(errors="replace") if isinstance(p, bytes) else p or "" for p in (error.stdout, error.stderr)]
        printed, problem = "".join(pieces), f"longer than {limit:.0f} s"
    (out / f"{section}.log").write_text(printed, encoding="utf-8")
    if result.is_file():
        found = json.loads(result.read_text(encoding="utf-8"))[section]
        return found if not problem else {"failed": problem, **found}
    last = [line for line in printed.strip().splitlines() if line.strip()][-1:]
    return {"failed": f"{problem or 'no result'}: {' '.join(last)[:200]}"}


def table(results: dict[str, dict[str, Any]]) -> list[str]:
    """Sections and numbers, a line each; nested ones in one line."""
    lines = []
    for section, values in results.items():
        lines.append(f"{section}:")
        for key, value in values.items():
            if isinstance(value, dict):
                value = ", ".join(f"{name} {_short(number)}" for name, number in value.items())
            if key != "places":
                lines.append(f"  {key:<34}{_short(value)}")
    return lines


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)[:160]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto", help="auto, cuda, npu, cpu")
    parser.add_argument("--tiny", action="store_true", help="small models: tries the code, measures nothing")
    parser.add_argument("--only", default=",".join(LIMITS), help="sections, with commas between them")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(os.environ.get("OUT", "out/gpu_check")),
        help="folder for results (default $OUT, else out/gpu_check)",
    )
    parser.add_argument("--limit", type=float, default=470.0, help="seconds for all sections together")
    parser.add_argument("--slower", type=float, default=1.0, help="multiplies the limits of the sections, for a slow machine")
    args = parser.parse_args(argv)
    unknown = set(args.only.split(",")) - set(LIMITS)
    if unknown:
        parser.error(f"unknown sections: {', '.join(sorted(unknown))}; there are {', '.join(LIMITS)}")
    args.out.mkdir(parents=True, exist_ok=True)
    began, results = time.monotonic(), dict[str, dict[str, Any]]()
    for section in [name for name in LIMITS if name in args.only.split(",")]:
        left = args.limit - (time.monotonic() - began)
        results[section] = run(section, args, args.out, left) if left > 5 else {"failed": f"no time left of {args.limit:.0f} s"}
        (args.out / "gpu_check.json").write_text(json.dumps(results, indent=1), encoding="utf-8")
    print("\n".join(table(results)))
    return 1 if any("failed" in values for values in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
