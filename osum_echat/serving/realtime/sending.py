"""What a session sends to its client."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from osum_echat.serving.metrics import Metrics
from osum_echat.serving.realtime import events

log = logging.getLogger(__name__)


class Sender:
    """Builds messages and gives them to ``send``.

    Args:
        send: takes each message as JSON text, in order, and never blocks.
        session: the session object; says whether the client wants events of ours.
        warnings: what the checkpoint cannot do, by the field that asks for it (`backend.Backend`).
    """

    def __init__(
        self, send: Callable[[str], None], session: Mapping[str, Any], warnings: Mapping[str, str], metrics: Metrics
    ) -> None:
        self._send, self._session, self._warnings, self._metrics = send, session, warnings, metrics
        self._warned: set[str] = set()

    def emit(self, kind: str, **fields: Any) -> None:
        self._send(events.build(kind, **fields))

    def own(self, kind: str, **fields: Any) -> None:
        """An event of ours, where the session asks for them."""
        if (self._session.get("x_echat") or {}).get("events") is True:
            self._send(events.build_own(kind, **fields))

    def error(self, code: str, message: str, event_id: str | None, param: str | None = None, fault: bool = False) -> None:
        self._metrics.errors.labels(code).inc()
        self._send(events.build_error(code, message, event_id, param, fault))

    def warn(self, field: str) -> None:
        """Something that was asked for and that this checkpoint cannot do: said once."""
        message = self._warnings.get(field)
        if message is None or field in self._warned:
            return
        self._warned.add(field)
        log.warning("session %s: %s", self._session["id"], message)
        self.own("x_echat.warning", field=field, message=message)
