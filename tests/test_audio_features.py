"""Features equal to the recorded ones, and augmentation that repeats from its generator."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from osum_echat.audio import augment
from osum_echat.audio import features as audio_features
from osum_echat.audio.features import LogMel, kaldi_fbank, mel_22k, mel_filter_bank, num_frames
from osum_echat.audio.resample import resample, resample_sinc
from tests.dialogue_case import OSUM

CASES = np.load(OSUM / "cases.npz")
FRONTEND = load_file(OSUM.parent / "token2wav" / "frontend.safetensors")


@pytest.mark.parametrize("index", range(4))
def test_log_mel_equals_the_recorded_one(index):
    samples = CASES[f"wav{index}_int16"].astype(np.float32) / 32768
    ours = LogMel(80)(samples).numpy()
    np.testing.assert_allclose(ours, CASES[f"feat{index}"], atol=1e-5, rtol=0)
    assert len(ours) == num_frames(len(samples))


def test_log_mel_of_128_bins_equals_the_recorded_one():
    # The recording itself is 1.6e-5 from the same computation in float64, so 1e-5 cannot be asked for here.
    ours = LogMel(128)(FRONTEND["wav16k_from22k"][0]).numpy().T
    np.testing.assert_allclose(ours, FRONTEND["whisper_logmel128"][0], atol=5e-5, rtol=0)


def test_log_mel_of_several_recordings_is_that_of_each():
    two = torch.randn(2, 8000, generator=torch.Generator().manual_seed(0)) * torch.tensor([[1.0], [0.01]])
    both = LogMel(80)(two)
    for row in range(2):
        torch.testing.assert_close(both[row], LogMel(80)(two[row]), atol=1e-6, rtol=0)


def test_silence_and_the_shortest_recording_have_a_log_mel():
    assert torch.isfinite(LogMel(80)(np.zeros(16000, np.float32))).all()
    assert LogMel(80)(np.zeros(201, np.float32)).shape == (1, 80)
    with pytest.raises(ValueError, match="more than 200 samples"):
        LogMel(80)(np.zeros(200, np.float32))


def test_vocoder_mel_and_fbank_equal_the_recorded_ones():
    np.testing.assert_allclose(mel_22k(FRONTEND["wav22k"]).numpy(), FRONTEND["prompt_feat_BTF"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(mel_filter_bank(22050, 1024, 80, 8000.0).T, FRONTEND["mel_filterbank_22k"], atol=1e-8)
    np.testing.assert_allclose(kaldi_fbank(FRONTEND["wav16k_from22k"][0]).numpy(), FRONTEND["kaldi_fbank"], atol=1e-3, rtol=0)
    assert kaldi_fbank(np.zeros(100, np.float32)).shape == (0, 80)


def test_the_sinc_resampler_equals_the_recorded_one_to_the_bit():
    wav48 = torch.from_numpy(FRONTEND["wav48k"])
    wav22 = torch.from_numpy(FRONTEND["wav22k"])
    for source, rate, target, name in (
        (wav48, 48000, 16000, "wav16k_from48k"),
        (wav48, 48000, 22050, "wav22k"),
        (wav22, 22050, 16000, "wav16k_from22k"),
        (torch.from_numpy(FRONTEND["wav16k_from48k"]), 16000, 22050, "wav22k_from16k"),
    ):
        np.testing.assert_allclose(resample_sinc(source, rate, target).numpy(), FRONTEND[name], atol=4e-6, rtol=0)


def test_both_resamplers_keep_length_and_sound():
    samples = np.sin(2 * np.pi * 300 * np.arange(22050) / 22050).astype(np.float32)
    by_soxr, by_sinc = resample(samples, 22050, 16000), resample_sinc(torch.from_numpy(samples), 22050, 16000).numpy()
    assert len(by_soxr) == len(by_sinc) == 16000
    assert np.abs(by_soxr - by_sinc)[200:-200].max() < 1e-2
    assert resample(samples, 16000, 16000) is samples


def features(frames: int = 200) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((frames, 80)).astype(np.float32)


@pytest.mark.parametrize("change", [augment.spec_augment, augment.spec_substitute])
def test_log_mel_augmentation_repeats_from_its_generator_and_keeps_the_input(change):
    feats, before = features(), features()
    one, two = (change(feats, np.random.default_rng(5)) for _ in range(2))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(feats, before)
    assert one.shape == feats.shape and not np.array_equal(one, feats)
    assert not np.array_equal(one, change(feats, np.random.default_rng(6)))


def test_spec_augment_masks_whole_stretches_within_its_bounds():
    out = augment.spec_augment(features(), np.random.default_rng(1), 1, 20, 1, 5)
    frames, mels = (out == 0).all(axis=1), (out == 0).all(axis=0)
    assert 1 <= frames.sum() <= 20 and 1 <= mels.sum() <= 5
    assert (out == 0).sum() == 80 * frames.sum() + 200 * mels.sum() - frames.sum() * mels.sum()


def test_spec_substitute_only_moves_frames():
    feats = features()
    out = augment.spec_substitute(feats, np.random.default_rng(2))
    rows = {row.tobytes() for row in feats}
    assert all(row.tobytes() in rows for row in out)


def test_noise_has_the_ratio_asked_for():
    rng = np.random.default_rng(3)
    signal = rng.standard_normal(16000).astype(np.float32)
    for noise in (None, rng.standard_normal(3000).astype(np.float32)):
        added = augment.add_noise(signal, 10.0, rng, noise) - signal
        assert abs(10 * np.log10(np.mean(signal**2) / np.mean(added**2)) - 10) < 0.2
    silence = np.zeros(100, np.float32)
    assert augment.add_noise(silence, 10.0, rng) is silence


def test_speed_and_reverberation_keep_what_they_should():
    rng = np.random.default_rng(4)
    signal = rng.standard_normal(16000).astype(np.float32)
    assert abs(len(augment.change_speed(signal, 16000, 1.1)) - 16000 / 1.1) <= 2
    assert augment.change_speed(signal, 16000, 1.0) is signal
    wet = augment.reverberate(signal, 16000, 0.3, rng)
    assert len(wet) == len(signal) and abs(np.mean(wet**2) / np.mean(signal**2) - 1) < 1e-3
    assert np.corrcoef(wet, signal)[0, 1] > 0.3
    np.testing.assert_allclose(augment.reverberate(signal, 16000, 0.0, rng, np.array([1.0], np.float32)), signal, atol=1e-5)


@pytest.mark.parametrize("mels", [80, 128])
def test_the_native_log_mel_equals_ours_to_a_millionth(mels: int) -> None:
    """asrfront, which is an option. Single bins, far below the loudest, differ by more in float32, ours from exact arithmetic too."""
    pytest.importorskip("asrfront", reason="needs `pip install asrfront`")
    native = LogMel(mels, native=True)
    assert native._native is not None
    for index in range(4):
        samples = CASES[f"wav{index}_int16"].astype(np.float32) / 32768
        found, wanted = native(samples), LogMel(mels)(samples)
        assert found.shape == wanted.shape and found.is_contiguous()
        differences = (found - wanted).abs()
        assert differences.mean() < 1e-7 and (differences < 1e-6).float().mean() > 0.998 and differences.max() < 2e-5
    samples[100] = np.nan
    assert native(samples).isnan().any(), "a damaged recording stays damaged"


def test_features_that_are_asked_for_by_name_must_be_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audio_features, "_asrfront", lambda: None)
    assert not audio_features.has_native("auto") and not audio_features.has_native("torch")
    with pytest.raises(ValueError, match="pip install"):
        audio_features.has_native("asrfront")
