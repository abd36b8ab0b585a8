"""One utterance or one text, every task.

Understanding tasks are named by what they return: `asr`, `emotion`, `asr+emotion`, `asr+age+gender` ..., or by the task
string of records (`<TRANSCRIBE> <EMOTION>`). Dialogue: `s2t_chat`, `s2t_chat_think`, `s2s`, `s2s_think`; speech out:
`tts`; text: `t2t`. All are rows of one table (`osum_echat.pipeline.ask.MODES`).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from osum_echat.cli.common import (
    UserError,
    add_model_arguments,
    add_request_arguments,
    check_output,
    load_echat,
    print_json,
    readable,
    recording,
    request_options,
    run,
    save_speech,
)
from osum_echat.pipeline.ask import MODES, Ask, find_mode

DEFAULT_OUT = Path("out") / "reply.wav"

EXAMPLES = """examples:
  infer_runtime.py --task asr --wav me.wav
  infer_runtime.py --task asr+emotion --wav me.wav --json
  infer_runtime.py --task s2s_think --think tag --wav me.wav --out reply.wav
  infer_runtime.py --task tts --text "I am glad to hear that." --out hello.wav
  infer_runtime.py --task t2t --text "What shall we do on Sunday?"
  infer_runtime.py --task s2s_think --wav me.wav --checkpoint language_think_final.pt --token2wav CosyVoice-300M-25Hz --speaker voice.wav

exit codes: 0 done, 1 something to mend (one line says what), 2 a wrong call
"""


def make_parser(prog: str | None = None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", required=True, help=f"one of {', '.join(MODES)}; or a task string of records")
    parser.add_argument(
        "--wav",
        help="the recording: a file (wav flac ogg mp3 m4a webm ..., any rate), an http(s) address, or - for standard input",
    )
    parser.add_argument("--text", help="what to say (tts) or to answer (t2t)")
    parser.add_argument("--prompt", help="an instruction of your own for an understanding task")
    parser.add_argument("--out", type=Path, help=f"where the reply's speech goes (default: {DEFAULT_OUT})")
    add_request_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_model_arguments(parser)
    return parser


def make_ask(args: argparse.Namespace) -> Ask:
    """What the arguments ask; refuses what cannot work before a model is loaded. Raises ValueError, UserError."""
    mode = find_mode(args.task)
    if mode.hears and not args.wav:
        raise UserError(f"--task {args.task} needs --wav")
    if mode.reads and not (args.text or "").strip():
        raise UserError(f"--task {args.task} needs --text")
    if args.out and not mode.speaks:
        raise UserError(f"--out: --task {args.task} makes no speech")
    wav = recording(args.wav) if mode.hears else None
    if mode.speaks:
        check_output(args.out or DEFAULT_OUT)
    return mode.ask(wav, args.text, args.prompt, args.think, **request_options(args))


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = make_parser(prog).parse_args(argv)

    def command() -> int:
        ask = make_ask(args)
        echat = load_echat(args, speech=ask.mode.speaks)
        if args.out and echat.token2wav is None:
            raise UserError(
                "this checkpoint has no token2wav, so there is no sound to write: give --token2wav FOLDER, or leave --out"
            )
        reply = echat.batch([ask])[0]
        wav = save_speech(reply, args.out or DEFAULT_OUT)
        if args.json:
            print_json({"task": args.task, **reply.as_json(), "wav": str(wav) if wav else None})
        else:
            print(args.task)
            print(readable(reply))
            if wav:
                print(f"  written   {wav}")
        if args.out and wav is None:
            raise UserError(f"{args.out} was not written: the reply has no speech (it ended by {reply.finish_reason})")
        return 0

    return run(command)
