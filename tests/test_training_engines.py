"""The update does not depend on how the work is spread: processes, engines, micro-batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import training_case as tc

# The same 14 samples in two steps: all in one process, in small micro-batches, and over two ranks.
ONE = [[[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]]
SPLIT = [[[0, 1], [2], [3, 4], [5, 6, 7], [8, 9], [10, 11], [12], [13]]]
TWO = [[[0, 1], [2, 3], [8, 9], [12]], [[4, 5], [6, 7], [10, 11], [13]]]
LOSS = {"loss": {"ctc": 0.3, "tags": 0.1}}


def deepspeed_json(folder: Path, stage: int) -> str:
    path = folder / f"zero{stage}.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": stage}, "gradient_clipping": "auto", "steps_per_print": 10**6}))
    return str(path)


def engine(name: str, folder: Path) -> dict[str, Any]:
    if name.startswith("zero"):
        return {"name": "deepspeed", "deepspeed_config": deepspeed_json(folder, int(name[-1]))}
    return {"name": name}


def train(folder: Path, name: str, batches: Any, world: int = 1, **changes: Any) -> dict[str, torch.Tensor]:
    case = {
        "config": tc.base_config(folder / name, **tc.config_io.merge(LOSS, changes)),
        "batches": batches,
        "heads": True,
        "result": str(folder / f"{name}.pt"),
    }
    codes = tc.launch(case, world)
    assert codes == [0] * world, tc.logs(case)
    return torch.load(case["result"])["weights"]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return train(tmp_path_factory.mktemp("one"), "one", ONE)


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k] - b[k]).abs().max()) for k in a)


def test_training_moves_every_part(reference: dict[str, torch.Tensor]) -> None:
    start = dict(tc.tiny_model(heads=True).named_parameters())
    moved = {
        name.removeprefix("model.").split(".")[0]
        for name, w in reference.items()
        if not w.equal(start[name.removeprefix("model.")])
    }
    assert moved == {"encoder", "adapter", "projection", "lm", "ctc", "tags"}


def test_any_split_into_micro_batches_gives_the_same_update(reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    assert largest_difference(train(tmp_path, "split", SPLIT, accumulation=4), reference) < 1e-5


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_ranks_give_the_update_of_one_process(name: str, reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weights = train(tmp_path, name, TWO, world=2, engine=engine(name, tmp_path))
    assert largest_difference(weights, reference) < 1e-5


@pytest.mark.parametrize("name", ["fsdp", "zero3"])
def test_activation_checkpointing_changes_nothing(name: str, reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weights = train(tmp_path, name, TWO, world=2, engine=engine(name, tmp_path), checkpoint_activations=True)
    assert largest_difference(weights, reference) < 1e-5


@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_ranks_with_uneven_data_take_equal_steps_and_lose_nothing(name: str, tmp_path: Path) -> None:
    """Rank 1 runs dry two steps earlier; the weights are those of one process with all samples."""
    uneven = [[[0], [4], [8], [12]], [[1, 2, 3]]]
    together = [[[0, 1, 2, 3], [4], [8], [12]]]
    one = train(tmp_path, "one", together, accumulation=1, max_steps=4)
    two = train(tmp_path, "two", uneven, world=2, accumulation=1, max_steps=4, engine=engine(name, tmp_path))
    assert largest_difference(two, one) < 1e-5


@pytest.mark.parametrize("name", ["fsdp", "zero2"])
def test_bfloat16_trains_close_to_float32(name: str, reference: dict[str, torch.Tensor], tmp_path: Path) -> None:
    weights = train(tmp_path, name, TWO, world=2, engine=engine(name, tmp_path), precision="bf16")
    assert 0 < largest_difference({k: v.float() for k, v in weights.items()}, reference) < 0.02


def test_lora_under_sharding_in_bfloat16(tmp_path: Path) -> None:
    """Frozen bfloat16 weights and trained float32 shards in one block."""
    config = tc.base_config(tmp_path / "run", precision="bf16", engine=engine("fsdp", tmp_path), max_steps=3)
    case = {"config": config, "batches": TWO, "lora": True, "result": str(tmp_path / "weights.pt")}
    assert tc.launch(case, 2) == [0, 0], tc.logs(case)
    weights = torch.load(case["result"])["weights"]
    start = dict(tc.tiny_model().named_parameters())
    name = "lm.llm.model.layers.0.self_attn.q_proj"
    assert weights[f"model.{name}.base_layer.weight"].equal(start[f"{name}.weight"].detach().bfloat16())
    assert weights[f"model.{name}.lora_B.default.weight"].abs().max() > 0
