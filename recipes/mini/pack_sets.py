"""The held-out sets as they are shipped: one small tar each, and a handful of recordings for the demo.

    python -m recipes.mini.pack_sets --data out/mini/data --out assets

The sets can be made again from nothing (`recipes.mini.synthesize` draws them with fixed seeds), but the synthesisers are not on every
machine; so they travel as Ogg Opus, some 25 kbit a second. A recogniser hears no difference (recipes/mini/README.md).
"""

from __future__ import annotations

import argparse
import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import soundfile

from osum_echat.evaluation.items import Item
from osum_echat.evaluation.readers.lists import write_tar
from recipes.mini import dialogues, texts
from recipes.mini.prepare import labels_of, read_list

SETS = ("grammar", "handwritten", "new_voices")
QUALITY = 0.92  # soundfile's compression_level: 0 best, 1 smallest
DEMO = 8


def ogg(path: str) -> bytes:
    """A recording as Ogg Opus."""
    samples, rate = soundfile.read(path, dtype="float32")
    out = io.BytesIO()
    soundfile.write(out, samples, rate, format="OGG", subtype="OPUS", compression_level=QUALITY)
    return out.getvalue()


def item(record: dict[str, Any]) -> Item:
    """A held-out recording with the answers that fit it."""
    extra = record["extra"]
    kept = {name: extra[name] for name in ("age", "gender", "emotion", "event", "voice", "topic")}
    kept["think_str"] = texts.natural_think(record["txt"], labels_of(record))
    kept["replies"] = list(texts.reply_parts(extra["topic"], labels_of(record)).variants())
    return Item(record["key"], record["txt"], ogg(record["wav"]), extra=kept)


def turns_of(record: dict[str, Any], dialogue: dialogues.Dialogue) -> list[Item]:
    """A held-out conversation, an item a turn; the last one knows the fact that its answer must use, and those that it must not."""
    out = []
    for number, turn in enumerate(record["turns"], start=1):
        said = Item(f"{record['key']}_{number}", turn["txt"], ogg(turn["wav"]), dialogue_id=record["key"], turn=number)
        out.append(said)
    others = [value for value in dialogues.facts()[dialogue.fact]["values"] if value != dialogue.value]
    out[-1] = dataclasses.replace(out[-1], answer=dialogue.value, extra={"wrong_answers": others})
    return out


def pack_dialogues(data: Path, out: Path) -> None:
    """Raises ValueError when the recordings are those of other conversations than `dialogues.held_out_dialogues` draws now."""
    items: list[Item] = []
    for record, dialogue in zip(read_list(data / "heldout" / "dialogues.jsonl"), dialogues.held_out_dialogues(), strict=True):
        if [turn["txt"] for turn in record["turns"]] != [turn.said for turn in dialogue.turns]:
            raise ValueError(
                f"{record['key']} holds another conversation than the one that is drawn now; make the recordings anew"
            )
        items += turns_of(record, dialogue)
    path = out / "evaluation" / "dialogues.tar.gz"
    write_tar(path, items)
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")


def pack(data: Path, out: Path) -> None:
    for name in SETS:
        path = out / "evaluation" / f"{name}.tar.gz"
        write_tar(path, [item(record) for record in read_list(data / "heldout" / f"{name}.jsonl")])
        print(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    speech = [Item(f"speech_{n:03d}", sentence) for n, (sentence, _) in enumerate(texts.hand_written("speech"))]
    write_tar(out / "evaluation" / "speech.tar.gz", speech)
    pack_dialogues(data, out)


def demo(data: Path, out: Path) -> None:
    """Recordings of held-out voices with sentences that never were in training, each said in another way."""
    records = read_list(data / "heldout" / "new_voices.jsonl")
    chosen: list[dict[str, Any]] = []
    for wanted in ("happy", "sad", "angry", "surprised", "neutral", "cough", "laugh", "applause"):
        fitting = (
            record
            for record in records
            if (
                record["extra"]["event"] == wanted
                or (record["extra"]["event"] == "none" and record["extra"]["emotion"] == wanted)
            )
            and record["extra"]["topic"] not in {c["extra"]["topic"] for c in chosen}
            and [record["extra"]["age"], record["extra"]["gender"]]
            not in [[c["extra"]["age"], c["extra"]["gender"]] for c in chosen[-3:]]
        )
        chosen.append(next(fitting))
    folder = out / "demo"
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.ogg"):
        old.unlink()
    lines = []
    for number, record in enumerate(chosen[:DEMO], start=1):
        made = item(record)
        said_as = labels_of(record)
        event = "" if said_as.event == "none" else f"_{said_as.event}"
        name = f"{number}_{said_as.age}_{said_as.gender}_{said_as.emotion}{event}.ogg"
        (folder / name).write_bytes(made.wav if isinstance(made.wav, bytes) else b"")
        lines.append(json.dumps({"key": name.removesuffix(".ogg"), "wav": name, "txt": made.text, "extra": dict(made.extra)}))
    (folder / "demo.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"{folder}: {len(lines)} recordings")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    pack(arguments.data, arguments.out)
    demo(arguments.data, arguments.out)


if __name__ == "__main__":
    main()
