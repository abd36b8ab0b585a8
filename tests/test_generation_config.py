"""The written form of the settings says what the code says, and mini's fits mini's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from osum_echat import config
from osum_echat.config import ConfigError
from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.guards import AgeChoice
from osum_echat.model.config import load_config


def test_the_written_settings_are_the_defaults(root_dir: Path) -> None:
    assert config.load(GenerationConfig, root_dir / "conf" / "generation.yaml") == GenerationConfig()


def test_settings_survive_being_written_and_read() -> None:
    data = config.to_dict(GenerationConfig().with_profile("as_released"))
    assert config.from_dict(GenerationConfig, data) == GenerationConfig().with_profile("as_released")


def test_mini_settings_fit_its_tokenizer_and_prompts(root_dir: Path) -> None:
    settings = config.load(GenerationConfig, root_dir / "recipes" / "mini" / "conf" / "generation.yaml")
    assert set(settings.modes) == set(OUTPUTS)
    prompts = config.read_yaml(root_dir / "recipes" / "mini" / "conf" / "prompts.yaml")
    assert {task: sentences[0] for task, sentences in prompts.items()} == settings.instructions
    tokenizer = AutoTokenizer.from_pretrained(root_dir / "recipes" / "mini" / "conf" / "tokenizer")
    vocab = load_config(root_dir / "recipes" / "mini" / "conf" / "model.yaml").vocabulary
    assert settings.guards.age is not None
    age = AgeChoice.compile(settings.guards.age, tokenizer, vocab)
    assert age is not None and len(age.choice_ids) == len(settings.guards.age.choices)


@pytest.mark.parametrize("data", [{"modes": {"song": {}}}, {"profile": "no"}, {"modes": {"text": {"max_new": 0}}}, {"guard": {}}])
def test_wrong_settings_are_refused(data: dict) -> None:
    with pytest.raises(ConfigError):
        config.from_dict(GenerationConfig, data)
    with pytest.raises(ValueError, match="song"):
        GenerationConfig().mode("song")


def test_modes_that_are_not_named_keep_the_published_settings() -> None:
    settings = config.from_dict(GenerationConfig, {"modes": {"text": {"max_new": 5}}})
    assert settings.mode("text").max_new == 5
    assert settings.mode("text2token") == GenerationConfig().mode("text2token")
