"""What the model makes of the recordings of this repository (and of yours): a table here, a page with sound and
pictures in a file.

Each recording is heard, thought about in tags and answered in speech; the other modes are tried on the first of ours.
Everything that is shown is computed by the model; what was really said and how stands beside it, from the list of
recordings.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat.cli.common import UserError, add_model_arguments, load_echat, run, save_speech
from osum_echat.locations import find_recordings
from osum_echat.pipeline.ask import MODES, AudioChunk, StreamEvent, ThinkForm
from osum_echat.serving.demo_page import TAGS, Recording, Result, Shown, Summary, render

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from osum_echat.pipeline import EChat

PAGE = "index.html"
_WIDTH = 110  # of the table where no terminal says how wide it is
MODE = MODES["s2s_think"]
OTHERS: tuple[tuple[str, ThinkForm], ...] = (
    ("asr", None),
    ("emotion", None),
    ("age+gender", None),
    ("s2t_chat", None),
    ("s2t_chat_think", "language"),
    ("s2s", None),
    ("tts", None),
    ("t2t", None),
)
TEXTS = {"tts": "I am so glad to hear that.", "t2t": "I passed my exam today."}
SMALL = (
    "note: mini is small and knows English only; of people it understands short orders better than long sentences "
    "(checkpoints/mini/MODEL_CARD.md)"
)


def recordings(wav: str | None) -> list[Recording]:
    """Those of the repository, behind the file that is given. Raises UserError when there is none."""
    own = [Recording(Path(wav))] if wav else []
    if own and not own[0].path.is_file():
        raise UserError(f"no such recording: {wav}")
    ours = find_recordings()
    if ours is None:
        if own:
            return own
        raise UserError("the recordings of the demo are not installed; give one of yours: --wav me.wav (make demo WAV=me.wav)")
    return own + [_recording(json.loads(line), ours.parent) for line in ours.read_text(encoding="utf-8").splitlines()]


def _recording(record: dict[str, Any], folder: Path) -> Recording:
    extra: dict[str, Any] = record.get("extra", {})
    tags = {name: str(extra[name]) for name in TAGS if extra.get(name)}
    return Recording(folder / record["wav"], record["txt"], tags, tuple(extra.get("replies", ())))


def answer(echat: EChat, recording: Recording, thought: str, seed: int) -> Result:
    """Hear, think in tags, answer in speech, as a stream, so that it can be said what came when."""
    ask = MODE.ask(recording.path, think="tag", seed=seed)
    began, first = time.perf_counter(), dict[str, float]()
    events: list[StreamEvent] = []
    for event in echat.stream_ask(ask):
        kind = "sound" if isinstance(event, AudioChunk) else "text" if hasattr(event, "text") else ""
        first.setdefault(kind, time.perf_counter() - began)
        events.append(event)
    total = time.perf_counter() - began
    return Result(recording, echat.reply(events, ask), thought, first.get("text"), first.get("sound"), total)


def thoughts(echat: EChat, inputs: Sequence[Recording], seed: int) -> list[str]:
    """The thought about each recording in natural language."""
    mode = MODES["s2t_chat_think"]
    if echat.refusal(mode.ask(b"", think="language")) is not None:
        return [""] * len(inputs)
    replies = echat.batch([mode.ask(recording.path, think="language", seed=seed) for recording in inputs])
    return ["" if reply.think is None else reply.think.raw for reply in replies]


def other_modes(echat: EChat, recording: Recording, seed: int) -> list[Shown]:
    asked = [(MODES[name], think) for name, think in OTHERS]
    modes = [(mode, think) for mode, think in asked if echat.refusal(mode.ask(b"", TEXTS.get(mode.name), think=think)) is None]
    asks = [mode.ask(recording.path, TEXTS.get(mode.name), think=think, seed=seed) for mode, think in modes]
    given = [TEXTS.get(mode.name, recording.path.name) for mode, _ in modes]
    return [Shown(mode, what, reply) for (mode, _), what, reply in zip(modes, given, echat.batch(asks), strict=True)]


def table(results: Iterable[Result]) -> Table:
    """A row a recording: what was said, what was heard, tags, reply, seconds."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    out = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), collapse_padding=True)
    for name, ratio in (("recording", 4), ("said, heard", 8), ("tags", 4), ("reply", 7), ("s", None)):
        out.add_column(name, ratio=ratio, justify="right" if name == "s" else "left", overflow="fold")
    out.expand = True
    for result in results:
        title = Text(result.recording.name if result.recording.words else f"yours: {result.recording.name}")
        reply = Text(result.reply.text)
        if result.fits is not None:
            reply.append(*((" ✓", "green") if result.fits else (" ✗ does not fit", "red")))
        out.add_row(title, _heard(result), _tags(result), reply, f"{result.total:.1f}")
    return out


