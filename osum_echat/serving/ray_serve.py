"""The live server on Ray Serve: replicas of one server, each with a model and a device (or a share of one) of its own.

A session is one WebSocket, and Ray Serve's proxy hands a WebSocket to one replica for its whole life, so a session stays where its caches are. What a
client may ask of any replica (a client secret that another one made) needs no memory of its own (`safety.Keys`). A replica that dies ends its own
sessions only: the proxy closes their sockets with code 1012 (`CloseCleanly`), and Ray Serve starts the replica again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from osum_echat.serving.app import Server, build_app

PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Environment variable by which Ray Serve's proxies find `proxy_callback`; set on every node before its Ray is started."""
RESTART = 1012
"""Close code "service restart": connect again."""


class CloseCleanly:
    """In the proxy: a WebSocket whose replica went away without closing it is closed with a reason; without this the client sees a broken connection."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "websocket":
            await self.app(scope, receive, send)
            return
        state = {"open": False, "left": False}

        async def watched_send(message: Message) -> None:
            if message["type"] == "websocket.accept":
                state["open"] = True
            elif message["type"] == "websocket.close":
                state["open"] = False
            await send(message)

        async def watched_receive() -> Message:
            message = await receive()
            if message["type"] == "websocket.disconnect":
                state["left"] = True
            return message

        await self.app(scope, watched_receive, watched_send)
        if state["open"] and not state["left"]:
            await send({"type": "websocket.close", "code": RESTART, "reason": "the server of this session ended; connect again"})


def proxy_callback() -> list[Middleware]:
    """What Ray Serve's proxies put around everything; see `PROXY_CALLBACK`."""
    return [Middleware(CloseCleanly)]


class _Builder:
    """Makes the application of a replica, in its process."""

    def __init__(self, make_server: Callable[[], Server]) -> None:
        self.make_server = make_server

    def __call__(self) -> FastAPI:
        return build_app(self.make_server())


def build(
    make_server: Callable[[], Server], replicas: int, actor_options: dict[str, Any], sessions: int, drain_seconds: float
) -> Any:
    """A Ray Serve application.

    Args:
        make_server: makes a replica's server with its model; can be pickled.
        actor_options: devices of a replica, such as ``{"num_gpus": 0.5}`` (`batch.ray_data.Placement.options`).
        sessions: of one replica; beside them there is room for as many requests.
        drain_seconds: how long a replica that is taken away may let answers in progress end.
    """
    from ray import serve

    class Live:
        """A replica; its requests are the application's."""

    deployment: Any = serve.deployment(
        serve.ingress(_Builder(make_server))(Live),
        name="live",
        num_replicas=replicas,
        ray_actor_options=actor_options,
        max_ongoing_requests=2 * sessions,
        graceful_shutdown_timeout_s=drain_seconds + 5,
        health_check_period_s=5,
    )
    return deployment.bind()
