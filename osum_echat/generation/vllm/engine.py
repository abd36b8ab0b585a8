"""`VllmEngine` and `VllmGenerator`: the interfaces of `generation.engine` and `generation.generator`, with vLLM as the
decoder.

Two threads: one talks to vLLM (it sends prompts, reads ids, and calls the listeners), one does what `run` is given
(encoder, token2wav). vLLM computes in a process of its own.

What differs from our own engine: keys and values stay with vLLM, so nothing is kept for a session here (`Request.cache`
stays None); what a prompt has in common with an earlier one is found by vLLM's prefix cache. A request that is held
goes on, and its events wait.

T positions of a prompt that may be attended, D width of the LLM.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.packing import pack
from osum_echat.dialogue.tokens import Tokenizer
from osum_echat.generation.config import GenerationConfig, Reason
from osum_echat.generation.engine import EngineFull, EngineLimits, Load, OnEvent, Ticket
from osum_echat.generation.events import Done, Event
from osum_echat.generation.generator import Generator
from osum_echat.generation.live_row import LiveRow
from osum_echat.generation.request import Request, TooLong, join_audio
from osum_echat.generation.rows import OnLogits
from osum_echat.generation.session import Session
from osum_echat.generation.vllm.client import Decoder, Step
from osum_echat.generation.vllm.rules import RowPlan, guards_of
from osum_echat.model.echat import AudioFeatures, EChatModel

log = logging.getLogger(__name__)
T = TypeVar("T")
LIST_LIMITS = EngineLimits(rows=128)
"""Of an engine that nobody starts with limits of his own: for lists, where many rows at once cost little more than
one."""


class VllmGenerator(Generator):
    """`Generator` whose LLM runs in vLLM. The first call of `engine` starts it.

    Args:
        model: only its embedding tables, encoder and adapter are used (see `drop_decoder`).
        start: makes the decoder for the limits of the engine.
        limits: of the engine that `generate` uses when nobody has started one (default: `LIST_LIMITS`).
    """

    def __init__(
        self,
        model: EChatModel,
        tokenizer: Tokenizer,
        config: GenerationConfig | None,
        dialect: Dialect | None,
        start: Callable[[EngineLimits], Decoder],
        limits: EngineLimits | None = None,
    ) -> None:
        super().__init__(model, tokenizer, config, dialect)
        self._start, self._limits = start, limits
        self._engine: VllmEngine | None = None

    def engine(self, limits: EngineLimits | None = None) -> VllmEngine:
        """The engine, which exists once: vLLM is started with its limits."""
        if self._engine is None:
            limits = limits or self._limits or LIST_LIMITS
            self._engine = VllmEngine(self, self._start(limits), limits)
        return self._engine

    def close(self) -> None:
        """End vLLM's process; a later request starts another."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def compile(self, backend: str = "inductor") -> None:
        """vLLM compiles for itself."""

    def read(self, request: Request) -> None:
        """The cache is vLLM's: there is nothing to keep."""

    def generate(
        self, requests: Sequence[Request], on_logits: OnLogits | None = None, audio: AudioFeatures | None = None
    ) -> Iterator[tuple[int, Event]]:
        """See `Generator.generate`. Raises ValueError for ``on_logits``: logits stay in vLLM's process."""
        if on_logits is not None:
            raise ValueError("logits stay in vLLM's process; decode with our own engine to look at them")
        if not requests:
            return
        engine = self.engine()
        engine.start()
        came: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
        prompts = prompt_embeddings(self.model, requests, audio)
        tickets = []
        try:
            for i, (request, prompt) in enumerate(zip(requests, prompts, strict=True)):
                tickets.append(engine.submit(request, partial(_put, came, i), prompt=prompt, wait=True))
            left = len(tickets)
            while left:
                i, event = came.get()
                failed = tickets[i].failed
                if failed is not None:
                    raise failed if isinstance(failed, ValueError) else RuntimeError("vLLM failed on this request") from failed
                left -= isinstance(event, Done)
                yield i, event
        finally:
            for ticket in tickets:
                ticket.cancel()


