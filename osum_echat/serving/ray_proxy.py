"""What Ray Serve's proxies run of ours: a WebSocket whose replica died is closed with a code and a reason. Cheap to
import: every node has a proxy."""

from __future__ import annotations

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PROXY_CALLBACK = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
"""Environment variable by which Ray Serve's proxies find `proxy_callback`; set on every node before its Ray is
started."""
RESTART = 1012
"""Close code "service restart": connect again."""


class CloseCleanly:
    """In the proxy: a WebSocket whose replica went away without closing it is closed with a reason; without this the
    client sees a broken connection."""

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
