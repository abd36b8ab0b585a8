"""The two engines: the same outcomes, each once, whatever is lost on the way."""

from __future__ import annotations

import json
import os
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from osum_echat.batch.local import LocalEngine
from osum_echat.batch.ray_data import Placement, RayEngine, place
from osum_echat.batch.work import Engine, Outcome, Unit, blocks
from osum_echat.cli import batch
from tests.batch_case import Doubling, patiently

ROOT = Path(__file__).resolve().parents[1]
UNITS = [Unit(number, f"key{number}", number) for number in range(40) if number not in (7, 20)]


@pytest.fixture(scope="module")
def ray_engine() -> Iterator[RayEngine]:
    """A cluster of this machine with two cores, without dashboard, whose files are in the temporary folder (RAY_TMPDIR follows TMPDIR)."""
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    patiently(
        lambda: ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    )
    yield RayEngine(device="cpu", workers=2, block_size=8, dashboard=False)
    ray.shutdown()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.together)])
def engine(request: pytest.FixtureRequest) -> Engine:
    return LocalEngine("cpu", block_size=8) if request.param == "local" else request.getfixturevalue("ray_engine")


def by_number(outcomes: Iterator[Outcome]) -> dict[int, Outcome]:
    """Outcomes by number; each number once."""
    found: dict[int, Outcome] = {}
    for outcome in outcomes:
        assert outcome.number not in found, f"{outcome.number} came twice"
        found[outcome.number] = outcome
    return found


