"""Continuous batching: one thread owns the model, requests join and leave the running batch between two steps.

    engine = Engine(generator)
    engine.start()
    ticket = engine.submit(request, on_event)     # from any thread
    ticket.cancel()                               # no further step is made for it
    engine.run(lambda: listen(model, feats))      # anything else that needs the model, between two steps; a Future

``on_event(event)`` is called on the model's thread, with `Done` as the last event.

One turn of the thread is: what others asked for, one piece of a prompt, one step of the batch. So a long recording
delays the others by one piece at a time. A reply depends on its request alone, never on its company: pieces are cut by
the request's own length, and rows never see each other (`tests/test_generation_engine.py`).

Memory is counted in cached positions: a request holds its prompt and all it may generate from the moment it is taken
in, a session between its turns holds what it has read. When a request does not fit, caches of sessions are dropped, the
one that was used longest ago first (what is dropped is read again when its session goes on); if it still does not fit
it waits its turn, and when too many wait it is refused (`EngineFull`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

import torch

from osum_echat.generation.cache import KeptCache
from osum_echat.generation.decoder_state import DecoderState
from osum_echat.generation.events import Done, Event
from osum_echat.generation.generator import Generator
from osum_echat.generation.live_row import LiveRow
from osum_echat.generation.request import Request, TooLong
from osum_echat.generation.rows import Rows
from osum_echat.generation.session import Session

log = logging.getLogger(__name__)
T = TypeVar("T")
OnEvent = Callable[[Event], None]


class EngineFull(RuntimeError):
    """A request that cannot be taken now; the message is a sentence for whoever asked."""


@dataclass(frozen=True)
class EngineLimits:
    """What the engine takes on.

    Attributes:
        rows: rows of the batch at most.
        positions: cached positions at most, those of requests and those that sessions keep.
        queue: requests that may wait.
        piece: positions of a prompt that are read at once.
        reserve: positions that a request is counted with for what it generates, at most (its mode's limit, if that is
            lower).
    """

    rows: int = 16
    positions: int = 65536
    queue: int = 64
    piece: int = 256
    reserve: int = 2048

    def __post_init__(self) -> None:
        if min(self.rows, self.positions, self.piece, self.reserve) < 1 or self.queue < 0:
            raise ValueError(f"limits of the engine must be positive: {self}")


@dataclass(frozen=True)
class Load:
    """What the engine has in hand."""

    rows: int
    held: int
    reading: int
    waiting: int
    positions: int
    kept: int


@dataclass(eq=False)
class Ticket:
    """A submitted request.

    Attributes:
        request: what was asked; ``cache`` is set when it asked for that.
        read_only: only read the prompt, for its cache (the past of a dialogue).
        failed: why the engine gave it up, where it did; its last event is then Done("cancelled").
    """

    request: Request
    on_event: OnEvent
    number: int
    submitted: float
    read_only: bool = False
    held: threading.Event = field(default_factory=threading.Event)
    failed: BaseException | None = None
    _wake: Callable[[], None] = lambda: None

    def cancel(self) -> None:
        """Stop within one step."""
        self.request.cancel()
        self._wake()

    def hold(self, on: bool = True) -> None:
        """Make no step for it until ``hold(False)``; its cache stays."""
        if self.held.is_set() == on:
            return
        if on:
            self.held.set()
        else:
            self.held.clear()
        self._wake()


class LlmEngine(Protocol):
    """What servers need of an engine: `Engine`, and `vllm.engine.VllmEngine`."""

    def start(self) -> None: ...

    def close(self) -> None: ...

    def submit(self, request: Request, on_event: OnEvent, read_only: bool = False) -> Ticket: ...

    def run(self, work: Callable[[], T]) -> Future[T]: ...

    def remember(self, session: Session) -> None: ...

    def forget(self, session: Session) -> None: ...

    def load(self) -> Load: ...


class Engine:
    """See the module. `start` runs a thread; without it `tick` does one turn, for tests and for those who have a loop
    of their own."""

    def __init__(self, generator: Generator, limits: EngineLimits | None = None) -> None:
        self.generator, self.limits = generator, limits or EngineLimits()
        self._changed = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._waiting: deque[Ticket] = deque()
        self._reading: deque[tuple[Ticket, LiveRow, DecoderState]] = deque()
        self._tickets: dict[int, Ticket] = {}
        self._rows: Rows = generator.rows()
        self._sessions: OrderedDict[int, Session] = OrderedDict()
        self._numbers = 0
        self._closed = False
        self._awake = False
        self._thread: threading.Thread | None = None

    # ---- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run the model's thread."""
        assert self._thread is None, "the engine runs already"
        self._thread = threading.Thread(target=self._run, name="osum-echat-model", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Cancel everything and end the thread."""
        with self._changed:
            self._closed = True
            for ticket in [*self._waiting, *self._tickets.values()]:
                ticket.request.cancel()
                ticket.held.clear()
        self._wake()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def submit(self, request: Request, on_event: OnEvent, read_only: bool = False) -> Ticket:
        """Take a request. ``on_event`` is called on the model's thread and must not block; `Done` is the last.

        Raises:
            EngineFull: too many wait already, or the engine is closed. TooLong: it can never fit.
        """
        with self._changed:
            if self._closed:
                raise EngineFull("the model is shutting down; connect again later")
            self._numbers += 1
            ticket = Ticket(request, on_event, self._numbers, time.perf_counter(), read_only, _wake=self._wake)
            if self._need(ticket) > self.limits.positions:
                raise TooLong(
                    f"this request needs {self._need(ticket)} cached positions, the server has {self.limits.positions}; "
                    "ask with a shorter recording or history"
                )
            if len(self._waiting) >= self.limits.queue:
                raise EngineFull(f"the server is full: {len(self._waiting)} requests wait already; try again in a moment")
            self._waiting.append(ticket)
        self._wake()
        return ticket

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Call ``work`` on the model's thread between two steps, in inference mode."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  whoever waits for the future gets it, whatever it is
                future.set_exception(error)

        with self._changed:
            if self._closed:
                raise EngineFull("the model is shutting down; connect again later")
            self._calls.append(call)
        self._wake()
        return future

    def remember(self, session: Session) -> None:
        """The session holds a cache now, which may be dropped to make place. Call it on the model's thread, after each
        turn."""
        self._sessions.pop(id(session), None)
        if session.kept is not None:
            self._sessions[id(session)] = session
            self._make_place(0)

    def forget(self, session: Session) -> None:
        """The session has ended."""

        def drop() -> None:
            self._sessions.pop(id(session), None)
            session.kept = None

        if not self._closed:
            self.run(drop)

    def load(self) -> Load:
        """What is in hand (numbers of one moment, taken without stopping anything)."""
        tickets = list(self._tickets.values())
        kept = sum(len(cache) for cache in self._kept())
        return Load(
            rows=len(self._rows.live),
            held=len(self._rows.held),
            reading=len(self._reading),
            waiting=len(self._waiting),
            positions=sum(map(self._need, tickets)) + kept,
            kept=kept,
        )

    # ---- the model's thread ------------------------------------------------------------------------------------------

    def tick(self) -> bool:
        """One turn: calls, one piece of a prompt, one step. Returns whether there is more to do now."""
        with torch.inference_mode():
            while self._calls:
                self._calls.popleft()()
            self._admit()
            self._guarded(self._read_piece, self._reading_tickets)
            self._guarded(self._step, self._live_tickets)
        return bool(self._calls or self._reading or self._rows.live or self._may_go_on() or self._admissible())

    def _run(self) -> None:
        while True:
            more = self.tick()
            with self._changed:
                if self._closed and not (self._tickets or self._waiting):
                    break
                if not more and not self._awake:
                    self._changed.wait(timeout=1.0)
                self._awake = False
        while self._calls:
            self._calls.popleft()()

    def _wake(self) -> None:
        with self._changed:
            self._awake = True
            self._changed.notify()

    def _guarded(self, work: Callable[[], None], tickets: Callable[[], list[Ticket]]) -> None:
        """A fault in the model ends the rows it happened to, not the thread."""
        concerned, live = tickets(), self._live_tickets()
        try:
            work()
        except Exception as error:
            concerned += [t for t in self._live_tickets() if t not in live and t not in concerned]  # joined meanwhile
            log.exception("the model failed; %d requests are given up", len(concerned))
            for ticket in concerned:
                self._give_up(ticket, error)

    def _give_up(self, ticket: Ticket, error: BaseException) -> None:
        if self._tickets.pop(ticket.number, None) is None:
            return
        ticket.failed = error
        self._reading = deque(entry for entry in self._reading if entry[0] is not ticket)
        self._tell(ticket, Done("cancelled"))
        if any(row.index == ticket.number for row in self._rows.live):
            lost = self._live_tickets()
            self._rows.clear()
            for other in lost:
                self._give_up(other, error)

    def _tell(self, ticket: Ticket, event: Event) -> None:
        try:
            ticket.on_event(event)
        except Exception:
            log.exception("a listener of request %d failed; the request is cancelled", ticket.number)
            ticket.request.cancel()

    # ---- joining -----------------------------------------------------------------------------------------------------

    def _need(self, ticket: Ticket) -> int:
        generated = 0 if ticket.read_only else min(ticket.request.mode.max_new, self.limits.reserve)
        return len(ticket.request.prompt) + generated

    def _kept(self) -> list[KeptCache]:
        found = [session.kept for session in list(self._sessions.values())]  # another thread may set them to None
        return [kept for kept in found if kept is not None]

    def _in_use(self) -> int:
        return sum(map(self._need, self._tickets.values())) + sum(len(cache) for cache in self._kept())

    def _make_place(self, positions: int) -> bool:
        """Drop caches of sessions until ``positions`` more fit; whether they do."""
        while self._in_use() + positions > self.limits.positions and self._sessions:
            _, session = self._sessions.popitem(last=False)
            session.kept = None
        return self._in_use() + positions <= self.limits.positions

    def _admissible(self) -> bool:
        if not self._waiting:
            return False
        first = self._waiting[0]
        busy = sum(map(self._need, self._tickets.values()))
        return first.request.cancelled.is_set() or (
            len(self._tickets) < self.limits.rows and busy + self._need(first) <= self.limits.positions
        )

    def _admit(self) -> None:
        """Take in what waits, oldest first; nobody overtakes."""
        for ticket in [t for t in list(self._waiting) if t.request.cancelled.is_set()]:
            self._waiting.remove(ticket)
            self._tell(ticket, Done("cancelled"))
        while self._waiting and self._admissible():
            ticket = self._waiting[0]
            if not self._make_place(self._need(ticket)):
                return
            self._waiting.popleft()
            self._tickets[ticket.number] = ticket
            try:
                row = self.generator.begin(ticket.number, ticket.request, ticket.submitted)
                spare = 0 if ticket.read_only else self.generator.spare([ticket.request])
                self._reading.append((ticket, row, self._open(ticket.request, spare)))
            except Exception as error:
                log.exception("request %d cannot be read", ticket.number)
                self._give_up(ticket, error)

    def _open(self, request: Request, spare: int) -> DecoderState:
        return DecoderState(self.generator.model, [request], spare, read=False)

    def _read_piece(self) -> None:
        """One piece of one prompt. Newcomers take turns, so that a short prompt does not wait for a long one."""
        if not self._reading:
            return
        ticket, row, batch = self._reading.popleft()
        if ticket.request.cancelled.is_set():
            self._tickets.pop(ticket.number, None)
            self._tell(ticket, Done("cancelled"))
            return
        try:
            batch.read(self.limits.piece)
        except Exception:
            self._reading.appendleft((ticket, row, batch))  # so that it is found and given up
            raise
        if batch.unread:
            self._reading.append((ticket, row, batch))
        elif ticket.read_only:
            ticket.request.cache = batch.keep(0)
            self._tickets.pop(ticket.number, None)
            self._tell(ticket, Done("stop"))
        else:
            for _, event in self.generator.was_read(row):
                self._tell(ticket, event)
            self._rows.join([row], batch)

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _reading_tickets(self) -> list[Ticket]:
        return [self._reading[0][0]] if self._reading else []

    def _live_tickets(self) -> list[Ticket]:
        return [self._tickets[row.index] for row in self._rows.live if row.index in self._tickets]

    def _may_go_on(self) -> bool:
        """A row that was held is not to wait any more."""
        return any(not self._waits(self._tickets[row.index]) for row in self._rows.held)

    @staticmethod
    def _waits(ticket: Ticket) -> bool:
        return ticket.held.is_set() and not ticket.request.cancelled.is_set()

    def _held(self) -> set[int]:
        return {number for number, ticket in list(self._tickets.items()) if self._waits(ticket)}

    def _step(self) -> None:
        self._rows.release(self._held())
        for number, event in self._rows.choose():
            ticket = self._tickets[number]
            if isinstance(event, Done):
                del self._tickets[number]
            self._tell(ticket, event)
        self._rows.step(self._held())
