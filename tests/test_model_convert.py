"""tools/convert.py: there and back through every form."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from osum_echat.config import to_yaml
from osum_echat.model import checkpoint as model_io
from osum_echat.model.config import LoraConfig
from osum_echat.model.lora import merge_lora
from osum_echat.model.released import spec_of, to_released
from osum_echat.tools import convert
from tests.model_case import CONFIG, OPTIONS, make_feats, make_model, make_row, run


def write_config(folder: Path, config: object = CONFIG) -> str:
    file = folder / "model.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    return str(file)


def test_published_file_to_folder_to_file_to_published_is_lossless(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    model = make_model().to(torch.bfloat16)
    first = to_released(model.state_dict(), spec_of(model))
    torch.save(first, tmp_path / "a.pt")
    steps = [
        ("a.pt", "folder", "--config", config, "--no-tokenizer", "--max-shard-gb", "0.00002"),
        ("folder", "b.safetensors"),
        ("b.safetensors", "c.pt", "--config", config),
    ]
    for source, target, *rest in steps:
        assert convert.main([str(tmp_path / source), str(tmp_path / target), *rest]) == 0
    assert len(list((tmp_path / "folder").glob("*.safetensors"))) > 1
    last = torch.load(tmp_path / "c.pt", weights_only=True)
    assert last.keys() == first.keys()
    assert all(torch.equal(last[name], first[name]) and last[name].dtype == torch.bfloat16 for name in first)
    assert not list(tmp_path.glob("*partial*"))


def test_deepspeed_folder_to_published_file(tmp_path: Path) -> None:
    model = make_model()
    tag = tmp_path / "step_5"
    tag.mkdir()
    torch.save({"module": to_released(model.state_dict(), spec_of(model))}, tag / "mp_rank_00_model_states.pt")
    assert convert.main([str(tag), str(tmp_path / "step_5.pt"), "--config", write_config(tmp_path), "--storage", "bfloat16"]) == 0
    again = model_io.load_weights(tmp_path / "step_5.pt", CONFIG)
    assert again.dtype == torch.bfloat16
    assert torch.equal(again.projection.weight, model.projection.weight.to(torch.bfloat16))


@torch.no_grad()
def test_lora_is_merged_on_the_way(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, lora=LoraConfig(rank=2, alpha=4.0, dropout=0.0))
    model = make_model(config)
    wanted = run(model, [make_row([24])], make_feats([24])).nll_M
    model_io.save_model(model, None, tmp_path / "lora")
    assert convert.main([str(tmp_path / "lora"), str(tmp_path / "plain"), "--merge-lora", "--no-tokenizer"]) == 0
    plain = model_io.load_weights(tmp_path / "plain")
    assert plain.config.lora is None and merge_lora(plain) == 0
    torch.testing.assert_close(run(plain, [make_row([24])], make_feats([24])).nll_M, wanted, atol=1e-4, rtol=0)


def test_what_cannot_be_converted_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model_io.save_model(make_model(OPTIONS), None, tmp_path / "options")
    cases = {
        (str(tmp_path / "options"), str(tmp_path / "x.pt")): "no place for adapter.mix",
        (str(tmp_path / "options"), str(tmp_path / "x.pt"), "--storage", "int8"): "no 8-bit storage",
        (str(tmp_path / "options"), str(tmp_path / "x"), "--merge-lora", "--no-tokenizer"): "has no lora: section",
        (str(tmp_path / "options"), str(tmp_path / "x")): "--no-tokenizer",
        (str(tmp_path / "nothing"), str(tmp_path / "x")): "checkpoint not found",
    }
    for arguments, message in cases.items():
        assert convert.main(list(arguments)) == 2
        assert message in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["options"]
