"""Fixed strings: byte for byte what the checkpoints were trained with, and what the published inference feeds them."""

from __future__ import annotations

import pytest

from osum_echat.dialogue.prompts import AS_RELEASED, AS_TRAINED, PROFILES, get_profile
from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.dialogue.tokens import encode
from tests.dialogue_case import golden, tokenizer

PROMPTS = golden("prompts.json")
OUTPUT_OF_FUNCTION = {
    "generate": "text",
    "generate4chat": "s2t_chat",
    "generate4chat_think": "s2t_chat_think",
    "generate_tts": "text2token",
    "generate_text2text": "text2text",
    "generate_s2s_no_stream_with_repetition_penalty": "speech2text_token",
    "generate_s2s_no_stream_think_with_repetition_penalty": "speech2text_token_think",
}


@pytest.mark.parametrize("name", sorted(PROMPTS["training_system_prompt_by_output_type"]))
def test_trained_openings_are_exact(name):
    opening = AS_TRAINED.system[name] + AS_TRAINED.user_header
    assert opening == PROMPTS["training_system_prompt_by_output_type"][name]
    assert list(encode(tokenizer(), opening)) == PROMPTS["token_ids"][f"train.{name}"]


@pytest.mark.parametrize("function", sorted(OUTPUT_OF_FUNCTION))
def test_released_openings_are_exact_with_their_typos(function):
    name = OUTPUT_OF_FUNCTION[function]
    opening = AS_RELEASED.system[name] + ("" if name in AS_RELEASED.headerless else AS_RELEASED.user_header)
    assert opening == PROMPTS["inference_system_prompt_by_function"][function]


def test_released_dialogue_with_a_past_opens_without_a_user_header():
    opening = PROMPTS["inference_system_prompt_by_function"]["generate_s2s_no_stream_multi_turn"]
    assert AS_RELEASED.system["speech2text_token_history"] == opening
    assert not AS_RELEASED.history_headers


def test_other_fixed_strings_are_exact():
    assert AS_TRAINED.turn_end + AS_TRAINED.assistant == PROMPTS["assistant_prefix"]
    assert AS_TRAINED.system["speech2text_token_streaming_think"] == PROMPTS["unused_but_defined"]


@pytest.mark.parametrize("profile", [AS_TRAINED, AS_RELEASED], ids=lambda p: p.name)
def test_the_published_profiles_have_one_opening_for_both_forms(profile):
    assert all(profile.opening(name, "language") == profile.system[name] for name in OUTPUTS)


def test_every_output_type_has_a_system_prompt_in_every_profile():
    for profile in PROFILES.values():
        assert set(profile.system) == set(OUTPUTS)


def test_an_unknown_profile_is_an_error_that_names_the_known_ones():
    with pytest.raises(ValueError, match="as_trained or as_released"):
        get_profile("as_traned")
