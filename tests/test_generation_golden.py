"""Recorded decodes and functions of the published code (see tools/golden/decoding.py)."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from osum_echat.golden import decoding
from osum_echat.golden.report import CaseResult
from tests.generation_case import DATA, tiny


@pytest.fixture(scope="module")
def results() -> list[CaseResult]:
    model, tokenizer, _ = tiny()
    with np.load(DATA / "cases.npz") as arrays:
        feats = [torch.from_numpy(arrays[f"feat{i}"]) for i in range(4)]
    return decoding.run(DATA, model, tokenizer, feats)


def test_decodes_and_functions_are_the_recorded_ones(results: list[CaseResult]) -> None:
    assert len(results) > 40
    assert not [r.line() for r in results if not r.ok]


def test_what_is_not_understood_fails() -> None:
    model, tokenizer, heard = tiny()
    data = json.loads((DATA / "gen_cases.json").read_text(encoding="utf-8"))
    data["cases"] = {"sing.0": data["cases"]["generate.0"], "multi.turn2": data["cases"]["s2s.0.forced"]}
    decodes = decoding.Decodes(data, {}, model, tokenizer, heard)
    assert not decodes.check("sing.0")[0].ok
    assert not decodes.check("multi.turn2")[0].ok, "its first turn is not there"
    assert not decoding.check_functions({"song": []}, tokenizer, model.vocabulary)[0].ok
    assert not decoding.check_processor({"proc": "new"}, tokenizer, model.vocabulary).ok


def test_a_wrong_id_or_logit_is_found() -> None:
    model, tokenizer, heard = tiny()
    data = json.loads((DATA / "gen_cases.json").read_text(encoding="utf-8"))
    with np.load(DATA / "gen_cases.npz") as arrays:
        decodes = decoding.Decodes(data, dict(arrays), model, tokenizer, heard)
    data["cases"]["tts.free"]["ids"][40] += 1
    assert any(not r.ok and "ids" in r.name for r in decodes.check("tts.free"))
    data["cases"]["tts.free"]["ids"][40] -= 1
    data["cases"]["tts.free"]["steps"][5]["top"][3] += 1e-3
    assert any(not r.ok and "logits" in r.name for r in decodes.check("tts.free"))
