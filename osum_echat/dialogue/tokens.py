"""Text to ids and back, for any Hugging Face tokenizer; the fixed strings of a dialogue are encoded once per
tokenizer."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, TypeAlias

# transformers types `encode` too loosely to be worth repeating here; `encode` and `decode` are all that is used of it.
Tokenizer: TypeAlias = Any

_FIXED: weakref.WeakKeyDictionary[Any, dict[str, tuple[int, ...]]] = weakref.WeakKeyDictionary()


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of ``text``, without ids that a tokenizer adds by itself (BOS and the like)."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a fast tokenizer: the same ids without transformers' wrapping, in half the time
        return tuple(backend.encode(text, add_special_tokens=False).ids)
    return tuple(tokenizer.encode(text, add_special_tokens=False))


def encode_fixed(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """`encode` with a cache: for prompts, headers, single characters, never for data."""
    cache = _FIXED.setdefault(tokenizer, {})
    ids = cache.get(text)
    if ids is None:
        ids = cache[text] = encode(tokenizer, text)
    return ids


def decode(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Text of ``ids``, special tokens included and blanks untouched."""
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
