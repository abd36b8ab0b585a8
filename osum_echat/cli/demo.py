"""The seven modes on recordings of this repository: understand, chat, chat with a thought, speak, answer a text, talk, talk with a thought.

Everything that is printed is computed by the model; what was really said and how is printed beside it, from the list of recordings.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat.cli.common import ROOT, UserError, add_model_arguments, load_echat, readable, run, save_speech
from osum_echat.pipeline.ask import MODES, ThinkForm

if TYPE_CHECKING:
    from osum_echat.pipeline import EChat, Reply

RECORDINGS = ROOT / "assets" / "demo" / "demo.jsonl"
TAGS = ("age", "gender", "emotion", "event")
HEARD: tuple[tuple[str, ThinkForm], ...] = (
    ("asr", None),
    ("emotion", None),
    ("age+gender", None),
    ("s2t_chat", None),
    ("s2t_chat_think", "language"),
    ("s2s", None),
    ("s2s_think", "tag"),
)
SAID: tuple[tuple[str, ThinkForm], ...] = (("tts", None),)
ANSWERED: tuple[tuple[str, ThinkForm], ...] = (("t2t", None),)
SPOKEN_TEXT = "I am so glad to hear that."
WRITTEN_TEXT = "I passed my exam today."
ONLY_SYNTHETIC = (
    "note: mini has heard synthetic English voices only; a person's recording is beyond it (checkpoints/mini/MODEL_CARD.md)"
)


@dataclass(frozen=True)
class Recording:
    """A recording and, when it is one of ours, what was said and how."""

    path: Path
    words: str = ""
    labels: str = ""


def recordings(wav: str | None) -> list[Recording]:
    """The file given, or those of the repository. Raises UserError when there is none."""
    if wav:
        if not Path(wav).is_file():
            raise UserError(f"no such recording: {wav}")
        return [Recording(Path(wav))]
    if not RECORDINGS.is_file():
        raise UserError(f"{RECORDINGS.relative_to(ROOT)} is missing; give a recording with WAV=me.wav")
    out = []
    for line in RECORDINGS.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        extra: dict[str, Any] = record.get("extra", {})
        labels = ", ".join(f"{name}: {extra[name]}" for name in TAGS if extra.get(name))
        out.append(Recording(RECORDINGS.parent / record["wav"], record["txt"], labels))
    return out


def replies(echat: EChat, modes: Sequence[tuple[str, ThinkForm]], seed: int, **given: Any) -> Iterator[tuple[str, str, Reply]]:
    """Mode, what it does, and its reply; each computed as it is asked for."""
    for name, think in modes:
        yield name, MODES[name].title, echat.batch([MODES[name].ask(**given, think=think, seed=seed)])[0]


def show(shown: Iterator[tuple[str, str, Reply]], folder: Path, stem: str) -> int:
    """Print each reply and write its speech; the number of files written."""
    files = 0
    for task, purpose, reply in shown:
        print(f"\n  {task}: {purpose}")
        print(readable(reply, indent="    "))
        wav = save_speech(reply, folder / f"{stem}-{task}.wav")
        if wav:
            files += 1
            print(f"    written   {wav}")
    return files


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wav", help="a recording of your own instead of ours")
    parser.add_argument(
        "--out", type=Path, default=Path("out") / "demo", help="folder of the replies' speech (default: out/demo)"
    )
    parser.add_argument("--seed", type=int, default=0)
    add_model_arguments(parser)
    args = parser.parse_args(argv)

    def command() -> int:
        inputs = recordings(args.wav)
        start = time.perf_counter()
        echat = load_echat(args)
        print(f"model loaded in {time.perf_counter() - start:.1f} s")
        if args.wav and args.checkpoint == "mini":
            print(ONLY_SYNTHETIC)
        files = 0
        for recording in inputs:
            print(f"\n{recording.path.name}")
            if recording.words:
                print(f"  really said: {recording.words} ({recording.labels})")
            files += show(replies(echat, HEARD, args.seed, wav=recording.path), args.out, recording.path.stem)
        print("\ntexts")
        files += show(replies(echat, SAID, args.seed, text=SPOKEN_TEXT), args.out, "text")
        files += show(replies(echat, ANSWERED, args.seed, text=WRITTEN_TEXT), args.out, "text")
        print(f"\n{files} replies spoken, in {args.out}/")
        return 0

    return run(command)
