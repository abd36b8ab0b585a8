"""Whisper encoders from every published form give the outputs of the implementation that published them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import WhisperConfig, WhisperModel

from osum_echat.model.checkpoint import load_parts
from osum_echat.model.encoder import AudioEncoder
from osum_echat.model.whisper import read_whisper
from osum_echat.tools import whisper as convert_whisper
from tests.model_case import make_model

SIZES = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "num_mel_bins": 8}


@pytest.fixture(scope="module")
def original() -> WhisperModel:
    torch.manual_seed(0)
    model = WhisperModel(
        WhisperConfig(
            **SIZES,
            decoder_layers=1,
            decoder_attention_heads=2,
            decoder_ffn_dim=8,
            vocab_size=60,
            pad_token_id=0,
            max_source_positions=50,
        )
    )
    with torch.no_grad():
        for name, parameter in model.encoder.named_parameters():
            if "embed_positions" not in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@torch.no_grad()
def assert_same_encoder(path: Path, original: WhisperModel, tolerance: float = 1e-5) -> None:
    config, state = read_whisper(path)
    encoder = AudioEncoder(config).eval()
    encoder.load_state_dict(state)
    feats_NFT = torch.randn(1, 8, 100)
    wanted = original.encoder(feats_NFT).last_hidden_state
    (found,), _ = encoder(feats_NFT.transpose(1, 2), torch.tensor([100]))
    torch.testing.assert_close(found, wanted, atol=tolerance, rtol=0)


def test_hugging_face_folder(original: WhisperModel, tmp_path: Path) -> None:
    original.save_pretrained(tmp_path)
    assert_same_encoder(tmp_path, original)


def test_openai_file(original: WhisperModel, tmp_path: Path) -> None:
    torch.save({"dims": {"n_audio_head": 4}, "model_state_dict": openai_names(original)}, tmp_path / "tiny.pt")
    assert_same_encoder(tmp_path / "tiny.pt", original)


@pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
def test_ctranslate2_folder(kind: str, original: WhisperModel, tmp_path: Path) -> None:
    write_ctranslate2(original, tmp_path / "model.bin", kind)
    assert_same_encoder(tmp_path, original, {"float32": 1e-5, "float16": 0.02, "int8": 0.3}[kind])


def test_the_tool_writes_a_file_that_a_model_takes_as_its_encoder(original: WhisperModel, tmp_path: Path, capsys) -> None:
    original.save_pretrained(tmp_path / "hf")
    target = tmp_path / "out" / "encoder.safetensors"
    assert convert_whisper.main([str(tmp_path / "hf"), str(target)]) == 0
    assert "layers: 2" in capsys.readouterr().out
    with safe_open(target, framework="pt") as file:
        sizes = json.loads(file.metadata()["encoder"])
    import dataclasses

    from osum_echat.model.config import EncoderConfig
    from tests.model_case import CONFIG

    model = make_model(dataclasses.replace(CONFIG, encoder=EncoderConfig(**sizes)))
    load_parts(model, target, ["encoder"])
    assert torch.equal(model.encoder.blocks[1].ffn.up.weight, original.encoder.layers[1].fc1.weight)


def test_other_things_are_refused_with_what_is_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a Whisper checkpoint that can be read"):
        read_whisper(tmp_path)
    (tmp_path / "model.bin").write_bytes(struct.pack("<I", 6) + b"\x03\x00ab")
    with pytest.raises(ValueError, match="damaged"):
        read_whisper(tmp_path)
    torch.save({"a": torch.zeros(1)}, tmp_path / "x.pt")
    with pytest.raises(ValueError, match="not a Whisper file of OpenAI's form"):
        read_whisper(tmp_path / "x.pt")


# ---- writers of the other two forms --------------------------------------------------------------------------------------------------

_OPENAI = {
    "self_attn_layer_norm": "attn_ln",
    "self_attn.q_proj": "attn.query",
    "self_attn.k_proj": "attn.key",
    "self_attn.v_proj": "attn.value",
    "self_attn.out_proj": "attn.out",
    "final_layer_norm": "mlp_ln",
    "fc1": "mlp.0",
    "fc2": "mlp.2",
}


def openai_names(original: WhisperModel) -> dict[str, Tensor]:
    out = {}
    for name, tensor in original.encoder.state_dict().items():
        new = name.replace("layers.", "blocks.").replace("layer_norm", "ln_post") if name.startswith("layer_norm") else name
        if name.startswith("layers."):
            _, number, rest = name.split(".", 2)
            inner, _, kind = rest.rpartition(".")
            new = f"blocks.{number}.{_OPENAI[inner]}.{kind}"
        out["encoder." + new.replace("embed_positions.weight", "positional_embedding")] = tensor
    return {**out, "decoder.ln.weight": torch.zeros(1)}


def write_ctranslate2(original: WhisperModel, file: Path, kind: str) -> None:
    """The file that CTranslate2's converter would write (its variables of the encoder)."""
    e = original.encoder
    variables: dict[str, Tensor] = {"num_heads": torch.tensor(4, dtype=torch.int16)}

    def linear(name: str, weight: Tensor, bias: Tensor, quantize: bool = True) -> None:
        if kind == "int8" and quantize:
            scale = 127 / weight.abs().amax(1)
            variables[f"{name}/weight"] = (weight * scale[:, None]).round().to(torch.int8)
            variables[f"{name}/weight_scale"] = scale
        else:
            variables[f"{name}/weight"] = weight
        variables[f"{name}/bias"] = bias

    def norm(name: str, module: torch.nn.LayerNorm) -> None:
        variables[f"{name}/gamma"], variables[f"{name}/beta"] = module.weight, module.bias

    for name in ("conv1", "conv2"):
        linear(name, getattr(e, name).weight, getattr(e, name).bias, quantize=False)
    variables["position_encodings/encodings"] = e.embed_positions.weight
    norm("layer_norm", e.layer_norm)
    for i, layer in enumerate(e.layers):
        a, at = layer.self_attn, f"layer_{i}"
        fused = torch.cat([a.q_proj.weight, a.k_proj.weight, a.v_proj.weight])
        linear(f"{at}/self_attention/linear_0", fused, torch.cat([a.q_proj.bias, torch.zeros_like(a.q_proj.bias), a.v_proj.bias]))
        linear(f"{at}/self_attention/linear_1", a.out_proj.weight, a.out_proj.bias)
        norm(f"{at}/self_attention/layer_norm", layer.self_attn_layer_norm)
        norm(f"{at}/ffn/layer_norm", layer.final_layer_norm)
        linear(f"{at}/ffn/linear_0", layer.fc1.weight, layer.fc1.bias)
        linear(f"{at}/ffn/linear_1", layer.fc2.weight, layer.fc2.bias)

    def string(text: str) -> bytes:
        return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"

    codes = {torch.float32: 0, torch.int8: 1, torch.int16: 2, torch.float16: 4}
    out = struct.pack("<I", 6) + string("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, tensor in variables.items():
        tensor = tensor.detach().half() if kind == "float16" and tensor.is_floating_point() else tensor.detach()
        data = tensor.numpy().tobytes()
        out += string("encoder/" + name) + struct.pack("<B", tensor.ndim) + struct.pack(f"<{tensor.ndim}I", *tensor.shape)
        out += struct.pack("<BI", codes[tensor.dtype], len(data)) + data
    file.write_bytes(out + struct.pack("<I", 0))
