"""Directories: YAML as data, weights under every spelling, and errors that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from osum_echat.golden.token2wav import TINY
from osum_echat.token2wav import Token2Wav, released_yaml
from osum_echat.token2wav.checkpoint import load_into, vocoder_state
from osum_echat.token2wav.config import FlowConfig, Token2WavConfig, VocoderConfig
from osum_echat.token2wav.flow import FlowModel
from osum_echat.token2wav.vocoder import Vocoder
from tests.token2wav_case import recorded_speaker, recorded_tokens, weights, write_directory

RELEASED = """
__set_seed1: !apply:os.system ["touch {trap}"]
sample_rate: 22050
spk_embed_dim: 192
llm: !new:cosyvoice.llm.llm.TransformerLM
    text_encoder: !new:nothing.at.All
flow: !new:cosyvoice.flow.flow.MaskedDiffWithXvec
    input_size: 512
    output_size: 80
    spk_embed_dim: !ref <spk_embed_dim>
    vocab_size: 4096
    input_frame_rate: 25
    encoder: !new:cosyvoice.transformer.encoder.ConformerEncoder
        output_size: 512
        attention_heads: 8
        linear_units: 2048
        num_blocks: 6
        input_layer: 'linear'
        pos_enc_layer_type: 'rel_pos_espnet'
        selfattention_layer_type: 'rel_selfattn'
        use_cnn_module: False
        macaron_style: False
    length_regulator: !new:cosyvoice.flow.length_regulator.InterpolateRegulator
        channels: 80
        sampling_ratios: [1, 1, 1, 1]
    decoder: !new:cosyvoice.flow.flow_matching.ConditionalCFM
        cfm_params: !new:omegaconf.DictConfig
            content:
                sigma_min: 1e-06
                solver: 'euler'
                t_scheduler: 'cosine'
                training_cfg_rate: 0.2
                inference_cfg_rate: 0.7
        estimator: !new:cosyvoice.flow.decoder.ConditionalDecoder
            channels: [256, 256]
            attention_head_dim: 64
            n_blocks: 4
            num_mid_blocks: 12
            num_heads: 8
            act_fn: 'gelu'
hift: !new:cosyvoice.hifigan.generator.HiFTGenerator
    in_channels: 80
    base_channels: 512
    nb_harmonics: 8
    sampling_rate: !ref <sample_rate>
    nsf_voiced_threshold: 10
    upsample_rates: [8, 8]
    upsample_kernel_sizes: [16, 16]
    istft_params:
        n_fft: 16
        hop_len: 4
    resblock_dilation_sizes: [[1, 3, 5], [1, 3, 5], [1, 3, 5]]
    f0_predictor: !new:cosyvoice.hifigan.f0_predictor.ConvRNNF0Predictor
        cond_channels: 512
feat_extractor: !name:matcha.utils.audio.mel_spectrogram
    n_fft: 1024
    sampling_rate: !ref <sample_rate>
    center: False
