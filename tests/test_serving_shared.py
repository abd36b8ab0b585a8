"""One model for several people: recordings that are heard together, and every way in which an answer ends. No threads: the tests take the steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from osum_echat.dialogue.tasks import OUTPUTS
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.engine import EngineFull
from osum_echat.generation.events import Done, SpeechToken, TextDelta
from osum_echat.pipeline import Ask, EChat
from osum_echat.pipeline.ask import AudioChunk, StreamEvent
from osum_echat.serving.shared import Answer, Saying, SharedEChat, Voice
from osum_echat.token2wav import Token2Wav
from tests.generation_case import tiny
from tests.token2wav_case import recorded_speaker, write_directory

SHORT = GenerationConfig(modes={name: replace(GenerationConfig().mode(name), max_new=10) for name in OUTPUTS})


@pytest.fixture(scope="module")
def echat(tmp_path_factory: pytest.TempPathFactory) -> EChat:
    model, tokenizer, _ = tiny()
    folder = write_directory(tmp_path_factory.mktemp("token2wav") / "tiny")
    return EChat(model, tokenizer, SHORT, Token2Wav.load(folder, device="cpu"), recorded_speaker())


@pytest.fixture
def shared(echat: EChat) -> Iterator[SharedEChat]:
    made = SharedEChat(echat)
    yield made
    made.close()


def voice(shared: SharedEChat) -> Voice:
    assert shared.echat.voice is not None
    return Voice(shared.echat.voice)


def decode(shared: SharedEChat, steps: int = 200) -> None:
    for _ in range(steps):
        if not shared.engine.tick():
            return
    raise AssertionError("the model does not come to an end")


def sound(shared: SharedEChat) -> None:
    assert shared.pool is not None
    while shared.pool.work():
        pass


def speak(shared: SharedEChat) -> tuple[Answer, list[StreamEvent]]:
    """A text that is to be said, decoded; its sound has not been made."""
    told: list[StreamEvent] = []
    request = shared.echat.request(Ask(text="hello", kind="speak"))
    answer = shared.answer(request, told.append, voice(shared))
    decode(shared)
    assert any(isinstance(event, SpeechToken) for event in told) and not any(isinstance(event, Done) for event in told)
    return answer, told


def test_recordings_that_wait_together_are_encoded_together_and_as_alone(shared, monkeypatch):
    waves = [np.random.default_rng(i).normal(0, 0.1, length).astype(np.float32) for i, length in enumerate((8000, 40000, 9000))]
    alone = [shared.echat.hear([(wave, 16000)])[0] for wave in waves]
    calls: list[int] = []
    hear = shared.echat.hear
    monkeypatch.setattr(shared.echat, "hear", lambda wavs: calls.append(len(wavs)) or hear(wavs))
    futures = [shared.hear(wave) for wave in waves]
    shared.engine.tick()
    assert calls == [2, 1], "the two short ones in one call, the long one by itself"
    for future, expected in zip(futures, alone, strict=True):
        found = future.result(0)
        assert found.lengths_N.tolist() == expected.lengths_N.tolist()
        np.testing.assert_allclose(found.embeds_PD.numpy(), expected.embeds_PD.numpy(), atol=1e-4)


def test_a_recording_that_cannot_be_used_fails_by_itself(shared):
    good, bad = shared.hear(np.full(8000, 0.1, dtype=np.float32)), shared.hear(np.full(8500, np.nan, dtype=np.float32))
    shared.engine.tick()
    assert good.result(0).lengths_N.shape == (1,)
    with pytest.raises(ValueError):
        bad.result(0)


def test_the_end_of_an_answer_comes_behind_its_sound(shared):
    answer, told = speak(shared)
    sound(shared)
    assert isinstance(told[-1], Done) and told[-1].reason in ("stop", "length") and answer.failed is None
    assert isinstance(told[-2], AudioChunk) and len(told[-2].samples)


def test_an_answer_can_be_cancelled_while_only_its_sound_is_missing(shared):
    answer, told = speak(shared)
    answer.cancel()
    sound(shared)
    assert [event.reason for event in told if isinstance(event, Done)] == ["cancelled"]
    assert not any(isinstance(event, AudioChunk) for event in told)


def test_a_voice_that_fails_ends_its_answer(shared, monkeypatch):
    answer, told = speak(shared)
    monkeypatch.setattr(shared.echat.token2wav.flow, "solve", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    sound(shared)
    assert isinstance(told[-1], Done) and "no memory" in str(answer.failed)


def test_an_answer_is_whole_where_there_is_no_room_to_read_its_past(shared, monkeypatch):
    submit = shared.engine.submit

    def full(request, on_event, read_only=False):
        if read_only:
            raise EngineFull("the server is full")
        return submit(request, on_event, read_only)

    monkeypatch.setattr(shared.engine, "submit", full)
    shared.start()
    dialogue = shared.dialogue()
    told = list(shared.stream(Ask(text="how are you?"), dialogue))
    assert isinstance(told[-1], Done) and len(dialogue) == 1


def test_a_written_answer_is_said_once_it_is_whole(shared):
    told: list[StreamEvent] = []
    asked: list[str] = []

    def say(text: str):
        asked.append(text)
        return shared.echat.request(Ask(text=text, kind="speak"))

    request = shared.echat.request(Ask(text="how are you?"))
    answer = shared.answer(request, told.append, saying=Saying(say, voice(shared)))
    decode(shared)
    sound(shared)
    written = "".join(event.text for event in told if isinstance(event, TextDelta)).strip()
    assert asked == [written] and len(answer.decoded) == 2
    assert isinstance(told[-1], Done) and any(isinstance(event, AudioChunk) for event in told)
    assert told[-1].generated == answer.decoded[0].generated + answer.decoded[1].generated
