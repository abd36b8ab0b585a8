"""Decoding of many rows at once: prefill once, then a step at a time, each row in its own phase.

A step feeds every live row the ids it has accepted (usually one), asks the text head for the rows in text and the speech head for the rows in
speech, applies penalty, guards and sampling to each group, and lets `phases.RowState` say what the ids mean. Rows that end leave the batch.

Speed: at batch 1 the weights have to be read once per id, so everything else is kept small. Masks are left out when nothing is hidden, the
cache is written in place, logits exist for the rows that choose and their last position only, and ids that are given (spelled words, the begin of
speech) go through the LLM several at a time. See `packed.pack_linears` for the weights and `benchmarks/decode.py` for numbers.

B live rows, D width, R rows that choose from one head, V classes of that head, W last ids.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.tokens import Tokenizer
from osum_echat.generation.config import GenerationConfig, Reason, Sampling
from osum_echat.generation.decoder_state import DecoderState, Slots
from osum_echat.generation.events import Done, Event, SpeechToken, Timings
from osum_echat.generation.guards import AgeChoice, Repetition, Silence, ban_id
from osum_echat.generation.phases import RowState
from osum_echat.generation.request import Request
from osum_echat.generation.sampling import Dice, SamplingRows, choose, penalise, sampling_rows
from osum_echat.model.echat import AudioFeatures, EChatModel

OnLogits = Callable[[int, Tensor], None]
"""Called with the row's number and its raw logits [V] before every id that the model chooses."""


