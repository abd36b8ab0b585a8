"""Speech tokenizer: quantiser, lengths, batching, losses, ONNX contract."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat import config
from osum_echat.training.token2wav import onnx_export, tokenizer
from osum_echat.training.token2wav.fsq import FSQ
from osum_echat.training.token2wav.records import Utterance
from osum_echat.training.token2wav.speaker import SpeakerConfig, SpeakerNet
from osum_echat.training.token2wav.tokenizer_model import Encoder, TokenizerConfig, halved
from tests.token2wav_training_case import TINY_RUN, TINY_TOKENIZER, write_records


def _encoder(**sizes: int) -> Encoder:
    torch.manual_seed(0)
    return Encoder(TokenizerConfig(**{**TINY_TOKENIZER, **sizes})).eval()  # type: ignore[arg-type]


@given(levels=st.lists(st.integers(2, 9), min_size=1, max_size=4), seed=st.integers(0, 100))
@settings(max_examples=30, deadline=None)
def test_every_combination_of_levels_has_its_own_index(levels: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    fsq = FSQ(3, levels)
    assert fsq.size == np.prod(levels)
    grid = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float32) for n in levels)).reshape(-1, len(levels))
    assert sorted((grid * fsq.basis_K).sum(-1).long().tolist()) == list(range(fsq.size))
    indices = fsq.indices(torch.randn(1, 50, 3) * 20)
    assert int(indices.min()) >= 0
    assert int(indices.max()) < fsq.size


def test_quantiser_passes_the_gradient_and_gives_one_feature_per_code() -> None:
    torch.manual_seed(0)
    fsq = FSQ(4, [3, 3])
    x = (torch.randn(1, 200, 4) * 3).requires_grad_()
    out, indices = fsq(x)
    out.sum().backward()
    assert x.grad is not None and float(x.grad.abs().sum()) > 0
    for code in indices.unique():
        same = out[indices == code]
        assert torch.allclose(same, same[:1].expand_as(same), atol=1e-6)


def test_quantiser_refuses_levels_without_a_choice() -> None:
    with pytest.raises(ValueError, match="at least 2"):
        FSQ(4, [4, 1])


@given(st.integers(1, 400))
@settings(max_examples=20, deadline=None)
def test_a_recording_has_the_released_number_of_codes(frames: int) -> None:
    codes = _encoder()(torch.randn(1, 128, frames), torch.tensor([frames]))
    assert codes.shape == (1, math.ceil(math.ceil(frames / 2) / 2))


def test_codes_of_a_batch_equal_those_of_each_recording_alone() -> None:
    encoder = _encoder(width=32)
    lengths = torch.tensor([37, 120, 4, 81])
    feats = torch.randn(4, 128, 120)  # what follows a row's end is noise on purpose
    together = encoder(feats, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(feats[row : row + 1, :, :length], torch.tensor([length]))[0]
        assert torch.equal(together[row, : len(alone)], alone)


@pytest.mark.parametrize("half", [False, True])
def test_onnx_file_keeps_the_released_contract_and_equals_torch(tmp_path: Path, half: bool) -> None:
    encoder = _encoder(width=32)
    target = tmp_path / "speech_tokenizer_v1.onnx"
    assert onnx_export.export_tokenizer(encoder, target, half=half) >= 0.998
    run = onnx_export.session(target)
    feats, lengths = run.get_inputs()
    assert (feats.type, feats.shape[1]) == ("tensor(float)", 128)
    assert lengths.type == "tensor(int32)"
    found = run.run(None, {feats.name: np.zeros((1, 128, 101), np.float32), lengths.name: np.array([101], np.int32)})[0]
    assert found.reshape(-1).shape == (26,)


def test_half_storage_halves_the_file(tmp_path: Path) -> None:
    encoder = _encoder(width=64)
    for half in (False, True):
        onnx_export.export_tokenizer(encoder, tmp_path / f"{half}.onnx", half=half)
    assert (tmp_path / "True.onnx").stat().st_size < 0.65 * (tmp_path / "False.onnx").stat().st_size


def test_speaker_net_exports_with_the_released_contract(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = SpeakerNet(SpeakerConfig(channels=16, pooled=16)).eval()
    error = onnx_export.export_speaker(net, tmp_path / "campplus.onnx")
    assert error < 1e-3
    run = onnx_export.session(tmp_path / "campplus.onnx")
    assert len(run.get_inputs()) == 1
    assert run.run(None, {run.get_inputs()[0].name: np.zeros((1, 77, 80), np.float32)})[0].reshape(-1).shape == (192,)


def test_a_difference_between_torch_and_onnx_is_not_exported(tmp_path: Path) -> None:
    class Different(torch.nn.Module):
        """Traced in one way, computed in another: the exporter cannot see the Python branch."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mean(1).repeat(1, 3)[:, :192] * (1.0 if x.shape[1] == 200 else 2.0)

    with pytest.raises(RuntimeError, match="differs from torch"):
        onnx_export.export_speaker(Different(), tmp_path / "campplus.onnx", half=False)


