"""A session of the Realtime API: answers that are cancelled, interrupted or cut, and what the dialogue holds of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.serving.backend import Ended, Text, Turn
from osum_echat.serving.realtime.conversation import said_until
from tests.live_case import (
    CREATE,
    Client,
    Clock,
    FakeBackend,
    append,
    live,
    said,
    slow_answer,
    speech_pcm,
    spoken,
    tone,
    update,
)


@live
async def test_cancel_ends_the_response_and_nothing_of_it_comes_after() -> None:
    client = Client(FakeBackend(slow_answer))
    await client.send(said("talk"), CREATE)
    await client.until("response.output_audio.delta", 3)
    await client.send({"type": "response.cancel"})
    done = client.last()
    assert done["type"] == "response.done" and client.backend.jobs[0].cancelled.is_set()
    assert done["response"]["status"] == "cancelled"
    assert done["response"]["status_details"] == {"type": "cancelled", "reason": "client_cancelled"}
    count = len(client.sent)
    await asyncio.sleep(0.1)
    assert len(client.sent) == count
    assert [k for k in client.kinds() if k.endswith(".done")][-5:] == [
        "response.output_audio_transcript.done",
        "response.content_part.done",
        "response.output_item.done",
        "conversation.item.done",
        "response.done",
    ]
    await client.send(said("again"), CREATE)
    assert client.all("response.created")[1]


@live
async def test_a_second_response_while_one_is_active_is_an_error() -> None:
    client = Client(FakeBackend(slow_answer))
    await client.send(said("talk"), CREATE, {**CREATE, "event_id": "second"})
    assert (
        client.last()["error"]["code"] == "conversation_already_has_active_response"
        and client.last()["error"]["event_id"] == "second"
    )
    await client.send({"type": "response.cancel", "response_id": "resp_other"})
    assert client.last()["error"]["code"] == "response_cancel_not_active"
    await client.session.close()


@live
async def test_what_the_client_asks_for_while_another_answer_is_begun_is_an_error_too() -> None:
    """And is not answered later without what it asked for."""
    client = Client(FakeBackend(lambda turn: [5.0]))
    await client.send(said("talk"))
    answers = client.session._answers
    await answers._lock.acquire()  # the answer to a turn is being prepared
    begun = asyncio.create_task(answers.ask())
    asked = asyncio.create_task(client.send({**CREATE, "response": {"output_modalities": ["text"]}}))
    await asyncio.sleep(0.05)
    answers._lock.release()
    await asyncio.gather(begun, asked)
    assert client.last()["error"]["code"] == "conversation_already_has_active_response"
    await client.send({"type": "response.cancel"})
    await asyncio.sleep(0.05)
    assert len(client.backend.turns) == 1
    await client.session.close()


@live
async def test_speech_interrupts_once_confirmed_and_the_dialogue_holds_what_was_heard() -> None:
    clock = Clock()
    client = Client(FakeBackend(slow_answer), clock=clock)
    await client.send(said("talk", id="u1"), CREATE)
    await client.until("response.output_audio.delta", 10)
    clock.now = 0.4
    short = append(speech_pcm(0.2, 0.9) + speech_pcm(0.6, 0))
    await client.send(*short)
    assert not client.all("input_audio_buffer.speech_started") and client.session.busy, "a short sound is no interruption"
    await client.send(*append(speech_pcm(0.8, 0.9)))
    done = client.all("response.done")[0]["response"]
    assert done["status"] == "cancelled" and done["status_details"]["reason"] == "turn_detected"
    kinds = client.kinds()
    assert kinds.index("input_audio_buffer.speech_started") < kinds.index("response.output_audio.done"), (
        "clients stop playing at it"
    )
    item = next(i for i in client.session.conversation.items if i.role == "assistant")
    assert item.status == "incomplete" and item.said is not None and len(item.said) < len(item.text or "")
    assert client.session.metrics.barge_ins._value.get() == 1


@live
async def test_speech_before_any_sound_of_the_answer_joins_the_turn() -> None:
    client = Client(FakeBackend(lambda turn: [5.0, Text("late")]))
    await client.send(*spoken(1.0))
    await client.send(*spoken(0.5))
    assert client.all("response.done")[0]["response"]["status"] == "cancelled"
    assert len(client.backend.turns) == 2
    first, second = (turn.heard.seconds for turn in client.backend.turns if turn.heard)
    assert second == pytest.approx(first + first - 0.5, abs=0.1), "both recordings are one question"
    assert client.backend.turns[1].past == ()
    await client.session.close()


def four_words(turn: Turn) -> list[Any]:
    """Four words in two seconds of sound, made in no time; the second answer is not complete when it is interrupted."""
    end = [30.0] if turn.text == "second" else [Ended("stop", codes=tuple(range(50)))]
    return [Text("one two three four"), tone(2.0), *end]


@live
async def test_who_interrupts_while_two_answers_wait_to_be_played_has_heard_the_first_one_only() -> None:
    clock = Clock()
    client = Client(FakeBackend(four_words), clock=clock)
    await client.send(said("first"), CREATE)
    await client.until("response.done")
    clock.now = 1.0  # of two seconds
    await client.send(said("second"), CREATE)
    await client.until("response.output_audio.delta", 40)
    clock.now = 1.5
    await client.send(*append(speech_pcm(0.8, 0.9)))
    assert [e["response"]["status"] for e in client.all("response.done")] == ["completed", "cancelled"]
    first, second = (item for item in client.session.conversation.items if item.role == "assistant")
    assert first.shown == "one two three" and second.shown == ""
    assert client.session.metrics.barge_ins._value.get() == 1
    await client.session.close()


@live
async def test_what_the_client_has_cut_is_not_cut_again_when_somebody_speaks() -> None:
    clock = Clock()
    client = Client(FakeBackend(four_words), clock=clock)
    await client.send(said("talk"), CREATE)
    item_id = (await client.until("response.done"))["response"]["output"][0]["id"]
    clock.now = 1.8
    await client.send(
        {"type": "conversation.item.truncate", "item_id": item_id, "content_index": 0, "audio_end_ms": 600},
        *append(speech_pcm(0.8, 0.9)),
    )
    assert client.session.conversation.find(item_id).shown == "one"  # type: ignore[union-attr]
    await client.session.close()


@live
async def test_interrupt_response_false_lets_the_answer_go_on_and_answers_after_it() -> None:
    client = Client(FakeBackend(lambda turn: [Text("word"), tone(0.2), 0.3, tone(0.2)]))
    detection = {"type": "server_vad", "interrupt_response": False}
    await client.send(update(audio={"input": {"turn_detection": detection}}), *spoken())
    await client.until("response.output_audio.delta")
    await client.send(*spoken(1.0))
    assert not client.all("response.done") or client.all("response.done")[0]["response"]["status"] == "completed"
    await client.until("response.done", 2)
    assert [e["response"]["status"] for e in client.all("response.done")] == ["completed", "completed"]


@live
async def test_truncate_cuts_the_dialogue_and_is_clamped() -> None:
    client = Client()
    await client.send(said("talk"), CREATE)
    done = await client.until("response.done")
    item_id = done["response"]["output"][0]["id"]
    truncate = {"type": "conversation.item.truncate", "item_id": item_id, "content_index": 0}
    await client.send({**truncate, "audio_end_ms": 2535})
    assert client.last()["type"] == "conversation.item.truncated" and client.last()["audio_end_ms"] == pytest.approx(1000, abs=5)
    await client.send({**truncate, "audio_end_ms": 400})
    assert client.last()["audio_end_ms"] == 400
    await client.send(said("what did you say?"), CREATE)
    await client.until("response.done", 2)
    past = client.backend.turns[1].past[0]
    assert past.reply_text == "Hello" and past.codes == tuple(range(10))


def test_what_was_said_until() -> None:
    text = "one two three four"
    assert said_until(text, (10, 20, 30, 40), 40, 0, True) == ""
    assert said_until(text, (10, 20, 30, 40), 40, 14, True) == "one"
    assert said_until(text, (10, 20, 30, 40), 40, 16, True) == "one two"
    assert said_until(text, (10, 20), 20, 99, False) == "one two"
    assert said_until(text, (), 40, 20, True) == "one two"
    assert said_until(text, (), 40, 40, True) == text
    assert said_until("今天天气很好", (), 60, 30, True) == "今天天"


@settings(max_examples=50, deadline=None)
@given(st.text(alphabet="ab 字。", max_size=30), st.integers(0, 100), st.integers(0, 120), st.booleans())
def test_what_was_said_is_always_a_beginning_that_grows(text: str, total: int, codes: int, complete: bool) -> None:
    said_now, said_later = (said_until(text, (), total, c, complete) for c in (codes, codes + 5))
    assert text.startswith(said_now) and said_later.startswith(said_now)
