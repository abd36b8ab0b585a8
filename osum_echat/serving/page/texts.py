"""Texts of the page in the visitor's language, from `texts.yaml`."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files

import yaml

DEFAULT = "en"
LANGUAGES = {"en": "English", "zh": "中文"}


@lru_cache(maxsize=1)
def tables() -> Mapping[str, Mapping[str, str]]:
    """Texts by language and key."""
    return yaml.safe_load((files(__package__) / "texts.yaml").read_text(encoding="utf-8"))


def language_of(header: str | None) -> str:
    """The page's language for a browser's language tag or ``Accept-Language`` header: the first one that the page
    has."""
    for part in (header or "").split(","):
        code = part.split(";")[0].strip().lower().split("-")[0]
        if code in tables():
            return code
    return DEFAULT


def text(language: str, key: str, **values: object) -> str:
    """The text for ``key``, with its places filled in."""
    found = tables().get(language, {}).get(key) or tables()[DEFAULT][key]
    return found.format(**values) if values else found


def has(key: str) -> bool:
    return key in tables()[DEFAULT]
