"""What a session is when it begins and after an update, and what a server allows."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from osum_echat.serving.realtime import events
from osum_echat.serving.realtime.events import BadEvent
from osum_echat.serving.realtime.turns import TurnRules

SERVER_VAD: Mapping[str, Any] = {
    "type": "server_vad",
    "threshold": 0.5,
    "prefix_padding_ms": 300,
    "silence_duration_ms": 500,
    "idle_timeout_ms": None,
    "create_response": True,
    "interrupt_response": True,
}
SEMANTIC_VAD: Mapping[str, Any] = {
    "type": "semantic_vad",
    "eagerness": "auto",
    "create_response": True,
    "interrupt_response": True,
}
DETECTION = {"server_vad": SERVER_VAD, "semantic_vad": SEMANTIC_VAD}


@dataclass(frozen=True)
class SessionLimits:
    """What one session may do, and how it is paced.

    Attributes:
        message_bytes: of one message. turn_seconds: audio of one turn (the model's own limit, if that is lower).
        items: of a conversation; the oldest are forgotten. idle_seconds, session_seconds: without a message, and
            altogether.
        ahead_seconds: how far sound may be ahead of what has been played. outbox: messages that may wait for a client
            that does not read.
        transcript_wait: how long the begin of a response waits for the transcript of what it answers, so that events
            keep their order.
    """

    message_bytes: int = 8 * 2**20
    turn_seconds: float = 60.0
    items: int = 200
    idle_seconds: float = 600.0
    session_seconds: float = 7200.0
    ahead_seconds: float = 2.0
    outbox: int = 4096
    transcript_wait: float = 1.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name}={value} must be positive")


def first_session(session_id: str, model: str, voice: str, limits: SessionLimits, think: str | None) -> dict[str, Any]:
    """The whole session object as it is created."""
    expires = 0 if math.isinf(limits.session_seconds) else int(time.time() + limits.session_seconds)
    return {
        "type": "realtime",
        "object": "realtime.session",
        "id": session_id,
        "model": model,
        "expires_at": expires,
        "output_modalities": ["audio"],
        "instructions": "",
        "tools": [],
        "tool_choice": "auto",
        "max_output_tokens": "inf",
        "tracing": None,
        "prompt": None,
        "truncation": "auto",
        "include": None,
        "audio": {
            "input": {
                "format": {"type": "audio/pcm", "rate": 24000},
                "transcription": {"model": model},
                "noise_reduction": None,
                "turn_detection": dict(SERVER_VAD),
            },
            "output": {"format": {"type": "audio/pcm", "rate": 24000}, "voice": voice, "speed": 1.0},
        },
        "x_echat": {"events": False, "think": think},
    }


def with_detection_defaults(session: dict[str, Any], update: Mapping[str, Any]) -> dict[str, Any]:
    """A merged session whose turn detection is of another kind than before (or was off) gets that kind's defaults, not
    the old kind's fields."""
    given = (update.get("audio") or {}).get("input") or {}
    detection = given.get("turn_detection")
    if not isinstance(detection, Mapping):
        return session
    kind = detection.get("type", "")
    found = session["audio"]["input"]["turn_detection"]
    if isinstance(kind, str) and kind in DETECTION:
        keep = {key: value for key, value in found.items() if key in DETECTION[kind] or key in detection}
        session["audio"]["input"]["turn_detection"] = {**DETECTION[kind], **keep}
    return session


def merged(session: Mapping[str, Any], update: Mapping[str, Any], event_id: str | None) -> dict[str, Any]:
    """A session with a client's update laid over it. Raises BadEvent for what no session can be."""
    fixed = {key: value for key, value in update.items() if key not in ("id", "object", "expires_at")}
    audio = fixed.get("audio", {})
    if not isinstance(audio, dict) or not all(isinstance(audio.get(side, {}), dict) for side in ("input", "output")):
        raise BadEvent("invalid_value", "session.audio, its input and its output must be objects", "session.audio", event_id)
    result = with_detection_defaults(events.merge(copy.deepcopy(dict(session)), fixed), fixed)
    events.check_session(result, event_id)
    own = result.get("x_echat")
    if not isinstance(own, dict) or own.get("think") not in (None, "tag", "language"):
        raise BadEvent("invalid_value", "x_echat.think must be null, tag or language", "session.x_echat.think", event_id)
    audio = result["audio"]
    for side in ("input", "output"):
        found = audio[side].get("format")
        kind = (found or {}).get("type") or "audio/pcm"
        audio[side]["format"] = {"type": kind, "rate": 24000} if kind == "audio/pcm" else {"type": kind}
    if result.get("output_modalities") not in (["audio"], ["text"], ["text", "audio"], ["audio", "text"]):
        raise BadEvent("invalid_value", 'output_modalities must be ["audio"] or ["text"]', "session.output_modalities", event_id)
    try:
        turn_rules(result, 1.0)
    except (ValueError, TypeError) as error:
        raise BadEvent("invalid_value", str(error), "session.audio.input.turn_detection", event_id) from error
    return result


def turn_rules(session: Mapping[str, Any], max_turn_s: float) -> TurnRules:
    """The rules of a session's turn detection. Raises ValueError for numbers that make no sense."""
    detection = session["audio"]["input"].get("turn_detection")
    if detection is None:
        return TurnRules(mode="none", max_turn_s=max_turn_s)
    kind = detection["type"]
    if kind == "semantic_vad":
        return TurnRules(mode="semantic_vad", eagerness=detection.get("eagerness") or "auto", max_turn_s=max_turn_s)
    numbers = {}
    bounds = {"threshold": (0.0, 1.0), "prefix_padding_ms": (0, 5000), "silence_duration_ms": (0, 20000)}
    for name, (low, high) in bounds.items():
        value = detection.get(name)
        value = SERVER_VAD[name] if value is None else value
        if not low <= value <= high:
            raise ValueError(f"turn_detection.{name}={value} must be between {low} and {high}")
        numbers[name] = value
    return TurnRules(
        mode="server_vad",
        threshold=numbers["threshold"],
        prefix_ms=numbers["prefix_padding_ms"],
        silence_ms=max(numbers["silence_duration_ms"], 32),
        max_turn_s=max_turn_s,
    )
