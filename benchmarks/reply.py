#!/usr/bin/env python3
"""Seconds of a whole reply with speech, of this tree and of others beside it, in turns and with the same weights.

    python benchmarks/reply.py [--before TREE] [--checkpoint checkpoints/mini] [--recordings N] [--rounds N] [--json]

Each tree answers the same recordings in a process of its own that stays loaded; a round asks each tree for one reply after the other, so that a busy moment meets all of them. CPU
seconds of one thread, the smallest of the rounds, summed over the recordings. ``reply_ratio`` is this tree's over that of ``--before``; ``same_text`` says whether both wrote the same
replies (with other random numbers for the sound the samples differ, the words do not).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing

ROOT = Path(__file__).resolve().parent.parent
ANSWERER = """
import json, sys, time
import torch
torch.set_num_threads(1)
from osum_echat.pipeline import EChat
from osum_echat import device as devices
device = devices.resolve(sys.argv[2])
echat = EChat.load(sys.argv[1], device=sys.argv[2])
def clock():
    devices.synchronize(device)
    return time.process_time() if device.type == "cpu" else time.perf_counter()
print("ready", flush=True)
for line in sys.stdin:
    begun = clock()
    reply = echat.chat(line.strip(), speak=True)
    seconds = clock() - begun
    print(json.dumps({"seconds": seconds, "text": reply.text, "codes": len(reply.speech_tokens)}), flush=True)
"""


class Answerer:
    """One tree's process."""

    def __init__(self, tree: Path, checkpoint: Path, device: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-c", ANSWERER, str(checkpoint), device]
        self._process = subprocess.Popen(
            command, env=environment, cwd=tree, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read()

    def _read(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("a tree's process ended; its message is above")
        return line

    def ask(self, recording: Path) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{recording}\n")
        self._process.stdin.flush()
        return json.loads(self._read())

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def measure(trees: dict[str, tuple[Path, Path]], recordings: list[Path], rounds: int, device: str = "cpu") -> dict[str, Any]:
    """``trees``: checkout and checkpoint by name."""
    answerers = {name: Answerer(*places, device) for name, places in trees.items()}
    best: dict[str, list[float]] = {name: [float("inf")] * len(recordings) for name in trees}
    texts: dict[str, list[str]] = {name: [""] * len(recordings) for name in trees}
    codes = [0] * len(recordings)
    for answerer in answerers.values():
        answerer.ask(recordings[0])  # the first reply prepares things
    for _ in range(rounds):
        for index, recording in enumerate(recordings):
            for name, answerer in answerers.items():
                found = answerer.ask(recording)
                best[name][index] = min(best[name][index], found["seconds"])
                texts[name][index], codes[index] = found["text"], found["codes"]
    for answerer in answerers.values():
        answerer.close()
    result: dict[str, Any] = {"reply_s": {name: round(sum(seconds), 3) for name, seconds in best.items()}, "codes": sum(codes)}
    if "before" in best:
        result["reply_ratio"] = round(sum(best["now"]) / sum(best["before"]), 3)
        result["same_text"] = texts["now"] == texts["before"]
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="another checkout of this project")
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "mini")
    parser.add_argument("--checkpoint-before", type=Path, help="the same weights as that tree reads them (default: its own mini)")
    parser.add_argument("--recordings", type=int, default=4, help="of assets/demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda, npu or auto; an accelerator's time is wall clock")
    args = parser.parse_args(argv)
    trees = {"now": (ROOT, args.checkpoint.resolve())}
    if args.before:
        trees["before"] = (args.before.resolve(), (args.checkpoint_before or args.before / "checkpoints" / "mini").resolve())
    recordings = sorted((ROOT / "assets" / "demo").glob("*.ogg"))[: args.recordings]
    result = measure(trees, recordings, args.rounds, args.device)
    print(json.dumps(result) if args.json else "\n".join(f"{name:<12} {value}" for name, value in result.items()))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
