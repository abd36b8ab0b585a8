"""A frozen encoder's outputs from disk are those that it would give; masks on them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from osum_echat import config as config_io
from osum_echat.config import ConfigError
from osum_echat.model.config import EncoderConfig
from osum_echat.model.encoder import AudioEncoder
from osum_echat.model.encoder_cache import EncoderCache
from osum_echat.model.encoder_masks import EncoderMasks
from osum_echat.training.build import make_trainer
from osum_echat.training.config import TrainConfig
from tests import training_case

CONFIG = EncoderConfig(mels=8, dim=16, heads=2, ffn=32, layers=2, max_positions=64, dropout=0.0)
LENGTHS = torch.tensor([21, 40, 33])


def recordings() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(3, 40, 8)


def encoder(seed: int = 0) -> AudioEncoder:
    torch.manual_seed(seed)
    return AudioEncoder(CONFIG).eval()


def test_cached_layers_equal_those_of_the_encoder(tmp_path: Path):
    own = encoder()
    cache = EncoderCache(tmp_path, own, (1, 2))
    expected, frames = own(recordings(), LENGTHS, (1, 2))
    for _ in range(2):
        found, found_frames = cache(own, recordings(), LENGTHS)
        assert torch.equal(found_frames, frames)
        for a, b in zip(found, expected, strict=True):
            for n, count in enumerate(frames.tolist()):
                torch.testing.assert_close(a[n, :count], b[n, :count], atol=5e-3, rtol=0)  # half precision on disk
    assert (cache.found, cache.missed) == (3, 3)


def test_only_new_recordings_are_encoded(tmp_path: Path):
    own = encoder()
    cache = EncoderCache(tmp_path, own, (2,))
    cache(own, recordings()[:2], LENGTHS[:2])
    found, _ = cache(own, recordings(), LENGTHS)
    assert (cache.found, cache.missed) == (2, 3)
    alone, _ = own(recordings()[2:, :33], LENGTHS[2:], (2,))
    torch.testing.assert_close(found[0][2, :17], alone[0][0], atol=5e-3, rtol=0)


@pytest.mark.parametrize("section", ["data", "validation"])
def test_features_of_the_device_are_refused(tmp_path: Path, section: str):
    config = training_case.base_config(tmp_path / "out", encoder_cache=str(tmp_path / "cache"), lr={"encoder": 0.0})
    made = config_io.from_dict(TrainConfig, config | {"data": {}, "validation": {}} | {section: {"features": "device"}})
    if section == "data":
        made.validation.features = "auto"  # it takes over what data says
    with pytest.raises(ConfigError, match=f"{section}.features: auto"):
        make_trainer(made, training_case.tiny_model(), None, training_case.ListLoader([[0]]))


def test_features_in_bfloat16_are_cached_too(tmp_path: Path):
    own = encoder().bfloat16()
    cache = EncoderCache(tmp_path, own, (2,))
    feats = recordings().bfloat16()
    first, _ = cache(own, feats, LENGTHS)
    again, _ = cache(own, feats, LENGTHS)
    assert (cache.found, cache.missed) == (3, 3)
    assert first[0].dtype == torch.bfloat16
    assert torch.equal(first[0], again[0])


def test_another_encoder_or_other_features_find_nothing(tmp_path: Path):
    first, second = encoder(0), encoder(1)
    EncoderCache(tmp_path, first, (2,))(first, recordings(), LENGTHS)
    other = EncoderCache(tmp_path, second, (2,))
    other(second, recordings(), LENGTHS)
    assert (other.found, other.missed) == (0, 3)
    changed = EncoderCache(tmp_path, first, (2,))
    changed(first, recordings() + 0.1, LENGTHS)
    assert changed.found == 0


def test_masks_hide_spans_and_channels_of_all_layers_alike():
    torch.manual_seed(0)
    lengths = torch.tensor([500, 250])
    layers = [torch.ones(2, 500, 40), 2 * torch.ones(2, 500, 40)]
    first, second = EncoderMasks(spans_per_second=2.0, longest_span=10, channels=0.2)(layers, lengths)
    assert torch.equal(2 * first, second)
    hidden_frames = (first.sum(dim=2) == 0).float().mean(dim=1)
    assert 0.05 < float(hidden_frames[0]) < 0.4 and 0 < float(hidden_frames[1]) < float(hidden_frames[0])
    hidden_channels = (first.sum(dim=1) == 0).float().mean(dim=1)
    assert bool((hidden_channels > 0.05).all()) and bool((hidden_channels < 0.5).all())


def test_no_masks_change_nothing():
    layers = [torch.randn(2, 30, 8)]
    assert torch.equal(EncoderMasks(spans_per_second=0, channels=0)(layers, torch.tensor([30, 20]))[0], layers[0])


def test_only_training_sees_masks():
    tiny_model = training_case.tiny_model()
    feats, lengths = torch.randn(1, 80, tiny_model.config.encoder.mels), torch.tensor([80])
    plain = tiny_model.eval().encode_audio(feats, lengths).embeds_PD
    tiny_model.encoder_masks = EncoderMasks(spans_per_second=5.0, channels=0.5)
    assert torch.equal(tiny_model.encode_audio(feats, lengths).embeds_PD, plain)
    assert not torch.equal(tiny_model.train().encode_audio(feats, lengths).embeds_PD, plain)


def test_masks_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="channels in"):
        EncoderMasks(channels=1.0)
