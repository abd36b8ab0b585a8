"""The published model's recorded numbers at tiny size (see tests/data/osum/README.md)."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from osum_echat.golden import forward, osum
from osum_echat.golden.report import CaseResult

DATA = Path(__file__).parent / "data" / "osum"


@pytest.fixture(scope="module")
def setting() -> osum.Setting:
    return osum.load_setting(DATA)


def assert_all_ok(results: list[CaseResult], at_least: int) -> None:
    assert len(results) >= at_least
    assert not [r.line() for r in results if not r.ok]


def test_features_are_the_recorded_ones(setting: osum.Setting) -> None:
    assert_all_ok(osum.features(setting), at_least=4)


@torch.no_grad()
def test_encoder_and_adapter_are_the_recorded_ones_alone_and_padded(setting: osum.Setting) -> None:
    assert_all_ok(osum.encoder_cases(setting), at_least=9)


@torch.no_grad()
def test_losses_are_the_recorded_ones_per_target(setting: osum.Setting) -> None:
    results = forward.run(DATA / "forward_cases.json", setting.model, setting.tokenizer, setting.feats, setting.arrays)
    assert_all_ok(results, at_least=40)
    assert any("pad slot" in r.note for r in results), "the deliberate difference is to be told"


def test_full_size_names_and_shapes_are_the_published_ones(setting: osum.Setting) -> None:
    assert_all_ok(osum.full_manifest(setting, DATA / "manifest_full.json"), at_least=2)
    assert_all_ok(osum.lora_manifest(setting, DATA / "manifest_full_lora.json"), at_least=2)
    assert_all_ok(osum.tiny_manifest(setting, DATA / "tiny_manifest.json"), at_least=1)


def test_prompts_are_the_recorded_ones(setting: osum.Setting) -> None:
    assert_all_ok(osum.prompts(setting, DATA / "prompts.json"), at_least=30)


@torch.no_grad()
def test_a_file_or_case_that_nobody_knows_fails(setting: osum.Setting, tmp_path: Path) -> None:
    (tmp_path / "surprise.json").write_text("{}")
    assert not osum.file_results(setting, tmp_path / "surprise.json")[0].ok
    text = (DATA / "forward_cases.json").read_text(encoding="utf-8").replace('"output_type": "text"', '"output_type": "song"')
    (tmp_path / "forward_cases.json").write_text(text, encoding="utf-8")
    results = forward.run(tmp_path / "forward_cases.json", setting.model, setting.tokenizer, setting.feats, setting.arrays)
    assert any(r.name == "F.text.0" and not r.ok for r in results)


@torch.no_grad()
def test_a_wrong_number_fails(setting: osum.Setting, tmp_path: Path) -> None:
    shutil.copy(DATA / "forward_cases.json", tmp_path)
    file = tmp_path / "forward_cases.json"
    file.write_text(file.read_text(encoding="utf-8").replace("11.697781", "11.698781"), encoding="utf-8")
    results = forward.run(file, setting.model, setting.tokenizer, setting.feats, {})
    assert [r.name for r in results if not r.ok] == ["F.text.both[u1].nll"]
