"""The whole recipe of mini, from nothing to an evaluated model: ``make mini``.

    python -m recipes.mini.run                          every step that is not done yet
    python -m recipes.mini.run --list                   what there is to do
    python -m recipes.mini.run --only evaluate --again  one step once more

Each step is a command of its own (shown before it runs), skipped when it is done, and goes on where it was interrupted: speech is made in parts,
trainings resume from their checkpoints. On two cores, steps that do not wait for each other can be run side by side with ``--only``
(``needs`` in the list). Speech needs the Debian packages flite, espeak-ng and wordnet-base, and npm for the voices of Kokoro. Recordings of people are
read from ``$OSUM_ECHAT_PEOPLE`` (README, "Recordings of people"). ``$OSUM_ECHAT_KOKORO``: a folder with neural speech that was made before.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OUT = Path("out/mini")
DATA, LISTS, TOKEN2WAV = OUT / "data", OUT / "lists", OUT / "token2wav"
SOUND = TOKEN2WAV / "model"
KOKORO = OUT / "kokoro"
DONE = OUT / "done"
# One thread a step, and freed memory kept for the next step instead of handed back (a tenth of a training's time).
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}


@dataclass(frozen=True)
class Step:
    """A command. It is done when it has ended well once: then a file of its name stands in ``out/mini/done``."""

    name: str
    about: str
    command: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def marker(self) -> Path:
        return DONE / self.name


def module(name: str, *arguments: object) -> tuple[str, ...]:
    return (sys.executable, "-m", name, *map(str, arguments))


def stage(name: str, kind: str, *validators: str) -> tuple[str, ...]:
    measured = (argument for name in validators for argument in ("--validators", f"osum_echat.evaluation.validation:{name}"))
    return module("osum_echat.training", "--stage", kind, "--config", f"recipes/mini/conf/{name}.yaml", *measured)


def kokoro() -> tuple[str, ...]:
    made_before = os.environ.get("OSUM_ECHAT_KOKORO")
    return module("recipes.mini.kokoro", "--out", KOKORO, "--hours", 6, *(("--take-from", made_before) if made_before else ()))


def sound(part: str) -> tuple[str, ...]:
    return module(f"osum_echat.training.token2wav.{part}", "--config", f"recipes/mini/conf/token2wav/{part}.yaml")


def turn_head(part: str) -> tuple[str, ...]:
    voices = ("--kokoro", KOKORO / "model") if part == "data" else ()
    return module("recipes.mini.turn_head", part, "--checkpoint", OUT / "export", "--out", OUT / "turn_head", *voices)


STEPS = (
    Step("encoder", "Whisper tiny.en's published data, for the encoder", module("recipes.mini.fetch_encoder", "--out", OUT / "whisper")),
    Step("speech", "say some 20 + 3 + 4 + 3 hours with free synthesisers", module("recipes.mini.synthesize", "--out", DATA, "--kokoro", KOKORO / "model", "--user-hours", 20, "--reply-hours", 3, "--open-hours", 4, "--dialogue-hours", 3)),
    Step("kokoro", "six hours in neural voices", kokoro()),
    Step("people", "people's recordings and neural voices, with variants", module("recipes.mini.people.build", "--kokoro", KOKORO, "--out", DATA), ("kokoro",)),
    Step("text_lists", "sentences to read", module("recipes.mini.prepare", "text", "--out", LISTS)),
    Step("hear_lists", "recordings to understand", module("recipes.mini.prepare", "hear", "--data", DATA, "--out", LISTS), ("speech", "people")),
    Step("speech_tokenizer", "256 speech codes", sound("tokenizer"), ("speech",)),
    Step("tokens", "codes of the reply voice", module("recipes.mini.prepare", "tokens", "--data", DATA, "--token2wav", SOUND), ("speech_tokenizer",)),
    Step("speak_lists", "sentences to say, spoken dialogue", module("recipes.mini.prepare", "speak", "--data", DATA, "--out", LISTS), ("tokens",)),
    Step("speaker", "speaker embedding", sound("speaker"), ("speech",)),
    Step("flow", "codes to log-mel", sound("flow"), ("tokens", "speaker")),
    Step("vocoder", "log-mel to samples", sound("vocoder"), ("speech",)),
    Step("distill", "... and codes to log-mel in two steps", sound("distill"), ("flow", "vocoder")),
    Step("text", "a language model that reads", stage("text", "generation"), ("encoder", "text_lists")),
    Step("generation_tts", "... and speaks", stage("generation_tts", "generation"), ("text", "speak_lists")),
    Step("understanding_ctc", "an adapter that hears", stage("understanding_ctc", "understanding"), ("encoder", "hear_lists")),
    Step("understanding_encoder", "... with an encoder that knows all these voices", stage("understanding_encoder", "understanding"), ("understanding_ctc",)),
    Step(
        "blend",
        "the mean of that encoder and Whisper's",
        module("recipes.mini.blend", "--model", OUT / "understanding_encoder", "--whisper", OUT / "whisper/whisper-tiny.en", "--out", OUT / "blended"),
        ("understanding_encoder",),
    ),
    Step("understanding_people", "the adapter on the blended encoder", stage("understanding_people", "understanding"), ("blend",)),
    Step("understanding", "stage 1: words, tags, think", stage("understanding", "understanding", "hearing"), ("understanding_people", "generation_tts")),
    Step("generation_s2s", "stage 2: speech to speech", stage("generation_s2s", "generation", "hearing", "own_speech"), ("understanding", "flow", "vocoder")),
    Step("empathy", "stage 3: think, then answer", stage("empathy", "empathy", "hearing", "own_speech"), ("generation_s2s",)),
    Step(
        "export",
        "one folder, 8-bit",
        module("recipes.mini.export", "--run", OUT / "empathy", "--token2wav", TOKEN2WAV / "distilled", "--voice", DATA / "heldout/reply/reply_003.wav", "--out", OUT / "export"),
        ("empathy", "distill"),
    ),
    Step("turn_data", "pauses, ends of turns, and what listeners say", turn_head("data"), ("export",)),
    Step("turn_head", "a head that tells them apart, added to the folder", turn_head("train"), ("turn_data",)),
    Step("evaluate", "every number of the model card", module("recipes.mini.evaluation", "--checkpoint", OUT / "export", "--out", OUT / "evaluation"), ("turn_head",)),
)  # fmt: skip


def run(step: Step, again: bool) -> None:
    """Run a step unless it is done. Raises ValueError when what it needs is missing or it fails."""
    if step.marker.exists() and not again:
        print(f"{step.name}: done before")
        return
    missing = [need for need in step.needs if not (DONE / need).exists()]
    if missing:
        raise ValueError(f"{step.name} needs {', '.join(missing)}; run without --only, or run those first")
    print(f"{step.name}: {step.about}\n  {shlex.join(step.command)}", flush=True)
    began = time.monotonic()
    code = finish(step.command)
    if code:
        raise ValueError(f"{step.name} ended with code {code}; what it has made is kept, run again to go on")
    DONE.mkdir(parents=True, exist_ok=True)
    step.marker.write_text(f"{time.monotonic() - began:.0f} s\n", encoding="utf-8")


def finish(command: Sequence[str]) -> int:
    """Exit code of a command; minus the signal's number when this process was asked to stop meanwhile (a training then saves and ends well)."""
    asked: list[int] = []
    process = subprocess.Popen(command, env={**ENVIRONMENT, **os.environ})

    def stop(number: int, frame: object) -> None:
        asked.append(number)
        if number == signal.SIGTERM:  # Ctrl-C reaches the command by itself
            process.terminate()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return -asked[0] if asked else code


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="recipes.mini.run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--list", action="store_true", help="show the steps and stop")
    parser.add_argument("--only", nargs="+", choices=[step.name for step in STEPS], metavar="STEP", help="these steps")
    parser.add_argument("--again", action="store_true", help="also steps that are done")
    args = parser.parse_args(argv)
    if args.list:
        for step in STEPS:
            state = "done" if step.marker.exists() else "    "
            print(f"{state:<5}{step.name:<23}{step.about:<52}{'needs ' + ', '.join(step.needs) if step.needs else ''}")
        return 0
    try:
        for step in STEPS:
            if args.only is None or step.name in args.only:
                run(step, args.again)
    except ValueError as error:
        print(f"mini: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
