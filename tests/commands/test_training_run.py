"""Training as a user starts it, on the repository's fake data in all three forms: one process and two, killed with kill -9 and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from osum_echat.cli import main as command
from osum_echat.run.progress import METRICS
from osum_echat.training.folder import CHECKPOINTS, latest, read_state, step_folder, trained_weights

ROOT = Path(__file__).parents[2]
FAKE = "common_utils/fake_data"
STEPS, SAVE_EVERY, KILLED_AFTER = 6, 2, 3

CONFIG = f"""
stage: generation
device: cpu
precision: fp32
threads: 1
model: tests/data/osum/tiny_config.yaml
init: {{checkpoint: tests/data/osum/tiny.safetensors}}
optim: {{lr: 1.0e-3, schedule: linear, warmup_steps: 2}}
accumulation: 2
checkpoint_activations: false
input_noise: 0.1
max_epochs: null
max_steps: {STEPS}
save_every: {SAVE_EVERY}
log_every: 1
validate_every: 3
tensorboard: false
safety: {{try_largest_batch: false}}
data:
  streams:
    raw: {{list: {FAKE}/raw/data.list}}
    shard: {{list: {FAKE}/shard/shards_list.txt}}
    combine: {{list: {FAKE}/combine/combines_list.txt}}
  batch: {{rows: 2, row_positions: 1024, max_frames: 8000, pool: 8, max_samples: 8}}
  limits: {{max_positions: 1024}}
  split: 3
  shuffle_buffer: 20
  workers: 1
validation:
  streams:
    raw: {{list: {FAKE}/raw/data.list}}
validate_batches: 1
"""

MODULE = [sys.executable, "-m", "osum_echat.training"]
COMMAND = [sys.executable, "-m", "osum_echat.cli", "train"]
SCRIPT = ["bash", "train.sh"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "osum_echat.training"]


def start(command: list[str], processes: int, config: Path, out: Path) -> subprocess.Popen[str]:
    """A run."""
    arguments = [*command, "--stage", "generation", "--config", str(config), "--no-bar", f"out={out}"]
    more = {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "NPROC_PER_NODE": str(processes), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments,
        cwd=ROOT,
        env={**os.environ, **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(run: subprocess.Popen[str]) -> str:
    text = run.communicate(timeout=300)[0]
    assert run.returncode == 0, text
    return text


def kill_after(run: subprocess.Popen[str], metrics: Path, step: int) -> None:
    """kill -9 of every process of the run, once it has reported ``step``."""
    deadline = time.monotonic() + 300
    while f'"step": {step},' not in (metrics.read_text() if metrics.is_file() else ""):
        assert run.poll() is None and time.monotonic() < deadline, run.communicate()[0]
        time.sleep(0.02)
    ranks = psutil.Process(run.pid).children(recursive=True)  # torchrun's ranks are in sessions of their own
    for process in (run, *ranks):
        process.kill()
    run.communicate(timeout=300)
    psutil.wait_procs(ranks, timeout=300)
    assert run.returncode == -signal.SIGKILL


def reported(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what depends on the clock."""
    clock = {"time", "targets_per_s", "steps_per_s", "memory_gb", "waited_for_data"}
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


@pytest.mark.parametrize(
    ("processes", "whole_by", "killed_by", "resumed_by"), [(1, SCRIPT, MODULE, COMMAND), (2, SCRIPT, TORCHRUN, TORCHRUN)]
)
def test_a_run_that_is_killed_and_started_again_ends_as_if_it_had_not_been(
    processes: int, whole_by: list[str], killed_by: list[str], resumed_by: list[str], tmp_path: Path
) -> None:
    config, whole, parts = tmp_path / "config.yaml", tmp_path / "whole", tmp_path / "parts"
    config.write_text(CONFIG, encoding="utf-8")
    text = finish(start(whole_by, processes, config, whole))
    assert f"{processes} process(es)" in text and f"stopped at step {STEPS}: max_steps={STEPS}" in text
    assert all(f"  {form} " in text for form in ("raw", "shard", "combine")), "the mix names the three forms"
    lines = reported(whole)
    assert [line["step"] for line in lines if line["kind"] == "train"] == list(range(1, STEPS + 1))
    assert [line["step"] for line in lines if line["kind"] == "validation"] == [3, 6]
    assert {line["epoch"] for line in lines if line["kind"] == "train"} >= {0, 1}, "the run goes over the end of an epoch"
    tasks = {name for line in lines for name in line if name.startswith("loss/")}
    assert len(tasks) >= 15, "speech and text, in and out"

    kill_after(start(killed_by, processes, config, parts), parts / METRICS, KILLED_AFTER)
    newest = latest(parts / CHECKPOINTS)
    assert newest is not None and SAVE_EVERY <= read_state(newest)["step"] < STEPS
    text = finish(start(resumed_by, processes, config, parts))
    assert "data and random states continue exactly" in text
    assert reported(parts) == lines
    expected = trained_weights(step_folder(whole))
    weights = trained_weights(step_folder(parts))
    assert weights.keys() == expected.keys() and all(weights[name].equal(expected[name]) for name in expected)


def test_train_sh_alone_trains_mini_on_the_lists_of_data_tmp_and_the_result_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = subprocess.run(
        ["bash", "train.sh", "--print-config"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "NPROC_PER_NODE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "data_tmp.yaml" in shown and "checkpoints/mini" in shown
    monkeypatch.chdir(ROOT)
    run, made = str(tmp_path / "run"), str(tmp_path / "made")
    small = ["max_steps=1", "device=cpu", "threads=1", "optim.lr=1.0e-9", "tensorboard=false", "data.batch.rows=2"]
    assert command(["train", "--config", "conf/finetune_mini.yaml", "--no-bar", f"out={run}", *small]) == 0
    assert command(["convert", run, made]) == 0
    capsys.readouterr()
    record = json.loads((ROOT / "assets/demo/demo.jsonl").read_text(encoding="utf-8").splitlines()[0])
    wav = str(ROOT / "assets/demo" / record["wav"])
    texts = {}
    for checkpoint in ("checkpoints/mini", made):
        arguments = ["--checkpoint", checkpoint, "--task", "s2s", "--wav", wav, "--device", "cpu", "--threads", "1", "--json"]
        assert command(["infer", *arguments, "--out", str(tmp_path / "reply.wav")]) == 0
        texts[checkpoint] = json.loads(capsys.readouterr().out)["text"]
        assert (tmp_path / "reply.wav").stat().st_size > 10_000, "and is heard"
        (tmp_path / "reply.wav").unlink()
    assert texts[made] == texts["checkpoints/mini"] != ""
