"""Training recordings of people: each clip of the training set as it is and in variants, in the form of `recipes.mini.synthesize`.

    python -m recipes.mini.people.build --people shared/people --out out/mini/data --copies 3

writes `people/*.jsonl` (and `people/choice/*.jsonl`, for validation during training) and the variants as FLAC files; the clips stay where they are. Of the
variants (`recipes.mini.augment`), a fifth has a sound event beside the speech; clips of readers and neural voices are also joined to long recordings. Emotion is noted as neutral (read or ordered calmly), age as adult; gender
where it is known. Also varied: neural voices (`--kokoro`, caches of `recipes.mini.kokoro`), which come without noise. Lists that exist are left alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from recipes.mini import augment, people, texts
from recipes.mini.prepare import write_list

RATE = 16_000
EVENT_SHARE = 0.2  # of the variants
JOINED = 3  # one long recording for so many clips
SHORTEST, LONGEST = 0.4, 12.0  # seconds
HELD_OUT_SOUNDS = 10  # of each kind, kept for tests

Json = dict[str, Any]
Samples = augment.Samples


def read(path: Path) -> Samples:
    samples, rate = soundfile.read(path, dtype="float32")
    if rate != RATE:
        raise ValueError(f"{path} has {rate} Hz; the recordings of people are kept at {RATE} Hz")
    return np.asarray(samples if samples.ndim == 1 else samples.mean(axis=1), dtype=np.float32)


def readable(paths: Sequence[Path]) -> list[Samples]:
    """The recordings that can be read: an eighth of ESC-10's files as they were converted is damaged; their number is printed."""
    out = []
    for path in paths:
        try:
            out.append(read(path))
        except soundfile.LibsndfileError:
            continue
    if len(out) < len(paths):
        print(f"{len(paths) - len(out)} of {len(paths)} sounds in {paths[0].parent} cannot be read and are left out", flush=True)
    return out


class Sounds:
    """ESC-10 and kitchen noise: what may be behind speech, and sneezes beside it. The last of each kind are kept for tests."""

    def __init__(self, folder: Path) -> None:
        by_kind: dict[str, list[Path]] = {}
        for line in (folder / "sounds" / "data.list").read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            by_kind.setdefault(record["sound"], []).append(folder / "sounds" / record["wav"])
        kept = {kind: sorted(paths)[:-HELD_OUT_SOUNDS] for kind, paths in by_kind.items()}
        self.sneezes = readable(kept.pop("person_sneeze"))
        kitchen = read(folder / "noise" / "kitchen.ogg")
        size = 10 * RATE
        self.noises = readable([path for paths in kept.values() for path in paths])
        self.noises += [kitchen[start : start + size] for start in range(0, len(kitchen) - size + 1, size)] * 4


def record(key: str, wav: Path, words: str, seconds: float, **known: Any) -> Json:
    extra = {"age": "adult", "emotion": "neutral", "event": "none", "topic": None, **known, "duration": round(seconds, 3)}
    return {"key": key, "wav": str(wav), "txt": words, "task": "<TRANSCRIBE>", "extra": extra}


def with_variants(
    key: str, clip: Path, words: str, known: Json, copies: int, sounds: Sounds, target: Path, rng: random.Random
) -> Iterator[Json]:
    """Records of a clip and of ``copies`` - 1 variants of it, which are written to ``target``; nothing for one that is too long or short."""
    samples = read(clip)
    for copy in range(copies):
        event, changed, wav = "none", samples, clip
        if copy:
            event = rng.choice(texts.EVENTS[1:]) if rng.random() < EVENT_SHARE else "none"
            if event != "none":
                changed = augment.with_event(samples, augment.draw_event(event, sounds.sneezes, rng), rng)
            changed = augment.vary(changed, sounds.noises, rng)
            wav = target / f"{key}_{copy}.flac"
        if SHORTEST < len(changed) / RATE <= LONGEST:
            if copy:
                soundfile.write(wav, np.clip(changed, -1, 1), RATE, subtype="PCM_16")
            yield record(f"{key}_{copy}", wav, words, len(changed) / RATE, event=event, **known)


