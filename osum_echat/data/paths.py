"""Opening what a list names: local paths or fsspec URLs, and lists whose relative paths do not fit where they lie.

One rule for a relative path in a list, the same for every list and everybody who reads one: from the list's own folder,
then as written (from the working directory, as the published lists mean it). Lists are written on one machine and read
on another, so a path that is neither is tried with leading folders taken off, in the list's folder and up to three
folders above it; that is said once per rewrite in a warning. URLs are taken as they are.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
from pathlib import Path
from typing import IO, Any

import fsspec

log = logging.getLogger(__name__)

_BUFFER = 1 << 18
_SAID: set[tuple[str, str, str]] = set()  # rewrites that were told already, in this process
_LEVELS_UP = 3


def is_url(path: str) -> bool:
    """Whether ``path`` names a remote (or otherwise fsspec-only) place, such as ``s3://``, ``https://`` or
    ``memory://``."""
    return "://" in path


def open_binary(path: str) -> IO[bytes]:
    """Open for reading; ``.gz`` and other known compressions are unpacked on the way. Raises OSError."""
    if is_url(path) or Path(path).suffix in (".gz", ".bz2", ".xz", ".zst"):
        opened: Any = fsspec.open(path, "rb", compression="infer").open()
        return opened
    return open(path, "rb", buffering=_BUFFER)


def exists(path: str) -> bool:
    if not is_url(path):
        return os.path.exists(path)
    fs, inner = fsspec.core.url_to_fs(path)
    return bool(fs.exists(inner))


def read_bytes(path: str) -> bytes:
    with open_binary(path) as stream:
        return stream.read()


def read_lines(path: str) -> list[str]:
    """The lines of a small text file (UTF-8, a byte order mark allowed), blank ones and ``#`` comments left out.

    Raises:
        ValueError: when the file is not there or is not text; the message names the file.
    """
    try:
        text = io.TextIOWrapper(io.BytesIO(read_bytes(path)), encoding="utf-8-sig").read()
    except FileNotFoundError as error:
        raise ValueError(f"list not found: {path} (seen from {os.getcwd()})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a UTF-8 text file: {error}") from error
    lines = (line.strip() for line in text.split("\n"))
    return [line for line in lines if line and not line.startswith("#")]


def folder(path: str) -> str:
    """The folder of a path or URL, without a trailing slash."""
    head, _, _ = path.rpartition("/")
    return head if is_url(path) else (os.path.dirname(path) or ".")


def join(base: str, name: str) -> str:
    return f"{base.rstrip('/')}/{name}" if is_url(base) else os.path.join(base, name)


class Resolver:
    """Finds files named by one list; remembers the first rewrite that worked, so that a million lines cost one search.

    Args:
        list_path: the list that names the files.
    """

    def __init__(self, list_path: str) -> None:
        self.list_path = list_path
        here = folder(list_path)
        self._here = "" if here == "." else here
        # Each look at a remote folder costs a round trip, so what held for one name is not asked again.
        self._remote = is_url(list_path)
        self._all_here = False
        self._rewrites: list[tuple[str, str]] = []  # (prefix as written, prefix that exists)

    def __call__(self, name: str) -> str:
        """The path to open for ``name``.

        Raises:
            FileNotFoundError: nothing fits; the message says what was tried.
        """
        if is_url(name):
            return name
        beside = join(self._here, name) if self._here and not os.path.isabs(name) else name
        if beside != name and (self._all_here or exists(beside)):
            self._all_here = self._remote
            return beside
        if exists(name):
            return name
        for old, new in self._rewrites:
            if name.startswith(old):
                candidate = new + name[len(old) :]
                if exists(candidate):
                    return candidate
        found = self._search(name)
        if found is None:
            raise FileNotFoundError(
                f"{name} (named by {self.list_path}) does not exist: looked in the list's folder, from {os.getcwd()}, and in up to "
                f"{_LEVELS_UP} folders above the list's"
            )
        self._remember(name, found)
        return found

    def probe(self, name: str) -> None:
        """Learn the rewrite from one name, so that worker processes need not look (and warn) each for itself."""
        with contextlib.suppress(FileNotFoundError):  # told when the file is read
            self(name)

    def _search(self, name: str) -> str | None:
        here = folder(self.list_path)
        if not is_url(here):
            here = os.path.abspath(here)
        parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".")]
        anchors = [here]
        for _ in range(_LEVELS_UP):
            anchors.append(folder(anchors[-1]))
        for skip in range(len(parts)):
            for anchor in anchors:
                candidate = join(anchor, "/".join(parts[skip:]))
                if exists(candidate):
                    return candidate
        return None

    def _remember(self, name: str, found: str) -> None:
        old, new = name, found
        # Parts at the end that both share.
        while "/" in old and "/" in new and old.rpartition("/")[2] == new.rpartition("/")[2]:
            old, new = old.rpartition("/")[0], new.rpartition("/")[0]
        old, new = (name, found) if not new else (f"{old}/" if old != name else old, f"{new}/" if new != found else new)
        if old and not any(old == seen for seen, _ in self._rewrites):
            self._rewrites.append((old, new))
        if (self.list_path, old, new) not in _SAID:
            _SAID.add((self.list_path, old, new))
            log.warning("%s names %s, which is not there; assumed %s (%r is read as %r)", self.list_path, name, found, old, new)
