"""Log-mels computed on the training device: what a worker would have computed, from 16-bit samples."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from osum_echat.audio.features import LogMel, num_frames
from osum_echat.data.batch import Batch, collate
from osum_echat.data.config import AugmentConfig
from osum_echat.data.sound import MASKED, Sound, Sounds
from osum_echat.training.config import LossConfig
from osum_echat.training.objective import Objective
from tests import training_case
from tests.data_case import loader, record, write_raw

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_raw(tmp_path_factory.mktemp("sound"), [record(n) for n in range(9)])


def batches(raw: str, features: str, workers: int = 0, train: bool = True) -> list[Batch]:
    augment = AugmentConfig(speeds=[1.0, 1.1], max_time_mask=6, max_mel_mask=3, max_substitution=8)
    return list(loader({"raw": raw}, train=train, features=features, augment=augment, workers=workers))


@pytest.mark.parametrize(("train", "workers"), [(True, 0), (True, 2), (False, 0)])
def test_a_batch_hears_what_workers_would_have_computed(raw: str, train: bool, workers: int):
    """With all augmentation: stretches are drawn alike, whoever computes the log-mels."""
    there, here = batches(raw, "torch", workers, train), batches(raw, "device", workers, train)
    assert [b.keys for b in here] == [b.keys for b in there] and here
    for late, ready in zip(here, there, strict=True):
        assert late.feats_NTF.shape[2] == 0 and late.sounds is not None and late.sounds.pcm_NS.dtype == torch.int16
        computed = late.to(CPU)
        assert computed.sounds is None
        assert torch.equal(computed.feats_lengths_N, ready.feats_lengths_N)
        # 16 bits of samples that augmentation has changed: their rounding is heard where it is quietest.
        torch.testing.assert_close(computed.feats_NTF, ready.feats_NTF, atol=2e-2 if train else 2e-5, rtol=0)
        assert (computed.feats_NTF - ready.feats_NTF).abs().mean() < 1e-4
        assert bool(((computed.feats_NTF == 0) == (ready.feats_NTF == 0)).all())


def test_recordings_of_16_bits_arrive_exactly_whatever_stands_beside_them():
    rng = np.random.default_rng(0)
    waves = [(rng.integers(-9000, 9000, size) / 32768).astype(np.float32) for size in (5003, 1601, 12345)]
    sounds = [Sound.of(wave) for wave in waves]
    assert all(sound.scale == 1 / 32768 for sound in sounds)
    lengths_N = torch.tensor([len(sound) for sound in sounds])
    feats_NTF = Sounds.of(sounds, 80).features(lengths_N, CPU)
    for n, wave in enumerate(waves):
        alone_TF = LogMel(80)(wave)
        assert len(alone_TF) == len(sounds[n]) == num_frames(len(wave))
        torch.testing.assert_close(feats_NTF[n, : len(alone_TF)], alone_TF, atol=1e-5, rtol=0)
        assert not feats_NTF[n, len(alone_TF) :].any()


def test_many_recordings_are_computed_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(1)
    sounds = [Sound.of(rng.standard_normal(3200 + 160 * n).astype(np.float32)) for n in range(7)]
    lengths_N = torch.tensor([len(sound) for sound in sounds])
    whole = Sounds.of(sounds, 80).features(lengths_N, CPU)
    monkeypatch.setattr("osum_echat.data.sound._FRAMES_AT_ONCE", 60)
    torch.testing.assert_close(Sounds.of(sounds, 80).features(lengths_N, CPU), whole, atol=1e-6, rtol=0)


def test_louder_and_quieter_than_16_bits_hold():
    rng = np.random.default_rng(2)
    for loudness in (7.0, 1e-4):
        wave = (loudness * rng.standard_normal(8000)).astype(np.float32)
        sound = Sound.of(wave)
        feats_NTF = Sounds.of([sound], 80).features(torch.tensor([len(sound)]), CPU)
        torch.testing.assert_close(feats_NTF[0], LogMel(80)(wave), atol=1e-3, rtol=0)


def test_masks_and_moved_frames():
    wave = np.random.default_rng(3).standard_normal(1600).astype(np.float32)
    source_T, hidden_F = np.arange(10), np.zeros(80, dtype=np.bool_)
    source_T[4:6], source_T[8], hidden_F[7] = (0, 1), MASKED, True
    plain, changed = (
        Sounds.of([s], 80).features(torch.tensor([10]), CPU)[0] for s in (Sound.of(wave), Sound.of(wave, source_T, hidden_F))
    )
    wanted = plain.clone()
    wanted[4:6] = plain[0:2]
    wanted[8], wanted[:, 7] = 0, 0
    assert torch.equal(changed, wanted)


def test_what_is_too_short_or_not_finite():
    with pytest.raises(ValueError, match="200 samples"):
        Sound.of(np.zeros(200, dtype=np.float32))
    silent = Sound.of(np.zeros(400, dtype=np.float32))
    assert bool(Sounds.of([silent], 80).features(torch.tensor([2]), CPU).isfinite().all())
    broken = Sound.of(np.full(400, np.nan, dtype=np.float32))
    assert not bool(Sounds.of([broken], 80).features(torch.tensor([2]), CPU).isfinite().any())


def test_training_takes_either():
    objective = Objective(training_case.tiny_model(), LossConfig()).eval()
    rng = np.random.default_rng(4)
    examples = [training_case.example(n) for n in range(4)]
    waves = [[(rng.integers(-9000, 9000, 160 * len(f)) / 32768).astype(np.float32) for f in e.feats] for e in examples]
    log_mel = LogMel(training_case.MELS)
    losses = []
    for make in (log_mel, Sound.of):
        changed = [dataclasses.replace(e, feats=[make(w) for w in own]) for e, own in zip(examples, waves, strict=True)]
        micro = objective.prepare(collate(changed, training_case.MELS), CPU)
        assert micro.batch.feats_NTF.shape[2] == training_case.MELS
        losses.append(objective(micro, dict(micro.counts))[0])
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=0)