class LiveRow:
    """A row in work: its request, its state, its random numbers and its clock."""

    def __init__(self, index: int, request: Request, state: RowState, started: float) -> None:
        self.index, self.request, self.state, self.started = index, request, state, started
        self.dice = Dice(request.seed)
        self.age_armed = True  # the age guard may still act
        self.prefill = 0.0
        self.first: dict[str, float] = {}

    def note(self, what: str) -> None:
        """Remember when something happened first."""
        self.first.setdefault(what, time.perf_counter() - self.started)

    @property
    def sampling(self) -> Sampling:
        return self.request.mode.speech if self.state.in_speech else self.request.mode.text

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
        guards = self.config.guards
        self._age = AgeChoice.compile(guards.age, tokenizer, self.vocab) if guards.age is not None else None
        self._speech_guards: list[Repetition | Silence] = []
        if guards.repetition is not None:
            self._speech_guards.append(Repetition(guards.repetition))
        if guards.silence is not None and guards.silence.codes:
            self._speech_guards.append(Silence(guards.silence))
        self._memory = max([guard.memory for guard in self._speech_guards] + [self._age.memory if self._age else 0, 1])

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

    # ---- the parts of decoding, for those who mix rows themselves (`engine`) ---------------------------------------------------------

    def begin(self, index: int, request: Request, started: float) -> LiveRow:
        """A row in work. ``index``: what its events are marked with; ``started``: the second it counts its times from."""
        row = LiveRow(index, request, self._state(request), started)
        if self.config.guards.age is not None and self.config.guards.age.spoken_only:
            row.age_armed = row.state.form != "none"
        return row

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

    def _state(self, request: Request) -> RowState:
        return RowState(
            request.output_type,
            request.mode.max_new,
            self.config,
            self.tokenizer,
            self.vocab,
            request.text_ids,
            request.words,
            self.dialect.speech_form,
        )

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
            for row, chosen in zip(rows, self._pick(rows, logits_RV, in_speech), strict=True):
                step = len(row.state.generated)
                token = row.request.plan.get(step, chosen + offset)
                row.note("token")
                events += [(row.index, event) for event in self._reported(row, row.state.accept(token))]
        return events

    def _pick(self, rows: list[LiveRow], logits_RV: Tensor, in_speech: bool) -> list[int]:
        """Penalty, guards, sampling: a class of this head for every row. Everything that the host knows goes to the device in one copy, and
        comes back in one: on an accelerator each is a wait."""
        settings = sampling_rows(tuple(row.sampling for row in rows), logits_RV.device)
        known = self._known(rows, in_speech, settings, logits_RV.device)
        if settings.any_penalty:
            logits_RV = penalise(logits_RV, known.generated_RG, known.generated_RG >= 0, settings.penalty_R)
        acted: dict[str, Tensor] = {}
        guard = self._guard_speech if in_speech else self._guard_text
        chosen_R = choose(guard(rows, logits_RV, known, acted), settings, known.uniform_R)
        read = torch.stack([chosen_R, *acted.values()], dim=1).tolist()
        for row, (_, *flags) in zip(rows, read, strict=True):
            for name in (name for name, flag in zip(acted, flags, strict=True) if flag):
                row.state.acted[name] += 1
                row.age_armed &= name != "age"
        return [values[0] for values in read]

    def _guard_text(self, rows: list[LiveRow], logits_RV: Tensor, known: _Known, acted: dict[str, Tensor]) -> Tensor:
        if self._age is not None and any(row.age_armed for row in rows):
            logits_RV, acted["age"] = self._age(logits_RV, known.recent_RW, known.armed_R)
        if self.config.guards.think is not None and any(row.state.thinking for row in rows):
            logits_RV, acted["think"] = ban_id(logits_RV, self.vocab.eos_id, known.thinking_R)
        return logits_RV

    def _guard_speech(self, rows: list[LiveRow], logits_RV: Tensor, known: _Known, acted: dict[str, Tensor]) -> Tensor:
        for guard in self._speech_guards:
            logits_RV, acted[guard.name] = guard(logits_RV, known.recent_RW)
        if not all(row.state.may_end_speech for row in rows):
            logits_RV, _ = ban_id(logits_RV, self.vocab.speech_delimiter - self.vocab.text_size, known.unfinished_R)
        return logits_RV

    def _known(self, rows: list[LiveRow], in_speech: bool, settings: SamplingRows, device: torch.device) -> _Known:
        """One table of float32 for all: ids are far below 2^24, where float32 would round them."""
        size = self._memory
        kinds = (
            [row.state.codes if in_speech else row.state.text_ids for row in rows] if settings.any_penalty else [[] for _ in rows]
        )
        longest = max(map(len, kinds))
        table = []
        for row, generated in zip(rows, kinds, strict=True):
            state, last = row.state, row.state.generated[-size:]
            flags = [row.age_armed, state.thinking, not state.may_end_speech, 0.0 if settings.all_greedy else row.dice.roll()]
            table.append([-1] * (size - len(last)) + last + generated + [-1] * (longest - len(generated)) + flags)
        table_RX = torch.tensor(table, dtype=torch.float32, device=device)
        recent_RW = table_RX[:, :size].long()
        if in_speech:
            recent_RW = recent_RW - self.vocab.text_size
        else:
            recent_RW = recent_RW.masked_fill(recent_RW >= self.vocab.text_size, -1)
        armed_R, thinking_R, unfinished_R = (table_RX[:, -4:-1] > 0).unbind(1)
        generated_RG = table_RX[:, size : size + longest].long()
        return _Known(recent_RW, generated_RG, armed_R, thinking_R, unfinished_R, table_RX[:, -1])

    def _reported(self, row: LiveRow, events: list[Event]) -> list[Event]:
        """Note the time of what is about to be told."""
        for event in events:
            if isinstance(event, SpeechToken):
                row.note("speech")
        if row.state.think_ids and not row.state.thinking:
            row.note("think")
        return events


class _Known(NamedTuple):
    """What the host knows of the rows that choose.

    Attributes:
        recent_RW: the last ids of each row as classes of a head, oldest first; -1 or less where there is none of that head's ids.
        generated_RG: all text ids, or all codes, that each row has generated, -1 padded; [R, 0] where nobody needs them.
        armed_R, thinking_R, unfinished_R: the age guard may still act; the row thinks; its speech may not end yet.
        uniform_R: a random number in [0, 1), where somebody samples.
    """

    recent_RW: Tensor
    generated_RG: Tensor
    armed_R: Tensor
    thinking_R: Tensor
    unfinished_R: Tensor
    uniform_R: Tensor
