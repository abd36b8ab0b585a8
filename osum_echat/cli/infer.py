"""One utterance or one text, every task.

Understanding tasks are named by what they return: `asr`, `emotion`, `asr+emotion`, `asr+age+gender` ..., or by the task string of records
(`<TRANSCRIBE> <EMOTION>`). Dialogue: `s2t_chat`, `s2t_chat_think`, `s2s`, `s2s_think`; speech out: `tts`; text: `t2t`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat.cli.common import UserError, add_model_arguments, load_echat, print_json, readable, run
from osum_echat.dialogue.tasks import TASKS

if TYPE_CHECKING:
    from osum_echat.pipeline import EChat, Reply


@dataclass(frozen=True)
class Mode:
    """What a dialogue task takes and gives."""

    hears: bool
    thinks: bool = False
    speaks: bool = False


MODES = {
    "s2t_chat": Mode(hears=True),
    "s2t_chat_think": Mode(hears=True, thinks=True),
    "s2s": Mode(hears=True, speaks=True),
    "s2s_think": Mode(hears=True, thinks=True, speaks=True),
    "tts": Mode(hears=False, speaks=True),
    "t2t": Mode(hears=False),
}


def short_name(task: str) -> str:
    """``<TRANSCRIBE> <AGE>`` as ``asr+age``."""
    return "+".join(part.strip("<>").lower() for part in task.split()).replace("transcribe", "asr")


UNDERSTANDING = {short_name(name): name for name, task in TASKS.items() if task.prompted}

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
    names = ", ".join([*UNDERSTANDING, *MODES])
    parser.add_argument("--task", required=True, help=f"one of {names}; or a task string of records")
    parser.add_argument("--wav", help="the recording (any rate, mono or stereo, wav flac ogg mp3)")
    parser.add_argument("--text", help="what to say (tts) or to answer (t2t)")
    parser.add_argument("--prompt", help="an instruction of your own for an understanding task")
    parser.add_argument(
        "--think", choices=["tag", "language"], default="tag", help="form of the thought in *_think tasks (mini writes both)"
    )
    parser.add_argument("--out", type=Path, help="where the reply's speech goes (default: out/reply.wav)")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same reply")
    parser.add_argument("--greedy", action="store_true", help="take the most likely id at every step instead of sampling")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    add_model_arguments(parser)
    return parser


def task_string(name: str) -> str | None:
    """The understanding task for a name of the command line, None for a dialogue mode. Raises UserError for neither."""
    if name in MODES:
        return None
    if name in UNDERSTANDING:
        return UNDERSTANDING[name]
    if name in TASKS and TASKS[name].prompted:
        return name
    raise UserError(f"unknown task {name!r}: use one of {', '.join([*UNDERSTANDING, *MODES])}")


def check(args: argparse.Namespace) -> None:
    """Refuse what cannot work before a model is loaded. Raises UserError."""
    task_string(args.task)
    mode = MODES.get(args.task)
    hears = mode is None or mode.hears
    if hears and not args.wav:
        raise UserError(f"--task {args.task} needs --wav")
    if not hears and not (args.text or "").strip():
        raise UserError(f"--task {args.task} needs --text")
    if hears and not Path(args.wav).is_file():
        raise UserError(f"no such recording: {args.wav}")
    if args.out and not (mode and mode.speaks):
        raise UserError(f"--out: --task {args.task} makes no speech")


def answer(echat: EChat, args: argparse.Namespace) -> Reply:
    """Run the task that the arguments name."""
    options: dict[str, Any] = {"seed": args.seed, "greedy": args.greedy}
    task = task_string(args.task)
    if task is not None:
        return echat.understand(args.wav, task, prompt=args.prompt, **options)
    mode = MODES[args.task]
    if args.task == "tts":
        return echat.speak(args.text, **options)
    if not mode.hears:
        return echat.chat(text=args.text, **options)
    return echat.chat(args.wav, think=args.think if mode.thinks else None, speak=mode.speaks, **options)


def save_speech(reply: Reply, path: Path | None) -> Path | None:
    """Write the reply's samples, if it has any."""
    from osum_echat.audio.io import write

    if reply.audio is None:
        return None
    path = path or Path("out") / "reply.wav"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, reply.audio, reply.sample_rate)
    return path


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    args = make_parser(prog).parse_args(argv)

    def command() -> int:
        check(args)
        mode = MODES.get(args.task)
        echat = load_echat(args, speech=bool(mode and mode.speaks))
        reply = answer(echat, args)
        wav = save_speech(reply, args.out)
        if args.json:
            print_json({"task": args.task, **reply.as_json(), "wav": str(wav) if wav else None})
        else:
            print(args.task)
            print(readable(reply))
            if wav:
                print(f"  written   {wav}")
        return 0

    return run(command)
