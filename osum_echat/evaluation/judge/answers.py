"""A judge's answer: the first JSON object with a score from 1 to 5, or ``[[n]]``."""

from __future__ import annotations

import json
import re
from typing import Any

LOW, HIGH = 1, 5
_BRACKETS = re.compile(r"\[\[\s*([0-9]+(?:\.[0-9]+)?)\s*\]\]")
_DECODER = json.JSONDecoder()


class NoScore(ValueError):
    """The answer holds no score from 1 to 5."""


def read_score(text: str) -> tuple[float, str]:
    """(score, reason) of an answer; the reason may be empty. Raises NoScore."""
    out_of_range: list[Any] = []
    for start in (match.start() for match in re.finditer(r"\{", text)):
        try:
            found, _ = _DECODER.raw_decode(text, start)
        except ValueError:
            continue
        if isinstance(found, dict) and "score" in found:
            score = _number(found["score"])
            if score is not None:
                return score, str(found.get("reason") or "").strip()
            out_of_range.append(found["score"])
    for match in _BRACKETS.finditer(text):
        score = _number(match.group(1))
        if score is not None:
            return score, text.replace(match.group(0), "").strip()
        out_of_range.append(match.group(1))
    if out_of_range:
        raise NoScore(f"the score {out_of_range[0]!r} is not a number from {LOW} to {HIGH}")
    raise NoScore(f"no score in the answer {text.strip()[:80]!r}")


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        score = float(value)
    except ValueError:
        return None
    return score if LOW <= score <= HIGH else None
