"""An encoder between Whisper's and a trained one; everything else stays as it was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, WhisperConfig, WhisperModel

from osum_echat.model import checkpoint as model_io
from osum_echat.model.whisper import read_whisper
from recipes.mini.blend import blend
from tests.model_case import make_model


@pytest.fixture(scope="module")
def trained_and_whisper(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A checkpoint folder, and a Whisper of its encoder's size with other weights."""
    torch.manual_seed(0)
    model = make_model()
    sizes = model.config.encoder
    whisper = WhisperModel(
        WhisperConfig(
            d_model=sizes.dim,
            encoder_layers=sizes.layers,
            encoder_attention_heads=sizes.heads,
            encoder_ffn_dim=sizes.ffn,
            num_mel_bins=sizes.mels,
            max_source_positions=sizes.max_positions,
            decoder_layers=1,
            decoder_attention_heads=1,
            decoder_ffn_dim=8,
            vocab_size=60,
            pad_token_id=0,
        )
    )
    folder = tmp_path_factory.mktemp("blend")
    whisper.save_pretrained(folder / "whisper")
    tokenizer = AutoTokenizer.from_pretrained("recipes/mini/conf/tokenizer")
    return model_io.save_model(model, tokenizer, folder / "trained"), folder / "whisper"


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_the_encoder_is_the_mean_by_share_and_the_rest_is_kept(share: float, trained_and_whisper, tmp_path: Path):
    trained, whisper = trained_and_whisper
    before = model_io.load_weights(trained).float().state_dict()
    after = model_io.load_weights(blend(trained, whisper, share, tmp_path / "out")).float().state_dict()
    _, own = read_whisper(whisper)
    for name, tensor in after.items():
        wanted = before[name]
        if name.startswith("encoder."):
            other = own[name.removeprefix("encoder.")].float()
            wanted = share * wanted + (1 - share) * other[: len(wanted)]
        torch.testing.assert_close(tensor, wanted, atol=2e-3, rtol=2e-3)  # stored in half precision


def test_a_share_outside_its_range_is_refused(trained_and_whisper, tmp_path: Path):
    with pytest.raises(ValueError, match="within 0 and 1"):
        blend(*trained_and_whisper, 1.5, tmp_path / "out")


def test_a_training_run_is_read_as_a_run(trained_and_whisper, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    trained, whisper = trained_and_whisper
    monkeypatch.setattr("recipes.mini.blend.is_training_folder", lambda path: True)
    monkeypatch.setattr("recipes.mini.blend.load_run", model_io.load_model)
    out = blend(trained, whisper, 1.0, tmp_path / "out")
    wanted = model_io.load_weights(trained).float().state_dict()
    for name, tensor in model_io.load_weights(out).float().state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], atol=2e-3, rtol=2e-3)
