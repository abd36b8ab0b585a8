"""Model configs: the full-size file, the published training YAML, what is refused; and the inspector."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from osum_echat.config import ConfigError, to_yaml
from osum_echat.model import checkpoint as model_io
from osum_echat.model import inspect
from osum_echat.model.config import ModelConfig, load_config
from tests.model_case import CONFIG, make_model

ROOT = Path(__file__).parent.parent
TINY = Path(__file__).parent / "data" / "osum" / "tiny_config.yaml"


def test_the_full_size_file_is_the_default_model() -> None:
    config = load_config(ROOT / "conf" / "ct_config.yaml")
    default = ModelConfig()
    assert (config.encoder, config.adapter, config.vocabulary) == (default.encoder, default.adapter, default.vocabulary)
    assert config.llm.config == default.llm.config
    assert config.llm.rotary_dtype == "bfloat16"


def test_the_published_training_yaml_is_read_as_it_is() -> None:
    config = load_config(TINY, ["llm.attention=eager"])
    assert (config.encoder.dim, config.encoder.layers, config.adapter.dim, config.adapter.ffn) == (64, 2, 64, 2560)
    assert config.vocabulary.text_size == 151936 and config.vocabulary.speech_codes == 4096
    assert config.llm.attention == "eager" and config.llm.rotary_dtype == "bfloat16"
    assert Path(config.tokenizer or "").name == "tiny_llm" and config.lora is None


def test_lora_of_the_published_yaml_is_kept(tmp_path: Path) -> None:
    llm = tmp_path / "llm"
    llm.mkdir()
    (llm / "config.json").write_text(json.dumps(CONFIG.llm.config))
    file = tmp_path / "train.yaml"
    file.write_text(
        "llm_path: llm\nencoder_conf: {output_size: 64, attention_heads: 4}\nuse_lora: true\nlora_rank: 8\nlora_alpha: 16\n"
    )
    lora = load_config(file).lora
    assert lora is not None and (lora.rank, lora.alpha) == (8, 16.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("llm_path: x\nadapter_type: osum_echat2", "adapter_type: 'osum_echat2' is not supported"),
        ("llm_path: x\nencoder_conf: {input_layer: linear}", "encoder_conf.input_layer"),
        ("llm_path: x\nencoder_conf: {colour: red}", "unknown key encoder_conf.colour"),
        ("llm_path: nowhere\nencoder_conf: {}", "config.json not found"),
        ("encoder_conf: {}", "llm_path is missing"),
        ("encoder: {layer: 3}", "did you mean encoder.layers"),
        ("encoder: {dim: 10, heads: 3}", "must be a multiple"),
        ("adapter: {encoder_layers: [25]}", "must be different numbers in 1..24"),
        ("adapter: {tags: {gender: [male]}}", "at least two different labels"),
    ],
)
def test_what_cannot_be_used_is_refused_by_name(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "c.yaml")


def test_inspect_prints_parts_and_checks_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_io.save_model(make_model(), None, tmp_path / "ck")
    assert inspect.main([str(folder)]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[:6]] == ["part", "encoder", "adapter", "llm", "speech", "all"]
    assert "all 129 entries of the model are there and fit" in out
    assert inspect.main([str(folder), "--checkpoint", str(folder), "encoder.layers=2"]) == 1
    assert "15 unexpected: encoder.blocks.2" in capsys.readouterr().err
    assert inspect.main([str(tmp_path / "nowhere.yaml")]) == 2


def test_inspect_counts_the_published_model_without_allocating_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert inspect.main([str(ROOT / "conf" / "ct_config.yaml")]) == 0
    out = capsys.readouterr().out
    assert "3,458,797,569" in out and "6.92 GB in bfloat16" in out


def test_llm_and_vocabulary_must_agree() -> None:
    import dataclasses

    from osum_echat.dialogue.vocabulary import Vocabulary

    with pytest.raises(ValueError, match="the LLM has 60 text rows"):
        make_model(dataclasses.replace(CONFIG, vocabulary=Vocabulary(61, 2, None, 20)))


def test_a_config_written_is_read_back_equal(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(to_yaml(CONFIG))
    assert load_config(tmp_path / "c.yaml") == CONFIG