def test_phone_times_become_labels_per_20_ms() -> None:
    symbols = tokenizer.Symbols(["a", "b"], ["<blank>"])
    spoken = Utterance("k", Path("x.wav"), "", 0.2, phones=(("a", 0.06), ("?", 0.1), ("b", 0.16)))
    assert symbols.phone_frames(spoken, 10).tolist() == [0, 0, 0, -100, -100, 1, 1, 1, -100, -100]


def test_letters_are_counted_only_where_there_are_no_phone_times() -> None:
    spoken = Utterance("k", Path("x.wav"), "zz", 0.2, phones=(("a", 0.1),))
    written = [Utterance(f"{i}", Path("x.wav"), "Ab", 0.2) for i in range(5)]
    symbols = tokenizer.Symbols.of([spoken, *written])
    assert symbols.letters == ["<blank>", "a", "b"]
    assert symbols.letter_ids(written[0]).tolist() == [1, 2]
    assert len(symbols.letter_ids(spoken)) == 0


def test_warping_by_one_changes_nothing_and_by_more_moves_the_spectrum_up() -> None:
    mel = torch.zeros(2, 3, 128)
    mel[:, :, 40] = 1.0
    warped = tokenizer.warp_mel(mel, torch.tensor([1.0, 1.1]))
    assert torch.equal(warped[0], mel[0])
    assert int(warped[1, 0].argmax()) == 44


def test_training_learns_the_phones_of_made_up_vowels(tmp_path: Path) -> None:
    data = {"lists": [str(write_records(tmp_path, 10))], "held_out": 2}
    run = {**TINY_RUN, "out": str(tmp_path / "run"), "ema": None}
    plain = {**run, "data": data, "model": {**TINY_TOKENIZER, "width": 48}, "batch_size": 4, "warp": 0.0}
    recipe = tokenizer.TokenizerRecipe(config.from_dict(tokenizer.TokenizerTraining, plain))
    for group in recipe.optimizers["all"].param_groups:
        group["lr"] = 5e-3
    losses = [recipe.train_step(step) for step in range(100)]
    assert losses[0]["phone_accuracy"] < 0.7
    with torch.no_grad():
        measures = recipe.validate()
    assert measures["phone_accuracy"] > 0.85
    assert measures["codes_used"] >= 3


def test_records_without_phone_times_train_by_ctc(tmp_path: Path) -> None:
    path = write_records(tmp_path, 10)
    path.write_text(path.read_text().replace('"phones"', '"unused"'), encoding="utf-8")
    run = {**TINY_RUN, "out": str(tmp_path / "run")}
    plain = {**run, "data": {"lists": [str(path)], "held_out": 2}, "model": TINY_TOKENIZER, "batch_size": 4}
    recipe = tokenizer.TokenizerRecipe(config.from_dict(tokenizer.TokenizerTraining, plain))
    parts = recipe.train_step(0)
    assert set(parts) == {"mel", "ctc", "grad"}
    assert recipe.decoder.sizes[1] == 4  # blank and three letters


def test_halved_is_what_the_convolutions_leave() -> None:
    conv = torch.nn.Conv1d(1, 1, 3, stride=2, padding=1)
    for n in range(1, 20):
        assert conv(torch.zeros(1, 1, n)).shape[2] == int(halved(torch.tensor(n)))
