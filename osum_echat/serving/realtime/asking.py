"""What a response is about: items of the dialogue, items that the client names, and several items as one question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from osum_echat.serving.backend import Backend, Heard
from osum_echat.serving.realtime import events
from osum_echat.serving.realtime.audio import HEARD_RATE, Input, Samples, decode_base64
from osum_echat.serving.realtime.conversation import Conversation, Item, from_client, new_id
from osum_echat.serving.realtime.events import BadEvent


class Asking:
    """``samples``: recordings of items that wait for an answer, by id."""

    def __init__(self, backend: Backend, conversation: Conversation, max_turn_s: float) -> None:
        self._backend, self._conversation, self._max_turn_s = backend, conversation, max_turn_s
        self.samples: dict[str, Samples] = {}

    async def hear_item(self, item: Item, raw: Mapping[str, Any], kind: str) -> None:
        """The recordings of an item that a client made itself, in the session's input format."""
        stream = Input(kind)
        try:
            data = b"".join(decode_base64(part["audio"]) for part in raw["content"] if part.get("audio"))
            samples = np.concatenate([stream.push(data), stream.flush()])
            if not data:
                item.text = item.text or ""  # a replayed item of which only the transcript is left
                return
            if len(samples) > self._max_turn_s * HEARD_RATE:
                raise ValueError(f"a recording may have {self._max_turn_s:g} s")
            item.heard = await self._backend.hear(samples)
        except ValueError as error:
            raise BadEvent("invalid_value", str(error), "item.content") from error
        self.samples[item.id] = samples

    async def context(self, params: Mapping[str, Any], kind: str) -> Conversation:
        """What a response is about: the dialogue, or the items that the client names for it."""
        given = params.get("input")
        if given is None:
            return self._conversation
        conversation = Conversation()
        for raw in given:
            if not isinstance(raw, dict):
                raise BadEvent("invalid_value", "items of response.input must be objects", "response.input")
            item_id = raw.get("id")
            known = self._conversation.find(item_id) if isinstance(item_id, str) else None
            if raw.get("type") == "item_reference" or (known is not None and not raw.get("content")):
                if known is None:
                    raise BadEvent("invalid_value", f"there is no item {item_id!r}", "response.input")
                conversation.add(known)
                continue
            events.check_item(raw, "response.input")
            try:
                item = from_client(raw, item_id if isinstance(item_id, str) else new_id("item"))
            except ValueError as error:
                raise BadEvent("invalid_value", str(error), "response.input") from error
            if item.spoken and item.role == "user":
                await self.hear_item(item, raw, kind)
            conversation.add(item)
        return conversation

    async def question(self, asked: Sequence[Item]) -> tuple[Heard | None, str]:
        """Items that follow one another as one question. Of speech and text the last decides; recordings are put
        together."""
        if not asked:
            return None, ""
        if asked[-1].heard is None:
            return None, "\n".join(item.text for item in asked if item.heard is None and item.text)
        spoken = [item for item in asked if item.heard is not None]
        parts = [self.samples[item.id] for item in spoken if item.id in self.samples]
        whole = sum(map(len, parts))
        if len(parts) < 2 or len(parts) < len(spoken) or whole > self._max_turn_s * HEARD_RATE:
            return spoken[-1].heard, ""
        try:
            return await self._backend.hear(np.concatenate(parts)), ""
        except ValueError:
            return spoken[-1].heard, ""
