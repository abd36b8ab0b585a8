"""Talk to a Realtime server with recordings, at the speed of life, and measure how it takes turns.

For each ID/input.wav in a folder (or each wav file) the system's side becomes OUT/ID/output.wav, time-synchronous, with
OUT/ID/events.jsonl; the report is that of the suite "live": delay, interruption, rejection. A conversation that was
held before is not held again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from osum_echat.cli.common import run

EXAMPLES = """examples:
  osum-echat duplex --url ws://localhost:8000/v1/realtime --in recordings --out out/live
  osum-echat duplex --url wss://example.com/v1/realtime?model=m --in full-duplex-bench/user_interruption --out out/their
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="WebSocket of the server: ws://host:port/v1/realtime")
    parser.add_argument("--in", dest="source", type=Path, required=True, help="folder of */input.wav, or of wav files")
    parser.add_argument("--out", type=Path, required=True, help="folder of recordings and report")
    parser.add_argument("--key", help="bearer token of the server (default: OPENAI_API_KEY)")
    parser.add_argument(
        "--session", default="{}", metavar="JSON", help='fields of session.update, such as \'{"instructions": "..."}\''
    )
    parser.add_argument("--tail", type=float, default=1.5, help="seconds of quiet after the last answer (default: 1.5)")
    parser.add_argument("--patience", type=float, default=30.0, help="seconds to wait for answers at most (default: 30)")
    parser.add_argument("--limit", type=int, help="only the first so many recordings")
    parser.add_argument("--name", help="what the report calls the server (default: its URL)")
    return parser


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = make_parser(prog).parse_args(argv)

    def command() -> int:
        from osum_echat.evaluation.duplex.client import Settings
        from osum_echat.evaluation.duplex.run import SUITE, play_all
        from osum_echat.evaluation.results import FILE
        from osum_echat.evaluation.run import Plan, run_suite
        from osum_echat.evaluation.suite import load_suite

        try:
            session = json.loads(args.session)
        except ValueError as error:
            raise ValueError(f"--session is not JSON: {error}") from error
        key = args.key or os.environ.get("OPENAI_API_KEY")
        settings = Settings(args.url, key, session, tail=args.tail, patience=args.patience)
        for result in play_all(settings, args.source, args.out, args.limit, lambda line: print(line, file=sys.stderr)):
            if result.error:
                print(f"{result.id}: {result.error}", file=sys.stderr)
        plan = Plan(
            load_suite(SUITE),
            str(args.source),
            args.out,
            args.name or args.url,
            limit=args.limit,
            results=args.out / FILE,
        )
        report = run_suite(plan)
        text = (args.out / "report.md").read_text(encoding="utf-8")
        print(text.partition("## Pictures")[0].partition("## What is missing")[0].partition("## Examples")[0])
        values = {name: round(number.value, 3) for name, number in report.headline.items()}
        print(json.dumps({"scored": report.reached, "holes": len(report.holes()), **values}))
        return 0 if report.reached else 1

    return run(command)
