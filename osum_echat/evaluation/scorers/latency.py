"""How long a listener waits, and what it costs."""

from __future__ import annotations

from collections.abc import Mapping

from osum_echat.evaluation.items import Item
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.scorers import SECONDS, Measure, Score, Tools

_TIMES = ("first_token", "think", "first_text", "first_speech", "first_audio", "total")


class Latency:
    """Times of one request since it was handed over, the think's length, speed and memory.

    ``first_token``: the first id of any kind. ``think``: until the think was closed. ``first_text``: of the reply.
    ``first_speech``: the first speech code, ``first_audio``: the first sound. ``rtf``: whole time over seconds of sound
    (below 1: faster than it is played).
    """

    measures: Mapping[str, Measure] = {
        **{name: SECONDS for name in _TIMES},
        "think_tokens": Measure("", 1.0, "", spread=True),
        "tokens_per_second": Measure("1/s", 1.0, "higher"),
        "rtf": Measure("", 1.0, "lower"),
        "memory_mb": Measure("MiB", 1.0, "lower"),
    }

    def __init__(self, tools: Tools, _: str = "") -> None:
        pass

    def score(self, item: Item, result: Result) -> Score | None:
        times = {name: float(value) for name, value in result.timings.items() if isinstance(value, (int, float))}
        if "total" not in times:
            return None
        score = Score({name: (times[name], 1) for name in (*_TIMES, "memory_mb") if name in times})
        if times.get("think_tokens"):
            score.values["think_tokens"] = (times["think_tokens"], 1)
        generating = times["total"] - times.get("synthesis", 0.0)
        if times.get("tokens") and generating > 0:
            score.values["tokens_per_second"] = (times["tokens"], generating)
        if times.get("audio_seconds"):
            score.values["rtf"] = (times["total"], times["audio_seconds"])
        return score


class Seconds:
    """Mean time of an item, batched with others."""

    measures: Mapping[str, Measure] = {"seconds": Measure("s", 1.0, "lower")}

    def __init__(self, tools: Tools, _: str = "") -> None:
        pass

    def score(self, item: Item, result: Result) -> Score | None:
        return Score({"seconds": (result.seconds, 1)}) if result.seconds else None
