"""A whole list (raw, shard or combine) through the model.

In the folder --out: results.jsonl (a line a record: key, task, text, think, tags, wav, finish, guards, timings, or
error), wav/ (the spoken replies), text (key and answer) and task.json (what was asked: one task a folder). The last
line that is printed is one JSON object of counts and scores.

A run that was stopped goes on where it was. The list may be shared out over a Ray cluster (--engine ray;
docs/scale.md), or by hand (--part 0/4): then --join puts the parts together and scores them. The results are the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from osum_echat.batch.options import add_engine_arguments, check_engine_arguments, make_engine
from osum_echat.batch.output import NO_PARQUET, Lines, write_files, write_parquet, write_whole
from osum_echat.batch.work import Unit
from osum_echat.cli.batch_answers import Answering, list_type
from osum_echat.cli.common import UserError, add_model_arguments, add_request_arguments, request_options, run
from osum_echat.data.sources import Source, open_source
from osum_echat.dialogue.record import RecordError
from osum_echat.pipeline.ask import AskMode, find_mode

RESULTS, PARQUET, TEXT, TASK = "results.jsonl", "results.parquet", "text", "task.json"

EXAMPLES = """examples:
  osum-echat batch --list test/data.list --out out/test
  osum-echat batch --list shards_list.txt --task asr+emotion --out out/test_emotion --batch-size 16
  osum-echat batch --list test/data.list --out out/test --engine ray --address auto
  osum-echat batch --join out/test --parts 4

exit codes: 0 done (failed records are counted), 1 nothing could be answered, or something to mend (one line says what), 2 a wrong call
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", help="raw jsonl, list of tars, or combines_list.txt")
    parser.add_argument("--out", type=Path, help="folder of the results; one task a folder")
    parser.add_argument(
        "--data-type", choices=("auto", "raw", "shard", "combine"), default="auto", help="default: by the look of the list"
    )
    parser.add_argument("--task", default="asr", help="a task of infer_runtime.py (default: asr)")
    add_request_arguments(parser)
    parser.add_argument("--batch-size", type=int, default=8, help="records that are decoded together (default: 8)")
    parser.add_argument(
        "--format",
        choices=("jsonl", "parquet"),
        default="jsonl",
        help="parquet: the results as results.parquet, too (needs pyarrow)",
    )
    parser.add_argument("--part", help="i/n: only every n-th record, from the i-th on (default: all); scores come with --join")
    parser.add_argument("--join", type=Path, metavar="OUT", help="join and score the parts in this folder, and stop")
    parser.add_argument("--parts", type=int, default=1, help="with --join: how many parts")
    add_engine_arguments(parser)
    add_model_arguments(parser)
    return parser


def part_of(text: str | None) -> tuple[int, int]:
    """``i/n`` as numbers. Raises UserError."""
    try:
        part, parts = (int(x) for x in (text or "0/1").split("/"))
    except ValueError:
        raise UserError(f"--part {text!r} is not of the form i/n, for example 0/4") from None
    if not 0 <= part < parts:
        raise UserError(f"--part {text!r}: i must be in 0..n-1")
    return part, parts


def part_file(folder: Path, part: int, parts: int) -> Path:
    return folder / (RESULTS if parts == 1 else f"results.{part}of{parts}.jsonl")


# ---- the folder ------------------------------------------------------------------------------------------------------


