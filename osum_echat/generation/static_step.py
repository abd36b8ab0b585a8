"""A whole decoding step on the device: feed ids, choose the next ones, remember them. Shapes do not change, so it can
be recorded as a graph.

Every slot holds a row. The host says for each slot what to feed, or that the id chosen by the step before is to be fed;
it says what state the row is in and gives a random number, all in one small table that is copied without waiting. The
device keeps what it needs of the past: how long the row is, its last ids (guards), the ids that it has had (penalty),
its last hidden state. What comes back is one table: the chosen ids and which guards acted.

A slot that feeds nothing chooses again from the hidden state that it has: how a new row begins, and how a choice that
was made under a wrong expectation is repeated (`static_rows`).

B slots, n ids fed at once (1 but on a CPU), D width, V text ids, S speech classes, W last ids, G guards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from osum_echat import device as devices
from osum_echat.generation.choice import Choice, Known, MayAct
from osum_echat.generation.config import Sampling
from osum_echat.generation.decoder_step import Cache, DecoderStep
from osum_echat.generation.guards import AgeChoice
from osum_echat.generation.sampling import SamplingRows, sampling_rows
from osum_echat.model.echat import EChatModel


class Told(NamedTuple):
    """What the host says of a slot.

    Attributes:
        ids: to be fed; -1: the one that the step before chose.
        feed: False: choose again from the hidden state that is there.
        in_speech, armed, thinking, unfinished, uniform: of the choice, see `choice.Known`.
    """

    ids: tuple[int, ...] = (-1,)
    feed: bool = False
    in_speech: bool = False
    armed: bool = False
    thinking: bool = False
    unfinished: bool = False
    uniform: float = 0.0


class Drawing(NamedTuple):
    """What the rows of a phase have in common in how they draw; the numbers of each row are in tensors.

    Attributes:
        candidates: see `SamplingRows.candidates`.
    """

    greedy: bool
    penalty: bool
    top_p: bool
    candidates: int


class Shape(NamedTuple):
    """Everything that a recorded step depends on beside the tensors.

    Attributes:
        fed: ids fed at once; 0: no slot feeds, all choose again.
        columns, masked: see `DecoderStep.at`.
        text, speech: how rows of that phase draw; None where no row is in it, and its head is not computed.
        may_act: rules that may change something.
        remember: whether text ids, and speech codes, are remembered for a penalty.
    """

    fed: int
    columns: int
    masked: bool
    text: Drawing | None
    speech: Drawing | None
    may_act: MayAct
    remember: tuple[bool, bool]


class _Draws:
    """Settings of drawing of all slots, in tensors that stay where they are."""

    def __init__(self, slots: int, device: torch.device) -> None:
        settings = sampling_rows((Sampling(greedy=True),) * slots, device)
        parts = ("greedy_R", "temperature_R", "top_k_R", "top_p_R", "penalty_R")
        self.tensors = {name: getattr(settings, name).clone() for name in parts}

    def set(self, settings: Sequence[Sampling]) -> None:
        rows = sampling_rows(tuple(settings), self.tensors["greedy_R"].device)
        for name, tensor in self.tensors.items():
            tensor.copy_(getattr(rows, name))

    def rows(self, drawing: Drawing) -> SamplingRows:
        return SamplingRows(
            **self.tensors,
            all_greedy=drawing.greedy,
            any_penalty=drawing.penalty,
            any_top_p=drawing.top_p,
            candidates=drawing.candidates,
        )


class StaticStep:
    """The device's side of all slots. Its tensors change in size by `resized` only.

    Attributes:
        names: of the guards, in the order of the columns of the result.
        length_B: positions of each slot.
        hidden_BD: hidden state of the last position.
        chosen_B: ids that the last step chose.
    """

    def __init__(self, model: EChatModel, decoder: DecoderStep, choice: Choice, slots: int, columns: int) -> None:
        self.model, self.decoder, self.choice = model, decoder, choice
        self.slots, self.columns = slots, columns
        vocab, device = model.vocabulary, decoder.device
        self.names = (AgeChoice.name, "think", *(guard.name for guard in choice.speech_guards))
        self.cache: Cache = decoder.cache(slots, columns)
        self.cos_sin = decoder.cos_sin(columns)
        self.length_B = torch.zeros(slots, dtype=torch.long, device=device)
        self.chosen_B = torch.zeros(slots, dtype=torch.long, device=device)
        self.hidden_BD = torch.zeros(slots, model.lm.width, dtype=decoder.dtype, device=device)
        self.recent_BW = torch.full((slots, choice.memory), -1, dtype=torch.long, device=device)
        # One class more than the head has, which takes what is not to be remembered.
        self.seen_text = torch.zeros(slots, vocab.text_size + 1, dtype=torch.bool, device=device)
        self.seen_speech = torch.zeros(slots, vocab.speech_classes + 1, dtype=torch.bool, device=device)
        self.result_BG = torch.zeros(slots, 1 + len(self.names), dtype=torch.long, device=device)
        self.draws_text, self.draws_speech = _Draws(slots, device), _Draws(slots, device)
        self._tables: dict[int, Tensor] = {}
        self._choosing = decoder.compiled(StaticStep._choose)
        self._recorded: dict[Shape, Callable[[], None]] = {}
        self._pool: Any = None

    # ---- what the host does ------------------------------------------------------------------------------------------

    def run(self, told: Sequence[Told], shape: Shape, record: bool) -> Tensor:
        """One step of all slots. Returns the table of chosen ids (unified) and flags of the guards `names`, [B, 1 + G]:
        it is written to by the next step."""
        said = [(*t.ids, t.feed, t.in_speech, t.armed, t.thinking, t.unfinished, t.uniform) for t in told]
        table = devices.send(said, self.device, torch.float32)
        if not record:
            return self._compute(table, shape)
        if shape not in self._recorded:
            self._tables.setdefault(table.shape[1], torch.zeros_like(table))
            self._recorded[shape] = self._record(shape)
        self._tables[table.shape[1]].copy_(table)
        self._recorded[shape]()
        return self.result_BG

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def place(self, slot: int, length: int, hidden_D: Tensor) -> None:
        """A new row in a slot whose cache has its first ``length`` columns. `settle` comes behind it."""
        self.length_B[slot].fill_(length)
        self.hidden_BD[slot].copy_(hidden_D)
        self.recent_BW[slot].fill_(-1)
        self.seen_text[slot].fill_(False)
        self.seen_speech[slot].fill_(False)

    def resized(self, rows: Sequence[int], slots: int, columns: int, used: int) -> StaticStep:
        """Another size; its first slots are these ``rows``, with the first ``used`` columns of their cache. `settle`
        comes behind it."""
        new = StaticStep.__new__(StaticStep)
        new.__dict__.update(self.__dict__)
        new.slots, new.columns = slots, columns
        new.cache = self.cache.resized(rows, slots, columns, used)
        new.cos_sin = self.cos_sin if columns == self.columns else self.decoder.cos_sin(columns)
        index = devices.send(list(rows) + [0] * (slots - len(rows)), self.device, torch.long)
        for name in ("length_B", "chosen_B", "hidden_BD", "recent_BW", "seen_text", "seen_speech", "result_BG"):
            setattr(new, name, getattr(self, name)[index])
        new.draws_text, new.draws_speech = _Draws(slots, self.device), _Draws(slots, self.device)
        new._tables, new._recorded, new._pool = {}, {}, None
        return new

    def settle(self, settings: Sequence[tuple[Sampling, Sampling]]) -> None:
        """Settings of drawing, text and speech, of all slots."""
        self.draws_text.set([text for text, _ in settings])
        self.draws_speech.set([speech for _, speech in settings])

    # ---- graphs ------------------------------------------------------------------------------------------------------

    def _record(self, shape: Shape) -> Callable[[], None]:
        """Recording runs the step: what it changes is put back, and a table that feeds nothing makes sure that nothing
        is remembered."""
        kept_B, table = self.chosen_B.clone(), self._tables[shape.fed + 6]
        table.zero_()
        table[:, : shape.fed].fill_(-1.0)
        if self._pool is None:
            self._pool = devices.memory_pool(self.device)
        replay = devices.record(lambda: self._write_result(table, shape), self.device, self._pool)
        self.chosen_B.copy_(kept_B)
        return replay

    def _write_result(self, table_BX: Tensor, shape: Shape) -> None:
        self.result_BG.copy_(self._compute(table_BX, shape))

    # ---- what the device does ----------------------------------------------------------------------------------------

    def _compute(self, table_BX: Tensor, shape: Shape) -> Tensor:
        count = shape.fed
        if count:
            self._feed(table_BX[:, :count].long(), table_BX[:, count] > 0, shape)
        return self._choosing(self, table_BX[:, count + 1 :], shape)

    def _feed(self, given_Bn: Tensor, feed_B: Tensor, shape: Shape) -> None:
        count = shape.fed
        ids_Bn = torch.where(given_Bn >= 0, given_Bn, self.chosen_B[:, None])
        at = self.decoder.at(self.length_B, count, shape.columns, self.columns, shape.masked)
        hidden_BnD = self.decoder(self.model.embed(ids_Bn), at, self.cache, self.cos_sin)
        feed_B1 = feed_B[:, None]
        self.hidden_BD.copy_(torch.where(feed_B1, hidden_BnD[:, -1], self.hidden_BD))
        self.length_B.add_(feed_B.long(), alpha=count)
        self.recent_BW.copy_(torch.where(feed_B1, self._appended(ids_Bn), self.recent_BW))
        self._remember(ids_Bn, feed_B1, shape)

    def _appended(self, ids_Bn: Tensor) -> Tensor:
        return torch.cat([self.recent_BW, ids_Bn], dim=1)[:, -self.recent_BW.shape[1] :]

    def _remember(self, ids_Bn: Tensor, feed_B1: Tensor, shape: Shape) -> None:
        """Ids that were fed, for the penalty; ends and delimiters never count."""
        vocab = self.model.vocabulary
        size = vocab.text_size
        if shape.remember[0]:
            known = feed_B1 & (ids_Bn < size) & (ids_Bn != vocab.eos_id)
            self.seen_text.scatter_(1, torch.where(known, ids_Bn, size), True)
        if shape.remember[1]:
            known = feed_B1 & (ids_Bn >= size) & (ids_Bn != vocab.speech_delimiter)
            self.seen_speech.scatter_(1, torch.where(known, ids_Bn - size, vocab.speech_classes), True)

    def _choose(self, said_BX: Tensor, shape: Shape) -> Tensor:
        in_speech_B, armed_B, thinking_B, unfinished_B = (said_BX[:, :4] > 0).unbind(1)
        uniform_B, size = said_BX[:, 4], self.model.vocabulary.text_size
        found: list[tuple[Tensor, dict[str, Tensor]]] = []
        for in_speech, drawing in ((False, shape.text), (True, shape.speech)):
            if drawing is None:
                continue
            settings = (self.draws_speech if in_speech else self.draws_text).rows(drawing)
            logits_BV = (self.model.speech_logits if in_speech else self.model.text_logits)(self.hidden_BD).float()
            if drawing.penalty:
                logits_BV = penalised(logits_BV, (self.seen_speech if in_speech else self.seen_text)[:, :-1], settings.penalty_R)
            recent_BW = self.choice.recent(self.recent_BW, in_speech)
            known = Known(recent_BW, recent_BW[:, :0], armed_B, thinking_B, unfinished_B, uniform_B)
            chosen_B, acted = self.choice.decide(logits_BV, known, settings, in_speech, shape.may_act)
            found.append((chosen_B + size if in_speech else chosen_B, acted))
        chosen_B = found[0][0] if len(found) == 1 else torch.where(in_speech_B, found[1][0], found[0][0])
        self.chosen_B.copy_(chosen_B)
        acted = {name: flag for _, flags in found for name, flag in flags.items()}
        nothing_B = torch.zeros_like(in_speech_B)
        return torch.stack([chosen_B, *(acted.get(name, nothing_B) for name in self.names)], dim=1)


def penalised(logits_BV: Tensor, seen_BV: Tensor, penalty_B: Tensor) -> Tensor:
    """`sampling.penalise` with the ids as a mask."""
    penalty_B1 = penalty_B[:, None]
    lower_BV = torch.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
    return torch.where(seen_BV, lower_BV, logits_BV)
