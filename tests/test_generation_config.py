"""The written form of the settings says what the code says, and mini's fits mini's tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from osum_echat import config
from osum_echat.config import ConfigError
from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.generation.config import GenerationConfig, older_dialect_keys
from osum_echat.generation.guards import AgeChoice
from osum_echat.model.config import load_config


def test_the_written_settings_are_the_defaults(root_dir: Path) -> None:
    assert config.load(GenerationConfig, root_dir / "conf" / "generation.yaml") == GenerationConfig()


def test_settings_survive_being_written_and_read() -> None:
    data = config.to_dict(GenerationConfig().as_released())
    assert config.from_dict(GenerationConfig, data) == GenerationConfig().as_released()


def test_mini_settings_fit_its_tokenizer(root_dir: Path) -> None:
    settings = config.load(GenerationConfig, root_dir / "recipes" / "mini" / "conf" / "generation.yaml")
    assert set(settings.modes) == set(OUTPUTS)
    tokenizer = AutoTokenizer.from_pretrained(root_dir / "recipes" / "mini" / "conf" / "tokenizer")
    vocab = load_config(root_dir / "recipes" / "mini" / "conf" / "model.yaml").vocabulary
    assert settings.guards.age is not None
    age = AgeChoice.compile(settings.guards.age, tokenizer, vocab)
    assert age is not None and len(age.choice_ids) == len(settings.guards.age.choices)


@pytest.mark.parametrize("data", [{"modes": {"song": {}}}, {"modes": {"text": {"max_new": 0}}}, {"guard": {}}])
def test_wrong_settings_are_refused(data: dict) -> None:
    with pytest.raises(ConfigError):
        config.from_dict(GenerationConfig, data)
    with pytest.raises(ValueError, match="song"):
        GenerationConfig().mode("song")


def test_what_older_settings_say_of_the_dialect_is_taken_out_with_a_warning(caplog) -> None:
    old = {"profile": "as_released", "speech_form": "word", "only_instructed": True, "max_codes_per_word": 7}
    data, dialect = older_dialect_keys(old, "generation.yaml")
    assert config.from_dict(GenerationConfig, data) == GenerationConfig(max_codes_per_word=7)
    assert config.from_dict(Dialect, dialect) == Dialect("as_released", "word", refuse_unlisted=True)
    assert [r.getMessage() for r in caplog.records] == [
        f"generation.yaml: {old} is an older name; write {new} under dialect: in the checkpoint's config.yaml"
        for old, new in (("profile", "profile"), ("speech_form", "speech_form"), ("only_instructed", "refuse_unlisted"))
    ]


def test_modes_that_are_not_named_keep_the_published_settings() -> None:
    settings = config.from_dict(GenerationConfig, {"modes": {"text": {"max_new": 5}}})
    assert settings.mode("text").max_new == 5
    assert settings.mode("text2token") == GenerationConfig().mode("text2token")
