"""One line for each point; exit code 0 when all hold."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence

from osum_echat.serving.conformance.client import Target, read_speech
from osum_echat.serving.conformance.points import POINTS
from osum_echat.serving.conformance.runner import run


async def _run(target: Target, only: Sequence[str]) -> int:
    failed = count = 0
    async for result in run(target, only):
        count += 1
        failed += not result.holds
        print(f"{'ok  ' if result.holds else 'FAIL'}  {result.name:<22} {result.about}  ({result.seconds:.1f} s)", flush=True)
        if not result.holds:
            print(f"      {result.why}", flush=True)
    print(f"{count - failed} of {count} points hold")
    return 1 if failed else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m osum_echat.serving.conformance", description=__doc__)
    parser.add_argument("url", nargs="?", default="ws://127.0.0.1:8000/v1/realtime", help="of the server (default: %(default)s)")
    parser.add_argument("--key", default="conformance", help="the server's key")
    parser.add_argument("--wav", help="speech to send (default: a made-up sound that has the shape of speech)")
    parser.add_argument("--only", action="append", default=[], metavar="POINT", help="only this point; may be given again")
    parser.add_argument("--timeout", type=float, default=20.0, help="seconds to wait for an event (default: 20)")
    parser.add_argument("--list", action="store_true", help="the points, and nothing else")
    args = parser.parse_args(argv)
    if args.list:
        for name, test in POINTS.items():
            print(f"{name:<22} {(test.__doc__ or '').strip().splitlines()[0]}")
        return 0
    try:
        speech = read_speech(args.wav) if args.wav else None
        return asyncio.run(_run(Target(args.url, args.key, speech, args.timeout), args.only))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    raise SystemExit(main())
