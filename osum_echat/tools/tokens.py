"""Add the 25 Hz speech tokens of each recording to a raw list (``extra.speech_token``).

    osum-echat tokens --token2wav DIR --input data.list --output data_tokens.list

Recordings are tokenized in batches of similar length. An interrupted run continues where it was: work goes to ``OUTPUT.part``, which takes
its name only when the list is done. What cannot be tokenized (missing, broken, over 30 s) is left out, counted by reason and written with
its key to ``OUTPUT.dropped``. Records that have tokens already are copied, unless ``--again``.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from osum_echat.audio.io import AudioError, read
from osum_echat.data.paths import Resolver, read_lines
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.token2wav import released_yaml
from osum_echat.token2wav.prompt import Frontend, tokenizer_wave


@dataclass(frozen=True)
class Dropped:
    """A line that gave no record, by its place in the input."""

    line: int
    key: str
    reason: str
    detail: str

    def text(self) -> str:
        return json.dumps({"line": self.line, "key": self.key, "reason": self.reason, "detail": self.detail}, ensure_ascii=False)


class Progress:
    """The two files of an unfinished run. Every input line is in one of them, in order, so their lengths say where to go on."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self.part = output.with_name(output.name + ".part")
        self.dropped = output.with_name(output.name + ".dropped")

    def resume(self, keys: Sequence[str]) -> int:
        """How many input lines are done. A torn last line is cut off; ValueError when the files belong to another input."""
        if not self.part.exists():
            self.dropped.unlink(missing_ok=True)
            return 0
        kept = [json.loads(line)["key"] for line in _whole_lines(self.part)]
        lost = {json.loads(line)["line"] for line in _whole_lines(self.dropped)}
        done = len(kept) + len(lost)
        expected = [key for line, key in enumerate(keys[:done], start=1) if line not in lost]
        if [str(key) for key in kept] != expected:
            raise ValueError(f"{self.part} was made from another list; delete it to start anew")
        return done

    def write(self, records: Sequence[Record], dropped: Sequence[Dropped]) -> None:
        for path, lines in ((self.dropped, [d.text() for d in dropped]), (self.part, [_line(r) for r in records])):
            with path.open("a", encoding="utf-8") as file:
                file.writelines(line + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())

    def finish(self) -> None:
        self.part.touch()
        os.replace(self.part, self.output)


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file that may end in the middle of one; what is torn is removed from the file."""
    if not path.exists():
        return []
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.decode("utf-8").splitlines()


def _line(record: Record) -> str:
    return json.dumps(record.to_dict(), ensure_ascii=False)


def load_wave(record: Record, resolve: Resolver) -> Tensor:
    """Samples at 16 kHz of a record's recording or segment. Raises RecordError or AudioError."""
    if not isinstance(record.wav, str):
        raise record.error("no_wav", "the record names no recording")
    audio = read(resolve(record.wav), record.start, record.end, max_seconds=36_000)
    return tokenizer_wave(audio)


def tokenize(
    lines: Sequence[tuple[int, str]], frontend: Frontend, resolve: Resolver, source: str, again: bool, pool: ThreadPoolExecutor
):
    """(records, dropped) of numbered input lines, in their order."""

    def prepare(item: tuple[int, str]) -> tuple[Record, Tensor | None] | Dropped:
        number, text = item
        key = ""
        try:
            record = Record.from_json(text, source, number)
            key = record.key
            ready = bool(record.speech_token) and not again
            return record, None if ready else load_wave(record, resolve)
        except (RecordError, AudioError) as error:
            return Dropped(number, getattr(error, "key", "") or key, error.reason, str(error))
        except FileNotFoundError as error:
            return Dropped(number, key, "missing", str(error))

    prepared = list(pool.map(prepare, lines))
    waves = {i: p[1] for i, p in enumerate(prepared) if not isinstance(p, Dropped) and p[1] is not None}
    order = sorted(waves, key=lambda i: waves[i].shape[0])
    ids = dict(zip(order, frontend.tokens_of([waves[i] for i in order]), strict=True)) if order else {}
    records, dropped = [], []
    for i, item in enumerate(prepared):
        if isinstance(item, Dropped):
            dropped.append(item)
        else:
            record = item[0]
            extra = {**record.extra, "speech_token": ids[i].tolist()} if i in ids else record.extra
            records.append(replace(record, extra=extra))
    return records, dropped


def batches(lines: Sequence[str], start: int, size: int) -> Iterator[list[tuple[int, str]]]:
    """Numbered lines (from 1) after the first ``start``."""
    for first in range(start, len(lines), size):
        yield list(enumerate(lines[first : first + size], start=first + 1))


def run(
    token2wav: Path, source: Path, output: Path, batch: int = 16, again: bool = False, workers: int = 4
) -> collections.Counter[str]:
    """Tokenize a list. Returns counts: "tokenized or copied", and one for every reason of a drop."""
    if output.exists():
        raise ValueError(f"{output} exists; delete it or choose another name")
    lines = read_lines(str(source))
    progress = Progress(output)
    done = progress.resume([_key(line) for line in lines])
    frontend = Frontend(token2wav, released_yaml.load_config(token2wav / "cosyvoice.yaml").flow.vocab_size)
    resolve = Resolver(str(source))
    counts: collections.Counter[str] = collections.Counter()
    with ThreadPoolExecutor(workers) as pool, tqdm(total=len(lines), initial=done, unit="record") as bar:
        for part in batches(lines, done, batch):
            records, dropped = tokenize(part, frontend, resolve, str(source), again, pool)
            progress.write(records, dropped)
            counts["kept"] += len(records)
            counts.update(d.reason for d in dropped)
            bar.update(len(part))
            bar.set_postfix(dropped=counts.total() - counts["kept"])
    progress.finish()
    return counts


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
    args = parser.parse_args(argv)
    if args.batch < 1:
        parser.error("--batch must be at least 1")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        counts = run(args.token2wav, args.input, args.output, args.batch, args.again)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(", ".join(f"{reason}: {count}" for reason, count in counts.most_common()) or "nothing to do")
    return 0
