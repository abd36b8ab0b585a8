"""Can a recogniser follow the labelled speech? Word error rate of every label value and voice, before hours are generated.

python -m recipes.mini.check_speech --each 10
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from osum_echat.evaluation.recogniser import Recogniser
from osum_echat.metrics import total_errors
from recipes.mini import labels, texts


def check(
    cells: Iterable[tuple[str, str | None, dict[str, str]]], each: int, recogniser: Recogniser, voices: Sequence[str]
) -> dict[str, float]:
    """WER in percent of ``each`` utterances for every (name, voice or None for any of ``voices``, fixed labels)."""
    sentences = [sentence for sentence, _ in texts.training_user_sentences()]
    result = {}
    for name, voice_name, fixed in cells:
        rng = random.Random(name)
        said, heard = [], []
        while len(said) < each:
            voice = labels.VOICES[voice_name or rng.choice(voices)]
            drawn = texts.draw_labels(rng)
            wanted = texts.Labels(**{**vars(drawn), **fixed})
            if not labels.allowed(voice, wanted):
                continue
            sentence = rng.choice(sentences)
            said.append(sentence)
            heard.append(recogniser.transcribe(labels.speak(sentence, voice, wanted, rng)))
        result[name] = 100 * total_errors(said, heard).rate
        print(f"{name:<28}{result[name]:6.1f} %", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--each", type=int, default=10, help="utterances per cell")
    parser.add_argument("--recogniser", default="whisper-tiny.en")
    parser.add_argument("--wheels", type=Path, help="folder with the recogniser's packages")
    parser.add_argument("--voices", nargs="+", default=labels.training_voices(), help="speakers of the table of labels")
    parser.add_argument("--only", choices=("labels", "voices", "plain"), help="one table instead of all")
    arguments = parser.parse_args()
    recogniser = Recogniser.load(arguments.recogniser, wheels=arguments.wheels)
    plain = {"age": "adult", "emotion": "neutral", "event": "none"}
    tables: dict[str, list[tuple[str, str | None, dict[str, str]]]] = {
        "plain": [(f"plain {name}", name, plain) for name in labels.VOICES],
        "labels": [
            *((f"{age} {gender}", None, {**plain, "age": age, "gender": gender}) for age, gender in labels.BODIES),
            *((f"{emotion}", None, {**plain, "emotion": emotion}) for emotion in texts.EMOTIONS),
            *((f"{event}", None, {**plain, "event": event}) for event in texts.EVENTS),
        ],
        "voices": [(f"any labels {name}", name, {}) for name in labels.VOICES],
    }
    for table, cells in tables.items():
        if arguments.only in (None, table):
            check(cells, arguments.each, recogniser, arguments.voices)


if __name__ == "__main__":
    main()
