"""Frames that no client should send: for the soak, for fuzzing a server, and for tests of what reads frames."""

from __future__ import annotations

import json
import random
import string
from typing import Any

KINDS = (
    "session.update",
    "input_audio_buffer.append",
    "input_audio_buffer.commit",
    "input_audio_buffer.clear",
    "output_audio_buffer.clear",
    "conversation.item.create",
    "conversation.item.delete",
    "conversation.item.retrieve",
    "conversation.item.truncate",
    "response.create",
    "response.cancel",
)
"""Types of events that a server acts upon."""
FIELDS = (
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
)
"""Names of fields that mean something somewhere."""
WORDS = ("", "audio", "message", "user", "realtime", "AAAA", "server_vad")
"""Texts that mean something somewhere."""


def value(dice: random.Random, depth: int = 0) -> Any:
    """Any JSON, at most four levels deep; texts may hold half of a surrogate pair."""
    kind = dice.randrange(8 if depth < 3 else 5)
    if kind < 2:
        return dice.choice([None, True, False, -1, 0, 1e300, 3, *WORDS])
    if kind < 5:
        return "".join(dice.choices(string.printable + "你好\u0000\ud83d", k=dice.randrange(12)))
    if kind < 6:
        return [value(dice, depth + 1) for _ in range(dice.randrange(4))]
    return {dice.choice(FIELDS): value(dice, depth + 1) for _ in range(dice.randrange(5))}


def frame(dice: random.Random) -> str | bytes:
    """A frame: bytes, text that is no JSON, or an event of a known or unknown type with wrong fields."""
    kind = dice.randrange(10)
    if kind == 0:
        return dice.randbytes(dice.randrange(200))
    if kind == 1:
        return "".join(dice.choices(string.printable, k=dice.randrange(200)))
    if kind == 2:
        return "[" * dice.randrange(2000)
    event = value(dice)
    event = event if isinstance(event, dict) else {"item": event}
    return json.dumps({**event, "type": dice.choice([*KINDS, "no.such"])})
