"""Rows in slots of the device, decoded without waiting for it: a step is under way while the ids of the one before are
read.

Every live row is fed one id a step (several given ones at once on a CPU). The host reads ids one step late, so it
launches step k + 1 when it knows what step k was fed, and not what step k chose; what the choice in step k depends on
(phase, think, ends that are not allowed, the random number) it told the device before it knew. It expected an ordinary
id. Three cases:

    feed chosen   the expectation was right: the device feeds what it chose; the host reads it while the next step runs
    feed given    the id is not the model's to choose
    again         the expectation was wrong (a think was closed, a text ended and nothing is given): the same hidden
                  state chooses again

So a surprise costs its row one step, and the ids are those of `rows.UsualRows`, which the tests hold it to. With
``late=False`` (a CPU, where nothing runs beside the host) every id is read at once and nothing is ever chosen again.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from osum_echat import device as devices
from osum_echat.generation.cache import KeptCache
from osum_echat.generation.choice import Choice, MayAct
from osum_echat.generation.config import Sampling
from osum_echat.generation.decoder_state import DecoderState, extended
from osum_echat.generation.decoder_step import DecoderStep
from osum_echat.generation.events import Event
from osum_echat.generation.live_row import LiveRow
from osum_echat.generation.static_step import Drawing, Shape, StaticStep, Told
from osum_echat.model.echat import EChatModel

log = logging.getLogger(__name__)
_MIN_COLUMNS = 256
_GREEDY = Sampling(greedy=True)


@dataclass(frozen=True)
class Expected:
    """What a choice depends on beside the ids before it.

    Attributes:
        uniform: the random number (0 where the most likely id is taken).
    """

    in_speech: bool
    armed: bool = False
    thinking: bool = False
    unfinished: bool = False
    uniform: float = 0.0


class _Step:
    """A step that was launched: its result comes later."""

    def __init__(self, result: Tensor) -> None:
        self._packet = devices.fetch(result)
        self._rows: list[list[int]] | None = None

    def row(self, slot: int) -> list[int]:
        if self._rows is None:
            self._rows = self._packet.wait().tolist()
        return self._rows[slot]


@dataclass
class _Chosen:
    """An id that the device chose or is choosing for a row."""

    step: _Step
    slot: int
    expected: Expected


@dataclass
class _Row:
    """A row in a slot.

    Attributes:
        length: positions in its slot, steps under way included.
        fed: ids that were fed behind the prompt.
        last: what the last step that it took part in chose.
        unread: what the step before chose and the last one was fed.
        waited: it was left out of the last step.
    """

    live: LiveRow
    slot: int
    visible_T: Tensor
    length: int
    fed: int = 0
    last: _Chosen | None = None
    unread: _Chosen | None = None
    waited: bool = False


@dataclass(frozen=True)
class Sizes:
    """How the numbers of slots and columns are rounded.

    Attributes:
        exact: as many slots as rows and as many columns as there are positions (a CPU); else powers of two, so that few
            shapes are recorded.
        late: read ids one step late.
        record: record steps as graphs, where the device can.
    """

    exact: bool
    late: bool
    record: bool

    @classmethod
    def of(cls, device: torch.device) -> Sizes:
        on_host = device.type == "cpu"
        return cls(exact=on_host, late=not on_host, record=not on_host)

    def slots(self, rows: int) -> int:
        return rows if self.exact else _power(rows, 1)

    def columns(self, positions: int) -> int:
        return positions if self.exact else _power(positions, _MIN_COLUMNS)

    def capacity(self, positions: int) -> int:
        """Columns of a cache that must hold so many positions now."""
        return positions * 3 // 2 + 64 if self.exact else _power(positions, _MIN_COLUMNS)


def _power(number: int, least: int) -> int:
    return max(least, 1 << max(number - 1, 0).bit_length())


@dataclass
class StaticRows:
    """See the module and `rows.Rows`."""

    model: EChatModel
    choice: Choice
    decoder: DecoderStep
    sizes: Sizes
    _rows: dict[int, _Row] = field(default_factory=dict)
    _held: Collection[int] = ()
    _device: StaticStep | None = None

    @property
    def live(self) -> Sequence[LiveRow]:
        return [row.live for number, row in list(self._rows.items()) if number not in self._held]

    @property
    def held(self) -> Sequence[LiveRow]:
        return [row.live for number, row in list(self._rows.items()) if number in self._held]

    # ---- joining and leaving -----------------------------------------------------------------------------------------

    def join(self, rows: Sequence[LiveRow], batch: DecoderState) -> None:
        positions = [read.positions for read in batch.rows]
        self._make_place(len(rows), max(positions))
        assert self._device is not None
        free = [slot for slot in range(self._device.slots) if slot not in {row.slot for row in self._rows.values()}]
        for b, (live, read, slot) in enumerate(zip(rows, batch.rows, free, strict=False)):
            length = batch.copy_row(b, self._device.cache.keys, self._device.cache.values, slot)
            self._device.place(slot, length, batch.hidden_BD[b])
            self._rows[live.index] = _Row(live, slot, read.visible_T, length)
        self._settle()

    def clear(self) -> None:
        for row in self.live:
            del self._rows[row.index]
        if not self._rows:
            self._device = None

    def _make_place(self, more: int, positions: int) -> None:
        """Slots for so many more rows, and columns for ``positions`` and a step."""
        slots = self.sizes.slots(len(self._rows) + more)
        needed = max([positions, *(row.length for row in self._rows.values())]) + 1
        if self._device is None:
            self._device = StaticStep(self.model, self.decoder, self.choice, slots, self.sizes.capacity(needed))
            return
        columns = self._device.columns if needed <= self._device.columns else self.sizes.capacity(needed)
        if slots > self._device.slots or columns > self._device.columns:
            self._resize(max(slots, self._device.slots), columns)

    def _resize(self, slots: int, columns: int) -> None:
        assert self._device is not None
        rows = list(self._rows.values())
        used = max((row.length for row in rows), default=0)
        self._device = self._device.resized([row.slot for row in rows], slots, columns, used)
        for slot, row in enumerate(rows):
            row.slot = slot
        self._settle()

    def _settle(self) -> None:
        assert self._device is not None
        settings = [(_GREEDY, _GREEDY)] * self._device.slots
        for row in self._rows.values():
            settings[row.slot] = (row.live.mode.text, row.live.mode.speech)
        self._device.settle(settings)

    def _leave(self, row: _Row) -> tuple[int, Event]:
        live = row.live
        assert live.state.finished is not None
        if row.unread is not None:  # the device was fed an id that the row never took
            row.fed, row.length = row.fed - 1, row.length - 1
        if live.request.keep_cache:
            live.request.cache = self._keep(row)
        del self._rows[live.index]
        return live.index, live.done(live.state.finished)

    def _keep(self, row: _Row) -> KeptCache:
        """The cache of a row with what was fed so far. Positions that nobody may attend to have no column here and get
        one again."""
        assert self._device is not None
        visible_T = torch.cat([row.visible_T, row.visible_T.new_ones(row.fed)])
        columns_T = (visible_T.cumsum(0) - 1).clamp(min=0)
        keys, values = (
            [cached[row.slot].index_select(0, columns_T).transpose(0, 1).contiguous() for cached in layers]
            for layers in (self._device.cache.keys, self._device.cache.values)
        )
        request = row.live.request
        flat = extended(request.prompt, row.live.state.generated[: row.fed], row.length - row.fed)
        return KeptCache(flat, request.heard, visible_T, tuple(keys), tuple(values))

    # ---- between two steps -------------------------------------------------------------------------------------------

    def choose(self) -> list[tuple[int, Event]]:
        events: list[tuple[int, Event]] = []
        for row in [row for number, row in self._rows.items() if number not in self._held]:
            live, state = row.live, row.live.state
            if live.request.cancelled.is_set() and state.finished is None:
                events += live.reported(state.finish("cancelled"))
            elif state.finished is None:
                events += self._accept(row)
            if state.finished is not None:
                events.append(self._leave(row))
        self._shrink()
        return events

    def release(self, held: Collection[int]) -> None:
        """Rows that are not held any more take part again."""
        self._held = [number for number in self._held if number in held and number in self._rows]

    def _accept(self, row: _Row) -> list[tuple[int, Event]]:
        """Take the id that was chosen and read, if there is one."""
        if row.unread is not None:
            chosen, row.unread = row.unread, None
            events = self._take(row, chosen)
            row.live.state.pending.popleft()  # the device has fed it
            return events
        last = row.last
        if (self.sizes.late and not row.waited) or last is None or row.live.state.pending:
            return []
        return self._take(row, last) if last.expected == self._actual(row.live) else []

    def _take(self, row: _Row, chosen: _Chosen) -> list[tuple[int, Event]]:
        """The row takes an id that was chosen under an expectation that was right."""
        assert self._device is not None
        live, state = row.live, row.live.state
        token, *flags = chosen.step.row(chosen.slot)
        names = [name for name, flag in zip(self._device.names, flags, strict=True) if flag]
        if not live.sampling.greedy:
            live.dice.roll()
        live.acted(names)
        token = live.request.plan.get(len(state.generated), token)
        live.note("token")
        return live.reported(state.accept(token))

    def _shrink(self) -> None:
        """Leave no slots empty for long: on a CPU each costs as much as a full one."""
        if self._device is None:
            return
        if not self._rows:
            self._device = self._device if not self.sizes.exact else None
        elif self.sizes.exact and len(self._rows) < self._device.slots:
            self._resize(len(self._rows), self._device.columns)
        elif not self.sizes.exact and 4 * len(self._rows) <= self._device.slots:
            self._resize(self.sizes.slots(len(self._rows)), self._device.columns)

    # ---- a step ------------------------------------------------------------------------------------------------------

    def step(self, held: Collection[int] = ()) -> None:
        self._held = [number for number in self._rows if number in held]
        for row in self._rows.values():
            row.waited |= row.live.index in self._held
        rows = [row for number, row in self._rows.items() if number not in self._held]
        if not rows:
            return
        count = min(len(row.live.state.pending) for row in rows) if self.sizes.exact else 1
        self._launch(rows, max(count, 1))

    def _launch(self, rows: list[_Row], count: int) -> None:
        longest = max(row.length for row in rows) + count
        if longest >= self._columns():
            self._resize(self._slots(), self.sizes.capacity(longest + 1))
        assert self._device is not None
        device = self._device
        told: dict[int, Told] = {}
        expected: dict[int, Expected] = {}
        for row in rows:
            ids, feed, choice = self._next(row, count)
            told[row.slot] = Told(ids, feed, choice.in_speech, choice.armed, choice.thinking, choice.unfinished, choice.uniform)
            expected[row.slot] = choice
            if feed:
                row.length += count
                row.fed += count
        if not any(said.feed for said in told.values()):
            count, told = 0, {slot: said._replace(ids=()) for slot, said in told.items()}
        table = [told.get(slot, Told((-1,) * count)) for slot in range(device.slots)]
        step = _Step(device.run(table, self._shape(rows, expected, count), self.sizes.record))
        for row in rows:
            row.last, row.waited = _Chosen(step, row.slot, expected[row.slot]), False

    def _next(self, row: _Row, count: int) -> tuple[tuple[int, ...], bool, Expected]:
        """Ids to feed (-1: what was chosen), whether to feed at all, and what the choice behind them depends on."""
        live = row.live
        if live.state.pending:
            ids = tuple(live.state.pending.popleft() for _ in range(count))
            return ids, True, self._actual(live)
        nothing = (-1,) * count
        if row.last is None or row.last.expected != self._actual(live):
            return nothing, False, self._actual(live)
        assert self.sizes.late and not row.waited and count == 1, "the chosen id was not taken"
        row.unread = row.last
        planned = live.request.plan.get(len(live.state.generated), -1)
        return (planned,), True, self._ordinary(live)

    def _actual(self, live: LiveRow) -> Expected:
        state = live.state
        return self._expected(live, state.in_speech, state.thinking, state.may_end_speech, 0)

    def _ordinary(self, live: LiveRow) -> Expected:
        """After one more id that the model chooses, if it is an ordinary one."""
        in_speech, thinking, may_end = live.state.expected()
        return self._expected(live, in_speech, thinking, may_end, 0 if live.sampling.greedy else 1)

    def _expected(self, live: LiveRow, in_speech: bool, thinking: bool, may_end: bool, ahead: int) -> Expected:
        sampling = live.mode.speech if in_speech else live.mode.text
        uniform = 0.0 if sampling.greedy else live.dice.peek(ahead)
        if in_speech:
            return Expected(True, unfinished=not may_end, uniform=uniform)
        return Expected(False, armed=live.age_armed, thinking=thinking, uniform=uniform)

    def _shape(self, rows: list[_Row], expected: dict[int, Expected], count: int) -> Shape:
        choices = [(row, expected[row.slot]) for row in rows]
        texts = [row.live.mode.text for row, choice in choices if not choice.in_speech]
        speeches = [row.live.mode.speech for row, choice in choices if choice.in_speech]
        may_act = MayAct()
        if self.sizes.exact:
            may_act = MayAct(
                *(any(getattr(choice, name) for _, choice in choices) for name in ("armed", "thinking", "unfinished"))
            )
        lengths = {row.length for row in rows}
        modes = [row.live.mode for row in self._rows.values()]
        return Shape(
            count,
            columns=min(self.sizes.columns(max(lengths)), self._columns()),
            masked=not (self.sizes.exact and len(lengths) == 1 and count <= 1 and len(rows) == self._slots()),
            text=_drawing(texts),
            speech=_drawing(speeches),
            may_act=may_act,
            remember=(any(m.text.repetition_penalty != 1 for m in modes), any(m.speech.repetition_penalty != 1 for m in modes)),
        )

    def _columns(self) -> int:
        assert self._device is not None
        return self._device.columns

    def _slots(self) -> int:
        assert self._device is not None
        return self._device.slots


def _drawing(settings: Sequence[Sampling]) -> Drawing | None:
    if not settings:
        return None
    drawn = [s for s in settings if not s.greedy]
    return Drawing(
        greedy=not drawn,
        penalty=any(s.repetition_penalty != 1 for s in settings),
        top_p=any(s.top_p < 1 for s in drawn),
        candidates=max((s.top_k for s in drawn), default=0) if all(s.top_k for s in drawn) else 0,
    )
