"""What the parts share: checks, a cluster of two nodes, lists, and work whose blocks leave a trace."""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osum_echat.batch.ray_data import RayEngine
from osum_echat.batch.work import Outcome, Unit, Work, Worker
from osum_echat.cli import batch
from osum_echat.cli import main as command
from osum_echat.cli.batch_answers import Answering
from osum_echat.data.sources import open_source
from tests.batch_case import patiently

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "assets" / "demo" / "demo.jsonl"
STORE = 150 * 2**20
"""Bytes of each node's object store."""


class Bench:
    """The run: its folder, its cluster, what was checked and measured."""

    def __init__(self, folder: Path, records: int) -> None:
        self.folder, self.records = folder, records
        self.failed: list[str] = []
        self.found: dict[str, Any] = {}
        self.cluster: Any = None

    def check(self, what: str, held: bool, detail: object = "") -> None:
        print(f"{'ok    ' if held else 'FAILED'} {what}{'' if held else f': {detail}'}", flush=True)
        if not held:
            self.failed.append(what)

    def start(self) -> Any:
        """A cluster of two nodes of one core each, to which this process is connected; the first holds the driver."""
        import ray
        from ray.cluster_utils import Cluster

        self.cluster = Cluster()
        for _ in range(2):
            patiently(lambda: self.cluster.add_node(num_cpus=1, object_store_memory=STORE, include_dashboard=False))
        ray.init(address=self.cluster.address, log_to_driver=False, logging_level="ERROR")
        return self.cluster

    def close(self) -> None:
        if self.cluster is not None:
            import ray

            ray.shutdown()
            self.cluster.shutdown()
            self.cluster = None

    def engine(self, **options: Any) -> RayEngine:
        return RayEngine(**{"device": "cpu", "block_size": 16, "say": print, **options})


def write_list(folder: Path, count: int, name: str = "raw.list") -> Path:
    """So many records: the recordings of the demo again and again, with keys of their own."""
    demo = [json.loads(line) for line in DEMO.read_text(encoding="utf-8").splitlines()]
    rows = [
        {**demo[n % len(demo)], "key": f"k{n:04d}", "wav": str(DEMO.parent / demo[n % len(demo)]["wav"])} for n in range(count)
    ]
    path = folder / name
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_forms(folder: Path, count: int) -> dict[str, Path]:
    """The same records in each form."""
    forms = {"raw": write_list(folder, count)}
    before = forms["raw"]
    for form, name in {"shard": "shards_list.txt", "combine": "combines_list.txt"}.items():
        assert command(["data", "convert", str(before), str(folder / form), "--to", form, "--workers", "1"]) == 0
        before = forms[form] = next((folder / form).rglob(name))
    return forms


@dataclass(frozen=True)
class Question:
    """What is asked about a list, as the arguments of `osum-echat batch`."""

    list: str
    task: str
    more: tuple[str, ...] = ()

    @property
    def args(self) -> argparse.Namespace:
        asked = ["--list", self.list, "--out", "-", "--task", self.task, "--greedy", "--device", "cpu", "--threads", "1"]
        return batch.make_parser().parse_args([*asked, *self.more])

    def work(self, log: Path, gate: Path | None = None) -> Traced:
        return Traced(Answering(self.args), str(log), None if gate is None else str(gate))

    def units(self) -> list[Unit]:
        units, faults = batch.read_units(open_source(self.list))
        assert not faults, faults
        return units


@dataclass(frozen=True)
class Traced:
    """Work whose workers write into the folder ``log`` that they are ready, what they work on, and of each block that is done a line of `Block`.

    Attributes:
        gate: file without which no block is begun; None for none.
    """

    inner: Work
    log: str
    gate: str | None = None

    def open(self, device: str) -> TracedWorker:
        return TracedWorker(self.inner.open(device), Path(self.log), self.gate)


class TracedWorker:
    def __init__(self, inner: Worker, log: Path, gate: str | None) -> None:
        self.inner, self.log, self.gate = inner, log, gate
        log.mkdir(parents=True, exist_ok=True)
        (log / f"ready{os.getpid()}").touch()

    def run(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        came, numbers, mark = time.time(), " ".join(str(unit.number) for unit in units), self.log / f"busy{os.getpid()}"
        while not self._passes(mark, numbers):
            time.sleep(0.005)
        began, cpu = time.time(), time.process_time()
        yield from self.inner.run(units)
        ended, cpu = time.time(), time.process_time() - cpu
        mark.unlink()
        with (self.log / f"done{os.getpid()}").open("a") as file:
            file.write(f"{came} {began} {ended} {cpu} {numbers}\n")

    def _passes(self, mark: Path, numbers: str) -> bool:
        """Whether the gate is open; the mark is there before, so that whoever has closed it sees all that passed."""
        if self.gate is not None and not os.path.exists(self.gate):
            return False
        mark.write_text(numbers)
        if self.gate is None or os.path.exists(self.gate):
            return True
        mark.unlink()
        return False


@dataclass(frozen=True)
class Block:
    """A block that was done: when it came to its worker, passed the gate, and ended; CPU seconds of the worker's process for it; its units."""

    came: float
    began: float
    ended: float
    cpu: float
    numbers: list[int]


def ready(log: Path) -> list[int]:
    """Processes of the workers that have loaded."""
    return [int(path.name[5:]) for path in log.glob("ready*")]


def busy(log: Path) -> list[tuple[int, str]]:
    """Process and numbers of the blocks that are worked on."""
    return [(int(path.name[4:]), path.read_text()) for path in log.glob("busy*")]


def done(log: Path) -> dict[int, list[Block]]:
    """Blocks of each process, in the order in which it did them."""
    out: dict[int, list[Block]] = {}
    for path in log.glob("done*"):
        for line in path.read_text().splitlines():
            came, began, ended, cpu, numbers = line.split(maxsplit=4)
            block = Block(float(came), float(began), float(ended), float(cpu), list(map(int, numbers.split())))
            out.setdefault(int(path.name[4:]), []).append(block)
    return out


def rows_of(outcomes: Iterable[Outcome]) -> dict[int, Any]:
    """What must be equal of each outcome: all but the times. Raises AssertionError for one that comes twice."""
    rows: dict[int, Any] = {}
    for outcome in outcomes:
        assert outcome.number not in rows, f"{outcome.number} came twice"
        value = {name: item for name, item in (outcome.value or {}).items() if name != "timings"}
        rows[outcome.number] = (value, outcome.files, outcome.error)
    return rows


def differences(ours: dict[int, Any], theirs: dict[int, Any]) -> list[int]:
    """Numbers whose outcomes differ, or that one lacks."""
    return [number for number in sorted({*ours, *theirs}) if ours.get(number) != theirs.get(number)]
