"""Interrupted and resumed is uninterrupted, to the bit, for every engine; real processes, real kill -9."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from osum_echat.training import checkpoint, folder
from tests import training_case as tc
from tests.test_training_engines import engine, largest_difference

BATCHES = {1: [[[0, 1], [2], [3, 4], [5], [6, 7]]], 2: [[[0, 1], [2], [8]], [[3], [4, 5], [6, 7]]]}
WORLD = {"single": 1, "ddp": 2, "fsdp": 2, "zero1": 2, "zero2": 2, "zero3": 2}


def make(folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    """Six steps over a little more than two epochs, a checkpoint after every second; dropout on, so random states matter."""
    world = WORLD[name]
    config = tc.base_config(
        folder / "run",
        **{
            "max_steps": 6,
            "save_every": 2,
            "accumulation": 1,
            "keep": 2,
            "input_noise": 0.1,
            "engine": engine(name, folder),
            **changes,
        },
    )
    return {"config": config, "batches": BATCHES[world], "dropout": True, "result": str(folder / "result.pt")}


def finish(case: dict[str, Any], world: int) -> dict[str, torch.Tensor]:
    codes = tc.launch(case, world)
    assert codes == [0] * world, tc.logs(case)
    return torch.load(case["result"])["weights"]


# A different place for every engine: in the middle of a step, while data is fetched, while a checkpoint is written or has just been.
KILLS = [("single", 5, "backward", 0), ("single", 4, "rename", 0), ("ddp", 4, "data", 1), ("fsdp", 6, "update", 1), ("zero2", 4, "renamed", 0), ("zero3", 5, "forward", 1)]  # fmt: skip


@pytest.mark.parametrize(("name", "step", "phase", "rank"), KILLS)
def test_killed_and_resumed_is_uninterrupted_to_the_bit(name: str, step: int, phase: str, rank: int, tmp_path: Path) -> None:
    world = WORLD[name]
    (tmp_path / "whole").mkdir()
    whole = finish(make(tmp_path / "whole", name), world)
    case = make(tmp_path, name)
    codes = tc.launch({**case, "kill_rank": rank, "kill_at_step": step, "kill_in": phase}, world)
    assert codes[rank] == -signal.SIGKILL, tc.logs(case)
    newest = folder.latest(tmp_path / "run" / "checkpoints")
    assert newest is not None and newest.name == f"step_{(step if phase == 'renamed' else step - 1) // 2 * 2:08d}"
    resumed = finish(case, world)
    assert "resumed" in tc.logs(case)
    assert all(resumed[key].equal(whole[key]) for key in whole)
    stored = folder.trained_weights(folder.step_folder(tmp_path / "run"))
    assert all(stored[key.removeprefix("model.")].equal(whole[key]) for key in whole)


@pytest.mark.parametrize(("name", "before", "after"), [("fsdp", 2, 1), ("ddp", 1, 2), ("zero2", 2, 1)])
def test_another_number_of_ranks_reshards_and_says_what_happens_to_the_data(
    name: str, before: int, after: int, tmp_path: Path
) -> None:
    """Weights and optimiser go on exactly: with the same samples a step, the end is that of an unchanged run."""
    split = {1: [[[0, 1, 2, 3]]], 2: [[[0, 1]], [[2, 3]]]}
    config = tc.base_config(tmp_path / "run", max_steps=2, accumulation=1, engine=engine(name, tmp_path))
    case = {"config": config, "batches": split[before], "torchrun": True, "result": str(tmp_path / "result.pt")}
    finish(case, before)
    more = {**case, "config": {**config, "max_steps": 4}, "batches": split[after]}
    weights = finish(more, after)
    whole_config = tc.base_config(tmp_path / "whole", max_steps=4, accumulation=1)
    whole = finish({**case, "config": whole_config, "batches": split[1], "torchrun": False}, 1)
    assert largest_difference(weights, whole) < 1e-5
    assert f"written by {before} ranks" in tc.logs(more) and "begins again" in tc.logs(more)


def test_a_run_that_ended_with_an_epoch_is_prolonged_by_the_next_one(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = tc.run(make(tmp_path / "whole", "single", max_steps=None, max_epochs=2))
    first = make(tmp_path, "single", max_steps=None, max_epochs=1)
    assert tc.run(first).state.epoch == 1
    prolonged = tc.run({**first, "config": {**first["config"], "max_epochs": 2}})
    assert (prolonged.state.epoch, prolonged.state.step) == (2, whole.state.step) == (2, 10)
    assert all(a.equal(b) for a, b in zip(prolonged.objective.parameters(), whole.objective.parameters(), strict=True))


def test_a_signal_saves_and_stops_and_the_rest_is_exact(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    whole = finish(make(tmp_path / "whole", "ddp"), 2)
    case = make(tmp_path, "ddp", save_every=100)
    assert tc.launch({**case, "signal_at_step": 3}, 2) == [0, 0], tc.logs(case)
    assert folder.read_state(folder.step_folder(tmp_path / "run"))["step"] == 3
    resumed = finish(case, 2)
    assert all(resumed[key].equal(whole[key]) for key in whole)


def test_a_full_disk_costs_the_checkpoint_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = make(tmp_path, "single", max_steps=2)
    tc.run(case)
    before = folder.step_folder(tmp_path / "run")

    def no_space(*args: Any, **kwargs: Any) -> None:
        Path(args[1]).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", no_space)
        more = {**case, "config": {**case["config"], "max_steps": 4}}
        trainer = tc.run(more)
    assert trainer.state.step == 4
    assert folder.step_folder(tmp_path / "run") == before
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp*"))
    assert tc.run(more).state.step == 4  # from step 2 again, this time written
    assert folder.step_folder(tmp_path / "run").name == "step_00000004"


def test_only_the_newest_checkpoints_are_kept_and_leftovers_of_a_kill_removed(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    (folder / ".tmp-step_00000009").mkdir(parents=True)
    tc.run(make(tmp_path, "single"))
    assert sorted(p.name for p in folder.iterdir()) == ["latest", "step_00000004", "step_00000006"]


def test_a_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    tc.run(make(tmp_path, "single", max_steps=2))
    state = folder.read_state(folder.step_folder(tmp_path / "run"))
    assert {"step", "epoch", "targets", "config", "code", "world_size", "model"} <= state.keys()
    assert state["step"] == 2 and state["config"]["optim"]["lr"] == 1e-3


def test_another_engine_family_or_other_frozen_weights_are_refused(tmp_path: Path) -> None:
    case = make(tmp_path, "single", max_steps=2, lr={"encoder": 0.0})
    tc.run(case)
    path = folder.step_folder(tmp_path / "run") / "state.json"
    content = json.loads(path.read_text())
    for change, message in (
        ({"engine_family": "deepspeed"}, "keep the engine"),
        ({"frozen": {"encoder.conv1.weight": "0/0"}}, "frozen"),
    ):
        path.write_text(json.dumps({**content, **change}))
        with pytest.raises(ValueError, match=message):
            tc.run(case)


def test_a_pointer_to_nothing_is_an_error_not_a_new_start(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    checkpoints.mkdir()
    (checkpoints / "latest").write_text("step_00000004\n")
    with pytest.raises(ValueError, match="not there"):
        folder.latest(checkpoints)
    assert os.listdir(checkpoints) == ["latest"]


def test_the_commit_is_read_without_git(tmp_path):
    branch = "refs/heads/main"
    (tmp_path / "HEAD").write_text(f"ref: {branch}\n")
    assert checkpoint._commit(tmp_path) == ""
    (tmp_path / "packed-refs").write_text(f"# pack-refs\n{'a' * 40} refs/heads/other\n{'b' * 40} {branch}\n")
    assert checkpoint._commit(tmp_path) == "b" * 12
    (tmp_path / branch).parent.mkdir(parents=True)
    (tmp_path / branch).write_text("c" * 40 + "\n")
    assert checkpoint._commit(tmp_path) == "c" * 12
    (tmp_path / "HEAD").write_text("d" * 40 + "\n")
    assert checkpoint._commit(tmp_path) == "d" * 12 and checkpoint._commit(tmp_path / "no repository") == ""
