"""The recorded numbers of the published implementation, through the same checker that the command runs."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from osum_echat.golden import check
from osum_echat.golden import token2wav as golden
from osum_echat.token2wav.estimator import Padding
from osum_echat.token2wav.fast_vocoder import FastVocoder
from tests.token2wav_case import DATA

CASES = sorted(p.name for p in DATA.iterdir() if p.name not in golden.NOT_CASES)


@pytest.fixture(scope="module")
def networks() -> golden.Networks:
    return golden.Networks.load(DATA)


@pytest.mark.parametrize("name", CASES)
def test_recorded_case_is_within_its_limits(name: str, networks: golden.Networks) -> None:
    results = golden.check_file(DATA / name, networks)
    assert results
    assert [r.line() for r in results if not r.ok] == []


@pytest.mark.parametrize("name", ["hift_zero60.safetensors", "stream_n120_prompt20.safetensors"])
def test_fast_vocoder_is_within_the_same_limits(name: str, networks: golden.Networks) -> None:
    fast = FastVocoder(networks.vocoder.config).eval()
    fast.load_state_dict(networks.vocoder.state_dict())
    results = golden.check_file(DATA / name, golden.Networks(networks.flow, fast.prepare()))
    # Forward hooks see nothing of the fast path, so the two tensors inside of a stage are not compared.
    assert len(results) > 5
    assert [r.line() for r in results if not r.ok] == []


def test_a_file_without_a_rule_fails(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("tiny_flow_fp16.safetensors", "tiny_hift_fp16.safetensors", "encoder_padded.safetensors"):
        shutil.copy(DATA / name, tmp_path)
    assert check.main(["token2wav", str(tmp_path)]) == 0
    (tmp_path / "new_part.safetensors").write_bytes((DATA / "encoder_padded.safetensors").read_bytes())
    assert check.main(["token2wav", str(tmp_path)]) == 1
    assert "not understood" in capsys.readouterr().out


def test_a_changed_weight_fails(networks: golden.Networks) -> None:
    changed = golden.Networks.load(DATA)
    with torch.no_grad():
        changed.flow.encoder.encoders[1].norm_ff.bias[0] += 0.01  # type: ignore[union-attr,operator]
    failed = [r for r in golden.check_file(DATA / "flow_n37_noprompt.safetensors", changed) if not r.ok]
    assert {"flow_n37_noprompt.mel", "flow_n37_noprompt.encoder_out"} <= {r.name for r in failed}


def test_estimator_case_matches_each_output_to_a_mask(networks: golden.Networks, tmp_path: Path) -> None:
    """The recorded estimator case is kept apart; one of its form is made here with the published padding semantics."""
    torch.manual_seed(0)
    x, mu, cond = (torch.randn(2, 80, 31) for _ in range(3))
    spks, t = torch.randn(2, 80), torch.tensor([0.2, 0.7])
    mask = (torch.arange(31) < torch.tensor([[31], [22]])).float()[:, None]
    with torch.no_grad():
        padding = Padding(mask.transpose(1, 2), "all")
        run = networks.flow.decoder.estimator
        inputs = [v.transpose(1, 2) for v in (x, mu, cond)]
        full = run(inputs[0], inputs[1], t, spks, inputs[2]).transpose(1, 2)
        padded = run(inputs[0], inputs[1], t, spks, inputs[2], padding).transpose(1, 2)
    assert (full - padded).abs().max() > 1e-3
    assert padded[1, :, 22:].abs().max() == 0
    case = {"x": x, "mu": mu, "cond": cond, "spks": spks, "t": t, "mask": mask, "out": full, "out_masked": padded}
    save_file({k: v.contiguous() for k, v in case.items()}, tmp_path / "estimator_direct.safetensors")
    results = golden.check_file(tmp_path / "estimator_direct.safetensors", networks)
    assert [(r.ok, r.note) for r in results] == [(True, "equals the run with no mask"), (True, "equals the run with mask")]
