"""Text as it is compared, before words are counted.

``standard`` is what published numbers use: Whisper's English normaliser (package whisper-normalizer) and WeText for
Chinese (package wetext; numbers written out, er endings kept, simplified characters), after which punctuation goes.
``own`` is `metrics.normalize`, which needs no package.
"""

from __future__ import annotations

import re
from functools import cached_property
from typing import Any, Literal

from osum_echat import metrics
from osum_echat.evaluation.items import Item

_CJK = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
_TAG = re.compile(r"<[^<>]*>")


def language_of(text: str, item: Item | None = None) -> str:
    """``zh`` or ``en``: what the item says (its ``lang``), else by the characters."""
    said = str(item.extra.get("lang") or "").lower() if item is not None else ""
    if said[:2] in ("zh", "cn") or said == "yue":
        return "zh"
    if said[:2] == "en":
        return "en"
    return "zh" if _CJK.search(text) else "en"


class Normalizer:
    """A function of a text. ``name`` says what it uses, for the report.

    Raises:
        ValueError: ``standard`` without the packages that it needs, when a text of their language comes.
    """

    def __init__(self, kind: Literal["auto", "own", "standard"] = "auto") -> None:
        self.kind = kind

    def __call__(self, text: str, item: Item | None = None) -> str:
        if self.kind == "own":
            return metrics.normalize(text)
        plain = _TAG.sub(" ", text)
        if language_of(text, item) == "zh":
            return metrics.normalize(self._chinese.normalize(plain) if self._chinese is not None else plain)
        return " ".join(self._english(plain).split()) if self._english is not None else metrics.normalize(plain)

    @property
    def name(self) -> str:
        if self.kind == "own":
            return "own"
        english = "Whisper's" if self._english is not None else "own"
        return f"English: {english}, Chinese: {'WeText' if self._chinese is not None else 'own'}"

    @cached_property
    def _english(self) -> Any:
        try:
            from whisper_normalizer.english import EnglishTextNormalizer
        except ImportError as error:
            return self._missing("whisper-normalizer", error)
        return EnglishTextNormalizer()

    @cached_property
    def _chinese(self) -> Any:
        try:
            from wetext import Normalizer as WeText
        except ImportError as error:
            return self._missing("wetext", error)
        return WeText(lang="zh", operator="tn", traditional_to_simple=True)

    def _missing(self, package: str, error: ImportError) -> None:
        if self.kind == "standard":
            raise ValueError(
                f"standard normalisation needs {package}: pip install 'osum-echat[evaluation]', or normalizer=own"
            ) from error
