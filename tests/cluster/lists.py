"""The same lists on two nodes and in one process: every form, every task, speech tokens, the generate step."""

from __future__ import annotations

import json
import pickle
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osum_echat.batch.local import LocalEngine
from osum_echat.cli import main as command
from osum_echat.cli.batch_answers import AnswerWorker
from osum_echat.pipeline import EChat
from osum_echat.pipeline.ask import MODES, find_mode
from tests.cluster.case import DEMO, ROOT, Bench, Question, differences, done, rows_of, write_forms, write_list

PROCESSES = 2


def local_process(folder: Path) -> None:
    """Every second block of a question in this process; `folder` has the question, and gets the rows."""
    question, part, block = pickle.loads((folder / "question").read_bytes())
    units = [unit for unit in question.units() if unit.number // block % PROCESSES == part]
    rows = rows_of(LocalEngine("cpu", block).run(question.work(folder / "log"), units))
    (folder / "rows").write_bytes(pickle.dumps(rows))


def local_rows(folder: Path, question: Question, block: int) -> dict[int, Any]:
    """The rows of the local engine on both cores: two processes, each every second block."""
    running = []
    for part in range(PROCESSES):
        own = folder / f"local{part}"
        own.mkdir(parents=True)
        (own / "question").write_bytes(pickle.dumps((question, part, block)))
        running.append(subprocess.Popen([sys.executable, str(ROOT / "tests" / "cluster" / "run.py"), "--local", str(own)]))
    assert [process.wait() for process in running] == [0] * PROCESSES
    rows: dict[int, Any] = {}
    for part in range(PROCESSES):
        rows |= pickle.loads((folder / f"local{part}" / "rows").read_bytes())
    return rows


def seconds_of(log: Path) -> float:
    """Seconds of all workers, from the beginning of a worker's first block to the end of its last one."""
    return sum(max(ended for _, ended, _ in some) - min(began for began, _, _ in some) for some in done(log).values())


def forms(bench: Bench) -> None:
    """Transcription in each form, equal to the local engine."""
    folder = bench.folder / "forms"
    folder.mkdir()
    lists = write_forms(folder, bench.records)
    block = 8
    local = local_rows(folder, Question(str(lists["raw"]), "asr"), block)
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


def overhead(bench: Bench, rounds: int = 3) -> None:
    """What Ray costs beside the local engine on the same two cores, without start and loading: the same list in turns, with a cluster of its own for
    each of Ray's turns. Workers are counted from their first block to their last, so what the other one still has to do at the end is left out."""
    folder = bench.folder / "overhead"
    folder.mkdir()
    question, block = Question(str(write_list(folder, bench.records)), "asr"), 8
    units = question.units()
    each: dict[str, list[float]] = {"local": [], "ray": []}
    for turn in range(rounds):
        own = folder / f"{turn}"
        local = local_rows(own, question, block)
        each["local"].append(sum(seconds_of(own / f"local{part}" / "log") for part in range(PROCESSES)) / bench.records)
        bench.start()
        rows = rows_of(bench.engine(block_size=block).run(question.work(own / "ray"), units))
        bench.close()
        each["ray"].append(seconds_of(own / "ray") / bench.records)
        bench.check(f"turn {turn}: {bench.records} records equal", not differences(rows, local), differences(rows, local)[:9])
        bench.check(f"turn {turn}: both workers had part", len(done(own / "ray")) == PROCESSES, done(own / "ray").keys())
    ratios = [theirs / ours for theirs, ours in zip(each["ray"], each["local"], strict=True)]
    bench.found["overhead"] = {
        "ray_over_local": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "seconds_each": {name: [round(seconds, 4) for seconds in some] for name, some in each.items()},
    }


@dataclass
class Loaded:
    """A question's work with a model that is there already."""

    echat: EChat
    question: Question

    def open(self, device: str) -> AnswerWorker:
        return AnswerWorker(self.echat, self.question.args, find_mode(self.question.task))


def tasks(bench: Bench) -> None:
    """Eight records of every other task that the checkpoint has learnt: text, tags, speech tokens and the bytes of the wav files."""
    folder = bench.folder / "tasks"
    folder.mkdir()
    path = write_list(folder, 8)
    echat = EChat.load("mini", device="cpu")
    learnt = [
        (name, think)
        for name, mode in MODES.items()
        for think in (("tag", "language") if mode.thinks else ("tag",))
        if name != "asr" and echat.refusal(mode.ask(b"", "a", think=think)) is None
    ]
    bench.start()
    bench.found["tasks"] = [f"{name} {think}" if MODES[name].thinks else name for name, think in learnt]
    for name, think in learnt:
        question = Question(str(path), name, ("--think", think, "--batch-size", "4"))
        local = rows_of(LocalEngine("cpu", 4).run(Loaded(echat, question), question.units()))
        rows = rows_of(bench.engine(block_size=4).run(question.work(folder / "r"), question.units()))
        sounds = sum(len(files) for _, files, _ in rows.values())
        bench.check(
            f"{name} ({think}): 8 records equal, {sounds} wav files byte for byte",
            not differences(rows, local)
            and len(rows) == 8
            and (sounds == 8) == MODES[name].speaks
            and not any(r[2] for r in rows.values()),
            differences(rows, local),
        )


def tokens(bench: Bench) -> None:
    """Speech tokens of a list, through the command."""
    folder = bench.folder / "tokens"
    folder.mkdir()
    path = write_list(folder, 24)
    sound = str(ROOT / "checkpoints" / "mini" / "token2wav")
    asked = ["tokens", "--token2wav", sound, "--input", str(path), "--block", "5"]
    assert command([*asked, "--output", str(folder / "local.list")]) == 0
    bench.start()
    assert command([*asked, "--output", str(folder / "ray.list"), "--engine", "ray"]) == 0
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
