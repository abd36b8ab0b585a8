"""Decoding of many rows at once: prefill once, then a step at a time, each row in its own phase.

A step feeds every live row the ids it has accepted (usually one), asks the text head for the rows in text and the speech head for the rows in
speech, lets `choice` apply penalty, guards and sampling to each group, and lets `phases.RowState` say what the ids mean. Rows that end leave the batch.

Speed: at batch 1 the weights have to be read once per id, so everything else is kept small. Masks are left out when nothing is hidden, the
cache is written in place, logits exist for the rows that choose and their last position only, and ids that are given (spelled words, the begin of
speech) go through the LLM several at a time. See `packed.pack_linears` for the weights and `benchmarks/decode.py` for numbers.

B live rows, D width, R rows that choose from one head, V classes of that head.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.tokens import Tokenizer
from osum_echat.generation.cache import KeptCache
from osum_echat.generation.choice import Choice, ChoosingRow
from osum_echat.generation.config import GenerationConfig, Reason
from osum_echat.generation.decoder_state import DecoderState, Slots
from osum_echat.generation.events import Done, Event, SpeechToken, Timings
from osum_echat.generation.phases import RowState
from osum_echat.generation.request import Request
from osum_echat.model.echat import AudioFeatures, EChatModel

OnLogits = Callable[[int, Tensor], None]
"""Called with the row's number and its raw logits [V] before every id that the model chooses."""


class LiveRow(ChoosingRow):
    """A row in work: its request, its state, its random numbers and its clock."""

    def __init__(self, index: int, request: Request, state: RowState, started: float, age_armed: bool = True) -> None:
        super().__init__(state, request.mode, request.seed, age_armed)
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


