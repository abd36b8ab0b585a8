"""A session of the Realtime API with a model that says what it is given: turns, spoken and written, and their answers."""

from __future__ import annotations

import base64
import itertools
import json

import numpy as np
import pytest

from osum_echat.audio import g711
from osum_echat.serving.backend import Heard, Text, ThoughtDone
from osum_echat.serving.realtime.settings import SessionLimits
from tests.live_case import (
    COMMIT,
    CREATE,
    PTT,
    Client,
    Clock,
    FakeBackend,
    append,
    live,
    said,
    speech_pcm,
    spoken,
    update,
)

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


@pytest.mark.parametrize(
    ("finds_turns", "asked_after", "expected"),
    [(True, 0.0, 0.25), (False, 0.0, 0.25), (False, 3.0, 0.0)],
    ids=["the server ends the turn", "the client commits and asks at once", "the client commits and asks later"],
)
@live
async def test_time_to_first_audio_runs_from_the_commit_or_the_later_wish(
    finds_turns: bool, asked_after: float, expected: float
) -> None:
    """Reading the recording takes 0.25 s here, and somebody waits for that too, unless the answer is asked for later."""
    clock = Clock()

    class Backend(FakeBackend):
        async def hear(self, samples: np.ndarray) -> Heard:
            heard = await super().hear(samples)
            clock.now += 0.25
            return heard

    client = Client(Backend(), clock=clock)
    if finds_turns:
        await client.send(*spoken())
    else:
        await client.send(PTT, *append(speech_pcm(1.0)))
        arrived = clock.now + asked_after  # of both messages; the second waits while the first is acted upon
        await client.send(COMMIT)
        clock.now = max(clock.now, arrived)
        await client.session.handle(json.dumps(CREATE), arrived)
    await client.until("response.done")
    samples = {s.name: s.value for m in client.session.metrics.first_audio.collect() for s in m.samples}
    assert samples["osum_echat_time_to_first_audio_seconds_count"] == 1
    assert samples["osum_echat_time_to_first_audio_seconds_sum"] == pytest.approx(expected)


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
