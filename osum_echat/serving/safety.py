"""Who may use a server: keys, where a page may come from, and how many at once."""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from urllib.parse import urlsplit

KEY_PROTOCOL = "openai-insecure-api-key."
"""Browsers cannot set a header for a WebSocket, so the key comes as a subprotocol of this form."""
SECRET_SECONDS = 600


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
    """

    api_key: str | None = None
    clock: Callable[[], float] = time.time
    _secrets: dict[str, float] = field(default_factory=dict)

    def make_secret(self, seconds: float = SECRET_SECONDS) -> tuple[str, int]:
        """A key that begins with ``ek_``, and when it expires (Unix time)."""
        now = self.clock()
        self._secrets = {secret: end for secret, end in self._secrets.items() if end > now}
        secret = f"ek_{secrets.token_hex(24)}"
        self._secrets[secret] = now + seconds
        return secret, int(now + seconds)

    def is_secret(self, key: str) -> bool:
        """One of the keys that `make_secret` gave out, and still good."""
        return self._secrets.get(key, 0.0) > self.clock()

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
    """Whether a page of ``origin`` may talk to this server. Programs send none. Pages of the server itself may, and those of ``allowed`` (* for all).

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
    """On loopback only the names of this machine: a page elsewhere could have its own name point here (DNS rebinding)."""
    if not is_loopback(bound) or "*" in allowed:
        return True
    name = (host or "").rsplit(":", 1)[0].strip("[]") if not (host or "").endswith("]") else (host or "").strip("[]")
    return name in ("localhost", "testserver") or is_loopback(name) or any(urlsplit(o).hostname == name for o in allowed)
