"""Who may use a server: keys, where a page may come from, and how many at once."""

from __future__ import annotations

import base64
import hmac
import ipaddress
import json
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

KEY_PROTOCOL = "openai-insecure-api-key."
"""Browsers cannot set a header for a WebSocket, so the key comes as a subprotocol of this form."""
SECRET_SECONDS = 600
_SECRET = "ek_"
SECRET_LETTERS = 6000
"""Of a client secret at most: it must fit into a header."""


def is_loopback(host: str) -> bool:
    """Whether a server on this address is reached from its own machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_host(host: str, api_key: str | None) -> None:
    """Raises ValueError for a server that others could reach and that asks for no key."""
    if not is_loopback(host) and not api_key:
        raise ValueError(
            f"--host {host} can be reached from other machines: give --api-key KEY (or OSUM_ECHAT_API_KEY), or stay with 127.0.0.1"
        )


@dataclass
class Keys:
    """Who has the key. Without one everybody has it, whatever they send.

    ``client_secrets`` are short-lived keys that a holder of the key makes for a browser; they work until they expire.
    Such a secret is signed with the key and holds its end and its session, so that every server with the same key
    (`ray_serve`: every replica) knows it, and none keeps a list.

    Attributes:
        shared: what servers that know each other's secrets have in common, where there is no key.
    """

    api_key: str | None = None
    clock: Callable[[], float] = time.time
    shared: str = field(default_factory=lambda: secrets.token_hex(32))

    def make_secret(self, seconds: float = SECRET_SECONDS, session: Mapping[str, Any] | None = None) -> tuple[str, int]:
        """A key that begins with ``ek_``, and when it expires (Unix time). Raises ValueError for a session that is too
        long for a key."""
        end = self.clock() + seconds
        content = {"end": end, "session": session or {}, "nonce": secrets.token_hex(12)}
        body = base64.urlsafe_b64encode(json.dumps(content, separators=(",", ":")).encode()).decode().rstrip("=")
        if len(body) > SECRET_LETTERS:
            raise ValueError("session is too long for a client secret; send its instructions with session.update")
        return f"{_SECRET}{body}.{self._sign(body)}", int(end)

    def session_of(self, key: str | None) -> Mapping[str, Any] | None:
        """The session of a key that `make_secret` gave out and that is still good; None for any other."""
        body, _, signature = (key or "")[len(_SECRET) :].rpartition(".")
        if not (key or "").startswith(_SECRET) or not hmac.compare_digest(signature.encode(), self._sign(body).encode()):
            return None
        content = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
        return content["session"] if content["end"] > self.clock() else None

    def _sign(self, body: str) -> str:
        return hmac.new((self.api_key or self.shared).encode(), body.encode(), "sha256").hexdigest()

    def is_secret(self, key: str) -> bool:
        """One of the keys that `make_secret` gave out, and still good."""
        return self.session_of(key) is not None

    def allows(self, key: str | None) -> bool:
        if not self.api_key:
            return True
        if key is None:
            return False
        return hmac.compare_digest(key.encode(), self.api_key.encode()) or self.is_secret(key)


def key_of(headers: Mapping[str, str], protocols: list[str] | None = None) -> str | None:
    """The key of a request: ``Authorization: Bearer``, ``api-key``, or a subprotocol."""
    kind, _, value = headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer" and value:
        return value.strip()
    if headers.get("api-key"):
        return headers["api-key"]
    return next((p[len(KEY_PROTOCOL) :] for p in protocols or [] if p.startswith(KEY_PROTOCOL)), None)


def origin_allowed(origin: str | None, host: str | None, allowed: tuple[str, ...]) -> bool:
    """Whether a page of ``origin`` may talk to this server. Programs send none. Pages of the server itself may, and
    those of ``allowed`` (* for all).

    A browser lets any page open a WebSocket to this machine, so it is the server that has to look.
    """
    if origin is None or "*" in allowed or origin in allowed:
        return True
    try:
        parts = urlsplit(origin)
    except ValueError:
        return False
    return bool(host) and parts.scheme in ("http", "https") and parts.netloc == host


def host_allowed(host: str | None, bound: str, allowed: tuple[str, ...]) -> bool:
    """On loopback only the names of this machine: a page elsewhere could have its own name point here (DNS
    rebinding)."""
    if not is_loopback(bound) or "*" in allowed:
        return True
    name = (host or "").rsplit(":", 1)[0].strip("[]") if not (host or "").endswith("]") else (host or "").strip("[]")
    return name in ("localhost", "testserver") or is_loopback(name) or any(urlsplit(o).hostname == name for o in allowed)
