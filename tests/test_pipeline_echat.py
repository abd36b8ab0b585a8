"""The public object: every call, replies as plain data, streams, batches and dialogues, with a tiny model and a tiny voice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.events import Done, SpeechTokens, TextDelta, ThinkDelta
from osum_echat.pipeline import Ask, AudioChunk, EChat
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
    request = echat._request(Ask(recording(), think="tag"))
    request.plan = dict(enumerate([*echat.tokenizer.encode(written), echat.model.vocabulary.eos_id]))
    request.mode = replace(request.mode, max_new=200)
    events = [event for _, event in echat.generator.generate([request])]
    reply = echat.reply(events, "tag")
    assert reply.text == "很好" and reply.finish_reason == "stop" and reply.think is not None
    assert (reply.think.transcript, reply.think.age, reply.think.gender, reply.think.emotion) == (
        "你好",
        "CHILD",
        "FEMALE",
        "HAPPY",
    )
    assert reply.think.event is None and reply.think.reply_emotion == "开心"
    assert reply.timings.think is not None and reply.timings.think_tokens > 20
    assert echat.reply(events, "language").think.raw == reply.think.raw  # type: ignore[union-attr]


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
    streamed, whole = echat.reply(events, ask.think), echat.batch([ask])[0]
    assert (streamed.text, streamed.think) == (whole.text, whole.think)
    assert (
        tuple(c for e in events if isinstance(e, SpeechTokens) for c in e.codes) == whole.speech_tokens == streamed.speech_tokens
    )
    assert (streamed.audio is None) == (whole.audio is None)
    if whole.audio is not None and streamed.audio is not None:
        assert len(streamed.audio) == len(whole.audio) > 0


def test_streamed_text_comes_before_the_sound_of_its_speech(echat: EChat) -> None:
    kinds = [type(e) for e in echat.stream(recording(), speak=True, interleaved=True)]
    assert kinds.index(TextDelta) < kinds.index(SpeechTokens) < kinds.index(AudioChunk)
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
    assert "anaosum_echat2e" in echat.tokenizer.decode(echat._request(Ask(recording(), kind="understand")).prompt.ids_T)


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (Ask(), "neither"),
        (Ask(text=" "), "neither"),
        (Ask(kind="speak"), "no text to say"),
        (Ask(kind="understand"), "needs a recording"),
        (Ask(text="hello", think="tag"), "recordings only"),
        (Ask(recording(), text="hello"), "not both"),
        (Ask(recording(), kind="understand", task="<S2TCHAT>"), "no understanding task"),
        (Ask(recording(), think="loud"), "think='loud'"),  # type: ignore[arg-type]
    ],
)
def test_what_does_not_go_together_is_refused(echat: EChat, ask: Ask, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        echat.batch([ask])


def test_a_task_that_is_not_in_the_table_is_asked_without_an_instruction(echat: EChat) -> None:
    assert echat._instruction("<SOMETHING NEW>") == ""
    assert echat._instruction("<GENDER>") and echat._instruction("<TRANSCRIBE>") != echat._instruction("<GENDER>")


def test_a_checkpoint_that_says_so_refuses_tasks_that_it_has_not_learnt(echat: EChat, monkeypatch: pytest.MonkeyPatch) -> None:
    knows = replace(echat.config, only_instructed=True, instructions={"<GENDER>": "who is it"})
    monkeypatch.setattr(echat, "config", knows)
    assert echat._instruction("<GENDER>") == "who is it"
    with pytest.raises(ValueError, match="has not learnt <EMOTION>, only <GENDER>"):
        echat.understand((np.zeros(16_000, np.float32), 16_000), "<EMOTION>")