def _put(came: queue.SimpleQueue[tuple[int, Event]], row: int, event: Event) -> None:
    came.put((row, event))


def prompt_embeddings(model: EChatModel, requests: Sequence[Request], audio: AudioFeatures | None = None) -> list[Tensor]:
    """What vLLM is sent for each prompt: its embeddings [T, D] without the positions that nothing attends to.

    Those positions take no position number either, so leaving them out changes nothing; the last of a prompt is never
    one of them.

    Args:
        audio: the recordings of all requests, joined; None: each has its own in `Request.heard`.

    Raises:
        ValueError: prompts and recordings do not fit together, or an embedding is not a number.
    """
    if audio is None:
        audio = join_audio([recording for request in requests for recording in request.heard])
    with torch.inference_mode():
        inputs = model.inputs(pack([request.prompt for request in requests]).to(model.device), audio)
        found = []
        for b, request in enumerate(requests):
            visible_T = inputs.visible_BT[b, : len(request.prompt)]
            assert bool(visible_T[-1]), "the last position of a prompt is masked"
            embeds_TD = inputs.embeds_BTD[b, : len(request.prompt)][visible_T]
            if not bool(torch.isfinite(embeds_TD).all()):
                raise ValueError("the recording comes to numbers that are none (infinite, or not a number); send another")
            found.append(embeds_TD)
    return found


def drop_decoder(model: EChatModel) -> None:
    """Free the layers and the heads of the LLM, which vLLM has; embedding tables, encoder and adapter stay."""
    decoder = model.lm.llm.get_decoder()
    decoder.layers = torch.nn.ModuleList()
    tied = model.lm.llm.get_output_embeddings().weight is model.lm.llm.get_input_embeddings().weight
    if not tied:
        model.lm.llm.set_output_embeddings(torch.nn.Identity())
    model.lm.speech_head = torch.nn.Linear(1, 1)


class _Running:
    """A request that vLLM has, or is about to be sent."""

    def __init__(self, ticket: Ticket, row: LiveRow, prompt: Tensor | None) -> None:
        self.ticket, self.row, self.prompt = ticket, row, prompt
        self.waiting: list[Event] = []  # events that came while it was held
        self.read = False

    @property
    def name(self) -> str:
        return str(self.ticket.number)


