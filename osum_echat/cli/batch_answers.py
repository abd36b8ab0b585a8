"""What `osum-echat batch` does with a record: ask the model, and make a line of results of the reply. An engine runs it
(`osum_echat.batch`)."""

from __future__ import annotations

import argparse
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from osum_echat.audio.io import AudioError, Source, duration, read
from osum_echat.batch.work import Outcome, Unit
from osum_echat.cli.common import load_echat, request_options
from osum_echat.data.sources import open_source
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.pipeline.ask import Ask, AskMode, find_mode

if TYPE_CHECKING:
    from osum_echat.evaluation.items import Item
    from osum_echat.pipeline import EChat, Reply

_LONGEST_NAME = 150
_READERS = 4  # threads that look recordings up while others are read


@dataclass(frozen=True)
class Answering:
    """The work: answers to records of a list. A unit's payload is the record's `data.sources.Place`.

    Attributes:
        args: of the command; what is asked of which model.
    """

    args: argparse.Namespace

    def open(self, device: str) -> AnswerWorker:
        """Load the model. Raises ValueError for what it has not learnt, and for a voice that is missing."""
        mode = find_mode(self.args.task)
        args = argparse.Namespace(**{**vars(self.args), "device": device})
        echat = load_echat(args, speech=mode.speaks)
        why = echat.refusal(mode.ask(b"", "a", think=args.think))
        if why is not None:
            raise ValueError(why)
        if mode.speaks and echat.token2wav is None:
            raise ValueError("this checkpoint has no token2wav, so its replies have no sound: give --token2wav FOLDER")
        return AnswerWorker(echat, args, mode)


@dataclass(frozen=True)
class _Question:
    """A record that can be asked; ``size``: seconds of its recording, else length of its text: alike ones are asked
    together."""

    unit: Unit
    record: Record
    ask: Ask
    size: float


class AnswerWorker:
    """A loaded model and the list."""

    def __init__(self, echat: EChat, args: argparse.Namespace, mode: AskMode) -> None:
        self.echat, self.args, self.mode = echat, args, mode
        self.source = open_source(args.list, list_type(args))
        self.readers = ThreadPoolExecutor(_READERS, thread_name_prefix="osum-echat-reader")

    def run(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Outcomes of a block: sorted by length, asked in batches; where one spoils a batch, each of it alone."""
        records = self.source.at([unit.payload for unit in units])
        questions = []
        for found in self.readers.map(self._question, units, records):
            if isinstance(found, Outcome):
                yield found
            else:
                questions.append(found)
        questions.sort(key=lambda question: (question.size, question.unit.number))
        size = self.args.batch_size
        groups = [questions[start : start + size] for start in range(0, len(questions), size)]
        spoilt: list[_Question] = []
        answers = self.echat.answers(([question.ask for question in group] for group in groups), size)
        for group, replies in zip(groups, answers, strict=True):
            if isinstance(replies, ValueError) and len(group) > 1:
                spoilt += group
                continue
            for number, question in enumerate(group):
                yield self._outcome(question, replies if isinstance(replies, ValueError) else replies[number])
        for question, replies in zip(spoilt, self.echat.answers(([question.ask] for question in spoilt), 1), strict=True):
            yield self._outcome(question, replies if isinstance(replies, ValueError) else replies[0])

    def _question(self, unit: Unit, record: Record | RecordError) -> _Question | Outcome:
        try:
            if isinstance(record, RecordError):
                raise record
            ask = ask_for(record, self.args)
        except (ValueError, OSError) as error:
            return Outcome(unit.number, error=str(error))
        return _Question(unit, record, ask, size_of(ask))

    def _outcome(self, question: _Question, reply: Reply | ValueError) -> Outcome:
        if isinstance(reply, ValueError):
            return Outcome(question.unit.number, error=str(reply))
        row, files = result_of(question.record, reply, self.mode)
        return Outcome(question.unit.number, row, files)


def list_type(args: argparse.Namespace) -> Any:
    """``--data-type`` as `open_source` takes it."""
    return "auto" if args.data_type == "combine" else args.data_type


def ask_for(record: Record, args: argparse.Namespace) -> Ask:
    """What to ask about a record. Raises ValueError when the record lacks what the task needs."""
    mode = find_mode(args.task)
    if mode.hears and record.wav is None:
        raise ValueError("the record has no recording")
    text = record.txt if mode.kind == "speak" else str(record.extra.get("question", record.txt))
    wav: Source | None = record.wav
    if wav is not None and mode.hears and (record.start is not None or record.end is not None):
        wav = read(wav, record.start, record.end)
    return mode.ask(wav, text, think=args.think, **request_options(args))


def size_of(ask: Ask) -> float:
    """Seconds of the recording, by its header; else letters of the text. What cannot be read has 0, and is told when it
    is asked."""
    wav: Any = ask.wav
    if wav is None:
        return float(len(ask.text or ""))
    try:
        return float(wav.seconds) if hasattr(wav, "seconds") else duration(wav)
    except AudioError:
        return 0.0


def result_of(record: Record, reply: Reply, mode: AskMode) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The line of a record that was answered, and the file of its spoken reply."""
    from osum_echat.evaluation.readers.lists import item_of

    item, wav, files = item_of(record), None, {}
    if reply.audio is not None and len(reply.audio):
        wav = wav_name(record.key)
        files[wav] = reply.wav()
    data = reply.as_json()
    row = {
        "key": record.key,
        "task": mode.task or mode.name,
        "text": reply.text,
        "think": None if reply.think is None else asdict(reply.think),
        "tags": tags_of(reply, mode, item),
        "wav": wav,
        "finish": reply.finish_reason,
        "guards": data["guards"],
        "timings": data["timings"],
        "speech_tokens": data["speech_tokens"],
        "reference": {"words": item.text, "tags": dict(item.labels)},
        "error": None,
    }
    return row, files


def wav_name(key: str) -> str:
    """The file of a key's reply, in the folder of the results."""
    name = quote(key, safe=" ")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{zlib.crc32(key.encode()):08x}"
    return f"wav/{name}.wav"


def tags_of(reply: Reply, mode: AskMode, item: Item) -> dict[str, str | None]:
    """The labels that were found, by kind: those of the thought, or those that the task asked for."""
    from osum_echat.evaluation.labels import KINDS, canonical, read_label

    if reply.think is not None:
        found = {kind: getattr(reply.think, kind) for kind in KINDS}
        return {kind: canonical(kind, value) for kind, value in found.items() if value}
    asked = [{"sounds": "event"}.get(aspect, aspect) for aspect in mode.aspects]
    return {
        kind: read_label(kind, reply.text, frozenset(filter(None, [item.labels.get(kind)]))) for kind in asked if kind in KINDS
    }
