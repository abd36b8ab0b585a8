"""Penalty, guards and sampling: from the logits of one head to an id for every row that chooses from it.

These are the rules of every way of decoding: the generator applies them to the logits of our own model, `vllm.rules` to
those that vLLM computed. A row's choice depends on its own ids, settings and seed alone, never on the rows beside it.

R rows, V classes of the head (text or speech), W last ids, G generated ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from osum_echat.device import send
from osum_echat.dialogue.tokens import Tokenizer
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.generation.config import GenerationConfig, Mode, Sampling
from osum_echat.generation.guards import AgeChoice, Repetition, Silence, ban_id
from osum_echat.generation.phases import RowState
from osum_echat.generation.sampling import Dice, SamplingRows, choose, penalise, sampling_rows
from osum_echat.generation.transcript import Transcribed, TranscriptRow, ending_ids


class ChoosingRow:
    """What choosing needs of a row: its state, its settings, its random numbers.

    Attributes:
        age_armed: the age guard may still act.
        transcript: of rows whose words the CTC head chooses too.
    """

    def __init__(
        self, state: RowState, mode: Mode, seed: int, age_armed: bool = True, transcript: TranscriptRow | None = None
    ) -> None:
        self.state, self.mode, self.age_armed, self.transcript = state, mode, age_armed, transcript
        self.dice = Dice(seed)
        self._rolled = (-1, 0.0)

    @property
    def sampling(self) -> Sampling:
        return self.mode.speech if self.state.in_speech else self.mode.text

    def uniform(self) -> float:
        """The random number of this step, the same however often it is asked for; 0 where the most likely id is
        taken."""
        if self.sampling.greedy:
            return 0.0
        step = len(self.state.generated)
        if self._rolled[0] != step:
            self._rolled = (step, self.dice.roll())
        return self._rolled[1]

    def acted(self, guards: Iterable[str]) -> None:
        """Count the guards that acted on an id that the row takes now."""
        for name in guards:
            self.state.acted[name] += 1
            self.age_armed &= name != AgeChoice.name


class Picked(NamedTuple):
    """A class of the head, and the guards that acted on its choice."""

    chosen: int
    acted: tuple[str, ...]


class MayAct(NamedTuple):
    """Rules that may change something on some row; the others need not be computed."""

    age: bool = True
    think: bool = True
    unfinished: bool = True


class Choice:
    """The rules that a `GenerationConfig` comes to with a tokenizer. It holds no state of rows.

    Attributes:
        memory: how many of the last ids of a row the guards look at.
    """

    def __init__(self, config: GenerationConfig, tokenizer: Tokenizer, vocab: Vocabulary) -> None:
        self.config, self.vocab, self._tokenizer = config, vocab, tokenizer
        self._ends: dict[str, Tensor] = {}
        guards = config.guards
        self.age = AgeChoice.compile(guards.age, tokenizer, vocab) if guards.age is not None else None
        self.speech_guards: list[Repetition | Silence] = []
        if guards.repetition is not None:
            self.speech_guards.append(Repetition(guards.repetition))
        if guards.silence is not None and guards.silence.codes:
            self.speech_guards.append(Silence(guards.silence))
        self.memory = max([guard.memory for guard in self.speech_guards] + [self.age.memory if self.age else 0, 1])

    def age_armed(self, state: RowState) -> bool:
        """Whether the age guard may act on a row that begins."""
        guard = self.config.guards.age
        return guard is None or not guard.spoken_only or state.form != "none"

    def transcript(self, transcribed: Transcribed | None) -> TranscriptRow | None:
        """For a row that begins: its transcript, where there is one and the CTC head has a share in it."""
        if transcribed is None or not self.config.ctc_weight:
            return None
        place = transcribed.place
        if place.end not in self._ends:
            self._ends[place.end] = ending_ids(self._tokenizer, self.vocab, place.end)
        return TranscriptRow(*transcribed, self._ends[place.end])

    def age_acts(self, row: ChoosingRow) -> bool:
        """Whether the age guard acts on the id that the row chooses now. It depends on ids alone, so it can be asked
        again later."""
        if self.age is None or not row.age_armed or row.state.in_speech:
            return False
        return tuple(row.state.generated[-self.age.memory :]) == self.age.trigger_ids

    def pick(self, rows: Sequence[ChoosingRow], logits_RV: Tensor, in_speech: bool) -> list[Picked]:
        """A choice for every row. Everything that the host knows goes to the device in one copy, and comes back in one.
        The rows are not changed; see `ChoosingRow.acted`."""
        settings = sampling_rows(tuple(row.sampling for row in rows), logits_RV.device)
        known = self._known(rows, in_speech, settings, logits_RV.device)
        if settings.any_penalty:
            logits_RV = penalise(logits_RV, known.generated_RG, known.generated_RG >= 0, settings.penalty_R)
        if not in_speech:
            logits_RV = self._with_ctc(rows, logits_RV)
        chosen_R, acted = self.decide(logits_RV, known, settings, in_speech, self.may_act(rows))
        read = torch.stack([chosen_R, *acted.values()], dim=1).tolist()
        return [Picked(chosen, tuple(name for name, flag in zip(acted, flags, strict=True) if flag)) for chosen, *flags in read]

    def _with_ctc(self, rows: Sequence[ChoosingRow], logits_RV: Tensor) -> Tensor:
        """The logits of rows in a transcript, joined with what the CTC head says; the others as they are."""
        found = {r: row.transcript.scores(row.state.text_ids) for r, row in enumerate(rows) if row.transcript is not None}
        share = self.config.ctc_weight
        joined = {
            r: (1 - share) * logits_RV[r].log_softmax(0) + share * scores_V.to(logits_RV.device)
            for r, scores_V in found.items()
            if scores_V is not None
        }
        if not joined:
            return logits_RV
        return torch.stack([joined.get(r, logits_V) for r, logits_V in enumerate(logits_RV)])

    @staticmethod
    def may_act(rows: Sequence[ChoosingRow]) -> MayAct:
        """What the host knows before anything is computed: which rules can change nothing on these rows."""
        return MayAct(
            age=any(row.age_armed for row in rows),
            think=any(row.state.thinking for row in rows),
            unfinished=not all(row.state.may_end_speech for row in rows),
        )

    def decide(
        self, logits_RV: Tensor, known: Known, settings: SamplingRows, in_speech: bool, may_act: MayAct
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Guards and sampling on the device alone; the penalty is in the logits already.

        Returns:
            chosen_R, and whether each guard acted on each row, by its name.
        """
        acted: dict[str, Tensor] = {}
        if in_speech:
            for guard in self.speech_guards:
                logits_RV, acted[guard.name] = guard(logits_RV, known.recent_RW)
            if may_act.unfinished:
                logits_RV, _ = ban_id(logits_RV, self.vocab.speech_delimiter - self.vocab.text_size, known.unfinished_R)
        else:
            if self.age is not None and may_act.age:
                logits_RV, acted[self.age.name] = self.age(logits_RV, known.recent_RW, known.armed_R)
            if self.config.guards.think is not None and may_act.think:
                logits_RV, acted["think"] = ban_id(logits_RV, self.vocab.eos_id, known.thinking_R)
        return choose(logits_RV, settings, known.uniform_R), acted

    def recent(self, ids_RW: Tensor, in_speech: bool) -> Tensor:
        """The last ids, of all kinds, as classes of a head; negative where there is none of that head's."""
        size = self.vocab.text_size
        return ids_RW - size if in_speech else ids_RW.masked_fill(ids_RW >= size, -1)

    def _known(self, rows: Sequence[ChoosingRow], in_speech: bool, settings: SamplingRows, device: torch.device) -> Known:
        """One table of float32 for all: ids are far below 2^24, where float32 would round them."""
        size = self.memory
        kinds = (
            [row.state.codes if in_speech else row.state.text_ids for row in rows] if settings.any_penalty else [[] for _ in rows]
        )
        longest = max(map(len, kinds))
        table = []
        for row, generated in zip(rows, kinds, strict=True):
            state, last = row.state, row.state.generated[-size:]
            flags = [row.age_armed, state.thinking, not state.may_end_speech, row.uniform()]
            table.append([-1] * (size - len(last)) + last + generated + [-1] * (longest - len(generated)) + flags)
        table_RX = send(table, device, torch.float32)
        recent_RW = self.recent(table_RX[:, :size].long(), in_speech)
        armed_R, thinking_R, unfinished_R = (table_RX[:, -4:-1] > 0).unbind(1)
        generated_RG = table_RX[:, size : size + longest].long()
        return Known(recent_RW, generated_RG, armed_R, thinking_R, unfinished_R, table_RX[:, -1])


class Known(NamedTuple):
    """What the host knows of the rows that choose.

    Attributes:
        recent_RW: the last ids of each row as classes of a head, oldest first; -1 or less where there is none of that
            head's ids.
        generated_RG: all text ids, or all codes, that each row has generated, -1 padded; [R, 0] where nobody needs
            them.
        armed_R, thinking_R, unfinished_R: the age guard may still act; the row thinks; its speech may not end yet.
        uniform_R: a random number in [0, 1), 0 for rows that take the most likely id.
    """

    recent_RW: Tensor
    generated_RG: Tensor
    armed_R: Tensor
    thinking_R: Tensor
    unfinished_R: Tensor
    uniform_R: Tensor
