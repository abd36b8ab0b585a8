"""A whole list (raw, shard or combine) through the model: `results.jsonl` (everything), `text` (key and hypothesis), and the error rate.

The list may be shared out (``--part 0/4``); a run that was stopped goes on where it was; ``--join`` puts the parts together and scores them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat import metrics
from osum_echat.audio.io import Source, read
from osum_echat.cli.common import UserError, add_model_arguments, add_request_arguments, load_echat, request_options, run
from osum_echat.pipeline.ask import Ask, find_mode

if TYPE_CHECKING:
    from osum_echat.dialogue.record import Record, RecordError
    from osum_echat.pipeline import EChat, Reply

RESULTS = "results.jsonl"

EXAMPLES = """examples:
  osum-echat batch --list test/data.list --out out/test
  osum-echat batch --list shards_list.txt --data-type shard --task asr+emotion --out out/test --batch-size 16
  osum-echat batch --join out/test --parts 4
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", help="raw jsonl, list of tars, or combines_list.txt")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--data-type", choices=("auto", "raw", "shard"), default="auto", help="default: by the look of the list")
    parser.add_argument("--task", default="asr", help="a task of infer_runtime.py (default: asr)")
    add_request_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--part", default="0/1", help="i/n: only every n-th record, from the i-th on (default: 0/1, all)")
    parser.add_argument("--join", type=Path, metavar="OUT", help="join and score the parts in this folder, and stop")
    parser.add_argument("--parts", type=int, default=1, help="with --join: how many parts")
    add_model_arguments(parser)
    return parser


def part_of(text: str) -> tuple[int, int]:
    """``i/n`` as numbers. Raises UserError."""
    try:
        part, parts = (int(x) for x in text.split("/"))
    except ValueError:
        raise UserError(f"--part {text!r} is not of the form i/n, for example 0/4") from None
    if not 0 <= part < parts:
        raise UserError(f"--part {text!r}: i must be in 0..n-1")
    return part, parts


def part_file(folder: Path, part: int, parts: int) -> Path:
    return folder / (RESULTS if parts == 1 else f"results.{part}of{parts}.jsonl")


def finished_keys(path: Path) -> set[str]:
    """Keys that a stopped run has written; a last line that was cut off is taken away."""
    if not path.exists():
        return set()
    keys, good = set(), 0
    with path.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            keys.add(json.loads(line)["key"])
            good += len(line)
    if good < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(good)
    return keys


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


def answer_all(echat: EChat, records: Iterable[Record | RecordError], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result a record, in the order of the list; a record that cannot be used gives ``error`` and no text."""
    waiting: list[tuple[Record, Ask]] = []
    for record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            waiting.append((record, ask_for(record, args)))
        except ValueError as error:
            yield {"key": key_of(record), "error": str(error)}
        if len(waiting) == args.batch_size:
            yield from answer_batch(echat, waiting)
            waiting = []
    yield from answer_batch(echat, waiting)


def key_of(record: Record | RecordError) -> str:
    """The key of a record, or the place of one that has none."""
    return record.key or f"{record.source}:{record.line}"


def answer_batch(echat: EChat, waiting: Sequence[tuple[Record, Ask]]) -> Iterator[dict[str, Any]]:
    """A batch; if one recording spoils it (not audio, empty ...), each is asked alone, so that only that one fails."""
    try:
        replies: list[Reply | ValueError] = list(echat.batch([ask for _, ask in waiting], size=max(len(waiting), 1)))
    except ValueError:
        replies = [answer_one(echat, ask) for _, ask in waiting]
    for (record, _), reply in zip(waiting, replies, strict=True):
        if isinstance(reply, ValueError):
            yield {"key": record.key, "error": str(reply)}
        else:
            yield {"key": record.key, "reference": record.txt, **reply.as_json()}


def answer_one(echat: EChat, ask: Ask) -> Reply | ValueError:
    try:
        return echat.batch([ask])[0]
    except ValueError as error:
        return error


def join(folder: Path, parts: int) -> dict[str, Any]:
    """Put the parts together, write ``text``, and score. Raises UserError when a part is missing."""
    rows: list[dict[str, Any]] = []
    for part in range(parts):
        path = part_file(folder, part, parts)
        if not path.is_file():
            raise UserError(f"{path} is missing: run that part first")
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: str(row["key"]))
    answered = [row for row in rows if "error" not in row]
    with (folder / "text").open("w", encoding="utf-8") as out:
        out.writelines(f"{row['key']} {row['text']}\n" for row in answered)
    if parts > 1:
        with (folder / RESULTS).open("w", encoding="utf-8") as out:
            out.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    scored = [row for row in answered if row.get("reference")]
    errors = metrics.total_errors([row["reference"] for row in scored], [row["text"] for row in scored])
    return {"records": len(rows), "failed": len(rows) - len(answered), "scored": len(scored), "wer": round(100 * errors.rate, 2)}


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    if args.join is None and (args.list is None or args.out is None):
        parser.error("--list and --out are needed (or --join)")

    def command() -> int:
        if args.join is not None:
            print(json.dumps(join(args.join, args.parts)))
            return 0
        from tqdm import tqdm

        from osum_echat.data.sources import open_source

        mode = find_mode(args.task)
        part, parts = part_of(args.part)
        source = open_source(args.list, args.data_type)
        args.out.mkdir(parents=True, exist_ok=True)
        path = part_file(args.out, part, parts)
        done = finished_keys(path)
        mine = (record for number, record in enumerate(source.records()) if number % parts == part)
        todo = (record for record in mine if key_of(record) not in done)
        echat = load_echat(args, speech=mode.speaks)
        with path.open("a", encoding="utf-8") as out:
            for result in tqdm(answer_all(echat, todo, args), desc=f"part {part} of {parts}", unit="utt", initial=len(done)):
                out.write(json.dumps(result, ensure_ascii=False) + "\n")
                out.flush()
        if parts == 1:
            print(json.dumps(join(args.out, 1)))
        return 0

    return run(command)