def joined(records: Sequence[Json], count: int, target: Path, rng: random.Random) -> Iterator[Json]:
    """Long recordings: two or three unchanged clips of one gender with short pauses, at most 12 s. Single clips have hardly more than ten words."""
    for number in range(count):
        first = rng.choice(records)
        same = [record for record in records if record["extra"].get("gender") == first["extra"].get("gender")]
        parts = [first, *rng.choices(same, k=rng.choice((1, 1, 2)))]
        pieces: list[Samples] = []
        for part in parts:
            pieces += [read(Path(part["wav"])), np.zeros(int(RATE * rng.uniform(0, 0.3)), np.float32)]
        samples = np.concatenate(pieces)
        if len(samples) > LONGEST * RATE:
            continue
        wav = target / f"joined_{number:04d}.flac"
        soundfile.write(wav, np.clip(samples, -1, 1), RATE, subtype="PCM_16")
        known = {name: first["extra"][name] for name in ("gender", "voice") if name in first["extra"]}
        yield record(f"{target.name}_joined_{number:04d}", wav, " ".join(p["txt"] for p in parts), len(samples) / RATE, **known)


def write(path: Path, records: list[Json]) -> None:
    write_list(path, records)
    print(f"{path}: {len(records)} recordings, {sum(r['extra']['duration'] for r in records) / 3600:.2f} h", flush=True)


def build_people(folder: Path, out: Path, copies: dict[str, int], sounds: Sounds) -> None:
    """Lists of every source that has training clips, and of the clips for choices (unchanged)."""
    for source in people.SOURCES:
        for name in ("train", "choice"):
            clips = [clip for clip in people.read_clips(source, (name,)) if clip.words]
            path = out / (f"{source}.jsonl" if name == "train" else f"choice/{source}.jsonl")
            if not clips or path.exists():
                continue
            target = path.with_suffix("")
            target.mkdir(parents=True, exist_ok=True)
            rng = random.Random(f"people {source} {name}")
            records: list[Json] = []
            for clip in clips:
                known: Json = {"voice": f"person-{clip.cluster}"} | ({"gender": clip.gender} if clip.gender else {})
                number = copies[source] if name == "train" else 1
                key = f"{source}_{clip.key}"
                records += with_variants(key, clip.path(folder), clip.words, known, number, sounds, target, rng)
            if name == "train" and source == "kathleen":
                plain = [r for r in records if r["key"].endswith("_0")]
                records += joined(plain, len(plain) // JOINED, target, rng)
            write(path, records)


def neural_parts(cache: Path) -> list[Path]:
    """Lists of a Kokoro cache: its parts, or the one list of `people/kokoro`."""
    parts = sorted(cache.glob("part_*.jsonl")) or [path for path in [cache / "data.list"] if path.is_file()]
    if not parts:
        raise ValueError(f"no speech in {cache}; run recipes.mini.kokoro first")
    return parts


def neural_labels(extra: Json, words: str) -> Json:
    """Gender, voice and topic of a neural recording in either form."""
    topic = extra.get("topic") or dict(texts.training_user_sentences()).get(words)
    return {
        "gender": extra["gender"].strip("<>").lower(),
        "voice": extra.get("voice") or f"kokoro-{extra['speaker']}",
        "topic": topic,
    }


def build_neural(cache: Path, sounds: Sounds, out: Path, copies: int) -> None:
    """The lists of a Kokoro cache with variants: `neural/*.jsonl`."""
    for part in neural_parts(cache):
        path = out / f"{cache.name}_{part.stem}.jsonl"
        if path.exists():
            continue
        target = path.with_suffix("")
        target.mkdir(parents=True, exist_ok=True)
        rng = random.Random(f"neural {path.stem}")
        records: list[Json] = []
        for line in map(json.loads, part.read_text(encoding="utf-8").splitlines()):
            known = neural_labels(line["extra"], line["txt"])
            records += with_variants(line["key"], cache / line["wav"], line["txt"], known, copies, sounds, target, rng)
        plain = [r for r in records if r["key"].endswith("_0")]
        records += joined(plain, len(plain) // JOINED, target, rng)
        write(path, records)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=Path, help=f"folder of the recordings (default: ${people.FOLDER_VARIABLE})")
    parser.add_argument("--kokoro", type=Path, nargs="*", default=[], help="caches of recipes.mini.kokoro")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--copies", type=int, default=3, help="of a clip: itself and variants (wake words: one)")
    arguments = parser.parse_args(argv)
    try:
        folder = people.folder(arguments.people)
        copies = dict.fromkeys(people.SOURCES, arguments.copies) | {"wakewords": 1}
        sounds = Sounds(folder)
        build_people(folder, arguments.out / "people", copies, sounds)
        for cache in arguments.kokoro:
            build_neural(cache, sounds, arguments.out / "neural", max(1, arguments.copies - 1))
    except ValueError as error:
        print(f"build: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