def test_every_unit_has_its_outcome_once(engine: Engine, tmp_path: Path) -> None:
    units = [*UNITS, Unit(50, "bad", -1), Unit(60, "spoils", 99)]
    found = by_number(engine.run(Doubling(log=str(tmp_path), raises=frozenset([99])), units))
    assert sorted(found) == [unit.number for unit in units]
    assert all(found[u.number].value == {"twice": 2 * u.payload, "device": "cpu"} for u in UNITS)
    assert all(found[u.number].files == {"a/b.bin": bytes([u.payload])} for u in UNITS)
    assert (found[50].value, found[50].error) == (None, "negative")
    assert found[60].error == "given up after 3 tries: RuntimeError: payload 99"
    told = [line for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    cut = [" ".join(str(unit.number) for unit in block) for block in blocks(units, 8)]
    assert sorted(told) == sorted([*cut, "60", "60"]), "blocks are those of the list; what spoils its block is tried alone"


def test_the_mates_of_a_unit_that_spoils_its_block_are_done() -> None:
    found = by_number(LocalEngine("cpu", block_size=8).run(Doubling(raises=frozenset([13, 21])), UNITS))
    assert [number for number, outcome in found.items() if outcome.error] == [13, 21] and len(found) == len(UNITS)


def test_work_that_cannot_be_done_is_one_sentence(engine: Engine) -> None:
    if isinstance(engine, RayEngine):
        engine = replace(engine, workers=1)
    with pytest.raises(ValueError, match=r"^this checkpoint has not learnt it$"):
        list(engine.run(Doubling(refuses="this checkpoint has not learnt it"), UNITS))
    assert list(engine.run(Doubling(refuses="never opened"), [])) == []


@pytest.mark.together
def test_a_unit_that_kills_its_worker_is_counted_and_costs_no_other(ray_engine: RayEngine, tmp_path: Path) -> None:
    engine = replace(ray_engine, tries=2, workers=1)
    found = by_number(engine.run(Doubling(log=str(tmp_path), kills=frozenset([13])), UNITS))
    assert {n: o.error for n, o in found.items() if o.error} == {13: "given up after 2 tries: its worker died each time"}
    assert len(found) == len(UNITS) and all(found[n].value["twice"] == 2 * n for n in found if n != 13)
    told = [line.split() for file in tmp_path.iterdir() for line in file.read_text().splitlines()]
    assert sorted(len(numbers) for numbers in told if "13" in numbers) == [1, 8], "with its block, then alone"


@pytest.mark.together
def test_a_worker_that_is_killed_costs_its_block_only(ray_engine: RayEngine, tmp_path: Path) -> None:
    log, gate = tmp_path / "log", tmp_path / "gate"
    log.mkdir()

    def kill() -> None:
        """Ends the process that works on the block of 13, then lets the block go on."""
        for _ in range(3000):
            busy = [file for file in log.iterdir() if any("13" in line.split() for line in file.read_text().splitlines())]
            if busy:
                os.kill(int(busy[0].name), signal.SIGKILL)
                break
            time.sleep(0.02)
        gate.touch()

    killer = threading.Thread(target=kill)
    killer.start()
    found = by_number(ray_engine.run(Doubling(log=str(log), gate=str(gate), held=frozenset([13])), UNITS))
    killer.join()
    assert sorted(found) == [unit.number for unit in UNITS] and not any(outcome.error for outcome in found.values())
    told = [line for file in log.iterdir() for line in file.read_text().splitlines()]
    assert told.count("8 9 10 11 12 13 14 15") == 2 and len(told) <= 5 + 2, "its block again, and one that waited for it at most"


# ---- the command -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.together
def test_the_command_gives_the_same_results_on_both_engines(
    ray_engine: RayEngine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "some.jsonl").write_text("".join(f"{line}\n" for line in list_with_faults()), encoding="utf-8")
    asked = ["--list", str(tmp_path / "some.jsonl"), "--task", "emotion", "--greedy", "--device", "cpu", "--batch-size", "2"]
    found = {}
    for name, more in {"local": [], "ray": ["--engine", "ray", "--workers", "1", "--format", "parquet"]}.items():
        assert batch.main([*asked, "--block", "3", "--out", str(tmp_path / name), *more]) == 0
        score = json.loads(capsys.readouterr().out.splitlines()[-1])
        assert (score["records"], score["failed"]) == (6, 2) and score["tags"]["emotion"]["right"] == 3
        lines = (tmp_path / name / "results.jsonl").read_text(encoding="utf-8").splitlines()
        found[name] = [{key: value for key, value in json.loads(line).items() if key != "timings"} for line in lines]
        assert batch.main([*asked, "--out", str(tmp_path / name), *more]) == 0, "there is nothing left to do"
        assert (tmp_path / name / "results.jsonl").read_text(encoding="utf-8").splitlines() == lines
        capsys.readouterr()
    assert found["ray"] == found["local"]
    assert (tmp_path / "ray" / "text").read_bytes() == (tmp_path / "local" / "text").read_bytes()
    parquet = pytest.importorskip("pyarrow.parquet").read_table(tmp_path / "ray" / "results.parquet").to_pylist()
    assert [(row["key"], row["text"], row["error"]) for row in parquet] == [
        (row["key"], row.get("text"), row["error"]) for row in found["local"]
    ]
    assert [json.loads(row["tags"]) for row in parquet if row["error"] is None] == [
        row["tags"] for row in found["local"] if "tags" in row
    ]


def list_with_faults() -> list[str]:
    """Four recordings of the demo, one that is not there, and a key that came before."""
    lines = [json.loads(line) for line in (ROOT / "assets" / "demo" / "demo.jsonl").read_text(encoding="utf-8").splitlines()[:4]]
    lines = [{**line, "wav": str(ROOT / "assets" / "demo" / line["wav"])} for line in lines]
    return [
        json.dumps(line) for line in (*lines, {"key": "gone", "wav": "gone.wav", "txt": "x"}, {**lines[1], "wav": "other.wav"})
    ]


# ---- without a cluster -----------------------------------------------------------------------------------------------------------------


def test_workers_are_placed_on_what_the_cluster_has() -> None:
    nodes = [{"CPU": 4.0, "GPU": 2.0}, {"CPU": 3.0, "NPU": 8.0}, {"CPU": 1.0}]
    assert place("auto", 1, None, nodes) == Placement("cuda", 1, 2)
    assert place("auto", 4, None, nodes) == Placement("npu", 4, 2)
    assert place("cuda", 0.25, None, nodes) == Placement("cuda", 0.25, 8)
    assert place("cpu", 2, None, nodes) == Placement("cpu", 2, 3), "a worker's cores are on one node"
    assert place("npu", 1, 12, nodes).workers == 12, "more than there is room for wait"
    assert place("npu", 0.5, None, nodes).options == {"resources": {"NPU": 0.5}, "num_cpus": 1}
    assert place("cuda", 1, None, nodes).options == {"num_gpus": 1, "num_cpus": 1} and place("cpu", 1, 1, nodes).options == {
        "num_cpus": 1
    }
    for device, share, message in [
        ("npu", 9, "no node of the cluster has 9 NPU"),
        ("cuda:1", 1, "Ray hands the single devices out"),
        ("cpu", 1.5, "a part of 1, or a whole number"),
        ("cpu", 0, "cannot be"),
    ]:
        with pytest.raises(ValueError, match=message):
            place(device, share, None, nodes)


def test_blocks_do_not_depend_on_what_is_left() -> None:
    whole = [[unit.number for unit in block] for block in blocks(UNITS, 8)]
    rest = [[unit.number for unit in block] for block in blocks(UNITS[3::2], 8)]
    assert whole[0] == [0, 1, 2, 3, 4, 5, 6] and all(any(set(some) <= set(block) for block in whole) for some in rest)


def test_units_and_outcomes_are_sent_as_they_are() -> None:
    for thing in (UNITS[0], Outcome(1, {"a": 1}, {"b": b"c"}, "d"), Doubling()):
        assert pickle.loads(pickle.dumps(thing)) == thing


def test_without_ray_the_engine_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'osum-echat\[ray\]'"):
        list(RayEngine().run(Doubling(), UNITS))
