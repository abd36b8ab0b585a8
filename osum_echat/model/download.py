"""Folders and files that may be on this machine or on the hub; what can be had from neither is said at once.

The libraries that download retry for a minute or more when there is no network. `find` looks first at this machine,
then asks once whether the hub answers at all.
"""

from __future__ import annotations

import os
import re
import socket
import urllib.parse
from pathlib import Path

SECONDS = 5.0


class NotFound(ValueError):
    """A name that is neither a path of this machine nor to be had from the hub."""


def is_hub_name(name: str) -> bool:
    """Whether ``name`` may be a repository on the hub (``owner/name``) and is no path here."""
    return not Path(name).exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", name) is not None


def remedy(name: str) -> str:
    """How to get a repository of the hub onto a machine without a network."""
    return (
        f"download it where there is one (hf download {name} --local-dir FOLDER), copy FOLDER here and name it; or set HF_ENDPOINT to a mirror "
        "that can be reached"
    )


def check(name: str, key: str = "") -> None:
    """Raise NotFound, within seconds, for a hub name that is neither in the local cache nor to be downloaded. ``key``:
    who asks for it.

    Names of paths that exist are fine, other names are not this function's affair.
    """
    if not is_hub_name(name) or _in_cache(name):
        return
    asked = f"{key}: " if key else ""
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise NotFound(f"{asked}{name} is not on this machine, and HF_HUB_OFFLINE forbids to ask the hub; {remedy(name)}")
    if not _hub_answers():
        raise NotFound(f"{asked}{name} is not on this machine, and the hub cannot be reached; {remedy(name)}")


def find(name: str | Path, files: list[str] | None = None, key: str = "") -> Path:
    """A path of this machine: ``name`` itself, or the download of a hub repository (of ``files`` only, patterns).

    Raises:
        NotFound: a hub name that cannot be had. Other names come back as they are: whoever reads them says what is
            missing.
    """
    name = str(name)
    if not is_hub_name(name):
        return Path(name)
    check(name, key)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=files))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        asked = f"{key}: " if key else ""
        raise NotFound(f"{asked}{name} is neither a path here nor on the hub ({str(error).splitlines()[0]})") from error


def _in_cache(name: str) -> bool:
    from huggingface_hub import try_to_load_from_cache

    files = ("config.json", "tokenizer.json", "tokenizer_config.json", "config.yaml")
    return any(isinstance(try_to_load_from_cache(name, file), str) for file in files)


def _hub_answers() -> bool:
    """Whether a connection to the hub, or to the proxy before it, can be opened."""
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    proxy = os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy")
    where = urllib.parse.urlsplit(proxy or endpoint)
    port = where.port or (443 if where.scheme == "https" else 80)
    try:
        socket.create_connection((where.hostname or "", port), timeout=SECONDS).close()
    except OSError:
        return False
    return True
