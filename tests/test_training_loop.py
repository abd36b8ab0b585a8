"""The loop and its parts in one process: schedules, stages, losses, faults, reports."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from osum_echat import config as config_io
from osum_echat.config import ConfigError
from osum_echat.data.config import DataConfig
from osum_echat.model.config import LoraConfig
from osum_echat.model.lora import add_lora, merge_lora
from osum_echat.run import progress, schedule
from osum_echat.run.bad_steps import TooManyBadSteps
from osum_echat.training import __main__ as entry
from osum_echat.training import export, memory, stages, watchdog
from osum_echat.training.config import LossConfig, OptimConfig, PartRates, TrainConfig
from osum_echat.training.distributed import World
from osum_echat.training.engines.deepspeed import merged_config
from osum_echat.training.folder import trained_weights
from osum_echat.training.objective import Objective, add_input_noise
from osum_echat.training.weights import load_run
from tests import training_case as tc

CPU = torch.device("cpu")


def case(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"config": tc.base_config(folder / "run", **changes), "batches": [[[0, 1, 2, 3], [4, 5], [6, 7]]], "heads": True}


# ---- config and schedule ---------------------------------------------------------------------------------------------------------


def test_warmup_equals_the_recorded_learning_rates(data_dir: Path) -> None:
    for step, rate in json.loads((data_dir / "training" / "warmup.json").read_text()):
        assert 1e-6 * schedule.factor(OptimConfig(), max(step, 1), None) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_decaying_schedules_warm_up_and_end_at_the_final_factor(name: Any) -> None:
    optim = OptimConfig(schedule=name, warmup_steps=10, final_factor=0.1)
    factors = [schedule.factor(optim, step, 100) for step in range(1, 121)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == pytest.approx(1.0)
    assert factors[9:100] == sorted(factors[9:100], reverse=True)
    assert factors[99] == pytest.approx(0.1) and factors[119] == pytest.approx(0.1)


def test_defaults_are_the_published_ones() -> None:
    config = TrainConfig()
    optim = config.optim
    assert (optim.betas, optim.eps, optim.lr, optim.weight_decay, optim.warmup_steps) == ((0.9, 0.99), 1e-6, 1e-6, 0.01, 2000)
    assert (optim.clip, config.accumulation, config.max_epochs, config.log_every, config.save_every, config.seed) == (
        5.0,
        8,
        1,
        10,
        1250,
        777,
    )


@pytest.mark.parametrize(
    "file", ["stage1_understanding", "stage2_tts", "stage2_s2s", "stage3_empathy_tag", "stage3_empathy_language"]
)
def test_every_full_size_config_is_valid(file: str, root_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root_dir)
    config = config_io.load(TrainConfig, f"conf/{file}.yaml")
    assert config.data.streams and Path(str(config.model)).is_file()
    assert all(Path(stream.list).is_file() for stream in config.data.streams.values())
    for zero in (1, 2, 3):
        config.engine.deepspeed_config = f"conf/ds_stage{zero}.json"
        merged = merged_config(config)
        assert merged["zero_optimization"]["stage"] == zero
        assert (merged["gradient_accumulation_steps"], merged["gradient_clipping"], merged["bf16"]["enabled"]) == (8, 5.0, True)


def test_deepspeed_json_that_disagrees_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"gradient_accumulation_steps": 4, "gradient_clipping": 1.0, "bf16": {"enabled": True}}))
    config = TrainConfig()
    config.engine.deepspeed_config = str(path)
    with pytest.raises(
        ConfigError, match=r"gradient_accumulation_steps is 4 there and 8 here; gradient_clipping is 1.0 there and 5.0 here"
    ):
        merged_config(config)


def test_the_stage_must_be_that_of_the_config(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("stage: generation\n")
    assert entry.load_config(tmp_path / "c.yaml", None, ["seed=3"]).seed == 3
    with pytest.raises(ConfigError, match="--stage empathy"):
        entry.load_config(tmp_path / "c.yaml", "empathy", [])
    assert entry.main(["--config", str(tmp_path / "none.yaml")]) == 2


def test_keys_of_older_configs_are_read_with_a_warning_that_names_the_new_ones(caplog: pytest.LogCaptureFixture) -> None:
    old = config_io.from_dict(
        TrainConfig, {"rooms": {"encoder": 0.0, "heads": 2e-4}, "init": {"rooms": {"ctc": "a", "lm": "b"}}}, "old.yaml"
    )
    assert old.lr == PartRates(encoder=0.0, heads=2e-4) and old.init.parts == {"ctc": "a", "lm": "b"}
    assert "rooms is an older name; write lr" in caplog.text and "init.rooms is an older name; write init.parts" in caplog.text


# ---- stages ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("stage", "moved"), [("understanding", {"encoder", "adapter", "projection", "ctc", "tags"}), ("generation", {"encoder", "adapter", "projection", "ctc", "tags", "lm"})])  # fmt: skip
def test_frozen_parts_are_unchanged_to_the_bit_and_hold_nothing(stage: str, moved: set[str], tmp_path: Path) -> None:
    before = tc.tiny_model(heads=True).state_dict()
    trainer = tc.run(case(tmp_path, stage=stage, loss={"ctc": 0.3, "tags": 0.1}))
    after = trainer.objective.model.state_dict()
    changed = {name.split(".")[0] for name in before if not before[name].equal(after[name])}
    assert changed == moved
    known = {id(p) for p in trainer.engine.optimizer.parameters}  # type: ignore[attr-defined]
    for name, param in trainer.objective.model.named_parameters():
        assert param.grad is None
        assert (id(param) in known) == param.requires_grad == (name.split(".")[0] in moved)


def test_nothing_below_the_first_trained_part_is_recorded_for_backward() -> None:
    model = tc.tiny_model()
    stages.assign(model, TrainConfig(stage="understanding", lr=PartRates(encoder=0.0)))
    layers, _ = model.encode(torch.zeros(1, 80, tc.MELS), torch.tensor([80]))
    assert not layers[0].requires_grad and not model.encoder.training


def test_lora_freezes_the_llm_and_merging_it_changes_no_output(tmp_path: Path) -> None:
    model = tc.tiny_model()
    add_lora(model.lm.llm, LoraConfig(rank=4, alpha=8, dropout=0.0))
    groups = stages.assign(model, TrainConfig(stage="generation"))
    assert {g.part for g in groups} == {"encoder", "adapter", "lora", "speech"}
    assert "llm" in stages.table(model, groups) and "frozen" in stages.table(model, groups)
    trainer = tc.run({**case(tmp_path), "heads": False, "lora": True})
    trained = trainer.objective.model.eval()
    batch = tc.make_batch([0, 1, 2, 3])
    with torch.no_grad():
        before = trained(batch.rows, batch.feats_NTF, batch.feats_lengths_N).nll_M
        assert merge_lora(trained) > 0
        after = trained(batch.rows, batch.feats_NTF, batch.feats_lengths_N).nll_M
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


# ---- objective -------------------------------------------------------------------------------------------------------------------


def test_stream_weights_count_in_the_mean() -> None:
    objective = Objective(tc.tiny_model(), LossConfig(stream={"t2s": 3.0}))
    text, speech = (objective.prepare(tc.make_batch([n]), CPU) for n in (3, 1))
    both = objective.prepare(tc.make_batch([3, 1]), CPU)
    sums = [float(objective(m, {"lm": 1.0})[0].detach()) for m in (text, speech)]
    assert both.counts["lm"] == text.counts["lm"] + speech.counts["lm"]
    assert speech.counts["lm"] == 3 * tc.make_batch([1]).num_targets
    assert float(objective(both, both.counts)[0].detach()) == pytest.approx(sum(sums) / both.counts["lm"], rel=1e-5)


def test_input_noise_changes_the_stated_share_of_codes_and_nothing_else() -> None:
    torch.manual_seed(0)
    rows = tc.make_batch([1, 2, 5, 6, 9, 10, 13, 14, 17, 18]).rows
    noisy = add_input_noise(rows, tc.VOCABULARY, 0.5)
    changed = noisy.ids_BT != rows.ids_BT
    codes = (rows.ids_BT >= tc.VOCABULARY.text_size) & (rows.ids_BT < tc.VOCABULARY.speech_delimiter)
    assert not changed[~codes].any() and 0.3 < changed[codes].float().mean() < 0.7
    assert noisy.targets_BT.equal(rows.targets_BT)


# ---- faults ----------------------------------------------------------------------------------------------------------------------


def test_a_nan_sample_costs_one_step_and_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """sample-2 is spoiled in a batch of three; every other step trains, weights stay finite."""
    with caplog.at_level(logging.ERROR):
        trainer = tc.run({**case(tmp_path, max_steps=3, accumulation=1), "poison": "sample-2"})
    assert trainer.state.step == 3 and trainer.state.bad_steps == 0
    assert "step 1 skipped" in caplog.text and "Samples: rank 0, loss: sample-2\n" in caplog.text
    assert all(torch.isfinite(p).all() for p in trainer.objective.parameters())
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines if line["kind"] == "skipped"] == [["sample-2"]]


def test_a_run_of_bad_steps_ends_the_run(tmp_path: Path) -> None:
    bad = {**case(tmp_path, max_steps=10, accumulation=1, safety={"max_bad_steps": 2}), "poison": "sample-2"}
    bad["batches"] = [[[2], [2], [2]]]
    with pytest.raises(TooManyBadSteps, match="2 steps in a row"):
        tc.run(bad)


@pytest.mark.parametrize("name", ["ddp", "fsdp", "zero2", "zero3"])
def test_two_ranks_skip_a_nan_step_together(name: str, tmp_path: Path) -> None:
    from tests.test_training_engines import engine

    bad = {**case(tmp_path, max_steps=2, accumulation=1, engine=engine(name, tmp_path)), "poison": "sample-2"}
    bad |= {"batches": [[[0], [4]], [[2], [5]]], "result": str(tmp_path / "weights.pt")}
    assert tc.launch(bad, 2) == [0, 0], tc.logs(bad)
    assert "step 1 skipped" in tc.logs(bad) and "rank 1, loss: sample-2" in tc.logs(bad)
    weights = torch.load(bad["result"])["weights"]
    alone = {**case(tmp_path / "alone", max_steps=1, accumulation=2), "batches": [[[4], [5]]]}
    expected = dict(tc.run(alone).objective.named_parameters())
    assert max(float((weights[k] - expected[k]).detach().abs().max()) for k in weights) < 1e-5


def test_the_watchdog_names_the_rank_that_holds_up_the_others() -> None:
    line = watchdog.report({0: (7, "backward", 100.0), 1: (7, "data", 60.0), 2: (7, "backward", 101.0)}, now=400.0)
    assert "rank 1 silent at step 7 in 'data'" in line and "rank 0: step 7, in backward for 300 s" in line
    assert "rank 2 silent at step 6" in watchdog.report({0: (7, "update", 9.0), 1: (7, "update", 8.0), 2: (6, "save", 7.0)}, 90.0)


def test_the_watchdog_speaks_once_when_a_step_hangs() -> None:
    import time

    heard: list[str] = []
    dog = watchdog.Watchdog(World(), watchdog.LocalStore(), seconds=0.2, tell=heard.append)
    dog.start()
    dog.beat(3, "forward")
    time.sleep(1.0)
    dog.close()
    assert len(heard) == 1 and "rank 0 silent at step 3 in 'forward'" in heard[0]


def test_a_run_that_ends_before_its_first_step_leaves_no_watchdog_behind(tmp_path: Path) -> None:
    """Its line would come a minute later, into whatever is printed then."""
    import threading

    known = set(threading.enumerate())
    first = case(tmp_path, max_steps=1)
    tc.run(first)
    state = next((tmp_path / "run" / "checkpoints").glob("step_*/state.json"))
    state.write_text(json.dumps({**json.loads(state.read_text()), "engine_family": "deepspeed"}))
    with pytest.raises(ValueError, match="keep the engine"):
        tc.run(first)
    assert not [thread for thread in threading.enumerate() if thread.name == "watchdog" and thread not in known]


def test_the_largest_batch_is_run_before_step_one_and_leaves_no_trace(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = {
        "batch": {"rows": 2, "row_positions": 96, "max_frames": 400},
        "limits": {"max_frames": 300, "max_positions": 96},
    }
    with caplog.at_level(logging.INFO):
        tried = tc.run(case(tmp_path / "a", data=data, safety={"try_largest_batch": True}))
    assert "largest batch 2 x 96 positions" in caplog.text and "peak" in caplog.text
    plain = tc.run(case(tmp_path / "b", data=data))
    assert all(a.equal(b) for a, b in zip(tried.objective.parameters(), plain.objective.parameters(), strict=True))


def test_a_largest_batch_without_room_stops_with_the_setting_to_change(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("osum_echat.device.total_memory", lambda device: 1000)
    data = {
        "batch": {"rows": 2, "row_positions": 96, "max_frames": 400},
        "limits": {"max_frames": 300, "max_positions": 96},
    }
    with pytest.raises(ConfigError, match=r"checkpoint_activations: true; lower data.batch.rows \(now 2\)"):
        tc.run(case(tmp_path, data=data, safety={"try_largest_batch": True}))


def test_the_largest_batch_fills_every_row_and_frame_that_the_config_allows() -> None:
    data = config_io.from_dict(DataConfig, {"batch": {"rows": 3, "row_positions": 200, "max_frames": 800}, "limits": {"max_frames": 400, "max_positions": 200}})  # fmt: skip
    batch = memory.largest_batch(data, tc.VOCABULARY, tc.MELS)
    assert batch.rows.ids_BT.shape == (3, 200) and batch.rows.padding_fraction == 0
    assert batch.feats_NTF.shape == (2, 400, tc.MELS)


# ---- reports and the way out --------------------------------------------------------------------------------------------------------


def test_a_run_leaves_metrics_tensorboard_and_curves(tmp_path: Path) -> None:
    tc.run({**case(tmp_path, max_steps=4, validate_every=2, loss={"ctc": 0.3, "tags": 0.1}), "validate": True})
    curves = progress.read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [step for step, _ in curves["train"]["loss"]] == [1, 2, 3, 4]
    assert [step for step, _ in curves["validation"]["loss"]] == [2, 4]
    assert {"loss/<TTS>", "ctc", "tag.gender", "targets_per_s", "padding", "memory_gb"} <= curves["train"].keys()
    assert (tmp_path / "run" / "curves.png").read_bytes()[:4] == b"\x89PNG"
    assert list((tmp_path / "run" / "tensorboard").glob("events*"))


def test_validation_disturbs_nothing(tmp_path: Path) -> None:
    quiet = tc.run({**case(tmp_path / "a", max_steps=4), "dropout": True})
    validated = tc.run({**case(tmp_path / "b", max_steps=4, validate_every=1), "dropout": True, "validate": True})
    assert all(a.equal(b) for a, b in zip(quiet.objective.parameters(), validated.objective.parameters(), strict=True))


def test_validators_report_beside_the_loss(tmp_path: Path) -> None:
    trainer = tc.run({**case(tmp_path), "validate": True})
    trainer.validators["real"] = lambda t: {"wer": 12.5, "step": float(t.state.step)}
    trainer.progress = progress.Progress(tmp_path / "more", None, 0, bar=False)
    assert trainer.validate()["real.wer"] == 12.5
    trainer.progress.close()


def test_repeated_steps_of_a_resumed_run_are_drawn_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"kind": "train", "step": s, "time": 0, "loss": v} for s, v in ((1, 3.0), (2, 2.0), (2, 1.5), (3, math.nan))]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"kind": "tr')
    assert progress.read_metrics(path)["train"]["loss"][:2] == [(1, 3.0), (2, 1.5)]


def test_export_and_average_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is exported is what was trained; the mean of two checkpoints is their mean."""
    from osum_echat.tools import average

    trainer = tc.run(case(tmp_path, save_frozen=True, max_steps=4, save_every=2))
    run = tmp_path / "run"
    model, _ = load_run(run)
    for name, param in model.named_parameters():
        assert param.equal(dict(trainer.objective.model.named_parameters())[name]), name
    assert average.main([str(run), str(tmp_path / "mean"), "--last", "2"]) == 0
    first, second = (trained_weights(run / "checkpoints" / f"step_{s:08d}") for s in (2, 4))
    from osum_echat.model.checkpoint import load_weights

    mean = dict(load_weights(tmp_path / "mean").named_parameters())
    for name, param in mean.items():
        torch.testing.assert_close(param, (first[name] + second[name]) / 2, atol=1e-7, rtol=1e-6)
    assert average.main([str(run), str(tmp_path / "x"), "--last", "9"]) == 2


def test_a_lora_run_exports_merged_weights(tmp_path: Path) -> None:
    trainer = tc.run({**case(tmp_path, save_frozen=True), "heads": False, "lora": True})
    trainer.objective.model.eval()
    export.export_folder(tmp_path / "run", tmp_path / "out")
    from osum_echat.model.checkpoint import load_weights

    exported, batch = load_weights(tmp_path / "out"), tc.make_batch([0, 1, 2, 3])
    assert exported.config.lora is None
    with torch.no_grad():
        before = trainer.objective.model(batch.rows, batch.feats_NTF, batch.feats_lengths_N).nll_M
        after = exported(batch.rows, batch.feats_NTF, batch.feats_lengths_N).nll_M
    torch.testing.assert_close(before, after, atol=1e-5, rtol=1e-5)


def test_the_hub_tool_refuses_what_is_no_checkpoint_folder(tmp_path: Path) -> None:
    from osum_echat.tools import hub

    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    with pytest.raises(ValueError, match="export it first"):
        hub.check(tmp_path / "run")
    with pytest.raises(ValueError, match=r"config.yaml, tokenizer, model.safetensors"):
        hub.check(tmp_path)
