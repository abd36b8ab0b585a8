"""Conversations that were played to a Realtime server (`evaluation.duplex`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from osum_echat.evaluation.items import Item
from osum_echat.evaluation.results import Result
from osum_echat.evaluation.scorers import PERCENT, SECONDS, Measure, Score, Tools


class Live:
    """Delay, interruption, rejection, as Full-Duplex-Bench and HumDial-FDBench name them. Each counts the segments that
    it is about.

    ``delay``: end of the person's words to the first sound of the answer; ``after_commit``: from the server's own end
    of the turn. ``stop``: from the person's first sound to the system's silence, where it was interrupted. ``gaps``:
    silence inside answers in a conversation, because sound came late.
    """

    measures: Mapping[str, Measure] = {
        "delay": SECONDS,
        "after_commit": SECONDS,
        "answered": PERCENT,
        "interrupted": PERCENT,
        "stop": SECONDS,
        "rejected": PERCENT,
        "gaps": SECONDS,
    }

    def __init__(self, tools: Tools, _: str = "") -> None:
        pass

    def score(self, item: Item, result: Result) -> Score | None:
        turns: Sequence[Mapping[str, Any]] = result.timings.get("turns") or ()
        if not isinstance(turns, (list, tuple)) or not all(isinstance(turn, dict) and "kind" in turn for turn in turns):
            raise ValueError("timings.turns must be a list of objects with kind, as osum-echat duplex writes them")
        if not turns:
            return None
        wanted = [turn for turn in turns if turn["kind"] == "say"]
        interrupting = [turn for turn in wanted if turn.get("interrupts")]
        unwanted = [turn for turn in turns if turn["kind"] == "reject"]
        score = Score({"gaps": (float(result.timings.get("gaps", 0.0)), 1)})
        for name in ("delay", "after_commit", "stop"):
            values = [float(turn[name]) for turn in wanted if name in turn]
            if values:
                score.values[name] = (sum(values), len(values))
        for name, among, good in (
            ("answered", wanted, [turn.get("answered") for turn in wanted]),
            ("interrupted", interrupting, ["stop" in turn for turn in interrupting]),
            ("rejected", unwanted, [turn.get("rejected") for turn in unwanted]),
        ):
            if among:
                score.values[name] = (sum(map(bool, good)), len(among))
        return score
