"""Rows that are decoded together, a step at a time: what `Generator.generate` and the engine need of them, and the way
that runs everywhere.

    rows.join([row], batch)             # its prompt was read
    events = rows.choose()              # ids that were chosen, ends
    rows.step(held={3})                 # feed what was chosen; row 3 waits

`static_rows` does the same on the device without waiting for it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

from torch import Tensor

from osum_echat.device import send
from osum_echat.generation.choice import Choice
from osum_echat.generation.decoder_state import DecoderState, Slots
from osum_echat.generation.events import Event
from osum_echat.generation.live_row import LiveRow
from osum_echat.model.echat import EChatModel

OnLogits = Callable[[int, Tensor], None]
"""Called with the row's number and its raw logits [V] before every id that the model chooses."""


class Rows(Protocol):
    """Rows in work. They know each row by its number (`LiveRow.index`)."""

    @property
    def live(self) -> Sequence[LiveRow]:
        """Rows that go on."""
        ...

    @property
    def held(self) -> Sequence[LiveRow]:
        """Rows that the last `step` left out."""
        ...

    def join(self, rows: Sequence[LiveRow], batch: DecoderState) -> None:
        """Add rows whose prompts ``batch`` has read; it is not to be used any more."""
        ...

    def release(self, held: Collection[int]) -> None:
        """Rows that are held and not among these take part again. Call it before `choose`."""
        ...

    def choose(self) -> list[tuple[int, Event]]:
        """All that happens between two steps: cancelled rows end, others take the id that was chosen, and rows that
        have ended leave."""
        ...

    def step(self, held: Collection[int] = ()) -> None:
        """Feed all rows but these, which keep their caches."""
        ...

    def clear(self) -> None:
        """Give up all live rows, after a fault."""
        ...


class UsualRows:
    """One batch; rows that are held leave it with their caches."""

    def __init__(self, model: EChatModel, choice: Choice, on_logits: OnLogits | None = None) -> None:
        self._model, self._choice, self._on_logits = model, choice, on_logits
        self._live: list[LiveRow] = []
        self._batch: Slots | None = None
        self._held: dict[int, tuple[LiveRow, Slots]] = {}

    @property
    def live(self) -> Sequence[LiveRow]:
        return self._live

    @property
    def held(self) -> Sequence[LiveRow]:
        return [row for row, _ in list(self._held.values())]

    def join(self, rows: Sequence[LiveRow], batch: Slots) -> None:
        self._live = [*self._live, *rows]  # first, so that they are found where a fault ends the batch
        if self._batch is None:
            self._batch = batch
        else:
            self._batch.join(batch)

    def release(self, held: Collection[int]) -> None:
        for number in [n for n in self._held if n not in held]:
            row, batch = self._held.pop(number)
            self.join([row], batch)

    def choose(self) -> list[tuple[int, Event]]:
        events: list[tuple[int, Event]] = []
        for row in self._live:
            if row.request.cancelled.is_set() and row.state.finished is None:
                events += row.reported(row.state.finish("cancelled"))
        self._drop_finished(events)
        for in_speech, group in self._groups():
            events += self._choose(group, in_speech)
        self._drop_finished(events)
        return events

    def step(self, held: Collection[int] = ()) -> None:
        self._hold(held)
        if self._batch is None:
            return
        count = min(len(row.state.pending) for row in self._live)
        if count:
            self._batch.feed([[row.state.pending.popleft() for _ in range(count)] for row in self._live])

    def clear(self) -> None:
        self._live, self._batch = [], None

    def _hold(self, numbers: Collection[int]) -> None:
        """Take these rows out of the batch."""
        held = [b for b, row in enumerate(self._live) if row.index in numbers]
        if not held or self._batch is None:
            return
        for b in held:
            self._held[self._live[b].index] = (self._live[b], self._batch.take([b]))
        self._keep([b for b in range(len(self._live)) if b not in held])

    def _keep(self, rows: list[int]) -> None:
        """Go on with these rows of the batch."""
        if rows and self._batch is not None:
            self._batch.select(rows)
        else:
            self._batch = None
        self._live = [self._live[b] for b in rows]

    def _drop_finished(self, events: list[tuple[int, Event]]) -> None:
        """Report rows that have ended and take them out of the batch."""
        rest = [b for b, row in enumerate(self._live) if row.state.finished is None]
        if self._batch is None or len(rest) == len(self._live):
            return
        for b, row in enumerate(self._live):
            if row.state.finished is not None:
                if row.request.keep_cache:
                    row.request.cache = self._batch.keep(b)
                events.append((row.index, row.done(row.state.finished)))
        self._keep(rest)

    def _groups(self) -> list[tuple[bool, list[int]]]:
        """Rows that choose an id, by the head that they choose from."""
        choosing = [b for b, row in enumerate(self._live) if not row.state.pending]
        groups = [(in_speech, [b for b in choosing if self._live[b].state.in_speech == in_speech]) for in_speech in (False, True)]
        return [(in_speech, group) for in_speech, group in groups if group]

    def _choose(self, group: list[int], in_speech: bool) -> list[tuple[int, Event]]:
        """Choose the next id of some rows and let their states take it."""
        assert self._batch is not None
        events: list[tuple[int, Event]] = []
        rows = [self._live[b] for b in group]
        hidden_RD = self._batch.hidden_BD
        if len(group) < len(hidden_RD):
            hidden_RD = hidden_RD[send(group, hidden_RD.device)]
        head = self._model.speech_logits if in_speech else self._model.text_logits
        logits_RV = head(hidden_RD).float()
        if self._on_logits is not None:
            for row, logits_V in zip(rows, logits_RV, strict=True):
                self._on_logits(row.index, logits_V)
        offset = self._model.vocabulary.text_size if in_speech else 0
        for row, (chosen, acted) in zip(rows, self._choice.pick(rows, logits_RV, in_speech), strict=True):
            row.acted(acted)
            token = row.request.plan.get(len(row.state.generated), chosen + offset)
            row.note("token")
            events += row.reported(row.state.accept(token))
        return events
