"""What dialogue, processing and data tests share: the tokenizer and the published vocabulary."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from osum_echat.dialogue.vocabulary import Vocabulary

OSUM = Path(__file__).parent / "data" / "osum"
VOCAB = Vocabulary()


@functools.lru_cache(maxsize=1)
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(OSUM / "tiny_llm")


def golden(name: str) -> Any:
    return json.loads((OSUM / name).read_text(encoding="utf-8"))
