"""Generation shared out: one process a device, every n-th item each; a share that was stopped goes on where it was."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from osum_echat.evaluation.results import FILE, Lines


def generate_on(devices: Sequence[str], options: Sequence[str], out: Path, say: Callable[[str], None]) -> list[str]:
    """Run the shares at once and join their results into one file.

    Args:
        options: arguments of ``osum-echat eval`` that name suite, data and model.

    Returns:
        What failed, by share; empty when all ended well.
    """
    out.mkdir(parents=True, exist_ok=True)
    running = []
    for number, device in enumerate(devices):
        command = [
            sys.executable,
            "-m",
            "osum_echat.cli",
            "eval",
            *options,
            "--device",
            device,
            "--part",
            f"{number}/{len(devices)}",
        ]
        log = (out / f"generate.{number}of{len(devices)}.log").open("w", encoding="utf-8")
        running.append((number, device, log, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)))
        say(f"share {number} of {len(devices)} on {device}: see {log.name}")
    failed = []
    for number, device, log, process in running:
        code = process.wait()
        log.close()
        if code:
            last = (Path(log.name).read_text(encoding="utf-8").strip().splitlines() or ["no message"])[-1]
            failed.append(f"share {number} on {device} ended with {code}: {last}")
    if not failed:
        join(out, len(devices))
    return failed


def join(out: Path, shares: int) -> None:
    """Put results of shares behind those that are there, each answer once."""
    whole = Lines(out / FILE)
    seen = {(row["part"], row["id"]) for row in whole.rows()}
    with whole:
        for number in range(shares):
            for row in Lines(out / f"results.{number}of{shares}.jsonl").rows():
                if (row["part"], row["id"]) not in seen:
                    seen.add((row["part"], row["id"]))
                    whole.write(row)