def _heard(result: Result) -> Text:
    from rich.text import Text

    said = result.recording.words
    if said and all(mark == "right" for _, mark in result.words):
        return Text(said).append(" ✓", "green")
    out = Text(f"{said}\n").append("heard: ", "dim") if said else Text()
    for word, mark in result.words:
        out.append(
            f"[{word}]" if mark == "wrong" else f"({word} missing)" if mark == "missing" else word,
            "red" if mark != "right" else "",
        )
        out.append(" ")
    return out


def _tags(result: Result) -> Text:
    from rich.text import Text

    if result.tags and all(tag.mark == "right" for tag in result.tags):
        return Text(" ".join(tag.found for tag in result.tags)).append(" ✓", "green")
    out = Text()
    for tag in result.tags:
        wrong = tag.mark == "wrong"
        out.append(tag.found, "red" if wrong else "")
        out.append(f" ✗ {tag.expected} " if wrong else " ✓ " if tag.mark == "right" else " ", "red" if wrong else "green")
    return out


def in_short(summary: Summary) -> str:
    """One line of numbers."""
    parts = []
    if summary.word_errors.units:
        parts += [
            f"words {summary.words_right} of {summary.word_errors.units}",
            f"tags {summary.tags_right} of {summary.tags}",
            f"replies that fit {summary.fits} of {summary.judged}",
        ]
    if summary.first_sound is not None:
        parts.append(f"first sound after {summary.first_sound:.1f} s, whole reply {summary.total:.1f} s (medians)")
    return "; ".join(parts)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wav", help="a recording of your own beside ours")
    parser.add_argument("--out", type=Path, default=Path("out") / "demo", help="folder of page and sounds (default: out/demo)")
    parser.add_argument("--seed", type=int, default=0)
    add_model_arguments(parser)
    args = parser.parse_args(argv)
    return run(lambda: demo(args))


def demo(args: argparse.Namespace) -> int:
    from rich.console import Console
    from tqdm import tqdm

    inputs = recordings(args.wav)
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    echat = load_echat(args)
    loaded = time.perf_counter() - start
    why = echat.refusal(MODE.ask(b"", think="tag"))
    if why is not None:
        raise UserError(f"the demo needs speech out and a thought in tags: {why}")
    thought = thoughts(echat, inputs, args.seed)
    pairs = tqdm(list(zip(inputs, thought, strict=True)), desc="recordings", unit="", leave=False, disable=None)
    results = [answer(echat, recording, text, args.seed) for recording, text in pairs]
    first = next((each for each in inputs if each.words), inputs[0])
    shown = other_modes(echat, first, args.seed)
    for result in results:
        save_speech(result.reply, args.out / f"{result.recording.path.stem}.wav")
    for each in shown:
        save_speech(each.reply, args.out / f"mode_{each.mode.name}.wav")
    facts = {
        "Checkpoint": str(args.checkpoint),
        "Machine": f"{echat.model.device}, {platform.machine()}, {platform.system()}",
        "Loading": f"{loaded:.1f} s",
        "Seed": str(args.seed),
        "Repeat": "the same seed gives the same replies",
    }
    page = args.out / PAGE
    page.write_text(render(results, shown, facts), encoding="utf-8")
    console = Console(highlight=False) if sys.stdout.isatty() else Console(highlight=False, width=_WIDTH)
    console.print(table(results))
    print(in_short(Summary.of(results)))
    print("modes: " + ", ".join([MODE.name, *(each.mode.name for each in shown)]))
    if args.wav and args.checkpoint == "mini":
        print(SMALL)
    sounds = len(list(args.out.glob("*.wav")))
    print(f"look and listen: {page} ({sounds} replies spoken, {page.stat().st_size / 1e6:.1f} MB); talk to it: make page")
    return 0
