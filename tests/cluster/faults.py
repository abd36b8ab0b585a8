"""What is lost in the middle of a run: a worker, a node, the command; and results that come faster than they are taken."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import psutil

from osum_echat.batch.local import LocalEngine
from osum_echat.batch.work import Outcome, Unit
from tests.cluster.case import ROOT, STORE, Bench, Question, busy, differences, done, ready, rows_of, write_list

COUNT, BLOCK = 96, 8


def wait_for(true: Callable[[], bool]) -> bool:
    """Whether it became true within five minutes."""
    for _ in range(6000):
        if true():
            return True
        time.sleep(0.05)
    return False


def when(log: Path, blocks: int, act: Callable[[], object]) -> threading.Thread:
    """A thread that acts when so many blocks are done and both workers are at one."""

    def wait() -> None:
        if wait_for(lambda: sum(map(len, done(log).values())) >= blocks and len(busy(log)) == 2):
            act()

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


def workers_and_nodes(bench: Bench) -> None:
    """kill -9 of a worker, removal of a node, a node that comes: complete, equal, nothing twice, and no more again than the lost blocks."""
    folder = bench.folder / "faults"
    folder.mkdir()
    question = Question(str(write_list(folder, COUNT)), "emotion")
    units = question.units()
    local = rows_of(LocalEngine("cpu", BLOCK).run(question.work(folder / "local"), units))
    cluster = bench.start()
    second = next(iter(cluster.worker_nodes))
    acts = {
        "a worker killed": lambda log: os.kill(busy(log)[0][0], signal.SIGKILL),
        "a node removed": lambda _: cluster.remove_node(second),
    }
    for what, act in acts.items():
        log = folder / what.replace(" ", "_")
        acting = when(log, 2, lambda act=act, log=log: act(log))  # type: ignore[misc]
        rows = rows_of(bench.engine(block_size=BLOCK).run(question.work(log), units))
        acting.join()
        bench.check(
            f"{what}: {COUNT} records, each once, equal to the local engine",
            not differences(rows, local),
            differences(rows, local)[:9],
        )
        worked = sum(len(block.numbers) for some in done(log).values() for block in some)
        bench.check(f"{what}: {worked - COUNT} records were done again", worked - COUNT <= 3 * BLOCK, worked)
        bench.check(f"{what}: it was lost in the middle", len(list(log.glob("busy*"))) >= 1, list(log.glob("*")))
    what, log = "a node comes", folder / "a_node_comes"
    gate = folder / "gate"
    gate.touch()
    with ThreadPoolExecutor(1) as other:  # a node is started by the main thread only
        running = other.submit(lambda: rows_of(bench.engine(block_size=BLOCK, workers=2).run(question.work(log, gate), units)))
        wait_for(lambda: sum(map(len, done(log).values())) >= 2)
        gate.unlink()  # the blocks that are left wait until the second worker has loaded, however long that takes here
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
        wait_for(lambda: len(ready(log)) == 2)
        gate.touch()
        rows = running.result()
    bench.check(f"{what}: {COUNT} records, each once, equal to the local engine", not differences(rows, local))
    bench.check(f"{what}: the worker that waited for it had part", len(done(log)) == 2, done(log).keys())


def driver(bench: Bench) -> None:
    """kill -9 of the command, here the shell script's: the same command goes on."""
    folder = bench.folder / "driver"
    folder.mkdir()
    path = write_list(folder, COUNT)
    asked = ["--task", "emotion", "--greedy", "--device", "cpu", "--threads", "1", "--block", str(BLOCK)]
    local_call = [sys.executable, "-m", "osum_echat.cli", "batch", "--list", str(path), "--out", str(folder / "local"), *asked]
    subprocess.run(local_call, check=True, capture_output=True)
    bench.start()
    script = ["bash", str(ROOT / "infer_with_shards_or_raw.sh"), str(path), str(folder / "ray"), "ray", "", "mini", ""]
    call = [*script, "--address", bench.cluster.address, *asked]
    results = folder / "ray" / "results.jsonl"
    os.environ["PYTHON"] = sys.executable
    first = subprocess.Popen(
        call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )  # the script's process becomes the command
    for _ in range(6000):
        if results.exists() and results.read_bytes().count(b"\n") >= 2 * BLOCK:
            break
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    kept = results.read_bytes()
    before = kept[: kept.rfind(b"\n") + 1].splitlines()
    bench.check(f"the command was killed in the middle, after {len(before)} of {COUNT}", 2 * BLOCK <= len(before) < COUNT)
    subprocess.run(call, check=True, capture_output=True)
    rows, local = (
        [json.loads(line) for line in (folder / name / "results.jsonl").read_text().splitlines()] for name in ("ray", "local")
    )
    times = {row["key"]: row["timings"] for row in rows}
    bench.check("it went on: complete, each key once", [row["key"] for row in rows] == sorted({row["key"] for row in local}))
    bench.check(
        "what was written was not asked again", all(times[(row := json.loads(line))["key"]] == row["timings"] for line in before)
    )
    same = [{**row, "timings": None} for row in rows] == [{**row, "timings": None} for row in local]
    bench.check("the results are those of the local engine", same)


@dataclass(frozen=True)
class Large:
    """Work whose every unit gives a file of so many bytes."""

    size: int

    def open(self, device: str) -> Large:
        return self

    def run(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        for unit in units:
            yield Outcome(unit.number, {}, {"file": bytes(self.size)})


def memory(bench: Bench) -> None:
    """2 GB of results through object stores of 150 MB each, taken slowly: workers wait."""
    bench.start()
    units, size = [Unit(number, str(number)) for number in range(400)], 5 * 2**20
    process = psutil.Process()
    start = peak = process.memory_info().rss
    count = spilled = 0
    for outcome in bench.engine(block_size=2).run(Large(size), units):
        count += len(outcome.files["file"]) == size
        time.sleep(0.02)
        peak = max(peak, process.memory_info().rss)
    spilled = sum(path.stat().st_size for path in Path(os.environ["TMPDIR"]).rglob("*spilled*/*") if path.is_file())
    bench.found["memory_mb"] = {"driver_more": (peak - start) >> 20, "spilled": spilled >> 20, "through": count * size >> 20}
    bench.check("400 results of 5 MB came", count == 400, count)
    bench.check("the command's memory stays bounded", peak - start < 3 * STORE, bench.found["memory_mb"])
    bench.check("the object store is not spilled to disk without end", spilled < 4 * STORE, bench.found["memory_mb"])
