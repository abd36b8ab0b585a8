"""What was left out, and why. Every sample that does not reach a batch passes through here with key, file, line and
reason.

Two kinds: *bad* data that cannot be used (broken file, missing field), and samples that a rule keeps out (too long,
another stream's task). Only the first count against ``max_bad_fraction``.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import IO

from osum_echat.dialogue.record import RecordError

log = logging.getLogger(__name__)

FILTERS = frozenset(
    {
        "too_short", "too_long", "label_too_long", "label_empty", "sequence_too_long", "name_filter", "other_stream", "not_in_list", "replaced_line",
        "none_label", "text_speech_ratio", "speech_too_short", "interleave", "tag_extraction", "answer_extraction", "turn_limit",
    }
)  # fmt: skip
"""Reasons that are rules, not faults."""

_LOGGED_EACH = 20  # drops of one reason that are logged one by one; the rest only in the file and the report


@dataclass(frozen=True)
class Drop:
    """One sample that was left out. ``line`` counts from 1; 0 where the file has no lines (a tar)."""

    key: str
    file: str
    line: int
    reason: str
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.reason not in FILTERS

    @classmethod
    def of(cls, error: RecordError) -> Drop:
        return cls(error.key, error.source, error.line, error.reason, error.detail)

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}" if self.line else self.file
        return f"{place}: {self.key or '(no key)'}: {self.reason}: {self.detail}"


class TooManyBadSamples(ValueError):
    """More than ``max_bad_fraction`` of the samples were bad."""


@dataclass
class DropReport:
    """Counts of a run's epoch: how many samples were used, how many left out by reason."""

    used: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, used: int, drops: Iterable[Drop]) -> None:
        self.used += used
        self.reasons.update(drop.reason for drop in drops)

    @property
    def bad(self) -> int:
        return sum(n for reason, n in self.reasons.items() if reason not in FILTERS)

    @property
    def seen(self) -> int:
        return self.used + sum(self.reasons.values())

    def check(self, max_bad_fraction: float | None, minimum: int = 100, final: bool = False) -> None:
        """Raise TooManyBadSamples when the share of bad samples is above the bound, judged from ``minimum`` samples on
        or at the end."""
        if max_bad_fraction is None or (self.seen < minimum and not final) or self.seen == 0:
            return
        if self.bad > max_bad_fraction * self.seen:
            raise TooManyBadSamples(
                f"{self.bad} of {self.seen} samples are bad ({self.text()}); allowed is a share of {max_bad_fraction:g}. "
                "Look at the drops above or run `osum-echat data doctor LIST`, or raise max_bad_fraction"
            )

    def text(self) -> str:
        reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(self.reasons.items()))
        return f"{self.used} used" + (f"; left out: {reasons}" if reasons else "; none left out")

    def state_dict(self) -> dict[str, object]:
        return {"used": self.used, "reasons": dict(self.reasons)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self.used = int(state["used"])  # type: ignore[call-overload]
        self.reasons = Counter(state["reasons"])  # type: ignore[call-overload]


class DropLog:
    """Writes drops as they come: to the log (the first of each reason) and, all of them, to a JSON-lines file."""

    def __init__(self, path: str | None = None) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._logged: Counter[str] = Counter()

    def write(self, drops: Iterable[Drop]) -> None:
        for drop in drops:
            self._logged[drop.reason] += 1
            if self._logged[drop.reason] <= _LOGGED_EACH:
                log.log(logging.WARNING if drop.bad else logging.INFO, "left out: %s", drop)
            if self._logged[drop.reason] == _LOGGED_EACH:
                log.warning(
                    "more samples left out for %s are counted, not logged%s", drop.reason, "" if self._path is None else " here"
                )
            if self._path is not None:
                if self._file is None:
                    self._file = open(self._path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115 - lives as long as the run
                self._file.write(json.dumps(asdict(drop), ensure_ascii=False) + "\n")
