"""The same lists on two nodes and in one process: every form, every task, speech tokens, the generate step."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from osum_echat.batch.local import LocalEngine
from osum_echat.batch.work import Outcome, Unit
from osum_echat.cli import main as command
from osum_echat.cli.batch_answers import AnswerWorker
from osum_echat.cli.common import load_echat
from osum_echat.pipeline import EChat
from osum_echat.pipeline.ask import MODES, find_mode
from tests.cluster.case import DEMO, ROOT, Bench, Question, busy, differences, done, ready, rows_of, write_forms, write_list

PROCESSES = 2


def local_process(folder: Path) -> None:
    """Every second block of a question in this process; `folder` has the question, and gets the rows."""
    question, part, block, gate = pickle.loads((folder / "question").read_bytes())
    units = [unit for unit in question.units() if unit.number // block % PROCESSES == part]
    rows = rows_of(LocalEngine("cpu", block).run(question.work(folder.parent / "log", gate), units))
    (folder / "rows").write_bytes(pickle.dumps(rows))


@contextlib.contextmanager
def local_rows(folder: Path, question: Question, block: int, gate: Path | None = None) -> Iterator[dict[int, Any]]:
    """The local engine on both cores: two processes, each every second block, their log in the folder. The rows are there when the context ends."""
    running = []
    for part in range(PROCESSES):
        own = folder / f"local{part}"
        own.mkdir(parents=True)
        (own / "question").write_bytes(pickle.dumps((question, part, block, gate)))
        running.append(subprocess.Popen([sys.executable, str(ROOT / "tests" / "cluster" / "run.py"), "--local", str(own)]))
    rows: dict[int, Any] = {}
    try:
        yield rows
        assert [process.wait() for process in running] == [0] * PROCESSES
    finally:
        for process in running:
            process.kill()
    for part in range(PROCESSES):
        rows |= pickle.loads((folder / f"local{part}" / "rows").read_bytes())


def forms(bench: Bench) -> None:
    """Transcription in each form, equal to the local engine."""
    folder = bench.folder / "forms"
    folder.mkdir()
    lists = write_forms(folder, bench.records)
    block = 8
    with local_rows(folder, Question(str(lists["raw"]), "asr"), block) as local:
        pass
    bench.check(
        f"local: {bench.records} records, none failed", len(local) == bench.records and not any(r[2] for r in local.values())
    )
    bench.start()
    for form, path in lists.items():
        question, log = Question(str(path), "asr"), folder / f"ray-{form}"
        rows = rows_of(bench.engine(block_size=block).run(question.work(log), question.units()))
        bench.check(
            f"ray: {form}, {bench.records} records equal to the local engine",
            not differences(rows, local),
            differences(rows, local)[:9],
        )
        bench.check(f"ray: {form}, two workers had part", len(done(log)) == 2, done(log).keys())


def overhead(bench: Bench) -> None:
    """What Ray costs beside the local engine on the same two cores, without start and loading.

    A machine's own speed may change by half within a minute, so the engines take turns of some seconds: both are there all the time, and gates let the
    workers of one pass while those of the other wait. Counted are seconds and CPU seconds of the blocks (other programs disturb the second less), the seconds
    that a worker has no block, and the share of a core that the command (with this measuring), the raylets and all else of Ray's take all the time.
    """
    folder = bench.folder / "overhead"
    folder.mkdir()
    question, size = Question(str(write_list(folder, bench.records)), "asr"), 8
    logs = {name: folder / name / "log" for name in ("local", "ray")}
    gates = {name: folder / f"{name}.gate" for name in logs}
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in logs}
    others: list[tuple[float, float]] = []

    def take_turns() -> None:
        until(lambda: all(len(ready(log)) == PROCESSES for log in logs.values()))
        workers = {pid for log in logs.values() for pid in ready(log)}
        others.append((time.monotonic(), cpu_of_others(workers)))
        total = -(-bench.records // size)
        while any(blocks_done(log) < total for log in logs.values()):
            for name, log in logs.items():
                target, began = min(total, blocks_done(log) + TURN), time.time()
                gates[name].touch()
                until(lambda: blocks_done(log) >= target)  # noqa: B023 - called at once
                gates[name].unlink()
                until(lambda: not busy(log))  # noqa: B023
                turns[name].append((began, time.time()))
        others.append((time.monotonic(), cpu_of_others(workers)))

    bench.start()
    with local_rows(folder / "local", question, size, gates["local"]) as local:
        turning = threading.Thread(target=take_turns)
        turning.start()
        rows = rows_of(bench.engine(block_size=size).run(question.work(logs["ray"], gates["ray"]), question.units()))
        turning.join()
    bench.check(f"in turns: {bench.records} records equal", not differences(rows, local), differences(rows, local)[:9])
    bench.check("in turns: both workers had part", len(done(logs["ray"])) == PROCESSES, done(logs["ray"]).keys())
    blocks = {name: list(done(log).values()) for name, log in logs.items()}
    seconds = {name: sum(block.ended - block.began for some in blocks[name] for block in some) for name in logs}
    cpu = {name: sum(block.cpu for some in blocks[name] for block in some) for name in logs}
    between = {name: sum(b.came - a.ended for some in blocks[name] for a, b in itertools.pairwise(some)) for name in logs}
    elapsed, cpu_others = (after - before for before, after in zip(*others, strict=True))
    bench.found["overhead"] = {
        "clock_over_local": round((seconds["ray"] + between["ray"]) / (seconds["local"] + between["local"]), 3),
        "clock_over_local_by_turn": [
            round(b / a, 3) for a, b in zip(*(seconds_each(logs[name], turns[name]) for name in logs), strict=False)
        ],
        "cpu_over_local_workers": round(cpu["ray"] / cpu["local"], 3),
        "all_else_of_ray_cores": round(cpu_others / elapsed, 3),
        "without_a_block_share": round(between["ray"] / (seconds["ray"] + between["ray"]), 4),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "cpu": {**{name: round(value, 2) for name, value in cpu.items()}, "all_else_of_ray": round(cpu_others, 2)},
        "without_a_block": {name: round(value, 2) for name, value in between.items()},
    }


TURN = 4
"""Blocks of an engine's turn, both workers together."""


