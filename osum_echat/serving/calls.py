"""Calls over WebRTC: ``POST /v1/realtime/calls`` takes an offer and gives the answer, as the OpenAI API does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.responses import Response
from starlette.datastructures import UploadFile

from osum_echat.serving import rest
from osum_echat.serving.metrics import Metrics
from osum_echat.serving.realtime.session import RealtimeSession
from osum_echat.serving.realtime.settings import SessionLimits
from osum_echat.serving.realtime.socket import Connection
from osum_echat.serving.safety import Keys, key_of

ALONE = "calls over WebRTC are for a single server; this one has several replicas"
INSTALL = "pip install 'osum-echat[webrtc]' (Python 3.11 or newer)"
MAX_SDP = 64 * 2**10
PATHS = ("/v1/realtime/calls", "/realtime/calls")


class Host(Protocol):
    """What calls need of a server."""

    keys: Keys
    metrics: Metrics
    connections: set[Connection]

    def no_room(self) -> str | None: ...

    @property
    def limits(self) -> SessionLimits: ...

    def new_session(self, emit: Any, model: str | None, session: Mapping[str, Any]) -> RealtimeSession: ...

    async def serve(self, connection: Connection) -> None: ...


def add_routes(app: FastAPI, server: Host, single: bool = True) -> None:
    """Without aiortc the routes answer 501 with what is to be installed.

    Args:
        single: False where other replicas of the server answer requests too; a call is known to one process, so there
            are none then.
    """
    running: dict[str, tuple[Any, asyncio.Task[None]]] = {}

    async def create(request: Request) -> Response:
        if not single:
            return rest.failure(501, f"{ALONE}; use a WebSocket (/v1/realtime)", "not_served")
        try:
            from osum_echat.serving.realtime.webrtc import CallSession, CallSocket, without_formats
        except ImportError:
            return rest.failure(501, f"calls need aiortc: {INSTALL}", "not_installed")
        if (refusal := _no_room(server)) is not None:
            return refusal
        call, begun = None, False
        try:
            offer, given = await _read(request)
            session = without_formats({**(server.keys.session_of(key_of(request.headers)) or {}), **given})
            asked = request.query_params.get("model") or session.get("model")
            model = asked if isinstance(asked, str) else None
            call = CallSocket()
            answer, speaker = await call.answer(offer), call.speaker
            if (refusal := _no_room(server)) is not None:  # others have come meanwhile
                return refusal
            connection = Connection(
                call,
                lambda c: CallSession(c.emit, lambda emit: server.new_session(emit, model, session), speaker, c.seen),
                server.limits,
            )
            server.connections.add(connection)  # counted from here on
            running[call.id] = (call, asyncio.create_task(serve(call, connection)))
            begun = True
        except ValueError as error:
            return rest.failure(400, str(error), "invalid_value")
        finally:
            if call is not None and not begun:
                await call.close()
        headers = {"Location": f"/v1/realtime/calls/{call.id}", "Access-Control-Expose-Headers": "Location"}
        return Response(answer, 201, headers, media_type="application/sdp")

    async def serve(call: Any, connection: Connection) -> None:
        try:
            await server.serve(connection)
        finally:
            running.pop(call.id)
            await call.close()

    async def hang_up(call_id: str) -> Response:
        if not single:
            return rest.failure(501, ALONE, "not_served")
        found = running.get(call_id)
        if found is None:
            return rest.failure(404, "there is no such call", "not_found")
        found[0].hang_up()
        return Response(status_code=200)

    for path in PATHS:
        app.add_api_route(path, create, methods=["POST"])
        app.add_api_route(f"{path}/{{call_id}}/hangup", hang_up, methods=["POST"])


def _no_room(server: Host) -> Response | None:
    why = server.no_room()
    return None if why is None else rest.failure(503, why, "server_full")


async def _read(request: Request) -> tuple[str, Mapping[str, Any]]:
    """The offer, and the session that the call begins with: SDP alone, or a form of ``sdp`` and ``session``."""
    session: Any = {}
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        form = await request.form(max_files=2, max_fields=2)
        offer, session_text = [await _text(form.get(name)) for name in ("sdp", "session")]
        try:
            session = json.loads(session_text) if session_text else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"session is not JSON: {error}") from error
    else:
        offer = (await request.body()).decode("utf-8", errors="replace")
    if not isinstance(session, dict):
        raise ValueError("session must be an object")
    if not offer.strip().startswith("v=0"):
        raise ValueError("the body must be an SDP offer (application/sdp), or a form with the field sdp")
    if len(offer) > MAX_SDP:
        raise ValueError(f"an offer may have {MAX_SDP} letters")
    session.setdefault("type", "realtime")
    return offer, session


async def _text(part: Any) -> str:
    return (await part.read()).decode("utf-8", errors="replace") if isinstance(part, UploadFile) else part or ""