class Generator:
    """Runs requests on one model. It holds no state between calls, so it can be shared (but not by threads at the same moment).

    Args:
        dialect: how the model is spoken to, when not as its config says.
    """

    def __init__(
        self,
        model: EChatModel,
        tokenizer: Tokenizer,
        config: GenerationConfig | None = None,
        dialect: Dialect | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.dialect = dialect or model.config.dialect
        self.vocab = model.vocabulary
        self.config = config or GenerationConfig()
        self.choice = Choice(self.config, tokenizer, self.vocab)

    def compile(self, backend: str = "inductor") -> None:
        """Compile the LLM's decoder with `torch.compile`, in place; meant for accelerators.

        Lengths are dynamic, so a few graphs serve all steps. The first steps wait for the compiler (minutes on a CPU, where
        `packed.pack_linears` gives more).
        """
        self.model.lm.llm.get_decoder().compile(dynamic=True, backend=backend)

    def generate(
        self, requests: Sequence[Request], on_logits: OnLogits | None = None, audio: AudioFeatures | None = None
    ) -> Iterator[tuple[int, Event]]:
        """Decode all requests together; yields (number of the request, event) as they happen, `Done` last for each.

        Stop iterating, or cancel a request, and no further step is made for it.

        Args:
            audio: the recordings of all requests, in their order and joined as the encoder gave them; else each request has its own (`heard`).

        Raises:
            ValueError: when prompts and recordings do not fit together.
        """
        if not requests:
            return
        started = time.perf_counter()
        live = [self.begin(i, request, started) for i, request in enumerate(requests)]
        spare = min(max(r.mode.max_new for r in requests), 512)
        with torch.inference_mode():
            batch = DecoderState(self.model, requests, spare, audio=audio)
        events = [told for row in live for told in self.was_read(row)]
        while True:
            with torch.inference_mode():
                live, more = self.between_steps(live, batch, on_logits)
            yield from events + more
            events = []
            if not live:
                return
            with torch.inference_mode():
                self.step(live, batch)

    def read(self, request: Request) -> KeptCache | None:
        """Only read the prompt, for its cache; None where the cache is not ours to keep."""
        with torch.inference_mode():
            return DecoderState(self.model, [request], spare=0).keep(0)

    # ---- the parts of decoding, for those who mix rows themselves (`engine`) ---------------------------------------------------------

    def begin(self, index: int, request: Request, started: float) -> LiveRow:
        """A row in work. ``index``: what its events are marked with; ``started``: the second it counts its times from."""
        state = request.state(self.config, self.tokenizer, self.vocab, self.dialect)
        return LiveRow(index, request, state, started, self.choice.age_armed(state))

    def was_read(self, row: LiveRow) -> list[tuple[int, Event]]:
        """The prompt of a row has been read: what there is to say before its first step."""
        row.prefill = time.perf_counter() - row.started
        return [(row.index, event) for event in self._reported(row, row.state.opening)]

    def between_steps(
        self, live: list[LiveRow], batch: Slots, on_logits: OnLogits | None = None
    ) -> tuple[list[LiveRow], list[tuple[int, Event]]]:
        """All that happens between two steps: cancelled rows end, rows without given ids choose one, rows that ended leave the batch.

        Returns the rows that go on (``batch`` is not to be used any more when there are none), and events.
        """
        events: list[tuple[int, Event]] = []
        for row in live:
            if row.request.cancelled.is_set() and row.state.finished is None:
                events += [(row.index, event) for event in self._reported(row, row.state.finish("cancelled"))]
        live = self._drop_finished(live, batch, events)
        choosing = [b for b, row in enumerate(live) if not row.state.pending]
        if choosing:
            events += self._choose(live, choosing, batch, on_logits)
            live = self._drop_finished(live, batch, events)
        return live, events

    @staticmethod
    def step(live: list[LiveRow], batch: Slots) -> None:
        """Feed what all rows have pending."""
        count = min(len(row.state.pending) for row in live)
        if count:
            batch.feed([[row.state.pending.popleft() for _ in range(count)] for row in live])

    # ---- inside -------------------------------------------------------------------------------------------------------------------

    def _drop_finished(self, live: list[LiveRow], batch: Slots, events: list[tuple[int, Event]]) -> list[LiveRow]:
        """Report rows that have ended and take them out of the batch."""
        keep = [b for b, row in enumerate(live) if row.state.finished is None]
        if len(keep) == len(live):
            return live
        for b, row in enumerate(live):
            if row.state.finished is not None:
                if row.request.keep_cache:
                    row.request.cache = batch.keep(b)
                events.append((row.index, row.done(row.state.finished)))
        if keep:
            batch.select(keep)
        return [live[b] for b in keep]

    def _choose(
        self, live: list[LiveRow], choosing: list[int], batch: Slots, on_logits: OnLogits | None
    ) -> list[tuple[int, Event]]:
        """Choose the next id of some rows and let their states take it."""
        events: list[tuple[int, Event]] = []
        phases = {b: live[b].state.in_speech for b in choosing}  # as they are now: choosing an id may change a row's phase
        for in_speech in (False, True):
            group = [b for b in choosing if phases[b] == in_speech]
            if not group:
                continue
            rows = [live[b] for b in group]
            hidden_RD = batch.hidden_BD if len(group) == len(batch.hidden_BD) else batch.hidden_BD[group]
            head = self.model.speech_logits if in_speech else self.model.text_logits
            logits_RV = head(hidden_RD).float()
            if on_logits is not None:
                for row, logits_V in zip(rows, logits_RV, strict=True):
                    on_logits(row.index, logits_V)
            offset = self.vocab.text_size if in_speech else 0
            for row, (chosen, acted) in zip(rows, self.choice.pick(rows, logits_RV, in_speech), strict=True):
                row.acted(acted)
                step = len(row.state.generated)
                token = row.request.plan.get(step, chosen + offset)
                row.note("token")
                events += [(row.index, event) for event in self._reported(row, row.state.accept(token))]
        return events

    def _reported(self, row: LiveRow, events: list[Event]) -> list[Event]:
        """Note the time of what is about to be told."""
        for event in events:
            if isinstance(event, SpeechToken):
                row.note("speech")
        if row.state.think_ids and not row.state.thinking:
            row.note("think")
        return events
