"""What an id may be, for the rows of a vLLM batch: phases, given ids, guards and sampling over vLLM's logits.

A think, the text and its speech are one request to vLLM: at every step each row's logits are replaced by a row that is
-inf everywhere but at the one id that our own engine would take (`choice` picks it by the same code), so vLLM's greedy
sampler takes that id. Ids that are given (spelled words, the begin of speech, what a limit ends) are forced in the same
way, one a step.

The value at that one id is no logit: it says which guards acted on the choice, as bits (`GUARDS`), so that the counts
come back to whoever sent the request (``logprobs_mode="processed_logits"`` returns it).

A choice counts only once vLLM has taken it: while a prompt is read in pieces it asks for logits and throws the id away.
The list of the row's ids, which vLLM extends, says what was taken. A row that vLLM puts back into the batch (after
preemption) is rebuilt from that list.

N rows of vLLM's batch, R rows that choose from one head, V text ids, S speech codes, X = V + S + 3 ids of the exported
vocabulary.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.tasks import OUTPUTS, SpeechForm
from osum_echat.dialogue.tokens import Tokenizer
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.generation.choice import Choice, ChoosingRow, Picked
from osum_echat.generation.config import GenerationConfig, Mode, Sampling
from osum_echat.generation.guards import AgeChoice
from osum_echat.generation.phases import RowState
from osum_echat.generation.request import Request
from osum_echat.generation.transcript import Place, Transcribed

GUARDS = ("age", "think", "repetition", "silence")
"""Bit n of what is sent back: the guard acted on this id."""


def end_id(vocab: Vocabulary) -> int:
    """The id that ends a request: a row that is an input only, so no reply holds it. vLLM stops at it."""
    return vocab.audio_end


def guard_bits(names: Sequence[str]) -> int:
    return sum(1 << GUARDS.index(name) for name in names)


def guards_of(bits: float) -> list[str]:
    """The guards that a sent value names. Raises ValueError for what `guard_bits` never made."""
    if not (0 <= bits < 1 << len(GUARDS) and bits == int(bits)):
        raise ValueError(f"{bits} names no guards: is logprobs_mode processed_logits?")
    return [name for n, name in enumerate(GUARDS) if int(bits) >> n & 1]


@dataclass(frozen=True)
class RowPlan:
    """What decides a row beside its prompt; travels to vLLM's process as plain data (``extra_args``). Fields as of
    `Request`."""

    output_type: str
    mode: Mode
    seed: int = 0
    text_ids: tuple[int, ...] = ()
    words: tuple[str, ...] = ()
    plan: tuple[tuple[int, int], ...] = ()
    transcribed: Transcribed | None = None

    @classmethod
    def of(cls, request: Request, joint: bool = True) -> RowPlan:
        """``joint``: the CTC head has a share in transcripts; else its probabilities (2 MB for 10 s of mini's) are not
        sent."""
        plan = tuple(sorted(request.plan.items()))
        transcribed = request.transcribed if joint else None
        return cls(request.output_type, request.mode, request.seed, request.text_ids, request.words, plan, transcribed)

    def to_plain(self) -> dict[str, Any]:
        """Only strings, numbers, lists and dicts."""
        data = asdict(replace(self, transcribed=None))
        lists = {name: [list(x) if isinstance(x, tuple) else x for x in data[name]] for name in ("text_ids", "words", "plan")}
        return data | lists | {"transcribed": None if self.transcribed is None else _to_plain(self.transcribed)}

    @classmethod
    def from_plain(cls, data: Mapping[str, Any], vocab: Vocabulary) -> RowPlan:
        """Raises ValueError for anything that `to_plain` would not have made."""
        try:
            mode = data["mode"]
            read = cls(
                str(data["output_type"]),
                Mode(Sampling(**mode["text"]), Sampling(**mode["speech"]), int(mode["max_new"])),
                int(data["seed"]),
                tuple(int(i) for i in data["text_ids"]),
                tuple(str(word) for word in data["words"]),
                tuple((int(step), int(token)) for step, token in data["plan"]),
                None if data["transcribed"] is None else _from_plain(data["transcribed"], vocab),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no request of osum-echat: {error!r}") from error
        if read.output_type not in OUTPUTS:
            raise ValueError(f"unknown output type {read.output_type!r}")
        ids = [*read.text_ids, *(token for _, token in read.plan)]
        if any(not 0 <= i <= vocab.speech_delimiter for i in ids):
            raise ValueError(f"ids outside [0, {vocab.speech_delimiter}]")
        return read


def _to_plain(transcribed: Transcribed) -> dict[str, Any]:
    """Numbers as the bytes of float32 in base64: they are many, and must arrive as they are."""
    place, log_probs_PC = transcribed
    data = log_probs_PC.float().cpu().contiguous().numpy().astype("<f4").tobytes()
    return {"place": [list(place.begin), place.end], "ctc_PC": [*log_probs_PC.shape, base64.b64encode(data).decode()]}


def _from_plain(data: Mapping[str, Any], vocab: Vocabulary) -> Transcribed:
    begin, end = data["place"]
    positions, classes, coded = data["ctc_PC"]
    numbers = np.frombuffer(base64.b64decode(str(coded), validate=True), dtype="<f4")
    if classes != vocab.text_size + 1 or positions < 1 or len(numbers) != positions * classes:
        raise ValueError(f"{len(numbers)} probabilities for {positions} positions of {vocab.text_size + 1} classes")
    log_probs_PC = torch.from_numpy(numbers.reshape(positions, classes).astype(np.float32))
    return Transcribed(Place(tuple(int(i) for i in begin), str(end)), log_probs_PC)


class Row:
    """A row of the batch.

    Attributes:
        output: the ids that vLLM has taken for it, extended by vLLM as it goes on; below 0 where they are not known to
            the host yet.
    """

    def __init__(self, row: ChoosingRow, plan: Mapping[int, int], output: Sequence[int], choice: Choice) -> None:
        self.row, self.plan, self.output = row, plan, output
        self._choice = choice
        self._taken = 0
        self._offered: tuple[int, Picked] | None = None  # the id of the coming step, not known to be taken
        row.state.pending.clear()  # what is given from the start stands at the end of the prompt

    def catch_up(self) -> None:
        """Take the ids that came since."""
        while self._taken < len(self.output):
            token = self.output[self._taken]
            self._taken += 1
            self._take(token)

    def _take(self, token: int) -> None:
        state, offered = self.row.state, self._offered
        self._offered = None
        if state.finished is not None:
            return
        if state.pending:
            given = state.pending.popleft()
            assert token in (given, -1), f"{given} was given, {token} was taken"
            return
        if offered is not None and token in (offered[0], -1):
            token = offered[0]
            self.row.acted(offered[1].acted)
        else:  # a row that was put back: its numbers and its age guard are where they were
            assert token >= 0, "the id is not known, and none was offered"
            self.row.uniform()
            if self._choice.age_acts(self.row):
                self.row.acted((AgeChoice.name,))
        state.accept(token)
        state.pending.popleft()

    def given(self, end: int) -> int | None:
        """The id that is not the model's to choose now; None where there is a choice."""
        if self.row.state.finished is not None:
            return end
        return self.row.state.pending[0] if self.row.state.pending else None

    def offer(self, picked: Picked, offset: int) -> tuple[int, int]:
        """Its id at this step, and the bits that say which guards acted."""
        token = self.plan.get(len(self.row.state.generated), picked.chosen + offset)
        self._offered = token, picked
        return token, guard_bits(picked.acted)


class BatchRules:
    """The rows of vLLM's batch by their place in it, and what their logits become.

    Args:
        speech_bias: bias [S + 1] of the speech head, which a plain Qwen2's head has no place for.
    """

    def __init__(
        self, vocab: Vocabulary, tokenizer: Tokenizer, config: GenerationConfig, speech_form: SpeechForm, speech_bias: Tensor
    ) -> None:
        assert len(speech_bias) == vocab.speech_classes, f"{len(speech_bias)} biases for {vocab.speech_classes} classes"
        self.vocab, self.tokenizer, self.config, self.speech_form = vocab, tokenizer, config, speech_form
        self.choice = Choice(config, tokenizer, vocab)
        self.end = end_id(vocab)
        self.rows: dict[int, Row] = {}
        self._bias = speech_bias.float()

    def add(self, index: int, plan: RowPlan, output: Sequence[int]) -> None:
        """A row comes to this place; ``output``: the ids taken for it, a list that grows."""
        state = RowState(
            plan.output_type,
            plan.mode.max_new,
            self.config,
            self.tokenizer,
            self.vocab,
            plan.text_ids,
            plan.words,
            self.speech_form,
        )
        transcript = self.choice.transcript(plan.transcribed)
        row = ChoosingRow(state, plan.mode, plan.seed, self.choice.age_armed(state), transcript)
        self.rows[index] = Row(row, dict(plan.plan), output, self.choice)

    def remove(self, index: int) -> None:
        self.rows.pop(index, None)

    def move(self, source: int, target: int, swap: bool) -> None:
        """What stands at ``source`` comes to ``target``, and with ``swap`` the other way round; a place may be that of
        another's request."""
        moved, other = self.rows.pop(source, None), self.rows.pop(target, None)
        if moved is not None:
            self.rows[target] = moved
        if swap and other is not None:
            self.rows[source] = other

    def apply(self, logits_NX: Tensor) -> Tensor:
        """Logits in which each of our rows has one id left; rows of others stay as they are."""
        found: dict[int, tuple[int, int]] = {}  # place: id, bits
        choosing: dict[bool, list[int]] = {False: [], True: []}
        for index, row in self.rows.items():
            row.catch_up()
            given = row.given(self.end)
            if given is not None:
                found[index] = given, 0
            else:
                choosing[row.row.state.in_speech].append(index)
        for in_speech, places in choosing.items():
            found |= self._chosen(logits_NX, places, in_speech) if places else {}
        if not found:
            return logits_NX
        table = torch.tensor([[place, *found[place]] for place in found], device=logits_NX.device)
        place_R, id_R, bits_R = table.unbind(1)
        if len(found) == len(logits_NX):
            logits_NX.fill_(float("-inf"))
        else:
            logits_NX.index_fill_(0, place_R, float("-inf"))
        logits_NX[place_R, id_R] = bits_R.to(logits_NX.dtype)
        return logits_NX

    def _chosen(self, logits_NX: Tensor, places: list[int], in_speech: bool) -> dict[int, tuple[int, int]]:
        size = self.vocab.text_size
        first, end = (size, size + self.vocab.speech_classes) if in_speech else (0, size)
        part = logits_NX[:, first:end]
        logits_RV = (part if len(places) == len(part) and places == list(range(len(part))) else part[places]).float()
        if in_speech:
            if self._bias.device != logits_RV.device:
                self._bias = self._bias.to(logits_RV.device)
            logits_RV = logits_RV + self._bias
        rows = [self.rows[place] for place in places]
        picked = self.choice.pick([row.row for row in rows], logits_RV, in_speech)
        return {place: row.offer(pick, first) for place, row, pick in zip(places, rows, picked, strict=True)}


def rules_of(settings: Mapping[str, Any], tokenizer: Tokenizer, override: Mapping[str, Any] | None = None) -> BatchRules:
    """The rules that an exported folder's settings come to (`export.read_settings`). ``override``: `to_settings` of
    another configuration."""
    from osum_echat.config import from_dict

    vocab = Vocabulary(**settings["vocabulary"])
    chosen = {**settings["decoding"], **(override or {})}
    config = from_dict(GenerationConfig, chosen["generation"], "the settings of decoding")
    bias = torch.tensor(settings["speech_bias"], dtype=torch.float32)
    return BatchRules(vocab, tokenizer, config, chosen["speech_form"], bias)


def to_settings(config: GenerationConfig, dialect: Dialect) -> dict[str, Any]:
    """What decoding needs to know, as plain data."""
    from osum_echat.config import to_dict

    return {"generation": to_dict(config), "speech_form": dialect.speech_form}
