"""A dialogue: several recordings in order, each answered in the light of what went before; one reply wav a round."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from osum_echat.cli.common import (
    UserError,
    add_model_arguments,
    check_output,
    load_echat,
    print_json,
    readable,
    recording,
    run,
    save_speech,
)
from osum_echat.pipeline.ask import Ask, AskOptions

EXAMPLES = """examples:
  infer_multiturn.py first.wav second.wav third.wav --out out/dialogue
  infer_multiturn.py first.wav second.wav --think language --json
"""


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wavs", nargs="+", help="recordings, one a round")
    parser.add_argument(
        "--think", choices=["none", "tag", "language"], default="none", help="think before answering (default: none)"
    )
    parser.add_argument("--text-only", action="store_true", help="answer in text, without speech")
    parser.add_argument(
        "--turns",
        type=int,
        default=5,
        help="past turns that are kept (default: 5, or as many as the checkpoint has learnt); 0: each recording by itself",
    )
    parser.add_argument("--out", type=Path, default=Path("out") / "dialogue", help="folder for round_1.wav, round_2.wav ...")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON object a round and nothing else")
    add_model_arguments(parser)
    args = parser.parse_args(argv)

    def command() -> int:
        wavs = [recording(wav) for wav in args.wavs]
        if not args.text_only:
            check_output(args.out / "round_1.wav")
        echat = load_echat(args, speech=not args.text_only)
        session = echat.session(max_turns=args.turns)
        options: AskOptions = {
            "think": None if args.think == "none" else args.think,
            "speak": not args.text_only,
            "seed": args.seed,
        }
        past = min(len(wavs) - 1, session.max_turns)
        why = echat.refusal(Ask(wavs[0], **options), past)
        if why is not None:
            raise UserError(f"{why}; --turns 0 answers each recording by itself" if past else why)
        for number, (name, wav) in enumerate(zip(args.wavs, wavs, strict=True), start=1):
            reply = session.chat(wav, **options)
            path = save_speech(reply, args.out / f"round_{number}.wav")
            if args.json:
                print_json({"round": number, "heard": name, **reply.as_json(), "wav": str(path) if path else None})
            else:
                print(f"round {number}: {name}")
                print(readable(reply))
                if path:
                    print(f"  written   {path}")
        return 0

    return run(command)