def claim(folder: Path, args: argparse.Namespace, mode: AskMode) -> None:
    """Write down what this folder holds; refuse one that holds the answers to something else. Raises UserError."""
    asked: dict[str, Any] = {
        "task": mode.task or mode.name,
        "mode": mode.name,
        "think": args.think if mode.thinks else None,
        "list": str(Path(args.list).absolute()) if "://" not in args.list else args.list,
        "checkpoint": args.checkpoint,
        **request_options(args),
    }
    path = folder / TASK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            if (folder / RESULTS).exists():
                raise UserError(f"{folder} holds results of an older version, or of something else; give another --out")
            write_whole(path, json.dumps(asked, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error
    before = json.loads(path.read_text(encoding="utf-8"))
    for name, value in asked.items():
        if before.get(name) != value:
            raise UserError(
                f"{folder} holds the answers of {name} {before.get(name)}, this is {name} {value}: "
                "give another --out (or delete that folder)"
            )


# ---- the command -----------------------------------------------------------------------------------------------------


def answer_list(args: argparse.Namespace) -> tuple[Path, int]:
    """Answer what is not answered yet; the folder, and how many parts the list has."""
    from tqdm import tqdm

    mode = find_mode(args.task)
    part, parts = part_of(args.part)
    source = open_source(args.list, list_type(args))
    claim(args.out, args, mode)
    lines = Lines(part_file(args.out, part, parts))
    with lines:
        done = {(str(row["key"]), row.get("error")) for row in lines.rows()}
        units, faults = read_units(source, part, parts)
        task = mode.task or mode.name
        for key, error in faults:
            if (key, error) not in done:
                lines.write({"key": key, "task": task, "error": error})
        answered = {key for key, _ in done}
        todo = [unit for unit in units if unit.key not in answered]
        keys = {unit.number: unit.key for unit in todo}
        outcomes = make_engine(args, args.device).run(Answering(args), todo)
        bar = f"part {part} of {parts}" if parts > 1 else "answers"
        for outcome in tqdm(outcomes, desc=bar, unit="utt", initial=len(units) - len(todo), total=len(units)):
            write_files(args.out, outcome)
            failed = {"key": keys[outcome.number], "task": task, "error": outcome.error}
            lines.write(failed if outcome.error is not None else outcome.value)
    return args.out, parts


def read_units(source: Source, part: int = 0, parts: int = 1) -> tuple[list[Unit], list[tuple[str, str]]]:
    """The records of a list (every ``parts``-th of them) as units, and key and fault of what cannot be used, such as a
    key that came before."""
    units: list[Unit] = []
    faults: list[tuple[str, str]] = []
    seen = set[str]()
    for number, found in enumerate(source.places()):
        if number % parts != part:
            continue
        if isinstance(found, RecordError):
            faults.append((found.key or f"{found.source}:{found.line}", str(found)))
            continue
        place, key = found
        if key in seen:
            faults.append((key, "an earlier record of the list has this key"))
            continue
        seen.add(key)
        units.append(Unit(number, key, place))
    return units, faults


def join(folder: Path, parts: int, form: str = "jsonl") -> dict[str, Any]:
    """Put the parts together, in the order of their keys, write ``text``, and score. Raises UserError when a part is
    missing."""
    from osum_echat.cli.batch_scores import scores

    rows: list[dict[str, Any]] = []
    for part in range(parts):
        path = part_file(folder, part, parts)
        if not path.is_file():
            raise UserError(f"{path} is missing: run that part first")
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: (str(row["key"]), row.get("error") or ""))
    answered = [row for row in rows if row.get("error") is None]
    write_whole(folder / TEXT, "".join(f"{row['key']} {' '.join(row['text'].split())}\n" for row in answered))
    write_whole(folder / RESULTS, json_lines(rows))
    if form == "parquet":
        write_parquet(folder / PARQUET, rows, ("key", "task", "text", "wav", "finish", "speech_tokens", "error"))
    return scores(rows)


def json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    if args.join is None and (args.list is None or args.out is None):
        parser.error("--list and --out are needed (or --join)")
    if args.batch_size < 1:
        parser.error("--batch-size must be at least 1")
    check_engine_arguments(parser, args)

    def command() -> int:
        if args.format == "parquet" and importlib.util.find_spec("pyarrow") is None:
            raise UserError(NO_PARQUET)
        folder, parts = (args.join, args.parts) if args.join is not None else answer_list(args)
        if args.join is None and args.part is not None:
            return 0
        found = join(folder, parts, args.format)
        print(json.dumps(found, ensure_ascii=False))
        if not found["records"]:
            raise UserError("the list holds no records")
        if found["failed"] == found["records"]:
            first = json.loads((folder / RESULTS).read_text(encoding="utf-8").splitlines()[0])
            raise UserError(f"no record could be answered; the first one: {first['error']}")
        return 0

    return run(command)
