"""The session machine of the Realtime API with a model that says what it is given: one test for each thing that clients rely on."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.audio import g711
from osum_echat.serving.backend import Ended, Refused, Text, ThoughtDone
from osum_echat.serving.realtime.conversation import said_until
from osum_echat.serving.realtime.settings import SessionLimits
from tests.live_case import Client, FakeBackend, append, live, speech_pcm, spoken, tone

PTT: dict[str, Any] = {"type": "session.update", "session": {"type": "realtime", "audio": {"input": {"turn_detection": None}}}}
CREATE = {"type": "response.create"}
COMMIT = {"type": "input_audio_buffer.commit"}


def update(**session: Any) -> dict[str, Any]:
    return {"type": "session.update", "session": {"type": "realtime", **session}}


def said(text: str, role: str = "user", **fields: Any) -> dict[str, Any]:
    kind = {"user": "input_text", "assistant": "output_text", "system": "input_text"}[role]
    item = {"type": "message", "role": role, "content": [{"type": kind, "text": text}], **fields}
    return {"type": "conversation.item.create", "item": item}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


# ---- session -------------------------------------------------------------------------------------------------------------------------


@live
async def test_the_first_event_is_a_whole_session() -> None:
    client = Client()
    created = client.sent[0]
    assert created["type"] == "session.created"
    session = created["session"]
    assert session["type"] == "realtime" and session["id"].startswith("sess_") and session["output_modalities"] == ["audio"]
    detection = session["audio"]["input"]["turn_detection"]
    assert detection["type"] == "server_vad" and detection["interrupt_response"] is True and detection["create_response"] is True
    assert session["audio"]["input"]["format"] == {"type": "audio/pcm", "rate": 24000}
    assert session["audio"]["input"]["transcription"], "transcription is on by default"


@live
async def test_partial_updates_are_merged_to_any_depth_and_answered_with_the_whole_session() -> None:
    client = Client()
    await client.send(
        update(audio={"input": {"turn_detection": {"type": "server_vad", "threshold": 0.3}}}, instructions="be kind")
    )
    await client.send(update(audio={"input": {"turn_detection": {"silence_duration_ms": 700}}, "output": {"voice": "marin"}}))
    session = client.last()["session"]
    assert client.last()["type"] == "session.updated"
    detection = session["audio"]["input"]["turn_detection"]
    assert (detection["type"], detection["threshold"], detection["silence_duration_ms"]) == ("server_vad", 0.3, 700)
    assert detection["interrupt_response"] is True
    assert session["instructions"] == "be kind" and session["audio"]["output"]["voice"] == "marin"
    assert session["audio"]["input"]["transcription"] and session["audio"]["input"]["format"]["rate"] == 24000
    assert client.session.turns.rules.threshold == 0.3 and client.session.turns.rules.silence_ms == 700


@live
async def test_another_kind_of_turn_detection_gets_its_own_defaults_and_null_switches_off() -> None:
    client = Client()
    await client.send(update(audio={"input": {"turn_detection": {"type": "semantic_vad", "eagerness": "high"}}}))
    detection = client.last()["session"]["audio"]["input"]["turn_detection"]
    assert detection == {"type": "semantic_vad", "eagerness": "high", "create_response": True, "interrupt_response": True}
    await client.send(PTT)
    assert client.last()["session"]["audio"]["input"]["turn_detection"] is None and client.session.turns.rules.mode == "none"
    await client.send(update(audio={"input": {"turn_detection": {"type": "server_vad"}, "transcription": None}}))
    audio = client.last()["session"]["audio"]["input"]
    assert audio["turn_detection"]["silence_duration_ms"] == 500 and audio["transcription"] is None


@live
async def test_what_is_not_supported_is_accepted_and_echoed_and_said_once() -> None:
    client = Client()
    odd = {
        "tools": [{"type": "function", "name": "weather", "parameters": {}}],
        "tool_choice": "required",
        "tracing": "auto",
        "truncation": {"type": "retention_ratio", "retention_ratio": 0.5},
        "prompt": {"id": "p"},
        "reasoning": {"effort": "low"},
        "include": ["item.input_audio_transcription.logprobs"],
        "a_key_of_tomorrow": 3,
        "x_echat": {"events": True},
    }
    await client.send(
        update(model="gpt-realtime", **odd), update(instructions="speak like a pirate"), update(instructions="again")
    )
    assert not client.all("error")
    session = client.all("session.updated")[-1]["session"]
    assert session["tools"] == odd["tools"] and session["a_key_of_tomorrow"] == 3 and session["model"] == "gpt-realtime"
    warnings = client.all("x_echat.warning")
    assert sorted(w["field"] for w in warnings) == ["instructions", "tools"], "each once"


@live
async def test_own_events_are_sent_only_to_those_who_asked() -> None:
    quiet, asking = Client(think="tag"), Client(think="tag")
    await asking.send(update(x_echat={"events": True}))
    for client in (quiet, asking):
        await client.send(*spoken())
        await client.until("response.done")
    assert not [e for e in quiet.sent if e["type"].startswith("x_echat")]
    assert {"x_echat.thought.delta", "x_echat.thought.done", "x_echat.speech_suspected"} <= {e["type"] for e in asking.sent}


@pytest.mark.parametrize(
    ("session", "param"),
    [
        ({"audio": {"input": {"format": {"type": "audio/opus"}}}}, "session.audio.input.format.type"),
        ({"audio": {"input": {"turn_detection": {"type": "psychic"}}}}, "session.audio.input.turn_detection.type"),
        ({"audio": {"input": {"turn_detection": {"type": "server_vad", "threshold": 7}}}}, "session.audio.input.turn_detection"),
        ({"output_modalities": ["smell"]}, "session.output_modalities.0"),
        ({"output_modalities": []}, "session.output_modalities"),
        ({"audio": {"input": 3}}, None),
        ({"audio": None}, None),
        ({"x_echat": {"think": "deep"}}, "session.x_echat.think"),
        ({"x_echat": None}, "session.x_echat.think"),
    ],
)
@live
async def test_a_wrong_update_changes_nothing_and_names_the_field(session: dict[str, Any], param: str | None) -> None:
    client = Client()
    before = client.session.session
    await client.send({"type": "session.update", "event_id": "e7", "session": {"type": "realtime", **session}})
    error = client.last()["error"]
    assert client.last()["type"] == "error" and error["event_id"] == "e7" and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param
    assert client.session.session == before


# ---- a turn --------------------------------------------------------------------------------------------------------------------------

ORDER = [
    "session.created",
    "input_audio_buffer.speech_started",
    "input_audio_buffer.speech_stopped",
    "input_audio_buffer.committed",
    "conversation.item.added",
    "conversation.item.done",
    "conversation.item.input_audio_transcription.delta",
    "conversation.item.input_audio_transcription.completed",
    "response.created",
    "response.output_item.added",
    "conversation.item.added",
    "response.content_part.added",
    "response.output_audio_transcript.delta",
    "response.output_audio.delta",
    "response.output_audio.done",
    "response.output_audio_transcript.done",
    "response.content_part.done",
    "response.output_item.done",
    "conversation.item.done",
    "response.done",
]


@pytest.mark.parametrize("think", [None, "tag"])
@live
async def test_the_order_of_events_of_a_turn(think: str | None) -> None:
    client = Client(think=think)
    await client.send(*spoken())
    done = await client.until("response.done")
    assert client.kinds() == ORDER
    response = done["response"]
    assert response["status"] == "completed" and response["output"][0]["content"][0]["transcript"] == "Hello there, friend."
    assert response["usage"]["output_token_details"]["audio_tokens"] == 25
    ids = {e["item_id"] for e in client.sent if e["type"].startswith("input_audio_buffer.")}
    user = client.all("conversation.item.added")[0]["item"]
    assert ids == {user["id"]} and user["role"] == "user" and user["content"][0]["type"] == "input_audio"
    assert client.all("conversation.item.added")[1]["previous_item_id"] == user["id"]
    started, stopped = client.all("input_audio_buffer.speech_started")[0], client.all("input_audio_buffer.speech_stopped")[0]
    assert 100 <= started["audio_start_ms"] <= 300 and 2000 <= stopped["audio_end_ms"] <= 2100


@live
async def test_the_sound_of_an_answer_arrives_whole_in_small_pieces() -> None:
    client = Client()
    await client.send(*spoken())
    await client.until("response.done")
    deltas = [base64.b64decode(e["delta"]) for e in client.all("response.output_audio.delta")]
    assert abs(sum(map(len, deltas)) / 48000 - 1.0) < 0.01 and max(map(len, deltas)) <= 4800
    assert len({(e["response_id"], e["item_id"]) for e in client.all("response.output_audio.delta")}) == 1


@live
async def test_the_transcript_comes_from_the_thought_and_tags_go_to_the_item() -> None:
    client = Client(think="tag")
    await client.send(*spoken())
    await client.until("response.done")
    completed = client.all("conversation.item.input_audio_transcription.completed")[0]
    assert completed["transcript"] == "hello"
    await client.send({"type": "conversation.item.retrieve", "item_id": completed["item_id"]})
    item = client.last()["item"]
    assert client.last()["type"] == "conversation.item.retrieved"
    assert item["content"] == [{"type": "input_audio", "transcript": "hello"}] and item["x_echat"]["tags"]["emotion"] == "happy"


@live
async def test_a_thought_without_a_transcript_is_made_up_for_by_the_transcript_task() -> None:
    client = Client(FakeBackend(lambda _: [ThoughtDone("hm", {}), Text("Yes.")]), think="tag")
    await client.send(*spoken())
    assert (await client.until("conversation.item.input_audio_transcription.completed"))["transcript"] == "what was said"


@live
async def test_without_transcription_there_is_none() -> None:
    client = Client()
    await client.send(update(audio={"input": {"transcription": None}}), *spoken())
    await client.until("response.done")
    assert not [k for k in client.kinds() if "transcription" in k]


@live
async def test_time_is_counted_in_samples_however_fast_they_come() -> None:
    client = Client()
    for _ in range(3):
        await client.send(*spoken())
    starts = [e["audio_start_ms"] for e in client.all("input_audio_buffer.speech_started")]
    assert [b - a for a, b in itertools.pairwise(starts)] == pytest.approx([2400, 2400], abs=40)


@live
async def test_push_to_talk() -> None:
    client = Client()
    await client.send(PTT, *append(speech_pcm(1.0)), COMMIT)
    assert not client.all("input_audio_buffer.speech_started") and client.all("input_audio_buffer.committed")
    assert not client.all("response.created"), "the client asks for the response"
    await client.send(CREATE)
    await client.until("response.done")
    assert client.backend.turns[0].heard is not None and abs(client.backend.turns[0].heard.seconds - 1.0) < 0.01


@live
async def test_an_empty_commit_is_an_error_and_clear_forgets() -> None:
    client = Client()
    await client.send(PTT, {**COMMIT, "event_id": "c1"})
    assert client.last()["error"]["code"] == "input_audio_buffer_commit_empty" and client.last()["error"]["event_id"] == "c1"
    await client.send(*append(speech_pcm(1.0)), {"type": "input_audio_buffer.clear"})
    assert client.last()["type"] == "input_audio_buffer.cleared"
    await client.send(COMMIT)
    assert client.last()["error"]["code"] == "input_audio_buffer_commit_empty"


@live
async def test_create_response_false_leaves_the_answer_to_the_client() -> None:
    client = Client()
    await client.send(update(audio={"input": {"turn_detection": {"type": "server_vad", "create_response": False}}}), *spoken())
    assert client.all("input_audio_buffer.committed") and not client.all("response.created")


@live
async def test_more_sound_than_a_turn_may_have_is_refused_with_a_sentence() -> None:
    client = Client(limits=SessionLimits(turn_seconds=2.0))
    await client.send(PTT, *append(speech_pcm(3.0)))
    assert client.last()["error"]["code"] == "input_audio_buffer_full" and "2 s" in client.last()["error"]["message"]


@pytest.mark.parametrize(("kind", "law"), [("audio/pcmu", "mu"), ("audio/pcma", "a")])
@live
async def test_telephone_audio(kind: str, law: g711.Law) -> None:
    client = Client()
    await client.send(update(audio={"input": {"format": {"type": kind}}, "output": {"format": {"type": kind}}}))
    wave = np.sin(np.arange(20000) / 5).astype(np.float32) / 2
    wave[:4000] = wave[12000:] = 0
    data = g711.encode(wave, law)
    audio = [base64.b64encode(data[i : i + 333]).decode() for i in range(0, len(data), 333)]
    await client.send(*[{"type": "input_audio_buffer.append", "audio": part} for part in audio])
    await client.until("response.done")
    answer = b"".join(base64.b64decode(e["delta"]) for e in client.all("response.output_audio.delta"))
    assert abs(len(answer) / 8000 - 1.0) < 0.01 and np.abs(g711.decode(answer, law)).max() == pytest.approx(1 / 3, abs=0.03)
    assert client.all("session.updated")[0]["session"]["audio"]["output"]["format"] == {"type": kind}


# ---- text ----------------------------------------------------------------------------------------------------------------------------


@live
async def test_written_turns_are_answered_in_text_where_that_is_asked() -> None:
    client = Client()
    await client.send(update(output_modalities=["text"]), said("how are you?"), CREATE)
    done = await client.until("response.done")
    assert [k for k in client.kinds() if k.startswith("response.")] == [
        "response.created",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.done",
    ]
    assert done["response"]["output"][0]["content"] == [{"type": "output_text", "text": "Hello there, friend."}]
    assert client.backend.turns[0].text == "how are you?" and not client.backend.turns[0].speak


@live
async def test_a_response_can_have_its_own_modality_metadata_limit_and_input() -> None:
    client = Client()
    params = {
        "output_modalities": ["text"],
        "metadata": {"client_event_id": "abc"},
        "max_output_tokens": 9,
        "conversation": "none",
        "input": [said("only this")["item"]],
        "instructions": "briefly",
    }
    await client.send(said("something else"), {"type": "response.create", "response": params})
    done = await client.until("response.done")
    created = client.all("response.created")[0]["response"]
    assert (
        created["metadata"] == {"client_event_id": "abc"}
        and created["status"] == "in_progress"
        and created["conversation_id"] is None
    )
    assert done["response"]["metadata"] == {"client_event_id": "abc"} and done["response"]["max_output_tokens"] == 9
    assert client.backend.turns[0].text == "only this" and client.backend.turns[0].max_tokens == 9
    assert len(client.session.conversation) == 1, "it is beside the dialogue"


@live
async def test_a_greeting_can_be_asked_for_before_anybody_spoke_and_nothing_is_answered_by_nothing() -> None:
    client = Client()
    await client.send({"type": "response.create", "response": {"instructions": "Greet the user."}})
    await client.until("response.done")
    assert client.backend.turns[0].text == "Greet the user."
    empty = Client()
    await empty.send(CREATE)
    done = await empty.until("response.done")
    assert done["response"]["status"] == "completed" and done["response"]["output"] == [] and not empty.all("error")


@live
async def test_the_model_is_given_the_dialogue_and_a_replayed_history() -> None:
    clock = Clock()
    client = Client(clock=clock)
    await client.send(said("hi", id="u1"), said("hello!", "assistant", id="a1"), said("who are you?", id="u2"), CREATE)
    await client.until("response.done")
    turn = client.backend.turns[0]
    assert [(e.user_text, e.reply_text) for e in turn.past] == [("hi", "hello!")] and turn.text == "who are you?"
    clock.now = 5.0  # the answer has been played
    await client.send(*spoken())
    await client.until("response.done", 2)
    assert [e.reply_text for e in client.backend.turns[1].past] == ["hello!", "Hello there, friend."]
    assert client.backend.turns[1].past[1].codes == tuple(range(25))
    assert len(client.backend.remembered[-1]) == 3


# ---- items ---------------------------------------------------------------------------------------------------------------------------


@live
async def test_items_are_created_with_their_ids_in_their_places_and_deleted() -> None:
    client = Client()
    await client.send(said("one", id="i1"), said("three", id="i3"))
    await client.send({**said("two", id="i2"), "previous_item_id": "i1"}, {**said("zero", id="i0"), "previous_item_id": "root"})
    added = client.all("conversation.item.added")
    assert [(e["item"]["id"], e["previous_item_id"]) for e in added] == [("i1", None), ("i3", "i1"), ("i2", "i1"), ("i0", None)]
    assert len(client.all("conversation.item.done")) == 4
    await client.send({"type": "conversation.item.delete", "item_id": "i2"})
    assert client.last()["type"] == "conversation.item.deleted" and client.last()["item_id"] == "i2"
    assert [item.id for item in client.session.conversation.items] == ["i0", "i1", "i3"]


@live
async def test_items_of_other_kinds_are_kept_as_they_are() -> None:
    client = Client()
    item = {"id": "f1", "type": "function_call_output", "call_id": "c1", "output": "sunny"}
    await client.send({"type": "conversation.item.create", "item": item}, {"type": "conversation.item.retrieve", "item_id": "f1"})
    assert client.last()["item"]["output"] == "sunny" and not client.all("error")


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({"type": "conversation.item.retrieve", "item_id": "no"}, "item_retrieve_invalid_item_id"),
        ({"type": "conversation.item.delete", "item_id": "no"}, "item_delete_invalid_item_id"),
        (
            {"type": "conversation.item.truncate", "item_id": "no", "content_index": 0, "audio_end_ms": 3},
            "item_truncate_invalid_item_id",
        ),
        ({"type": "response.cancel"}, "response_cancel_not_active"),
        ({"type": "input_audio_buffer.append", "audio": "!!!"}, "invalid_value"),
        ({"type": "input_audio_buffer.append"}, "missing_required_parameter"),
        ({"type": "conversation.item.create", "item": {"type": "message", "role": "wizard", "content": []}}, "invalid_value"),
        ({**said("x"), "previous_item_id": "no"}, "invalid_value"),
        ({"type": "response.create", "response": {"input": [{"type": "item_reference", "id": "no"}]}}, "invalid_value"),
        ({"type": "session.update"}, "missing_required_parameter"),
        ({"type": "transcription_session.update", "session": {}}, "unknown_event"),
        ({"type": 3}, "missing_required_parameter"),
    ],
)
@live
async def test_every_error_names_the_event_that_caused_it(message: dict[str, Any], code: str) -> None:
    client = Client()
    await client.send({**message, "event_id": "mine"})
    error = client.last()
    assert error["type"] == "error" and error["error"]["code"] == code and error["error"]["event_id"] == "mine"
    await client.send(said("still alive"), CREATE)
    await client.until("response.done")


@live
async def test_cancelling_nothing_says_so_in_the_words_that_clients_look_for() -> None:
    client = Client()
    await client.send({"type": "response.cancel"})
    assert client.last()["error"]["message"].startswith("Cancellation failed")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        '{"type": "no.such.\\ud83d"}',
        "[]",
        "3",
        "null",
        '{"a": 1}',
        '{"type": ["a"]}',
        '{"type": "session.update", "event_id": 3}',
    ],
)
@live
async def test_what_is_no_event_is_an_error_and_not_the_end(text: str) -> None:
    client = Client()
    await client.send(text, said("hello"))
    assert client.all("error") and client.last()["type"] == "conversation.item.done"


# ---- interruption --------------------------------------------------------------------------------------------------------------------


def slow_answer(_: Any) -> list[Any]:
    pieces: list[Any] = [Text("one two three four five six seven eight nine ten")]
    for _ in range(100):
        pieces += [tone(0.1), 0.02]
    return pieces


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


# ---- pace, limits, faults ------------------------------------------------------------------------------------------------------------


@live
async def test_sound_stays_close_to_what_was_played_and_the_model_is_asked_to_pause() -> None:
    clock = Clock()
    backend = FakeBackend(lambda _: [Text("long"), *[tone(1.0) for _ in range(9)]])
    client = Client(backend, limits=SessionLimits(ahead_seconds=2.0), clock=clock)
    await client.send(said("talk"), CREATE)
    await asyncio.sleep(0.3)
    assert 2.0 <= client.session._active.playback.sent <= 2.2
    assert backend.jobs[0].paused == [True]
    clock.now = 2.0
    await asyncio.sleep(0.7)
    assert client.session._active.playback.sent == pytest.approx(4.0, abs=0.2)
    while client.session.busy:
        clock.now += 1.0
        await asyncio.sleep(0.05)
    assert backend.jobs[0].paused == [True, False]


@live
async def test_a_refusal_of_the_model_is_a_failed_response_with_a_sentence() -> None:
    backend = FakeBackend()
    backend.refuse = Refused("the server is full; try again in a moment")
    client = Client(backend)
    await client.send(*spoken())
    done = await client.until("response.done")
    assert done["response"]["status"] == "failed" and "full" in done["response"]["status_details"]["error"]["message"]
    backend.refuse = None
    await client.send(CREATE)
    assert (await client.until("response.done", 2))["response"]["status"] == "completed"


@pytest.mark.parametrize(
    ("reason", "status", "detail"),
    [("length", "incomplete", "max_output_tokens"), ("failed", "failed", None), ("stop", "completed", None)],
)
@live
async def test_how_the_model_ended_is_how_the_response_ends(reason: Any, status: str, detail: str | None) -> None:
    client = Client(FakeBackend(lambda _: [Text("a"), Ended(reason, message="out of memory")]))
    await client.send(said("x"), CREATE)
    response = (await client.until("response.done"))["response"]
    assert response["status"] == status and (response["status_details"] or {}).get("reason") == detail


@live
async def test_a_model_that_breaks_fails_the_response_and_not_the_session() -> None:
    def broken(_: Any) -> list[Any]:
        class Break:
            pass

        return [Text("a"), Break()]

    backend = FakeBackend(broken)
    client = Client(backend)

    class Bad:
        async def __aiter__(self):
            yield Text("a")
            raise RuntimeError("cuda")

        def cancel(self) -> None: ...

        def slow(self, on: bool) -> None: ...

    backend.start = lambda turn, memory=None: Bad()  # type: ignore[method-assign,assignment]
    await client.send(said("x"), CREATE)
    response = (await client.until("response.done"))["response"]
    assert response["status"] == "failed" and "cuda" not in json.dumps(response)


@live
async def test_closing_stops_the_model_and_gives_its_memory_back() -> None:
    client = Client(FakeBackend(slow_answer))
    await client.send(said("x"), CREATE)
    await client.until("response.output_audio.delta")
    await client.session.close()
    assert client.backend.jobs[0].cancelled.is_set() and client.backend.memories[0].closed


@live
async def test_a_dialogue_forgets_its_oldest_items() -> None:
    client = Client(limits=SessionLimits(items=5))
    await client.send(*[said(str(i)) for i in range(9)])
    assert len(client.session.conversation) == 5


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-5, 5)
    | st.text(max_size=5)
    | st.sampled_from(["audio", "server_vad", "message", "user", "realtime"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "session",
                    "audio",
                    "input",
                    "output",
                    "format",
                    "turn_detection",
                    "item",
                    "id",
                    "content",
                    "role",
                    "text",
                    "response",
                    "item_id",
                    "event_id",
                    "audio_end_ms",
                    "content_index",
                    "previous_item_id",
                    "x_echat",
                    "think",
                    "events",
                    "output_modalities",
                    "threshold",
                    "transcription",
                    "voice",
                    "metadata",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)
KINDS = st.sampled_from(
    [
        "session.update",
        "input_audio_buffer.append",
        "input_audio_buffer.commit",
        "input_audio_buffer.clear",
        "output_audio_buffer.clear",
        "conversation.item.create",
        "conversation.item.retrieve",
        "conversation.item.delete",
        "conversation.item.truncate",
        "response.create",
        "response.cancel",
    ]
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(KINDS, st.dictionaries(st.sampled_from(["session", "item", "response", "audio", "item_id", "event_id"]), JSON)),
        max_size=6,
    )
)
def test_no_message_breaks_a_session(messages: list[tuple[str, dict[str, Any]]]) -> None:
    @live
    async def run() -> None:
        client = Client(FakeBackend(lambda _: [Text("a")]))
        for kind, fields in messages:
            await client.send({**fields, "type": kind})
        if client.session.busy:
            await client.until("response.done")
        await client.send(
            update(output_modalities=["text"], audio={"input": {"turn_detection": None}}), said("hello", id="last"), CREATE
        )
        await client.session.close()

    run()
