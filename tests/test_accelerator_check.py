"""The check for accelerators and the scripts that pack for one, on a CPU with small models."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from osum_echat.data.batch import Batch
from osum_echat.data.plain_tokenizer import PlainTokenizer
from recipes.mini import pack_for_accelerator as packing
from tests import training_case as tc
from tests.data_case import record, write_raw

ROOT = Path(__file__).resolve().parent.parent


def run(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / script), *arguments]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)


def test_every_section_runs_at_small_size(tmp_path: Path) -> None:
    sections = ["box", "correctness", "waits", "decode", "token2wav", "first_sound", "train", "mini"]
    done = run("benchmarks/on_accelerator.py", *sections, "--device", "cpu", "--tiny", "--out", str(tmp_path / "out.json"))
    assert done.returncode == 0, done.stderr
    found: dict[str, dict[str, Any]] = json.loads((tmp_path / "out.json").read_text())
    assert list(found) == sections
    right = found["correctness"]
    assert right["ids_equal"] and right["static_step_ids_equal"] and right["update_difference"] == 0.0
    assert found["waits"]["waits_a_token_static"] <= 1 and found["waits"]["waits_a_training_step"] == 1, found["waits"]
    arms = [arm for arm in found["train"].values() if isinstance(arm, dict)]
    assert len(arms) == 4 and all(arm["targets_s"] > 0 and arm["useful_tflops"] > 0 for arm in arms), found["train"]
    assert found["first_sound"]["whole_s"] > 0


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    """`tools/gpu_check.py` and `benchmarks/on_accelerator.py`; the first runs the second in this process."""
    for folder in ("tools", "benchmarks"):
        monkeypatch.syspath_prepend(ROOT / folder)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # scripts in benchmarks set their own
    command, sections = importlib.import_module("gpu_check"), importlib.import_module("on_accelerator")

    def run_here(command: list[str], **kwargs: Any) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, sections.main(command[2:]), "", "")

    monkeypatch.setattr(command.subprocess, "run", run_here)
    return command, sections


def test_a_wrong_update_gives_exit_code_1(
    check: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command, sections = check
    call = ["--device", "cpu", "--tiny", "--only", "correctness", "--out", str(tmp_path)]
    assert command.main(call) == 0
    step, calls = sections.one_step, iter(range(2))

    def second_is_wrong(*args: Any) -> dict[str, Any]:
        found = step(*args)
        if next(calls) == 1:
            found["weights"][0] += 0.01
        return found

    monkeypatch.setattr(sections, "one_step", second_is_wrong)
    assert command.main(call) == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())["correctness"]
    assert found["ids_equal"] and found["update_difference"] > 0.1 and "update_difference" in found["failed"]


def test_an_arm_without_enough_memory_gives_exit_code_1(
    check: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    command, sections = check

    def arm(place: Any, lora: bool, **kwargs: Any) -> dict[str, Any]:
        if not lora:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return {"positions_s": 1.0}

    monkeypatch.setattr(sections, "arm_of", arm)
    assert command.main(["--device", "cpu", "--tiny", "--only", "train", "--out", str(tmp_path)]) == 1
    found = json.loads((tmp_path / "gpu_check.json").read_text())["train"]
    assert "full_checkpointed" in found["failed"] and found["lora_checkpointed"] == {"positions_s": 1.0}


def test_a_section_that_takes_too_long_costs_itself_alone_and_is_named(tmp_path: Path) -> None:
    done = run("tools/gpu_check.py", "--device", "cpu", "--tiny", "--only", "box", "--slower", "0.001", "--out", str(tmp_path))
    assert done.returncode == 1 and "longer than 0 s" in done.stdout
    assert json.loads((tmp_path / "gpu_check.json").read_text())["box"].keys() == {"failed"}
    assert run("tools/gpu_check.py", "--only", "nothing").returncode == 2


def test_the_packed_tree_is_small_and_whole(tmp_path: Path) -> None:
    extra = tmp_path / "wheels"
    extra.mkdir()
    (extra / "one.whl").write_bytes(b"wheel")
    done = run("tools/pack_tree.py", str(tmp_path / "tree"), "--add", str(extra))
    assert done.returncode == 0, done.stdout + done.stderr
    for name in (
        "tools/gpu_check.py",
        "benchmarks/on_accelerator.py",
        "osum_echat/training/loop.py",
        "checkpoints/mini/model.safetensors",
        "wheels/one.whl",
    ):
        assert (tmp_path / "tree" / name).is_file(), name
    assert not (tmp_path / "tree/tests").exists()
    assert run("tools/pack_tree.py", str(tmp_path / "again"), "--limit", "1").returncode == 1


def test_what_is_checked_needs_no_more_than_the_listed_packages() -> None:
    """A bare machine has torch, transformers and numpy (with what these need)."""
    missing = [
        "soundfile",
        "soxr",
        "kaldi_native_fbank",
        "psutil",
        "jiwer",
        "peft",
        "onnxruntime",
        "matplotlib",
        "asrfront",
        "fastapi",
    ]
    code = f"import sys; sys.modules.update(dict.fromkeys({missing!r})); import runpy; runpy.run_path('on_accelerator.py')"
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'benchmarks'}"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "benchmarks", env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_packed_batches_are_the_loaders_within_half_a_step_of_eight_bits(tmp_path: Path) -> None:
    batches = [tc.make_batch(numbers) for numbers in ([0, 1, 2], [4, 5], [1, 3])]
    for _ in range(2):  # a second time nothing is written again
        assert packing.pack(iter(batches), tmp_path, hours=100, made_of="this list") == 1
    loader = packing.PackedLoader(tmp_path)
    found = list(loader)
    assert len(found) == 3 and loader.state_dict() == {"epoch": 1, "done": 0}
    for ours, theirs in zip(found, batches, strict=True):
        assert ours.samples == theirs.samples and ours.sample_N.equal(theirs.sample_N)
        assert all(getattr(ours.rows, name).equal(value) for name, value in vars(theirs.rows).items())
        assert ours.feats_lengths_N.equal(theirs.feats_lengths_N)
        if len(theirs.feats_NTF):
            step = (theirs.feats_NTF.max() - theirs.feats_NTF.min()) / 255
            assert (ours.feats_NTF - theirs.feats_NTF).abs().max() <= 0.51 * step
    first = iter(packing.PackedLoader(tmp_path))
    next(first)
    again = packing.PackedLoader(tmp_path)
    again.load_state_dict({"epoch": 0, "done": 1})
    assert next(iter(again)).keys == next(first).keys
    with pytest.raises(ValueError, match="packing has not ended"):
        packing.PackedLoader(tmp_path / "nothing")


def test_shards_of_another_list_are_refused_and_those_beyond_the_index_are_not_read(tmp_path: Path) -> None:
    batches = [tc.make_batch([n, n + 1]) for n in range(2 * packing.BATCHES_PER_SHARD)]
    assert packing.pack(iter(batches), tmp_path, hours=100, made_of="this list") == 2
    with pytest.raises(ValueError, match="another list"):
        packing.pack(iter(batches), tmp_path, hours=100, made_of="that list")
    assert len(list(packing.PackedLoader(tmp_path))) == len(batches), "what was there is as it was"
    assert packing.pack(iter(batches), tmp_path, hours=0.001, made_of="this list") == 1
    assert len(list(packing.PackedLoader(tmp_path))) == packing.BATCHES_PER_SHARD

    def stopped() -> Iterator[Batch]:
        yield from batches[: packing.BATCHES_PER_SHARD]
        raise KeyboardInterrupt

    folder = tmp_path / "stopped"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        packing.pack(stopped(), folder, hours=100, made_of="this list")
    with pytest.raises(ValueError, match="packing has not ended"):
        packing.PackedLoader(folder)
    with pytest.raises(ValueError, match="another list"):
        packing.pack(iter(batches), folder, hours=100, made_of="that list")


def test_a_list_is_packed_whatever_computes_its_log_mels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with ``data.features: device``, where the loader gives recordings."""
    model = tc.tiny_model()
    monkeypatch.setattr("osum_echat.training.weights.load_start", lambda config: (model, PlainTokenizer()))
    raw = write_raw(tmp_path / "raw", [record(n) for n in range(3)])
    streams = {"streams": {"s2t": {"list": raw}}, "workers": 0}
    config = tmp_path / "stage.yaml"
    packed = {}
    for features in ("torch", "device"):
        config.write_text(json.dumps(tc.base_config(tmp_path / "out", data={**streams, "features": features})))
        assert packing.make(config, [], tmp_path / features, hours=0.0005) == 1
        packed[features] = list(packing.PackedLoader(tmp_path / features))
    for one, two in zip(packed["torch"], packed["device"], strict=True):
        assert len(one.feats_NTF) and one.feats_NTF.equal(two.feats_NTF)
    with pytest.raises(ValueError, match="another config"):
        packing.make(config, ["data.seed=1"], tmp_path / "device", hours=0.0005)


def test_features_without_recordings_are_packed_too() -> None:
    packed = packing.rounded(torch.zeros(0, 0, 8), torch.zeros(0, dtype=torch.long))
    feats, lengths = packing.restored(packed)
    assert feats.shape == (0, 0, 8) and len(lengths) == 0
