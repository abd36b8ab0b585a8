"""A row in work, as every way of decoding has it."""

from __future__ import annotations

import time

from osum_echat.generation.choice import Choice, ChoosingRow
from osum_echat.generation.config import Reason
from osum_echat.generation.events import Done, Event, SpeechToken, Timings
from osum_echat.generation.phases import RowState
from osum_echat.generation.request import Request


class LiveRow(ChoosingRow):
    """A row in work: its request, its state, its random numbers and its clock."""

    def __init__(self, index: int, request: Request, state: RowState, started: float, choice: Choice) -> None:
        transcript = choice.transcript(request.transcribed)
        super().__init__(state, request.mode, request.seed, choice.age_armed(state), transcript)
        self.index, self.request, self.started = index, request, started
        self.prefill = 0.0
        self.first: dict[str, float] = {}

    def note(self, what: str) -> None:
        """Remember when something happened first."""
        self.first.setdefault(what, time.perf_counter() - self.started)

    def done(self, reason: Reason) -> Done:
        state = self.state
        timings = Timings(
            prefill=self.prefill,
            first_token=self.first.get("token"),
            think=self.first.get("think"),
            first_speech=self.first.get("speech"),
            total=time.perf_counter() - self.started,
            think_tokens=state.think_ids,
        )
        return Done(reason, tuple(state.text_ids), tuple(state.generated), dict(state.acted), timings)

    def reported(self, events: list[Event]) -> list[tuple[int, Event]]:
        """What is about to be told, with the row's number; when it was is noted."""
        if any(isinstance(event, SpeechToken) for event in events):
            self.note("speech")
        if self.state.think_ids and not self.state.thinking:
            self.note("think")
        return [(self.index, event) for event in events]
