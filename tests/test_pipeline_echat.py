"""The public object: every call, replies as plain data, streams, batches and dialogues, with a tiny model and a tiny voice."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.events import Done, SpeechToken, TextDelta, ThinkDelta, speech_codes
from osum_echat.pipeline import MODES, Ask, AskOptions, AudioChunk, EChat, find_mode
from tests.generation_case import DATA
from tests.token2wav_case import recorded_speaker, tiny_model, write_directory

RATE = 16_000
SHORT = GenerationConfig(modes={name: replace(GenerationConfig().mode(name), max_new=16) for name in OUTPUTS})


def recording(number: int = 0) -> tuple[np.ndarray, int]:
    with np.load(DATA / "cases.npz") as arrays:
        return arrays[f"wav{number}_int16"], RATE


@pytest.fixture(scope="module")
def echat(tmp_path_factory: pytest.TempPathFactory) -> EChat:
    folder = write_directory(tmp_path_factory.mktemp("voice") / "token2wav")
    return EChat.load(
        DATA / "tiny.safetensors",
        DATA / "tiny_config.yaml",
        token2wav=folder,
        generation=SHORT,
        speaker=recorded_speaker(),
        device="cpu",
    )


def test_every_call_gives_a_reply(echat: EChat) -> None:
    wav = recording()
    replies = [
        echat.understand(wav, "<TRANSCRIBE> <EMOTION>"),
        echat.understand(wav, prompt="what is said?"),
        echat.chat(wav),
        echat.chat(wav, think="language"),
        echat.chat(text="how are you?"),
    ]
    for reply in replies:
        assert reply.text and reply.audio is None and reply.finish_reason == "length" and reply.speech_tokens == ()
    spoken = [
        echat.speak("hello"),
        echat.chat(text="how are you?", speak=True),
        echat.chat(wav, speak=True, interleaved=True),
    ]
    for reply in spoken:
        assert reply.speech_tokens and reply.audio is not None and reply.audio.dtype == np.float32
        seconds = len(reply.audio) / reply.sample_rate
        assert abs(seconds - len(reply.speech_tokens) / 25) < 0.05 and reply.sample_rate == 22050


def test_a_reply_as_json_is_plain_and_whole(echat: EChat) -> None:
    data = json.loads(json.dumps(echat.speak("hello").as_json()))
    assert set(data) == {"text", "think", "speech_tokens", "sample_rate", "finish_reason", "guards", "timings"}
    assert set(data["timings"]) >= {"prefill", "first_token", "think_tokens", "first_speech", "total"}
    assert (
        data["timings"]["prefill"]
        <= data["timings"]["first_token"]
        <= data["timings"]["first_speech"]
        <= data["timings"]["total"]
    )
    assert data["think"] is None and data["sample_rate"] == 22050


def test_a_think_is_parsed_by_the_form_that_was_asked_for(echat: EChat) -> None:
    written = "<think>用户说的话是:你好,年龄为:<CHILD>,性别为:<FEMALE>,情感为:<HAPPY>,声音事件为:<&&>,推测使用的回复情感为:<开心><think end>很好"
    ask = Ask(recording(), think="tag")
    heard = echat.hear([recording()])
    request = echat.request(ask, heard)
    request.plan = dict(enumerate([*echat.tokenizer.encode(written), echat.model.vocabulary.eos_id]))
    request.mode = replace(request.mode, max_new=200)
    events = [event for _, event in echat.generator.generate([request])]
    reply = echat.reply(events, ask)
    assert reply.text == "很好" and reply.finish_reason == "stop" and reply.think is not None
    assert (reply.think.transcript, reply.think.age, reply.think.gender, reply.think.emotion) == (
        "你好",
        "CHILD",
        "FEMALE",
        "HAPPY",
    )
    assert reply.think.event is None and reply.think.reply_emotion == "开心"
    assert reply.timings.think is not None and reply.timings.think_tokens > 20
    assert echat.reply(events, replace(ask, think="language")).think.raw == reply.think.raw  # type: ignore[union-attr]


def test_a_batch_of_all_kinds_is_what_each_is_alone(echat: EChat) -> None:
    asks = [
        Ask(recording(0), kind="understand", task="<AGE>", seed=1),
        Ask(text="say this", kind="speak", seed=2),
        Ask(recording(1), speak=True, interleaved=True, seed=3),
        Ask(text="hello", seed=4),
        Ask(recording(2), think="tag", seed=5),
        Ask(text="hello", speak=True, seed=2),
    ]
    for ask, reply in zip(asks, echat.batch(asks, size=4), strict=True):
        alone = echat.batch([ask])[0]
        assert (reply.text, reply.think, reply.speech_tokens) == (alone.text, alone.think, alone.speech_tokens)
        assert (reply.audio is None) == (alone.audio is None)
        if reply.audio is not None and alone.audio is not None:
            assert len(reply.audio) == len(alone.audio)


@pytest.mark.parametrize(
    "ask", [Ask(text="hello", speak=True), Ask(text="go", kind="speak"), Ask(text="hello")], ids=["chat", "speak", "text"]
)
def test_a_stream_together_is_the_reply(echat: EChat, ask: Ask) -> None:
    events = list(echat.stream_ask(ask))
    assert isinstance(events[-1], Done) and not any(isinstance(e, Done) for e in events[:-1])
    streamed, whole = echat.reply(events, ask), echat.batch([ask])[0]
    assert (streamed.text, streamed.think) == (whole.text, whole.think)
    assert tuple(e.code for e in events if isinstance(e, SpeechToken)) == whole.speech_tokens == streamed.speech_tokens
    assert (streamed.audio is None) == (whole.audio is None)
    if whole.audio is not None and streamed.audio is not None:
        assert len(streamed.audio) == len(whole.audio) > 0


def test_streamed_text_comes_before_the_sound_of_its_speech(echat: EChat) -> None:
    kinds = [type(e) for e in echat.stream(recording(), speak=True, interleaved=True)]
    assert kinds.index(TextDelta) < kinds.index(SpeechToken) < kinds.index(AudioChunk)
    first_thoughts = next(iter(echat.stream(recording(), think="language")))
    assert isinstance(first_thoughts, (ThinkDelta, TextDelta))


def test_a_dialogue_remembers_its_turns(echat: EChat) -> None:
    dialogue = echat.session(max_turns=2)
    replies = [dialogue.chat(recording(i), speak=False, seed=i) for i in range(3)]
    assert len(dialogue) == 2 and all(reply.text for reply in replies)
    alone = echat.chat(recording(0), seed=0)
    assert replies[0].text == alone.text, "the first turn has no past"
    events = list(dialogue.stream(recording(3)))
    assert isinstance(events[-1], Done)
    half = dialogue.stream(recording(3))
    next(half)
    half.close()
    dialogue.clear()
    assert len(dialogue) == 0
    assert dialogue.chat(recording(0), seed=0).text == alone.text


def test_without_token2wav_speech_is_tokens_only() -> None:
    echat = EChat.load(DATA / "tiny.safetensors", DATA / "tiny_config.yaml", generation=SHORT, device="cpu")
    reply = echat.speak("hello")
    assert reply.speech_tokens and reply.audio is None and reply.as_json()["sample_rate"] is None
    with pytest.raises(ValueError, match="token2wav"):
        echat.speaker("somebody")


def test_sound_without_a_voice_is_refused(tmp_path: Path) -> None:
    echat = EChat.load(
        DATA / "tiny.safetensors",
        DATA / "tiny_config.yaml",
        token2wav=tiny_model(tmp_path / "t2w"),
        generation=SHORT,
        device="cpu",
    )
    with pytest.raises(ValueError, match="speaker="):
        echat.speak("hello")
    assert echat.speak("hello", speaker=recorded_speaker()).audio is not None


def test_the_profile_of_the_released_code_can_be_chosen() -> None:
    echat = EChat.load(DATA / "tiny.safetensors", DATA / "tiny_config.yaml", profile="as_released", device="cpu")
    assert echat.config.guards.repetition is None and not echat.config.force_speech_begin
    request = echat.request(Ask(recording(), kind="understand"), echat.hear([recording()]))
    assert "anaosum_echat2e" in echat.tokenizer.decode(request.prompt.ids_T)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "neither"),
        ({"text": " "}, "neither"),
        ({"kind": "speak"}, "no text to say"),
        ({"kind": "understand"}, "needs a recording"),
        ({"text": "hello", "think": "tag"}, "recordings only"),
        ({"wav": b"", "text": "hello"}, "not both"),
        ({"wav": b"", "kind": "understand", "task": "<S2TCHAT>"}, "no understanding task"),
        ({"wav": b"", "kind": "understand", "think": "tag"}, "leave think out"),
        ({"wav": b"", "kind": "understand", "speak": True}, "leave speak out"),
        ({"wav": b"", "kind": "dance"}, "kind='dance'"),
        ({"wav": b"", "think": "loud"}, "think='loud'"),
        ({"text": "hello", "temperature": -1}, "temperature=-1"),
        ({"text": "hello", "max_tokens": 0}, "max_tokens=0"),
    ],
)
def test_what_does_not_go_together_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Ask(**fields)


def test_every_mode_of_the_table_makes_an_ask_of_its_own() -> None:
    for name, mode in MODES.items():
        ask = mode.ask(b"a recording", "a text", prompt="what is said?", think="language", seed=3)
        assert ask.mode is mode and mode.name == name and ask.seed == 3 and mode.title
        assert (ask.wav is not None, ask.text is not None, ask.think is not None) == (mode.hears, mode.reads, mode.thinks)
        output = OUTPUTS[mode.output_type]
        assert (output.audio, output.think) == (mode.hears, mode.thinks)
        assert (output.speech != "none") == (mode.speaks and mode.then is None)
        with pytest.raises(ValueError, match=r"needs a recording|neither a recording|no text to say"):
            mode.ask()
    assert len({mode.title for mode in MODES.values()}) == len(MODES)
    assert find_mode("<AGE> <GENDER>") is MODES["age+gender"] and MODES["asr"].task == "<TRANSCRIBE>"


def test_options_of_a_request_are_fields_of_ask() -> None:
    fields = {f.name for f in dataclasses.fields(Ask) if f.init}
    assert fields - set(AskOptions.__annotations__) == {"wav", "text", "kind", "task", "prompt"}
    assert set(AskOptions.__annotations__) < fields


def test_a_request_can_have_its_own_temperature_and_limit(echat: EChat) -> None:
    short = echat.chat(recording(), max_tokens=3, seed=1)
    assert short.finish_reason == "length" and len(short.text) < len(echat.chat(recording(), seed=1).text)
    greedy = echat.chat(recording(), greedy=True, seed=1)
    assert echat.chat(recording(), temperature=0, seed=5).text == greedy.text
    hot = [echat.chat(recording(), temperature=50.0, seed=seed).text for seed in range(4)]
    assert len(set(hot)) > len({echat.chat(recording(), temperature=0.01, seed=seed).text for seed in range(4)})
    mixed = echat.batch(
        [Ask(recording(), temperature=50.0, seed=1), Ask(recording(), max_tokens=3, seed=1), Ask(recording(), seed=1)]
    )
    assert [reply.text for reply in mixed] == [hot[1], short.text, echat.chat(recording(), seed=1).text]
    dialogue = echat.session()
    assert dialogue.chat(recording(), max_tokens=3, seed=1).text == short.text
    assert next(e for e in dialogue.stream(recording(), max_tokens=1) if isinstance(e, Done)).reason == "length"


def test_what_is_said_is_the_text_of_a_spoken_reply_and_is_told_once(echat: EChat) -> None:
    assert echat.speak(" hello ").text == "hello"
    answer = echat.chat(text="how are you?", greedy=True).text
    for interleaved in (False, True):
        ask = Ask(text="how are you?", speak=True, interleaved=interleaved, greedy=True)
        events = list(echat.stream_ask(ask))
        assert "".join(e.text for e in events if isinstance(e, TextDelta)).strip() == answer == echat.batch([ask])[0].text
        assert speech_codes(events) and events[-1].timings.first_speech > events[-1].timings.prefill  # type: ignore[union-attr]


def test_a_task_that_is_not_in_the_table_is_asked_without_an_instruction(echat: EChat) -> None:
    assert echat.dialect.instruction("<SOMETHING NEW>") == ""
    assert echat.dialect.instruction("<GENDER>") and echat.dialect.instruction("<TRANSCRIBE>") != echat.dialect.instruction(
        "<GENDER>"
    )


def test_a_checkpoint_that_says_so_refuses_tasks_that_it_has_not_learnt(echat: EChat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echat.generator, "dialect", Dialect(refuse_unlisted=True, instructions={"<GENDER>": "who is it"}))
    assert echat.dialect.instruction("<GENDER>") == "who is it"
    with pytest.raises(ValueError, match="has not learnt <EMOTION>, only <GENDER>"):
        echat.understand((np.zeros(16_000, np.float32), 16_000), "<EMOTION>")
