"""The live server as one FastAPI application: protocol, REST, metrics, page.

Everything is an attribute of one `Server`; `build_app` puts routes around it. It is run by `osum-echat serve`
(`cli.serve`), and in tests by any ASGI server.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, WebSocket
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.middleware.base import RequestResponseEndpoint

from osum_echat.serving import calls, rest
from osum_echat.serving.backend import Backend
from osum_echat.serving.memory import Trimmer
from osum_echat.serving.metrics import Metrics
from osum_echat.serving.realtime.events import build_error
from osum_echat.serving.realtime.gpt_live import AHEAD_S, LiveSession
from osum_echat.serving.realtime.session import RealtimeSession
from osum_echat.serving.realtime.settings import SessionLimits
from osum_echat.serving.realtime.socket import POLICY, TRY_LATER, Connection
from osum_echat.serving.safety import Keys, host_allowed, key_of, origin_allowed
from osum_echat.serving.vad import TurnModels

log = logging.getLogger(__name__)
STATIC = Path(__file__).parent / "static"
PUBLIC = ("/", "/health")
"""Paths that need no key: the page asks for it."""


@dataclass(frozen=True)
class ServerSettings:
    """What whoever starts a server decides.

    Attributes:
        host: where it listens; on loopback only names of this machine are served.
        origins: other pages that may use it (``*``: any).
        sessions: real-time sessions at once.
        shared: what the replicas of one service have in common, for client secrets where there is no key; by itself
            each server has its own.
        think: form of the thought of sessions that do not choose, where the checkpoint has learnt it.
        drain_seconds: how long answers in progress may take when the server is told to stop.
        body_bytes: of one REST request.
    """

    host: str = "127.0.0.1"
    api_key: str | None = None
    origins: tuple[str, ...] = ()
    sessions: int = 64
    shared: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    think: str | None = "tag"
    drain_seconds: float = 30.0
    body_bytes: int = 32 * 2**20
    limits: SessionLimits = field(default_factory=SessionLimits)


class Server:
    """What the routes share."""

    def __init__(self, backend: Backend, turn_models: TurnModels | None = None, settings: ServerSettings | None = None) -> None:
        self.backend = backend
        self.settings = settings or ServerSettings()
        self.turn_models = turn_models or TurnModels.load(getattr(backend, "turn_head", None))
        self.keys = Keys(self.settings.api_key, shared=self.settings.shared)
        self.metrics = Metrics()
        self.executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="osum-echat-turns")
        self.connections: set[Connection] = set()
        self._trimmer = Trimmer()
        self.draining = False
        load = getattr(backend, "load", None)
        if load is not None:
            self.metrics.gauge("queue", "Requests that wait for the model", lambda: load().waiting)
            self.metrics.gauge("batch_rows", "Rows that are decoded now", lambda: load().rows)
            self.metrics.gauge("held_rows", "Rows that wait for their sound to be played", lambda: load().held)
            self.metrics.gauge("cached_positions", "Positions in caches", lambda: load().positions)
            self.metrics.gauge("kept_positions", "Positions that sessions keep between their turns", lambda: load().kept)

    @property
    def think(self) -> str | None:
        return self.settings.think

    @property
    def limits(self) -> SessionLimits:
        return self.settings.limits

    @property
    def full(self) -> bool:
        return len(self.connections) >= self.settings.sessions

    async def drain(self) -> None:
        """No new sessions; answers in progress are finished; then everybody is told to go."""
        self.draining = True
        for connection in list(self.connections):
            connection.drain()
        for _ in range(int(self.settings.drain_seconds * 10)):
            if not self.connections:
                return
            await asyncio.sleep(0.1)
        log.warning("%d sessions did not end in %g s", len(self.connections), self.settings.drain_seconds)
        for connection in list(self.connections):
            connection.end(1001, "the server is shutting down; connect again later")
        await asyncio.sleep(0.2)

    async def realtime(self, socket: WebSocket) -> None:
        """One real-time session, from the handshake to its end."""
        protocols = [p.strip() for p in socket.headers.get("sec-websocket-protocol", "").split(",") if p.strip()]
        key = key_of(socket.headers, protocols)
        refusal = self._refusal(socket, key)
        if refusal is not None:
            self.metrics.refused.labels("not_allowed").inc()
            await socket.close(POLICY, refusal)  # before the handshake: the client gets 403
            return
        await socket.accept("realtime" if "realtime" in protocols else None)
        if (why := self.no_room()) is not None:
            await socket.send_text(build_error("server_full", why, fault=True))
            await socket.close(TRY_LATER, why)
            return
        session = self.keys.session_of(key) or {}
        limits = self.settings.limits
        await self.serve(
            Connection(socket, lambda c: self.new_session(c.emit, socket.query_params.get("model"), session), limits)
        )

    async def gpt_live(self, socket: WebSocket) -> None:
        """The same in the other dialect."""
        refusal = self._refusal(socket, key_of(socket.headers))
        why = refusal or self.no_room()
        if why is not None:
            if refusal is not None:
                self.metrics.refused.labels("not_allowed").inc()
            await socket.close(TRY_LATER if refusal is None else POLICY, why)
            return
        await socket.accept()
        limits = replace(self.settings.limits, ahead_seconds=AHEAD_S)

        def make(connection: Connection) -> LiveSession:
            def inner(emit: Any, model: str | None, session: Mapping[str, Any]) -> RealtimeSession:
                return self.new_session(emit, model, session, limits)

            return LiveSession(connection.emit, inner, connection.end)

        await self.serve(Connection(socket, make, limits))

    async def serve(self, connection: Connection) -> None:
        self.connections.add(connection)
        self.metrics.sessions.set(len(self.connections))
        try:
            await connection.serve()
        finally:
            self.connections.discard(connection)
            self.metrics.sessions.set(len(self.connections))
            self._trimmer.session_ended()

    def new_session(
        self, emit: Any, model: str | None, session: Mapping[str, Any], limits: SessionLimits | None = None
    ) -> RealtimeSession:
        return RealtimeSession(
            self.backend,
            self.turn_models,
            emit,
            limits or self.settings.limits,
            self.metrics,
            model=model,
            think=self.settings.think,
            executor=self.executor,
            session=session,
        )

    def no_room(self) -> str | None:
        """Why nobody new is taken now, counted as a refusal; None: there is room."""
        if not (self.draining or self.full):
            return None
        self.metrics.refused.labels("draining" if self.draining else "full").inc()
        if self.draining:
            return "the server is shutting down; connect again later"
        return f"the server is full: {self.settings.sessions} sessions are open; try again in a moment"

    def _refusal(self, socket: WebSocket, key: str | None) -> str | None:
        """Why this client may not use the server at all."""
        settings = self.settings
        host = socket.headers.get("host")
        if not host_allowed(host, settings.host, settings.origins):
            return f"this server is not called {host}"
        if not origin_allowed(socket.headers.get("origin"), host, settings.origins):
            return "pages of this origin may not use this server; start it with --origin"
        if not self.keys.allows(key):
            return "the API key is missing or wrong"
        return None


def build_app(server: Server, single: bool = True) -> FastAPI:
    """All routes. The model's threads run as long as the application does. ``single``: no other replica answers under
    this address."""

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        start, close = getattr(server.backend, "start_threads", None), getattr(server.backend, "close", None)
        if start is not None:
            start()
        yield
        await server.drain()
        if close is not None:
            await asyncio.get_running_loop().run_in_executor(None, close)
        server.executor.shutdown(wait=False)

    app = FastAPI(title="OSUM-EChat", docs_url=None, redoc_url=None, openapi_url=None, lifespan=life)
    app.state.server = server

    @app.middleware("http")
    async def guard(request: Request, call_next: RequestResponseEndpoint) -> Response:
        refusal = _http_refusal(server, request)
        response = refusal if refusal is not None else await call_next(request)
        server.metrics.requests.labels(_path_label(app, request.url.path), str(response.status_code)).inc()
        response.headers["X-Content-Type-Options"] = "nosniff"
        origin = request.headers.get("origin")
        if origin and origin_allowed(origin, request.headers.get("host"), server.settings.origins):
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Vary"] = "Origin"
        return response

    for path in ("/v1/realtime", "/realtime"):
        app.add_api_websocket_route(path, server.realtime)
    for path in ("/v1/live/sessions", "/live/sessions"):
        app.add_api_websocket_route(path, server.gpt_live)

    @app.post("/v1/realtime/client_secrets")
    async def client_secrets(request: Request) -> JSONResponse:
        return await _client_secret(server, request)

    @app.get("/health")
    async def health() -> JSONResponse:
        state = "draining" if server.draining else "full" if server.full else "ok"
        body = {
            "status": state,
            "model": server.backend.name,
            "sessions": len(server.connections),
            "limit": server.settings.sessions,
        }
        return JSONResponse(body, 503 if server.draining else 200)

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(server.metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/")
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=PAGE_HEADERS)

    @app.get("/static/{name}")
    async def static(name: str) -> Response:
        path = STATIC / name
        # A name never holds a slash; what is not in the folder is not there.
        if path.parent != STATIC or not path.is_file():
            return JSONResponse({"error": {"message": "not found", "type": "invalid_request_error"}}, 404)
        return FileResponse(path, headers=PAGE_HEADERS)

    rest.add_routes(app, server)
    calls.add_routes(app, server, single)
    return app


PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; connect-src 'self' ws: wss:; img-src 'self' data:; media-src 'self' blob:; style-src 'self'",
    "Cache-Control": "no-cache",
    "Referrer-Policy": "no-referrer",
    "Permissions-Policy": "microphone=(self)",
}


def _path_label(app: FastAPI, path: str) -> str:
    """Known paths by name; a client cannot make up new labels."""
    known = {getattr(route, "path", "") for route in app.routes}
    return path if path in known else "/static" if path.startswith("/static/") else "other"


def _http_refusal(server: Server, request: Request) -> Response | None:
    settings, headers = server.settings, request.headers
    host = headers.get("host")
    if not host_allowed(host, settings.host, settings.origins):
        return rest.failure(403, f"this server is not called {host}", "not_allowed")
    if not origin_allowed(headers.get("origin"), host, settings.origins):
        return rest.failure(403, "pages of this origin may not use this server; start it with --origin", "not_allowed")
    if request.method == "OPTIONS":
        allow = {
            "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
            "Access-Control-Allow-Headers": "Authorization, Content-Type",
        }
        return Response(status_code=204, headers=allow)
    path = request.url.path
    if path not in PUBLIC and not path.startswith("/static/") and not server.keys.allows(key_of(headers)):
        server.metrics.refused.labels("key").inc()
        return rest.failure(401, "the API key is missing or wrong", "invalid_api_key")
    length = headers.get("content-length")
    if length is not None and (not length.isdigit() or int(length) > settings.body_bytes):
        return rest.failure(413, f"a request may have {settings.body_bytes} bytes", "too_large")
    if length is None and request.method == "POST" and "transfer-encoding" in headers:
        return rest.failure(411, "send the request with its length", "length_required")
    return None


async def _client_secret(server: Server, request: Request) -> JSONResponse:
    """A short-lived key for a browser, with the session that it will begin with."""
    try:
        body = await request.json() if int(request.headers.get("content-length") or 0) else {}
    except ValueError:
        return rest.failure(400, "the body must be JSON", "invalid_json")
    if not isinstance(body, dict) or not isinstance(body.get("session") or {}, dict):
        return rest.failure(400, "session must be an object", "invalid_value")
    after = body.get("expires_after") or {}
    seconds = after.get("seconds", 600) if isinstance(after, dict) else None
    if not isinstance(seconds, int) or not 10 <= seconds <= 7200:
        return rest.failure(400, "expires_after.seconds must be between 10 and 7200", "invalid_value")
    given = {"type": "realtime", **(body.get("session") or {})}
    try:
        first = server.new_session(lambda _: None, None, given)
    except ValueError as error:
        return rest.failure(400, str(error), "invalid_value")
    session = first.session
    await first.close()
    try:
        secret, expires = server.keys.make_secret(seconds, given)
    except ValueError as error:
        return rest.failure(400, str(error), "invalid_value")
    return JSONResponse({"value": secret, "expires_at": expires, "session": session})
