"""A whole list (raw, shard or combine) through the model.

In the folder --out: results.jsonl (a line a record: key, task, text, think, tags, wav, finish, guards, timings, or error), wav/ (the spoken replies),
text (key and answer) and task.json (what was asked: one task a folder). The last line that is printed is one JSON object of counts and scores.

The list may be shared out (--part 0/4); a run that was stopped goes on where it was; --join puts the parts together and scores them.
"""

from __future__ import annotations

import argparse
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from osum_echat.audio.io import Source, read
from osum_echat.cli.common import UserError, add_model_arguments, add_request_arguments, load_echat, request_options, run
from osum_echat.pipeline.ask import Ask, AskMode, find_mode

if TYPE_CHECKING:
    from osum_echat.dialogue.record import Record, RecordError
    from osum_echat.evaluation.items import Item
    from osum_echat.pipeline import EChat, Reply

RESULTS, TEXT, TASK = "results.jsonl", "text", "task.json"
_LONGEST_NAME = 150

EXAMPLES = """examples:
  osum-echat batch --list test/data.list --out out/test
  osum-echat batch --list shards_list.txt --task asr+emotion --out out/test_emotion --batch-size 16
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
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--part", help="i/n: only every n-th record, from the i-th on (default: all); scores come with --join")
    parser.add_argument("--join", type=Path, metavar="OUT", help="join and score the parts in this folder, and stop")
    parser.add_argument("--parts", type=int, default=1, help="with --join: how many parts")
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


# ---- the folder ----------------------------------------------------------------------------------------------------------------------


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


def write_whole(path: Path, text: str) -> None:
    """Write a file that appears under its name only when it is whole."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def wav_name(key: str) -> str:
    """The file of a key's reply, in the folder of the results."""
    name = quote(key, safe=" ")
    if len(name) > _LONGEST_NAME:
        name = f"{name[:_LONGEST_NAME]}-{zlib.crc32(key.encode()):08x}"
    return f"wav/{name}.wav"


# ---- answers -------------------------------------------------------------------------------------------------------------------------


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


def answer_all(
    echat: EChat, records: Iterable[Record | RecordError], args: argparse.Namespace
) -> Iterator[tuple[Record | RecordError, Reply | Exception]]:
    """Each record and its reply, in the order of the list; why there is none, where there is none."""
    waiting: list[tuple[Record, Ask]] = []
    seen = set[str]()
    for record in records:
        try:
            if isinstance(record, ValueError):
                raise record
            if record.key in seen:
                raise ValueError("an earlier record of the list has this key")
            seen.add(record.key)
            waiting.append((record, ask_for(record, args)))
        except (ValueError, OSError) as error:
            yield record, error
        if len(waiting) == args.batch_size:
            yield from answer_batch(echat, waiting)
            waiting = []
    yield from answer_batch(echat, waiting)


def key_of(record: Record | RecordError) -> str:
    """The key of a record, or the place of one that has none."""
    return record.key or f"{record.source}:{record.line}"


def answer_batch(echat: EChat, waiting: Sequence[tuple[Record, Ask]]) -> Iterator[tuple[Record, Reply | Exception]]:
    """A batch; if one recording spoils it (not audio, empty ...), each is asked alone, so that only that one fails."""
    try:
        replies: list[Reply | Exception] = list(echat.batch([ask for _, ask in waiting], size=max(len(waiting), 1)))
    except ValueError:
        replies = [answer_one(echat, ask) for _, ask in waiting]
    yield from zip((record for record, _ in waiting), replies, strict=True)


def answer_one(echat: EChat, ask: Ask) -> Reply | Exception:
    try:
        return echat.batch([ask])[0]
    except (ValueError, OSError) as error:
        return error


def result_of(record: Record | RecordError, reply: Reply | Exception, mode: AskMode, folder: Path) -> dict[str, Any]:
    """The line of a record; its spoken reply is written to its file."""
    from osum_echat.evaluation.readers.lists import item_of

    out: dict[str, Any] = {"key": key_of(record), "task": mode.task or mode.name}
    if isinstance(reply, Exception) or isinstance(record, ValueError):
        return {**out, "error": str(reply)}
    item, wav = item_of(record), None
    if reply.audio is not None and len(reply.audio):
        wav = wav_name(record.key)
        reply.save(folder / wav)
    data = reply.as_json()
    return {
        **out,
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


# ---- the command ---------------------------------------------------------------------------------------------------------------------


def answer_list(args: argparse.Namespace) -> tuple[Path, int]:
    """Answer what is not answered yet; the folder, and how many parts the list has."""
    from tqdm import tqdm

    from osum_echat.data.sources import open_source
    from osum_echat.evaluation.results import Lines

    mode = find_mode(args.task)
    part, parts = part_of(args.part)
    source = open_source(args.list, "auto" if args.data_type == "combine" else args.data_type)
    claim(args.out, args, mode)
    lines = Lines(part_file(args.out, part, parts))
    with lines:
        done = {str(row["key"]) for row in lines.rows()}
        mine = (record for number, record in enumerate(source.records()) if number % parts == part)
        todo = (record for record in mine if key_of(record) not in done)
        echat = load_echat(args, speech=mode.speaks)
        why = echat.refusal(mode.ask(b"", "a", think=args.think))
        if why is not None:
            raise UserError(why)
        if mode.speaks and echat.token2wav is None:
            raise UserError("this checkpoint has no token2wav, so its replies have no sound: give --token2wav FOLDER")
        answers = answer_all(echat, todo, args)
        for record, reply in tqdm(answers, desc=f"part {part} of {parts}", unit="utt", initial=len(done)):
            lines.write(result_of(record, reply, mode, args.out))
    return args.out, parts


def join(folder: Path, parts: int) -> dict[str, Any]:
    """Put the parts together, write ``text``, and score. Raises UserError when a part is missing, or nothing was answered."""
    from osum_echat.cli.batch_scores import scores

    rows: list[dict[str, Any]] = []
    for part in range(parts):
        path = part_file(folder, part, parts)
        if not path.is_file():
            raise UserError(f"{path} is missing: run that part first")
        rows += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows.sort(key=lambda row: str(row["key"]))
    answered = [row for row in rows if row.get("error") is None]
    write_whole(folder / TEXT, "".join(f"{row['key']} {' '.join(row['text'].split())}\n" for row in answered))
    if parts > 1:
        write_whole(folder / RESULTS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return scores(rows)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = make_parser(prog)
    args = parser.parse_args(argv)
    if args.join is None and (args.list is None or args.out is None):
        parser.error("--list and --out are needed (or --join)")
    if args.batch_size < 1:
        parser.error("--batch-size must be at least 1")

    def command() -> int:
        folder, parts = (args.join, args.parts) if args.join is not None else answer_list(args)
        if args.join is None and args.part is not None:
            return 0
        found = join(folder, parts)
        print(json.dumps(found, ensure_ascii=False))
        if not found["records"]:
            raise UserError("the list holds no records")
        if found["failed"] == found["records"]:
            first = json.loads((folder / RESULTS).read_text(encoding="utf-8").splitlines()[0])
            raise UserError(f"no record could be answered; the first one: {first['error']}")
        return 0

    return run(command)