class VllmEngine:
    """See the module, and `generation.engine.Engine` for what each call means."""

    def __init__(self, generator: Generator, decoder: Decoder, limits: EngineLimits | None = None) -> None:
        self.generator, self.limits = generator, limits or EngineLimits()
        self._decoder = decoder
        self._changed = threading.Condition()
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._waiting: deque[_Running] = deque()
        self._running: dict[str, _Running] = {}
        self._numbers = 0
        self._closed = self._awake = False
        self._dead: BaseException | None = None
        self._threads: list[threading.Thread] = []

    # ---- from any thread ---------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Run the two threads; once is enough, more does no harm."""
        with self._changed:
            if self._threads:
                return
            for name, work in (("osum-echat-vllm", self._run), ("osum-echat-model", self._work)):
                self._threads.append(threading.Thread(target=work, name=name, daemon=True))
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Cancel everything, end the threads and vLLM's process."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            for entry in [*self._waiting, *self._running.values()]:
                entry.ticket.request.cancel()
                entry.ticket.held.clear()
        self._wake()
        self._calls.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join()
        self._decoder.close()

    def submit(
        self, request: Request, on_event: OnEvent, read_only: bool = False, prompt: Tensor | None = None, wait: bool = False
    ) -> Ticket:
        """Take a request. ``on_event`` is called on the thread that talks to vLLM and must not block; `Done` is the
        last.

        Args:
            prompt: its embeddings, where they are known (`prompt_embeddings`).
            wait: take it however many wait.

        Raises:
            EngineFull: too many wait already, or the engine is closed. TooLong: it can never fit.
        """
        with self._changed:
            if self._closed or self._dead is not None:
                raise EngineFull("the model is shutting down; connect again later")
            self._numbers += 1
            ticket = Ticket(request, on_event, self._numbers, time.perf_counter(), read_only, _wake=self._wake)
            longest = self._decoder.max_positions
            if len(request.prompt) + 1 > longest:
                raise TooLong(
                    f"this request has {len(request.prompt)} positions, the server has {longest}; "
                    "ask with a shorter recording or history"
                )
            if len(self._waiting) >= self.limits.queue and not wait:
                raise EngineFull(f"the server is full: {len(self._waiting)} requests wait already; try again in a moment")
            row = self.generator.begin(ticket.number, request, ticket.submitted)
            self._waiting.append(_Running(ticket, row, prompt))
        self._wake()
        return ticket

    def run(self, work: Callable[[], T]) -> Future[T]:
        """Call ``work`` on the model's thread, in inference mode."""
        future: Future[T] = Future()

        def call() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001  whoever waits for the future gets it, whatever it is
                future.set_exception(error)

        if self._closed:
            raise EngineFull("the model is shutting down; connect again later")
        self._calls.put(call)
        return future

    def remember(self, session: Session) -> None:
        """Nothing to do: vLLM drops what it has no place for."""

    def forget(self, session: Session) -> None:
        """The session has ended."""
        session.kept = None

    def load(self) -> Load:
        """What is in hand."""
        running = list(self._running.values())
        held = sum(entry.ticket.held.is_set() for entry in running)
        reading = sum(not entry.read for entry in running)
        positions = sum(len(entry.ticket.request.prompt) + len(entry.row.state.generated) for entry in running)
        return Load(len(running) - reading, held, reading, len(self._waiting), positions, 0)

    # ---- the model's thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        with torch.inference_mode():
            while (call := self._calls.get()) is not None:
                call()

    # ---- the thread that talks to vLLM -------------------------------------------------------------------------------

    def tick(self) -> bool:
        """One turn: what was cancelled or released, what waits, one step. Returns whether there is more to do now."""
        self._stop_cancelled()
        self._admit()
        self._release()
        if self._running:
            try:
                steps = self._decoder.step()
            except Exception as error:
                log.exception("vLLM has stopped; %d requests are given up", len(self._running))
                self._dead = error
                for entry in [*self._running.values(), *self._waiting]:
                    self._give_up(entry, error)
                self._waiting.clear()
                return False
            for step in steps:
                if step.name in self._running:
                    self._take(self._running[step.name], step)
        return bool(self._running or self._waiting)

    def _run(self) -> None:
        while True:
            more = self.tick()
            with self._changed:
                if self._closed and not (self._running or self._waiting):
                    return
                if not more and not self._awake:
                    self._changed.wait(timeout=1.0)
                self._awake = False

    def _wake(self) -> None:
        with self._changed:
            self._awake = True
            self._changed.notify()

    def _stop_cancelled(self) -> None:
        for entry in [entry for entry in list(self._waiting) if entry.ticket.request.cancelled.is_set()]:
            self._waiting.remove(entry)
            self._tell(entry, [Done("cancelled")])
        for entry in [entry for entry in self._running.values() if entry.ticket.request.cancelled.is_set()]:
            self._decoder.abort(entry.name)
            self._end(entry, "cancelled")

    def _admit(self) -> None:
        """Send what waits to vLLM, oldest first, as many as it decodes together."""
        while self._waiting and len(self._running) < self.limits.rows:
            entry = self._waiting.popleft()
            request, state = entry.ticket.request, entry.row.state
            try:
                [prompt_TD] = [entry.prompt] if entry.prompt is not None else prompt_embeddings(self.generator.model, [request])
                if state.pending:  # given from the start: a part of the prompt
                    with torch.inference_mode():
                        given = torch.tensor([list(state.pending)], device=prompt_TD.device)
                        prompt_TD = torch.cat([prompt_TD, self.generator.model.embed(given)[0]])
                    state.pending.clear()
                if state.finished is None:
                    most = 1 if entry.ticket.read_only else request.mode.max_new + 1
                    plan = RowPlan.of(request, joint=self.generator.config.ctc_weight > 0)
                    self._decoder.add(entry.name, prompt_TD, plan, min(most, self._room(prompt_TD)))
            except ValueError as error:
                log.warning("request %s is not taken: %s", entry.name, error)
                self._give_up(entry, error)
                continue
            except Exception as error:
                log.exception("request %s cannot be sent to vLLM", entry.name)
                self._give_up(entry, error)
                continue
            entry.prompt = None
            self._running[entry.name] = entry
            if state.finished is not None:
                self._read(entry)
                self._end(entry, state.finished)

    def _room(self, prompt_TD: Tensor) -> int:
        room = self._decoder.max_positions - len(prompt_TD)
        if room < 1:
            raise ValueError(f"the prompt has {len(prompt_TD)} positions, there is room for {self._decoder.max_positions}")
        return room

    def _release(self) -> None:
        for entry in list(self._running.values()):
            if entry.waiting and not entry.ticket.held.is_set():
                self._tell(entry, [])

    def _take(self, entry: _Running, step: Step) -> None:
        """What cannot be ends its own request, not the thread."""
        try:
            self._took(entry, step)
        except Exception as error:
            log.exception("vLLM's answer to request %s cannot be; it is given up", entry.name)
            self._decoder.abort(entry.name)
            self._give_up(entry, error)

    def _took(self, entry: _Running, step: Step) -> None:
        """New ids of a request."""
        if entry.ticket.read_only:
            if step.ended is not None:
                del self._running[entry.name]
                self._tell(entry, [Done("stop")])
            return
        if not entry.read:
            self._read(entry)
        state, row = entry.row.state, entry.row
        for token, value in zip(step.ids, step.values, strict=True):
            if state.finished is not None:
                break
            if state.pending:
                given = state.pending.popleft()
                assert token == given, f"{given} was given, vLLM took {token}"
                continue
            row.acted(guards_of(value))
            row.note("token")
            events = state.accept(token)
            state.pending.popleft()
            self._report(entry, events)
        if state.finished is not None:
            self._end(entry, state.finished)
        elif step.ended is not None:  # vLLM has no place for more
            self._end(entry, "length" if step.ended == "length" else "cancelled")

    def _read(self, entry: _Running) -> None:
        entry.read = True
        self._tell(entry, [event for _, event in self.generator.was_read(entry.row)])

    def _end(self, entry: _Running, reason: Reason) -> None:
        """The last events of a request. vLLM ends it by itself, where it was not aborted."""
        del self._running[entry.name]
        state = entry.row.state
        if state.finished is None:
            self._report(entry, state.finish(reason))
        self._tell(entry, [entry.row.done(reason)])

    def _give_up(self, entry: _Running, error: BaseException) -> None:
        self._running.pop(entry.name, None)
        entry.ticket.failed = error
        self._tell(entry, [Done("cancelled")])

    def _report(self, entry: _Running, events: list[Event]) -> None:
        self._tell(entry, [event for _, event in entry.row.reported(events)])

    def _tell(self, entry: _Running, events: Sequence[Event]) -> None:
        """Events in their order; those of a held request wait, but for its end."""
        entry.waiting += events
        ended = bool(entry.waiting) and isinstance(entry.waiting[-1], Done)
        if entry.ticket.held.is_set() and not ended:
            return
        ready, entry.waiting = entry.waiting, []
        for event in ready:
            try:
                entry.ticket.on_event(event)
            except Exception:
                log.exception("a listener of request %s failed; the request is cancelled", entry.name)
                entry.ticket.request.cancel()
