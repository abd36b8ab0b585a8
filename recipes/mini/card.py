"""The model card of mini: its fixed text, with the numbers of an evaluation put in.

python -m recipes.mini.card --evaluation out/mini/evaluation --data out/mini/data --checkpoint out/mini/export
"""

from __future__ import annotations

import argparse
from pathlib import Path

from recipes.mini import labels, texts
from recipes.mini.prepare import read_list, read_lists

CARD = """---
license: apache-2.0
language: en
pipeline_tag: audio-to-audio
---

# Mini: a small spoken dialogue model

{parameters:.1f} M parameters, {size:.0f} MB, trained by OSUM-EChat's own recipe (`make mini`, [recipes/mini/README.md](../../recipes/mini/README.md)). It hears short English sentences and
how they are said, thinks, and answers in text and speech. It runs through the code of the 3B model and exists to show, test and teach that code.

## What it cannot do

- **Every word.** Of what people read aloud it mishears nearly every second word (`people_read_wer` below; worst in long sentences), of short orders one in eight; a good recogniser mishears one word in
  twenty. Say it again in fewer words.
- **Open conversation.** It knows {topics} everyday topics; its answers follow a rule of ours (topic, age, gender, emotion, event). Of another sentence it takes up a
  thing that was named. It knows nothing about the world, and remembers no earlier turn.
- **Feelings.** "Emotion", "age" and "event" are signal rules (pitch, formants, rate, brightness, tremor, generated sounds), not human behaviour. What people read or order calmly it
  mostly calls neutral. Nothing here says how well it would read a person who is moved, and it must not be used to judge one.
- **Other languages, long recordings.** English, 1 to 12 seconds. Other languages are answered with "I understand only English", where they are noticed.

## Data

{user_hours:.1f} h of user speech ({user_count:,} recordings) and {reply_hours:.1f} h of the reply voice ({reply_count:,}), synthesised with flite and espeak-ng from grammars of ours
(20 topics: 40,000 sentences of users, and what they are answered; conversations) and example sentences of WordNet; {people_hours:.1f} h of people ({people_count:,} recordings with their
variants: rooms, microphones, codecs, noise, events) and {neural_hours:.1f} h of neural voices ({neural_count:,}). {voices} synthetic voices in training; never trained on: {held_out}. The first weights
(of an earlier recipe, 42 h of synthetic speech) were trained on from here. The encoder is Whisper tiny.en's (MIT), trained further; everything else began with random weights.

People: the CC0 recordings of one reader (rhasspy/dataset-voice-kathleen), orders and wake words of over a hundred people (Picovoice/speech-to-intent-benchmark and
wake-word-benchmark, Apache-2.0). Sounds behind and beside speech: ESC-10 (K. J. Piczak and the Freesound authors, CC BY). Neural voices: Kokoro-82M (Apache-2.0). Whom it is measured on is in no training list
(`recipes/mini/people/clips`).

## Numbers

{table}

The sets, the judge and what is counted are described in recipes/mini/README.md. Below is every set with every number.

{sets}

## Licences

Weights: Apache-2.0. Encoder: Whisper tiny.en, MIT (OpenAI). WordNet 3.0 licence for the example sentences. Recordings that it was trained on: CC0,
Apache-2.0, CC BY (ESC-10). flite voices: Carnegie Mellon, free use. espeak-ng is GPL-3
as a program; nothing of it is in this folder.
"""


def section(report: str, title: str) -> str:
    """The body of a second-level section of a Markdown text."""
    return report.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0].strip()


def write(evaluation: Path, data: Path, checkpoint: Path) -> Path:
    from osum_echat.model.checkpoint import load_weights

    report = (evaluation / "report.md").read_text(encoding="utf-8")
    user, reply = read_lists(data / "user"), read_lists(data / "reply") + read_lists(data / "open")

    people = [record for path in sorted((data / "people").glob("*.jsonl")) for record in read_list(path)]
    neural = read_lists(data / "neural")

    def hours(records: list[dict]) -> float:  # type: ignore[type-arg]
        return sum(record["extra"]["duration"] for record in records) / 3600

    path = checkpoint / "MODEL_CARD.md"
    parameters = sum(p.numel() for p in load_weights(checkpoint).parameters()) / 1e6
    text = CARD.format(
        parameters=parameters,
        size=sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()) / 1e6,
        topics=len(texts.topics()),
        user_hours=hours(user),
        user_count=len(user),
        reply_hours=hours(reply),
        reply_count=len(reply),
        people_hours=hours(people),
        people_count=len(people),
        neural_hours=hours(neural),
        neural_count=len(neural),
        voices=len(set(labels.training_voices())),
        held_out=", ".join(labels.HELD_OUT_VOICES),
        table=section(report, "Numbers"),
        sets=section(report, "Every set"),
    )
    path.write_text(text, encoding="utf-8")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("evaluation", "data", "checkpoint"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    arguments = parser.parse_args()
    print(write(arguments.evaluation, arguments.data, arguments.checkpoint))


if __name__ == "__main__":
    main()
