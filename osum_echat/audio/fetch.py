"""Recordings from the web, with limits on size and time."""

from __future__ import annotations

import time
import urllib.error
import urllib.request

MAX_BYTES = 200 * 2**20
SECONDS = 60.0
_CHUNK = 1 << 16


class FetchError(ValueError):
    """Why there is no recording; the message names the address."""


def is_web(source: object) -> bool:
    """Whether this is an http or https address."""
    return isinstance(source, str) and source.lower().startswith(("http://", "https://"))


def fetch(url: str, max_bytes: int = MAX_BYTES, seconds: float = SECONDS) -> bytes:
    """What lies at an http or https address. Raises FetchError, also for what is larger than ``max_bytes`` or takes
    longer than ``seconds``."""
    if not is_web(url):
        raise FetchError(f"{url} is not an http or https address")
    deadline = time.monotonic() + seconds
    too_large = f"{url} has more than {max_bytes / 2**20:g} MB; download it and give a part"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"User-Agent": "osum-echat"}), timeout=seconds) as answer:
            if int(answer.headers.get("Content-Length") or 0) > max_bytes:
                raise FetchError(too_large)
            data = bytearray()
            while chunk := answer.read1(_CHUNK):
                data += chunk
                if len(data) > max_bytes:
                    raise FetchError(too_large)
                if time.monotonic() > deadline:
                    raise FetchError(f"{url} took longer than {seconds:g} s")
    except urllib.error.HTTPError as error:
        raise FetchError(f"{url}: the server answers {error.code} {error.reason}") from error
    except TimeoutError as error:
        raise FetchError(f"{url} took longer than {seconds:g} s") from error
    except (urllib.error.URLError, OSError, ValueError) as error:
        if isinstance(error, FetchError):
            raise
        raise FetchError(f"{url} cannot be reached: {getattr(error, 'reason', error)}") from error
    return bytes(data)
