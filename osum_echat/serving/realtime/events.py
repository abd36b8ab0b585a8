"""Events of the Realtime API (GA), typed by the `openai` package: what comes in is checked against its types, what goes
out is built of them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, get_args

from openai.types.realtime import (
    RealtimeErrorEvent,
    RealtimeServerEvent,
    RealtimeSessionCreateRequest,
    RealtimeTranscriptionSessionCreateRequest,
)
from openai.types.realtime.realtime_client_event import RealtimeClientEvent
from pydantic import BaseModel, TypeAdapter, ValidationError

from osum_echat.serving.realtime.conversation import new_id

IGNORED = (
    "tools",
    "tool_choice",
    "parallel_tool_calls",
    "prompt",
    "tracing",
    "include",
    "truncation",
    "reasoning",
    "instructions_id",
)
"""Fields of a session or response that are accepted and kept, whatever they hold."""


class BadEvent(ValueError):
    """A message of a client that cannot be acted upon; becomes an ``error`` event."""

    def __init__(self, code: str, message: str, param: str | None = None, event_id: str | None = None) -> None:
        super().__init__(message)
        self.code, self.param, self.event_id = code, param, event_id


def by_type(union: Any) -> dict[str, type[BaseModel]]:
    """Members of a union of the openai package by the type of their events."""
    members = get_args(get_args(union)[0])  # Annotated[Union[...], discriminator]
    return {get_args(model.model_fields["type"].annotation)[0]: model for model in members}


CLIENT_EVENTS: Mapping[str, type[BaseModel]] = by_type(RealtimeClientEvent)
SERVER_EVENTS: Mapping[str, type[BaseModel]] = by_type(RealtimeServerEvent)


@lru_cache(maxsize=1)
def server_event_adapter() -> TypeAdapter[Any]:
    """Checks any event of the server as the openai package does it."""
    return TypeAdapter(RealtimeServerEvent)


def read_json(text: str) -> Any:
    """Raises BadEvent for what is no JSON, and for half characters, which could not be sent back."""
    try:
        event = json.loads(text)
        if "\\u" in text:
            json.dumps(event, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:  # the error of encoding is a ValueError
        reason = "half of a surrogate pair" if isinstance(error, UnicodeError) else str(error)
        raise BadEvent("invalid_json", f"the message is not JSON: {reason}") from error
    return event


def parse(text: str) -> dict[str, Any]:
    """A client's message as plain data. Raises BadEvent for what is no event."""
    event = read_json(text)
    if not isinstance(event, dict):
        raise BadEvent("invalid_json", "a message must be a JSON object with a type")
    event_id = event.get("event_id")
    if event_id is not None and not isinstance(event_id, str):
        raise BadEvent("invalid_type", "event_id must be a string", "event_id")
    kind = event.get("type")
    if not isinstance(kind, str):
        raise BadEvent("missing_required_parameter", "the event has no type", "type", event_id)
    if kind not in CLIENT_EVENTS:
        raise BadEvent("unknown_event", f"unknown event type {kind[:80]!r}", "type", event_id)
    if kind != "session.update":  # its fields are checked after they were merged with the session
        check(CLIENT_EVENTS[kind], event, event_id)
    elif not isinstance(event.get("session"), dict):
        raise BadEvent("missing_required_parameter", "session.update needs a session object", "session", event_id)
    return event


def check(model: type[BaseModel], data: Mapping[str, Any], event_id: str | None = None, prefix: str = "") -> None:
    """Raises BadEvent that names the first wrong field; fields in `IGNORED` may hold anything."""
    try:
        model.model_validate(data)
    except ValidationError as error:
        for fault in error.errors(include_url=False, include_context=False, include_input=False):
            path = [str(part) for part in fault["loc"]]
            if any(part in IGNORED for part in path) or path[:2] == ["item", "RealtimeMcpToolCall"]:
                continue
            if path[:2] == ["response", "input"] and len(path) > 2:
                continue  # may be references, which this type does not know; `check_item` looks at the others
            if path[:1] == ["item"] and not _concerns_item(data.get("item"), path):
                continue
            missing = fault["type"] == "missing"
            path = [part for part in path if not part[:1].isupper()]  # names of the members of a union
            raise BadEvent(
                "missing_required_parameter" if missing else "invalid_value",
                f"{prefix}{'.'.join(path)}: {fault['msg']}",
                prefix + ".".join(path),
                event_id,
            ) from error


def check_item(raw: Any, param: str) -> None:
    """An item inside another event. Raises BadEvent."""
    try:
        check(CLIENT_EVENTS["conversation.item.create"], {"type": "conversation.item.create", "item": raw})
    except BadEvent as error:
        raise BadEvent(error.code, str(error), param) from error


_ITEM_MODELS = {
    ("message", "user"): "RealtimeConversationItemUserMessage",
    ("message", "assistant"): "RealtimeConversationItemAssistantMessage",
    ("message", "system"): "RealtimeConversationItemSystemMessage",
}


def _concerns_item(item: Any, path: list[str]) -> bool:
    """A union reports faults of all its members: only those of the kind that the client meant count."""
    if not isinstance(item, dict) or len(path) < 2:
        return True
    kind, role = item.get("type"), item.get("role")
    if not isinstance(kind, str):
        return True
    wanted = _ITEM_MODELS.get((kind, role if isinstance(role, str) else ""))
    if wanted is not None:
        return path[1] == wanted
    return kind == "message" and role not in ("developer",)  # other kinds are kept as they are


def check_session(session: Mapping[str, Any], event_id: str | None) -> None:
    """A whole session, after a merge. Raises BadEvent."""
    kinds: dict[Any, type[BaseModel]] = {
        "realtime": RealtimeSessionCreateRequest,
        "transcription": RealtimeTranscriptionSessionCreateRequest,
    }
    kind = session.get("type")
    if not isinstance(kind, str) or kind not in kinds:
        raise BadEvent("invalid_value", f"session.type {kind!r} is not one of realtime, transcription", "session.type", event_id)
    check(kinds[kind], session, event_id, "session.")


def merge(base: Mapping[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """``base`` with ``update`` laid over it, object by object, to any depth; null replaces. Other values, lists too,
    are replaced whole."""
    merged = dict(base)
    for key, value in update.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def build(kind: str, **fields: Any) -> str:
    """An event of the server as JSON text."""
    model = SERVER_EVENTS[kind]
    event = model.model_validate({"type": kind, "event_id": new_id("event"), **fields})
    return event.model_dump_json(exclude_unset=True)


def build_error(code: str, message: str, event_id: str | None = None, param: str | None = None, fault: bool = False) -> str:
    """``fault``: the server's, not the client's."""
    error = {
        "type": "server_error" if fault else "invalid_request_error",
        "code": code,
        "message": message,
        "param": param,
        "event_id": event_id,
    }
    event = RealtimeErrorEvent.model_validate({"type": "error", "event_id": new_id("event"), "error": error})
    return event.model_dump_json(exclude_unset=True)


def build_own(kind: str, **fields: Any) -> str:
    """An event of ours (``x_echat.*``), which is sent to those who asked for them only."""
    assert kind.startswith("x_echat."), kind
    return json.dumps({"type": kind, "event_id": new_id("event"), **fields}, ensure_ascii=False)
