"""Items of the dialogue as clients make, read, delete and truncate them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from osum_echat.serving.realtime.asking import Asking
from osum_echat.serving.realtime.conversation import Conversation, Item, from_client, new_id
from osum_echat.serving.realtime.events import BadEvent
from osum_echat.serving.realtime.response import Emit
from osum_echat.serving.realtime.settings import SessionLimits


class Items:
    """Those of one session.

    Args:
        cut_off: ends the response that is making this item, if there is one.
        codes_per_second: of speech.
    """

    def __init__(
        self,
        conversation: Conversation,
        asking: Asking,
        emit: Emit,
        limits: SessionLimits,
        cut_off: Callable[[Item], Awaitable[None]],
        codes_per_second: float,
    ) -> None:
        self._conversation, self._asking, self._emit, self._limits = conversation, asking, emit, limits
        self._cut_off, self._codes_per_second = cut_off, codes_per_second

    def add(self, item: Item, before: str | None) -> None:
        """An item of the session itself. ``before``: id of the one that it follows."""
        self._conversation.add(item, None)
        self._tell(item, before)

    async def create(self, event: Mapping[str, Any], kind: str) -> Item:
        """An item of the client. ``kind``: of its recordings. Raises BadEvent."""
        raw = event["item"]
        given = raw.get("id")
        if given is not None and (not isinstance(given, str) or not given):
            raise BadEvent("invalid_value", "item.id must be a string that is not empty", "item.id")
        if given and self._conversation.find(given):
            raise BadEvent("item_create_duplicate_item_id", f"there is an item {given!r} already", "item.id")
        try:
            item = from_client(raw, given or new_id("item"))
        except ValueError as error:
            raise BadEvent("invalid_value", str(error), "item.role") from error
        after = event.get("previous_item_id")
        if after not in (None, "root") and self._conversation.find(after) is None:
            raise BadEvent("invalid_value", f"there is no item {after!r} to put it behind", "previous_item_id")
        if item.spoken and item.role == "user":
            await self._asking.hear_item(item, raw, kind)
        self._conversation.add(item, after)
        self._tell(item, self._conversation.before(item))
        return item

    def retrieve(self, event: Mapping[str, Any]) -> None:
        item = self._found(event, "item_retrieve_invalid_item_id")
        self._emit("conversation.item.retrieved", item=item.as_json())

    async def delete(self, event: Mapping[str, Any]) -> None:
        item = self._found(event, "item_delete_invalid_item_id")
        await self._cut_off(item)
        if item in self._conversation.items:
            self._conversation.remove(item)
        self._asking.samples.pop(item.id, None)
        self._emit("conversation.item.deleted", item_id=item.id)

    async def truncate(self, event: Mapping[str, Any]) -> None:
        item = self._found(event, "item_truncate_invalid_item_id")
        if item.role != "assistant" or not item.spoken:
            raise BadEvent("invalid_value", "only spoken answers can be truncated", "item_id")
        if event["audio_end_ms"] < 0:
            raise BadEvent("invalid_value", "audio_end_ms must not be negative", "audio_end_ms")
        await self._cut_off(item)
        seconds = item.cut(event["audio_end_ms"] / 1000, self._codes_per_second)
        self._emit("conversation.item.truncated", item_id=item.id, content_index=0, audio_end_ms=round(seconds * 1000))

    def _found(self, event: Mapping[str, Any], code: str) -> Item:
        item = self._conversation.find(event["item_id"])
        if item is None:
            raise BadEvent(code, f"there is no item {event['item_id']!r}", "item_id")
        return item

    def _tell(self, item: Item, before: str | None) -> None:
        for kind in ("conversation.item.added", "conversation.item.done"):
            self._emit(kind, item=item.as_json(), previous_item_id=before)
        while len(self._conversation) > self._limits.items:
            oldest = self._conversation.items[0]
            self._conversation.remove(oldest)
            self._asking.samples.pop(oldest.id, None)
