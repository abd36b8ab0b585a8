"""A checkpoint's dialect: written and read whole, one place for what it asks and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from osum_echat import config as config_io
from osum_echat.dialogue.dialect import Dialect, Learnt, default_instructions
from osum_echat.dialogue.prompts import AS_RELEASED, AS_TRAINED
from osum_echat.dialogue.tasks import Sample
from osum_echat.model.checkpoint import portable_config
from osum_echat.model.config import ModelConfig, load_config
from osum_echat.training.config import TrainConfig
from recipes.mini.dialect import DIALECT as MINI
from tests.dialogue_case import VOCAB, tokenizer

DIALECTS = [Dialect(), Dialect("as_released", "word"), Dialect(AS_TRAINED, instructions={"<AGE>": ("how old", "多大")}), MINI]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_dialect_is_a_section_of_the_model_config_and_survives_being_written(dialect: Dialect, tmp_path: Path) -> None:
    model = ModelConfig(dialect=dialect)
    (tmp_path / "config.yaml").write_text(config_io.to_yaml(portable_config(model)), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml").dialect == dialect


def test_published_profiles_are_named_and_others_written_out() -> None:
    assert Dialect("as_released").strings is AS_RELEASED and Dialect("as_released").as_released
    assert MINI.strings.name == "mini" and not MINI.as_released
    assert MINI.with_profile("as_trained").strings is AS_TRAINED
    with pytest.raises(ValueError, match=r"unknown prompt profile 'mini'.*dialect\.profile"):
        Dialect("mini")
    with pytest.raises(config_io.ConfigError, match="lacks the opening of s2t_chat,"):
        config_io.from_dict(
            Dialect, {"profile": {"name": "x", "system": {"text": "a"}, "user_header": "", "turn_end": "", "assistant": ""}}
        )
    with pytest.raises(config_io.ConfigError, match=r"profile\.brackets"):
        config_io.from_dict(Dialect, {"profile": {"brackets": True}})


def test_a_task_is_asked_in_the_checkpoints_own_words_then_in_the_published_ones_then_in_the_default_ones() -> None:
    own = Dialect(instructions={"<AGE>": ("how old", "多大"), "<GENDER>": "who"})
    assert own.instruction("<AGE>") == "how old" and own.sentences("<AGE>") == ("how old", "多大")
    assert own.instruction("<GENDER>") == "who"
    assert own.instruction("<TRANSCRIBE>") == AS_TRAINED.asks["<TRANSCRIBE>"]
    assert own.instruction("<EMOTION>") == default_instructions()["<EMOTION>"][0]
    assert own.sentences("<TRANSCRIBE>") == default_instructions()["<TRANSCRIBE>"], "training draws"
    assert own.instruction("<SOMETHING NEW>") == ""
    alone = Dialect(instructions={"<AGE>": "how old"}, refuse_unlisted=True)
    assert alone.sentences("<EMOTION>") == () and alone.instruction("<TRANSCRIBE>") == ""
    for wrong in ((), "", ("a", " ")):
        with pytest.raises(ValueError, match="<AGE>"):
            Dialect(instructions={"<AGE>": wrong})


def test_what_is_not_learnt_is_refused_with_what_is() -> None:
    knows = Dialect(
        refuse_unlisted=True,
        instructions={"<AGE>": "how old"},
        learnt=Learnt(modes=("text", "s2t_chat", "s2t_chat_think", "speech2text_token"), think=("tag",), past_turns=1),
    )
    assert knows.refusal("<AGE>") is None and knows.refusal("text") is None
    assert knows.refusal("<GENDER>") == "this checkpoint has not learnt <GENDER>, only <AGE>"
    assert knows.refusal("<SOMETHING NEW>") is None, "not of the table: asked without an instruction"
    speech = knows.refusal("<TEXT2TOKEN>")
    assert speech == knows.refusal("text2token")
    assert speech is not None and speech.startswith(
        "this checkpoint has not learnt text to speech, only: understanding; a written"
    )
    assert knows.refusal("s2t_chat_think", think="tag") is None
    assert knows.refusal("s2t_chat_think", think="language") == (
        "this checkpoint has not learnt to think in natural language, only: tags"
    )
    assert knows.refusal("speech2text_token", past_turns=1) is None
    assert knows.refusal("speech2text_token", past_turns=2) == (
        "this checkpoint has not learnt dialogues with 2 past turns: at most 1 of them"
    )
    for asked in ("text", "speech2text_token_streaming_think", "<STYLE>"):
        assert Dialect().refusal(asked, past_turns=9, think="tag") is None, "nothing is stated, nothing is refused"
    assert set(Dialect().summary().values()) == {"not stated"} and knows.summary()["past turns"] == "1"
    for wrong in ({"modes": ("song",)}, {"past_turns": -1}):
        with pytest.raises(ValueError):
            Learnt(**wrong)


def test_the_forms_of_a_dialect_decide_the_layout() -> None:
    sample = Sample("speech2text_token", text_ids=(5, VOCAB.eos_id), speech=(1, 2), words=("a",), word_lengths=(2,))
    plain, word = (Dialect(speech_form=form).layout(sample, tokenizer(), VOCAB) for form in ("plain", "word"))
    assert plain.prefix == word.prefix and plain.segments != word.segments
    assert MINI.layout(sample, tokenizer(), VOCAB, prefix_only=True).segments != word.prefix


def test_training_files_that_say_the_dialect_in_their_data_still_work(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "prompts.yaml").write_text('"<AGE>": ["how old"]\n', encoding="utf-8")
    old = {"dialogue": "as_released", "profile": "tag_think", "prompts": str(tmp_path / "prompts.yaml"), "drop_none": False}
    section = {"processing": old, "speech_form": "word", "num_mels": 128}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump({"data": section, "validation": section}), encoding="utf-8")
    config = config_io.load(TrainConfig, tmp_path / "old.yaml")
    assert config.model_changes == {
        "dialect": {"profile": "as_released", "speech_form": "word", "instructions": {"<AGE>": ["how old"]}},
        "encoder": {"mels": 128},
    }
    for data in (config.data, config.validation):
        assert data is not None and data.processing.label_rules == "tag_think" and not data.processing.drop_none
    said = {record.getMessage() for record in caplog.records}
    assert any("data: speech_form is an older name; write dialect.speech_form into the model's config" in line for line in said)
    without = config_io.from_dict(TrainConfig, {"data": {"processing": {"prompts": ""}}})
    assert without.model_changes == {"dialect": {"refuse_unlisted": True}}
    default = config_io.from_dict(TrainConfig, {"data": {"processing": {"prompts": "conf/prompt_config.yaml"}}})
    assert default.model_changes == {}


def test_changes_of_the_model_are_checked_when_the_config_is_read() -> None:
    with pytest.raises(config_io.ConfigError, match=r"model_changes: unknown key llm\.attn"):
        TrainConfig(model_changes={"llm": {"attn": "eager"}})