def blocks_done(log: Path) -> int:
    return sum(map(len, done(log).values()))


def seconds_each(log: Path, turns: Sequence[tuple[float, float]]) -> list[float]:
    """Seconds a record in each turn that had blocks."""
    blocks = [block for some in done(log).values() for block in some]
    in_turns = [[block for block in blocks if start <= block.began < end] for start, end in turns]
    return [sum(b.ended - b.began for b in some) / sum(len(b.numbers) for b in some) for some in in_turns if some]


def until(held: Callable[[], bool], seconds: float = 900) -> None:
    deadline = time.monotonic() + seconds
    while not held():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.01)


def cpu_of_others(workers: Collection[int]) -> float:
    """CPU seconds of this process and all that it started, but for ``workers``."""
    this, seconds = psutil.Process(), 0.0
    for process in (this, *this.children(recursive=True)):
        if process.pid not in workers:
            with contextlib.suppress(psutil.Error):  # ended meanwhile
                times = process.cpu_times()
                seconds += times.user + times.system
    return seconds


@dataclass(frozen=True)
class Many:
    """Several questions, answered by one model. A unit's payload: which question, and the record's place; a block has units of one question."""

    questions: tuple[Question, ...]

    def open(self, device: str) -> ManyWorker:
        args = argparse.Namespace(**{**vars(self.questions[0].args), "device": device})
        return ManyWorker(load_echat(args, speech=True), self.questions)

    def units(self) -> list[Unit]:
        found = [(which, unit) for which, question in enumerate(self.questions) for unit in question.units()]
        return [Unit(number, unit.key, (which, unit.payload)) for number, (which, unit) in enumerate(found)]


class ManyWorker:
    def __init__(self, echat: EChat, questions: Sequence[Question]) -> None:
        self.inner = [AnswerWorker(echat, question.args, find_mode(question.task)) for question in questions]

    def run(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        [which] = {unit.payload[0] for unit in units}
        yield from self.inner[which].run([Unit(unit.number, unit.key, unit.payload[1]) for unit in units])


def tasks(bench: Bench, count: int = 8) -> None:
    """So many records of every other task that the checkpoint has learnt: text, tags, speech tokens and the bytes of the wav files."""
    folder = bench.folder / "tasks"
    folder.mkdir()
    path = write_list(folder, count)
    echat = EChat.load("mini", device="cpu")
    learnt = [
        (name, think)
        for name, mode in MODES.items()
        for think in (("tag", "language") if mode.thinks else ("tag",))
        if name != "asr" and echat.refusal(mode.ask(b"", "a", think=think)) is None
    ]
    work = Many(tuple(Question(str(path), name, ("--think", think, "--batch-size", "4")) for name, think in learnt))
    local = rows_of(LocalEngine("cpu", 4).run(work, work.units()))
    bench.start()
    rows = rows_of(bench.engine(block_size=4).run(work, work.units()))
    bench.found["tasks"] = [f"{name} {think}" if MODES[name].thinks else name for name, think in learnt]
    for number, (name, think) in enumerate(learnt):
        numbers = range(count * number, count * number + count)
        ours, theirs = ({n: found[n] for n in numbers if n in found} for found in (local, rows))
        sounds = sum(len(files) for _, files, _ in theirs.values())
        bench.check(
            f"{name} ({think}): {count} records equal, {sounds} wav files byte for byte",
            not differences(theirs, ours)
            and len(ours) == count
            and (sounds == count) == MODES[name].speaks
            and not any(r[2] for r in theirs.values()),
            differences(theirs, ours),
        )


def tokens(bench: Bench) -> None:
    """Speech tokens of a list, through the command, two workers on one core."""
    folder = bench.folder / "tokens"
    folder.mkdir()
    path = write_list(folder, 24)
    sound = str(ROOT / "checkpoints" / "mini" / "token2wav")
    asked = ["tokens", "--token2wav", sound, "--input", str(path), "--block", "5"]
    assert command([*asked, "--output", str(folder / "local.list")]) == 0
    bench.start()
    assert command([*asked, "--output", str(folder / "ray.list"), "--engine", "ray", "--share", "0.5", "--workers", "2"]) == 0
    local, ray = ((folder / f"{name}.list").read_bytes() for name in ("local", "ray"))
    bench.check("tokens of 24 recordings, byte for byte", local == ray and local.count(b"\n") == 24)


def evaluation(bench: Bench) -> None:
    """The generate step of a suite, through the command."""
    out = bench.folder / "eval"
    asked = [
        "eval",
        "mini",
        "--suite",
        "understanding",
        "--data",
        str(DEMO),
        "--steps",
        "generate",
        "--device",
        "cpu",
        "--threads",
        "1",
    ]
    command([*asked, "--out", str(out / "local")])
    bench.start()
    command([*asked, "--out", str(out / "ray"), "--engine", "ray"])
    rows = []
    for name in ("local", "ray"):
        found = [json.loads(line) for line in (out / name / "results.jsonl").read_text(encoding="utf-8").splitlines()]
        kept = [{key: value for key, value in row.items() if key not in ("timings", "seconds")} for row in found]
        rows.append(sorted(kept, key=lambda row: (row["part"], row["id"])))
    bench.check(f"eval: {len(rows[0])} answers equal", rows[0] == rows[1] and bool(rows[0]))
