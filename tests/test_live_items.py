"""A session of the Realtime API: items of the dialogue, errors that name their event, and messages of nonsense."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.serving.backend import Text
from osum_echat.serving.conformance.nonsense import FIELDS, KINDS, WORDS
from tests.live_case import (
    CREATE,
    Client,
    FakeBackend,
    live,
    said,
    update,
)


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


# ---- errors --------------------------------------------------------------------------------------------------------------------------


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


# ---- nonsense ------------------------------------------------------------------------------------------------------------------------


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5) | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(KINDS),
            st.dictionaries(st.sampled_from(["session", "item", "response", "audio", "item_id", "event_id"]), JSON),
        ),
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
