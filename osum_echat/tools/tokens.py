"""Add the 25 Hz speech tokens of each recording to a raw list (``extra.speech_token``).

    osum-echat tokens --token2wav DIR --input data.list --output data_tokens.list

Recordings are tokenized in batches of similar length, in this process or on a Ray cluster (``--engine ray``). An
interrupted run continues where it was: work goes to ``OUTPUT.part`` in the order in which it is done; when the list is
done, ``OUTPUT`` is made of it, in the order of the input. What cannot be tokenized (missing, broken, over 30 s) is left
out, counted by reason and written with its key to ``OUTPUT.dropped``. Records that have tokens already are copied,
unless ``--again``.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from tqdm import tqdm

from osum_echat.audio.io import AudioError, read
from osum_echat.batch.local import LocalEngine
from osum_echat.batch.options import add_engine_arguments, check_engine_arguments, make_engine
from osum_echat.batch.work import Engine, Outcome, Unit
from osum_echat.data.paths import Resolver, read_lines
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.token2wav import released_yaml
from osum_echat.token2wav.prompt import Frontend, tokenizer_wave

_READERS = 4  # threads that read recordings


@dataclass(frozen=True)
class Dropped:
    """A line that gave no record, by its place in the input."""

    line: int
    key: str
    reason: str
    detail: str


class Progress:
    """The unfinished run: a file of outcomes by line of the input, in the order in which they came."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.part = output.with_name(output.name + ".part")
        self.dropped = output.with_name(output.name + ".dropped")

    def done(self, keys: Sequence[str]) -> set[int]:
        """Input lines (from 1) that are done. A torn last line is cut off; ValueError when the file belongs to another
        input."""
        lines: set[int] = set()
        for _, row in self._rows():
            line = row.get("line")
            if not isinstance(line, int) or line > len(keys) or str(row.get("key")) != keys[line - 1]:
                raise ValueError(f"{self.part} was made from another list; delete it to start anew")
            lines.add(line)
        return lines

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        with self.part.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)

    def finish(self) -> collections.Counter[str]:
        """Make both files, in the order of the input; counts of what was kept, and of reasons why not. Nothing but
        places is held in memory."""
        self.part.touch()
        places = sorted((row["line"], start) for start, row in self._rows())
        counts: collections.Counter[str] = collections.Counter()
        whole, left_out = (path.with_name(f".{path.name}.tmp") for path in (self.output, self.dropped))
        with (
            self.part.open("rb") as rows,
            whole.open("w", encoding="utf-8") as kept,
            left_out.open("w", encoding="utf-8") as lost,
        ):
            for _, start in places:
                counts[_copy(rows, start, kept, lost)] += 1
        os.replace(left_out, self.dropped)
        os.replace(whole, self.output)
        self.part.unlink()
        return counts

    def _rows(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """Byte and content of every whole line; what is torn at the end is removed from the file."""
        if not self.part.exists():
            return
        start = 0
        with self.part.open("r+b") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    file.truncate(start)
                    return
                yield start, json.loads(line)
                start += len(line)


def _copy(rows: IO[bytes], start: int, kept: IO[str], lost: IO[str]) -> str:
    """One outcome to the file where it belongs; ``kept``, or the reason why it is lost."""
    rows.seek(start)
    row = json.loads(rows.readline())
    if "record" in row:
        kept.write(json.dumps(row["record"], ensure_ascii=False) + "\n")
        return "kept"
    lost.write(json.dumps({name: row[name] for name in ("line", "key", "reason", "detail")}, ensure_ascii=False) + "\n")
    return str(row["reason"])


def load_wave(record: Record, resolve: Resolver) -> Tensor:
    """Samples at 16 kHz of a record's recording or segment. Raises RecordError or AudioError."""
    if not isinstance(record.wav, str):
        raise record.error("no_wav", "the record names no recording")
    audio = read(resolve(record.wav), record.start, record.end, max_seconds=36_000)
    return tokenizer_wave(audio)


@dataclass(frozen=True)
class Tokenizing:
    """The work: speech tokens of the records of a list. A unit's payload is its line, its number the line's number.

    Attributes:
        token2wav: a token2wav directory. source: the list, whose folder relative paths start from.
        batch: recordings in one call of the tokenizer. again: tokenize records that have tokens, too. threads: CPU
            threads.
    """

    token2wav: str
    source: str
    batch: int = 16
    again: bool = False
    threads: int | None = None

    def open(self, device: str) -> TokenWorker:
        """The tokenizer runs on CPUs, whatever ``device`` is. Raises ValueError when the directory has none."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)
        folder = Path(self.token2wav)
        return TokenWorker(self, Frontend(folder, released_yaml.load_config(folder / "cosyvoice.yaml").flow.vocab_size))


class TokenWorker:
    """An open tokenizer."""

    def __init__(self, work: Tokenizing, frontend: Frontend) -> None:
        self.work, self.frontend, self.resolve = work, frontend, Resolver(work.source)
        self.readers = ThreadPoolExecutor(_READERS)

    def run(self, units: Sequence[Unit]) -> Iterator[Outcome]:
        """Outcomes of a block: rows of `Progress`."""
        waves: list[tuple[Unit, Record, Tensor]] = []
        for unit, found in zip(units, self.readers.map(self._prepare, units), strict=True):
            if isinstance(found, Dropped):
                yield Outcome(unit.number, asdict(found))
            elif found[1] is None:
                yield _kept(unit, found[0])
            else:
                waves.append((unit, found[0], found[1]))
        waves.sort(key=lambda wave: (wave[2].shape[0], wave[0].number))
        for start in range(0, len(waves), self.work.batch):
            some = waves[start : start + self.work.batch]
            for (unit, record, _), ids in zip(some, self.frontend.tokens_of([wave for _, _, wave in some]), strict=True):
                yield _kept(unit, replace(record, extra={**record.extra, "speech_token": ids.tolist()}))

    def _prepare(self, unit: Unit) -> tuple[Record, Tensor | None] | Dropped:
        key = ""
        try:
            record = Record.from_json(unit.payload, self.work.source, unit.number)
            key = record.key
            ready = bool(record.speech_token) and not self.work.again
            return record, None if ready else load_wave(record, self.resolve)
        except (RecordError, AudioError) as error:
            return Dropped(unit.number, getattr(error, "key", "") or key, error.reason, str(error))
        except FileNotFoundError as error:
            return Dropped(unit.number, key, "missing", str(error))


def _kept(unit: Unit, record: Record) -> Outcome:
    return Outcome(unit.number, {"line": unit.number, "key": unit.key, "record": record.to_dict()})


def run(
    token2wav: Path,
    source: Path,
    output: Path,
    batch: int = 16,
    again: bool = False,
    engine: Engine | None = None,
    threads: int | None = None,
) -> collections.Counter[str]:
    """Tokenize a list. Returns counts: "kept" (tokenized or copied), and one for every reason of a drop."""
    if output.exists():
        raise ValueError(f"{output} exists; delete it or choose another name")
    lines = read_lines(str(source))
    keys = [_key(line) for line in lines]
    progress = Progress(output)
    done = progress.done(keys)
    units = [
        Unit(number, key, line) for number, (key, line) in enumerate(zip(keys, lines, strict=True), start=1) if number not in done
    ]
    work = Tokenizing(str(token2wav), str(source), batch, again, threads)
    for outcome in tqdm((engine or LocalEngine()).run(work, units), total=len(lines), initial=len(done), unit="record"):
        number = outcome.number
        row = asdict(Dropped(number, keys[number - 1], "failed", outcome.error)) if outcome.error is not None else outcome.value
        progress.write([{**row, "key": keys[number - 1]}])
    return progress.finish()


def _key(line: str) -> str:
    try:
        data = json.loads(line)
    except json.JSONDecodeError:
        return ""
    return str(data.get("key", "")) if isinstance(data, dict) else ""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--token2wav", type=Path, required=True, help="a token2wav directory")
    parser.add_argument("--input", type=Path, required=True, help="raw list, one JSON object a line")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--batch", type=int, default=16, help="recordings in one call of the tokenizer")
    parser.add_argument("--again", action="store_true", help="tokenize records that have tokens, too")
    parser.add_argument("--threads", type=int, default=None, help="CPU threads of the tokenizer")
    add_engine_arguments(parser)
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    check_engine_arguments(parser, args)
    try:
        engine = make_engine(args, "cpu")
        counts = run(args.token2wav, args.input, args.output, args.batch, args.again, engine, args.threads)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{reason}: {count}" for reason, count in counts.most_common()) or "nothing to do")
    return 0
