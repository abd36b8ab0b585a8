"""What is too long is taken in parts, what is silent is answered as silence, what was not learnt is refused before anything is computed."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.audio.io import AudioError
from osum_echat.audio.pauses import cut_at_pauses, is_silent
from osum_echat.dialogue.dialect import Dialect, Learnt
from osum_echat.generation.events import Done, TextDelta
from osum_echat.pipeline import Ask, AudioChunk, EChat
from osum_echat.pipeline.parts import join_texts, refusal, split_text
from tests.test_pipeline_echat import DATA, SHORT, recorded_speaker, recording, write_directory

RATE = 16_000
RNG = np.random.default_rng(0)


def noise(seconds: float, level: float = 0.1) -> np.ndarray:
    return (RNG.standard_normal(round(seconds * RATE)) * level).astype(np.float32)


SILENCE = noise(3.0, 0.0005)  # a quiet room


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


def learnt(echat: EChat, monkeypatch: pytest.MonkeyPatch, **fields: Any) -> None:
    monkeypatch.setattr(echat.generator, "dialect", replace(echat.dialect, learnt=Learnt(**fields)))


# ---- silence -------------------------------------------------------------------------------------------------------------------------


def test_silence_is_told_from_soft_speech() -> None:
    assert is_silent(np.zeros(RATE, np.float32)) and is_silent(SILENCE)
    assert not is_silent(noise(1.0, 0.01)) and not is_silent(np.concatenate([SILENCE, noise(0.3)]))
    click = SILENCE.copy()
    click[RATE] = 1.0
    assert is_silent(click), "a click is nothing that was said"


def test_a_silent_recording_is_answered_without_the_model(echat: EChat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echat.generator, "generate", lambda *a, **k: pytest.fail("the model was asked"))
    silent = (SILENCE, RATE)
    assert (echat.chat(silent).text, echat.chat(silent).finish_reason) == ("I heard nothing.", "silence")
    assert (echat.understand(silent).text, echat.understand(silent).finish_reason) == ("", "silence")
    events = list(echat.stream(silent, speak=True))
    assert [type(event) for event in events] == [TextDelta, Done]
    dialogue = echat.session()
    assert dialogue.chat(silent).finish_reason == "silence" and len(dialogue) == 0
    assert list(dialogue.stream(silent))[-1].reason == "silence" and len(dialogue) == 0  # type: ignore[union-attr]
    learnt(echat, monkeypatch, hears=("zh",))
    assert echat.chat(silent).text == "我什么都没有听到。"


def test_silence_in_a_batch_leaves_the_others_as_they_are(echat: EChat) -> None:
    asks = [Ask(recording(0), seed=1), Ask((SILENCE, RATE)), Ask(text="hello", seed=2)]
    replies = echat.batch(asks)
    assert [r.finish_reason for r in replies][1] == "silence"
    assert replies[0].text == echat.batch([asks[0]])[0].text and replies[2].text == echat.batch([asks[2]])[0].text


# ---- long recordings -----------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.floats(0.3, 3.0), st.floats(0.3, 1.0)), min_size=1, max_size=12), st.integers(4, 12))
@settings(max_examples=30, deadline=None)
def test_pieces_hold_everything_that_was_said_and_are_short_enough(said: list[tuple[float, float]], longest: int) -> None:
    samples = np.concatenate(
        [part for speech, pause in said for part in (noise(speech), np.zeros(round(pause * RATE), np.float32))]
    )
    pieces = cut_at_pauses(samples, longest)
    assert all(len(piece) <= longest * RATE for piece in pieces)
    assert sum(np.count_nonzero(piece) for piece in pieces) == np.count_nonzero(samples)


def test_cuts_lie_in_pauses() -> None:
    samples = np.concatenate([part for _ in range(6) for part in (noise(2.5), np.zeros(RATE // 2, np.float32))])
    pieces = cut_at_pauses(samples, 7.0)
    assert len(pieces) == 3
    assert all(np.count_nonzero(piece[:100]) == 0 or np.count_nonzero(piece[-100:]) == 0 for piece in pieces)
    assert [np.count_nonzero(piece) for piece in pieces] == [5 * RATE] * 3, "no speech is cut in two"


def test_a_long_recording_is_heard_in_pieces_where_the_task_allows(echat: EChat, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt(echat, monkeypatch, seconds=4.0)
    long = np.concatenate([part for _ in range(3) for part in (noise(2.5), np.zeros(RATE // 2, np.float32))])
    ask = Ask((long, RATE), kind="understand", seed=3)
    pieces = echat.parts(ask)
    assert len(pieces) == 3
    reply = echat.batch([Ask(text="hello"), ask], size=2)[1]
    assert reply.text == join_texts([echat.batch([piece])[0].text for piece in pieces])
    events = list(echat.stream_ask(ask))
    assert echat.reply(events, ask).text == reply.text and sum(isinstance(event, Done) for event in events) == 1
    with pytest.raises(AudioError, match=r"has 9.0 s, this checkpoint has learnt recordings of at most 4 s") as error:
        echat.understand((long, RATE), "<EMOTION>")
    assert error.value.reason == "too_long"
    with pytest.raises(AudioError, match="at most 4 s"):
        echat.chat((long, RATE))


# ---- long texts ----------------------------------------------------------------------------------------------------------------------


TEXT = "I am glad. You are here, and so is he. " * 4 + "One two three four five six seven, eight nine ten eleven twelve thirteen."


@given(st.text(alphabet="ab ,.!?你好，。\n", max_size=120), st.integers(1, 12))
@settings(max_examples=100, deadline=None)
def test_no_word_of_a_long_text_is_lost(text: str, longest: int) -> None:
    pieces = split_text(text, longest)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    if len(pieces) > 1:
        assert all(piece.strip() for piece in pieces)


def test_a_long_text_is_cut_at_sentences_then_clauses_then_words() -> None:
    assert split_text("short", 1) == ["short"] and split_text("a  b", 2) == ["a  b"]
    pieces = split_text(TEXT, 8)
    assert all(len(piece.split()) <= 8 for piece in pieces) and " ".join(pieces) == TEXT
    assert pieces[0] == "I am glad." or pieces[0].endswith(".")
    assert pieces[-2:] == ["One two three four five six seven,", "eight nine ten eleven twelve thirteen."]
    assert split_text("你好吗？我很好。" * 3, 2) == ["你好吗？我很好。"] * 3


def test_a_long_text_is_said_in_pieces_and_as_one_reply(echat: EChat, monkeypatch: pytest.MonkeyPatch) -> None:
    learnt(echat, monkeypatch, say_words=4)
    text = "It is late. We go home now. Good night."
    reply = echat.speak(text, seed=5)
    alone = [echat.speak(piece, seed=5) for piece in split_text(text, 4)]
    assert len(alone) == 3 and reply.text == text
    assert reply.speech_tokens == tuple(code for one in alone for code in one.speech_tokens)
    gap = round(0.15 * reply.sample_rate)
    assert reply.audio is not None
    assert len(reply.audio) == sum(len(one.audio) for one in alone if one.audio is not None) + 2 * gap
    events = list(echat.stream_ask(Ask(text=text, kind="speak", seed=5)))
    streamed = echat.reply(events, Ask(text=text, kind="speak"))
    assert streamed.speech_tokens == reply.speech_tokens and isinstance(events[-1], Done)
    assert streamed.audio is not None and len(streamed.audio) == len(reply.audio)
    assert sum(isinstance(event, Done) for event in events) == 1 and any(isinstance(event, AudioChunk) for event in events)


# ---- what was not learnt -------------------------------------------------------------------------------------------------------------


MINI = Dialect(
    instructions={"<AGE>": "how old"},
    refuse_unlisted=True,
    learnt=Learnt(
        modes=("text", "s2t_chat", "text2text", "text2token"), think=("tag",), past_turns=0, hears=("en",), says=("en",)
    ),
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"wav": b"", "speak": True}, "has not learnt a spoken reply to a recording, only: understanding;"),
        ({"wav": b"", "think": "tag"}, "has not learnt a written reply to a recording, with a think"),
        ({"wav": b"", "kind": "understand", "task": "<EMOTION>"}, "has not learnt <EMOTION>, only <AGE>"),
        ({"wav": b"", "kind": "understand", "prompt": "what?"}, "follows its own instructions only, no others: <AGE>"),
        ({"text": "你好", "kind": "speak"}, r"says English; the text has Chinese characters \('你'\)"),
        ({"text": "Привет", "kind": "speak"}, "says English; the text has cyrillic letters"),
        ({"text": "ok 你好"}, "reads English; the text has Chinese characters"),
        ({"text": "hello", "speak": True, "interleaved": True}, "has not learnt text to speech, text and speech in turns"),
    ],
)
def test_what_a_checkpoint_has_not_learnt_is_a_sentence(fields: dict[str, Any], message: str) -> None:
    why = refusal(Ask(**fields), MINI)
    assert why is not None and re.search(message, why)
    assert refusal(Ask(**fields), Dialect()) is None, "a checkpoint that states nothing refuses nothing"


@pytest.mark.parametrize(
    "fields",
    [
        {"wav": b""},
        {"text": "Café, it costs 5 €!", "kind": "speak"},
        {"text": "hello", "speak": True},
        {"wav": b"", "kind": "understand", "task": "<AGE>"},
        {"wav": b"", "kind": "understand", "prompt": "how old"},
    ],
)
def test_what_a_checkpoint_has_learnt_is_not_refused(fields: dict[str, Any]) -> None:
    assert refusal(Ask(**fields), MINI) is None


def test_chinese_is_said_by_a_voice_that_has_learnt_it() -> None:
    assert refusal(Ask(text="你好 hello", kind="speak"), Dialect(learnt=Learnt(says=("zh", "en")))) is None


def test_past_turns_that_were_not_learnt_are_refused_before_anything_is_computed(
    echat: EChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    learnt(echat, monkeypatch, past_turns=0)
    dialogue = echat.session()
    first = dialogue.chat(recording(0), max_tokens=4)
    monkeypatch.setattr(echat.generator, "generate", lambda *a, **k: pytest.fail("the model was asked"))
    for ask in (dialogue.chat, dialogue.stream):
        with pytest.raises(ValueError, match="has not learnt dialogues with 1 past turns: each turn has to stand by itself"):
            ask(recording(1))
    monkeypatch.undo()
    learnt(echat, monkeypatch, past_turns=0)
    each = echat.session(max_turns=0)
    assert [each.chat(recording(0), max_tokens=4).text for _ in range(2)] == [first.text] * 2
    learnt(echat, monkeypatch, past_turns=1)
    dialogue = echat.session(max_turns=5)
    for turn in range(3):
        dialogue.chat(recording(turn), max_tokens=4)
    assert len(dialogue) == 1, "as many as it has learnt"


def test_an_ask_that_cannot_be_used_stops_a_batch_before_it_computes(echat: EChat, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(echat.generator, "generate", lambda *a, **k: pytest.fail("the model was asked"))
    with pytest.raises(AudioError):
        echat.batch([Ask(text="hello"), Ask(b"no audio")])
    learnt(echat, monkeypatch, says=("en",))
    with pytest.raises(ValueError, match="says English"):
        echat.batch([Ask(text="hello"), Ask(text="你好", kind="speak")], size=1)
