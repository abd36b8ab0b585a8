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
from osum_echat.pipeline.load import read_settings


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


def test_an_older_checkpoint_folder_is_asked_as_its_generation_settings_say(tmp_path: Path, caplog) -> None:
    own = Dialect(instructions={"<AGE>": "how old"})
    assert read_settings(tmp_path, None, own, None) == (GenerationConfig(), own), "a folder without a file"
    (tmp_path / "generation.yaml").write_text(
        "speech_form: word\nonly_instructed: true\ninstructions: {<GENDER>: who}\nmax_codes_per_word: 7\n", encoding="utf-8"
    )
    settings, dialect = read_settings(tmp_path, None, own, None)
    assert settings == GenerationConfig(max_codes_per_word=7)
    assert dialect == Dialect(speech_form="word", instructions={"<AGE>": "how old", "<GENDER>": "who"}, refuse_unlisted=True)
    assert sum("under dialect: in the checkpoint's config.yaml" in r.getMessage() for r in caplog.records) == 3
    (tmp_path / "generation.yaml").write_text("profile: as_released\n", encoding="utf-8")
    settings, dialect = read_settings(tmp_path, None, own, None)
    assert settings == GenerationConfig().as_released() and dialect.as_released
    assert not read_settings(tmp_path, None, own, "as_trained")[1].as_released, "what the caller asks for goes first"
    (tmp_path / "generation.yaml").write_text("profile: mine\n", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"unknown prompt profile 'mine'.*dialect\.profile"):
        read_settings(tmp_path, None, own, None)


def test_modes_that_are_not_named_keep_the_published_settings() -> None:
    settings = config.from_dict(GenerationConfig, {"modes": {"text": {"max_new": 5}}})
    assert settings.mode("text").max_new == 5
    assert settings.mode("text2token") == GenerationConfig().mode("text2token")