"""


@pytest.fixture
def released(tmp_path: Path) -> Path:
    path = tmp_path / "cosyvoice.yaml"
    path.write_text(RELEASED.replace("{trap}", str(tmp_path / "trap")), encoding="utf-8")
    return path


def test_released_yaml_gives_the_default_sizes_and_runs_nothing(released: Path) -> None:
    assert released_yaml.load_config(released) == Token2WavConfig()
    assert not (released.parent / "trap").exists()
    assert released_yaml.read(released)["hift"]["sampling_rate"] == 22050


def test_yaml_values_replace_defaults(released: Path) -> None:
    text = (
        released.read_text(encoding="utf-8")
        .replace("vocab_size: 4096", "vocab_size: 256")
        .replace("num_blocks: 6", "num_blocks: 3")
    )
    released.write_text(text, encoding="utf-8")
    config = released_yaml.load_config(released)
    assert (config.flow.vocab_size, config.flow.encoder.num_blocks) == (256, 3)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("sample_rate: 22050", "sample_rate: 24000", "sample_rate is 24000"),
        ("act_fn: 'gelu'", "act_fn: 'snakebeta'", "act_fn is 'snakebeta'"),
        ("!ref <spk_embed_dim>", "!ref <speaker_width>", "<speaker_width> points at nothing"),
        ("spk_embed_dim: 192", "spk_embed_dim: !ref <spk_embed_dim>", "refers to itself"),
        ("vocab_size: 4096", "vocab_size: many", "vocab_size must be int"),
        ("upsample_rates: [8, 8]", "upsample_rates: [8, 4]", "128 samples per frame, not 256"),
    ],
)
def test_what_is_not_supported_is_named(released: Path, old: str, new: str, message: str) -> None:
    released.write_text(released.read_text(encoding="utf-8").replace(old, new, 1), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        released_yaml.load_config(released)


def test_written_yaml_reads_back_equal(tmp_path: Path) -> None:
    released_yaml.write(tmp_path / "cosyvoice.yaml", TINY)
    assert released_yaml.load_config(tmp_path / "cosyvoice.yaml") == TINY


def _sound(directory: Path) -> torch.Tensor:
    model = Token2Wav.load(directory, device="cpu")
    return torch.from_numpy(model.synthesize(recorded_tokens(10), recorded_speaker(), steps=2)[0])


def test_weights_sound_the_same_under_every_spelling(tmp_path: Path) -> None:
    new = _sound(write_directory(tmp_path / "new"))
    old_names = {
        key.replace("parametrizations.weight.original0", "weight_g").replace(
            "parametrizations.weight.original1", "weight_v"
        ): value
        for key, value in weights("hift").items()
    }
    old = write_directory(tmp_path / "old")
    torch.save({f"generator.{key}": value for key, value in old_names.items()}, old / "hift.pt")
    (old / "llm.pt").write_bytes(b"never opened")
    assert torch.equal(_sound(old), new)
    folded = write_directory(tmp_path / "folded")
    for name in ("flow", "hift"):
        (folded / f"{name}.pt").unlink()
    save_file(weights("flow"), folded / "flow.safetensors")
    save_file(vocoder_state(weights("hift")), folded / "hift.safetensors")
    assert torch.equal(_sound(folded), new)


def test_weight_norm_is_folded_with_the_norm_over_all_but_the_first_dimension() -> None:
    state = weights("hift")
    scale, direction = (state[f"ups.0.parametrizations.weight.original{i}"].double() for i in (0, 1))
    wanted = scale * direction / direction.square().sum(dim=(1, 2), keepdim=True).sqrt()
    found = vocoder_state(state)["ups.0.weight"]
    assert (found.double() - wanted).abs().max() < 1e-6


def test_every_missing_unexpected_and_misshapen_key_is_named() -> None:
    state = weights("flow")
    del state["encoder.after_norm.bias"], state["input_embedding.weight"]
    state["encoder.after_norm.bais"] = torch.zeros(96)
    state["encoder_proj.bias"] = torch.zeros(81)
    with pytest.raises(ValueError) as error:
        load_into(FlowModel(TINY.flow), state, "flow.pt")
    text = str(error.value)
    assert "4 differences" in text
    for part in (
        "missing encoder.after_norm.bias",
        "missing input_embedding.weight",
        "unexpected encoder.after_norm.bais",
        "encoder_proj.bias has shape [81]",
    ):
        assert part in text


def test_half_of_a_weight_norm_pair_is_an_unexpected_key() -> None:
    state = weights("hift")
    del state["conv_pre.parametrizations.weight.original1"]
    with pytest.raises(ValueError, match=r"unexpected conv_pre\.parametrizations\.weight\.original0"):
        load_into(Vocoder(TINY.vocoder), vocoder_state(state), "hift.pt")


class _Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_a_pickle_that_runs_code_is_refused(tmp_path: Path) -> None:
    directory = write_directory(tmp_path / "d")
    torch.save({"x": _Trap(tmp_path / "trap")}, directory / "flow.pt")
    with pytest.raises(ValueError, match="cannot be read as plain weights"):
        Token2Wav.load(directory, device="cpu")
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("name", ["cosyvoice.yaml", "flow.pt", "hift.pt"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    directory = write_directory(tmp_path / "d")
    (directory / name).unlink()
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        Token2Wav.load(directory, device="cpu")


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not found"):
        Token2Wav.load(tmp_path / "nowhere")


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size must be positive"):
        FlowConfig(vocab_size=0)
    with pytest.raises(ValueError, match="40 mel bins but the vocoder reads 80"):
        Token2WavConfig(flow=FlowConfig(output_size=40), vocoder=VocoderConfig())
