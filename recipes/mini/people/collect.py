"""The lists of `clips/`, from the recordings: words of orders by a recogniser, speaker clusters, genders, sets.

    python -m recipes.mini.people.collect words --people shared/people --out recipes/mini/people/clips     # needs faster-whisper
    python -m recipes.mini.people.collect sets  --people shared/people --out recipes/mini/people/clips

Both have been run; their lists are committed, because trainings and numbers belong to one division. `words` writes down what Whisper base hears in the orders
of `coffee` (they have slots, but no text). `sets` keeps the words that agree with the slots, and divides.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from osum_echat import metrics
from recipes.mini import people, texts
from recipes.mini.people import Clip

HEARD = "coffee_heard.tsv"
QUOTAS = {"train": 0.66, "choice": 0.12, "report": 0.22}
NEAREST = 0.70
"""Clips of one speaker are nearer than this in the mean (Kokoro's voices: 0.84, different ones 0.58): low, so that a speaker is rather joined with another
than split over two sets."""
WOMEN_ABOVE, MEN_BELOW = 150.0, 170.0  # Hz; between them the embedding decides

Json = dict[str, Any]


def records(folder: Path, source: str) -> list[Json]:
    lines = (folder / source / "data.list").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if not record["key"].endswith(".wav")]  # one name of wakewords is a slip


# Words ------------------------------------------------------------------------------------------------------------------------------


def write_heard(folder: Path, out: Path, whisper: Path | None, wheels: Path | None) -> Path:
    """What Whisper base hears in each order, line after line, those of a known training set first; goes on where it stopped."""
    from osum_echat.evaluation.recogniser import Recogniser

    path = out / HEARD
    known = read_heard(path) if path.exists() else {}
    recogniser = Recogniser.load(fallback=None, cache=whisper, wheels=wheels)
    out.mkdir(parents=True, exist_ok=True)
    train = {clip.key for clip in people.read_clips("coffee", ("train",), out)} if (out / "coffee.tsv").exists() else set()
    with path.open("a", encoding="utf-8") as file:
        for record in sorted(records(folder, "coffee"), key=lambda record: record["key"] not in train):
            if record["key"] in known:
                continue
            samples, _ = soundfile.read(folder / "coffee" / record["wav"], dtype="float32")
            file.write(f"{record['key']}\t{' '.join(recogniser.transcribe(samples).split())}\n")
            file.flush()
    return path


def read_heard(path: Path) -> dict[str, str]:
    with path.open(encoding="utf-8", newline="") as file:
        return dict(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def slot_words(record: Json) -> str:
    return metrics.normalize(" ".join(record["slots"].values()))


def agreed(heard: str, wanted: str) -> str:
    """Words of an order as a training text, "" when words of the slots are missing (or it is far too short or long for an order)."""
    words = texts.normalise(metrics.normalize(heard))
    missing = Counter(wanted.split()) - Counter(words.split())
    return words if not missing and len(words.split()) <= 30 else ""


# Speakers ---------------------------------------------------------------------------------------------------------------------------


def listen(folder: Path, source: str, packages: Path) -> tuple[np.ndarray[Any, Any], list[float]]:
    """Embedding and pitch of every clip of a source."""
    from recipes.mini.speakers import SpeakerNet, pitch

    net = SpeakerNet.load(packages)
    embeddings, pitches = [], []
    for record in records(folder, source):
        samples, _ = soundfile.read(folder / source / record["wav"], dtype="float32")
        embeddings.append(net.embed(samples))
        pitches.append(pitch(samples))
    return np.stack(embeddings), pitches


class GenderJudge:
    """Gender by embedding: on which side of the plane between Kokoro's men and women."""

    def __init__(self, folder: Path, packages: Path, every: int = 5) -> None:
        from recipes.mini.speakers import SpeakerNet

        net = SpeakerNet.load(packages)
        found: dict[str, list[Any]] = {"<MALE>": [], "<FEMALE>": []}
        for record in records(folder, "kokoro")[::every]:
            samples, _ = soundfile.read(folder / "kokoro" / record["wav"], dtype="float32")
            found[record["extra"]["gender"]].append(net.embed(samples))
        men, women = (np.mean(found[name], axis=0) for name in ("<MALE>", "<FEMALE>"))
        self.normal = men - women
        self.middle = float((men + women) @ self.normal / 2)

    def __call__(self, embedding: Any, pitch: float) -> str:
        """``male`` or ``female`` where pitch and embedding agree, else ""."""
        male = float(embedding @ self.normal) > self.middle
        if male and 0 < pitch < MEN_BELOW:
            return "male"
        return "female" if not male and pitch > WOMEN_ABOVE else ""


def majority(votes: Sequence[str]) -> str:
    """The gender of a cluster: what nine in ten of the clips that have one say, "" otherwise."""
    counts = Counter(vote for vote in votes if vote)
    if not counts:
        return ""
    gender, count = counts.most_common(1)[0]
    return gender if count >= 0.9 * counts.total() and counts.total() >= 0.3 * len(votes) else ""


# Sets -------------------------------------------------------------------------------------------------------------------------------


def rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def divide(sizes: dict[str, int]) -> dict[str, str]:
    """A set for each group, so that the sets' shares of all clips come near to `QUOTAS`; large groups first, the order of equals by hash."""
    filled = dict.fromkeys(QUOTAS, 0.0)
    out = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], rank(name))):
        chosen = min(QUOTAS, key=lambda s: (filled[s] + sizes[name] / 2) / QUOTAS[s])
        filled[chosen] += sizes[name]
        out[name] = chosen
    return out


def readers(folder: Path) -> dict[str, list[Clip]]:
    """Kathleen by sentence, LJ for reports."""
    kathleen = records(folder, "kathleen")
    sentences = {texts.normalise(record["txt"]) for record in kathleen}
    sets = divide(dict.fromkeys(sentences, 1))
    out = [Clip("kathleen", r["key"], sets[texts.normalise(r["txt"])], 0, "female", texts.normalise(r["txt"])) for r in kathleen]
    # Its list calls the LJ reader a woman; pitch (105 Hz) and embedding say a man. So no gender is given.
    lj = [Clip("lj", r["key"], "report", 1, "", texts.normalise(r["txt"])) for r in records(folder, "lj")]
    return {"kathleen": out, "lj": lj}


def crowds(folder: Path, heard: dict[str, str], packages: Path) -> dict[str, list[Clip]]:
    """Orders and wake words: many people without names."""
    from recipes.mini.speakers import clusters

    lists = {source: records(folder, source) for source in ("coffee", "wakewords")}
    found = {source: listen(folder, source, packages) for source in lists}
    numbers = clusters(np.concatenate([embeddings for embeddings, _ in found.values()]), NEAREST)
    judge = GenderJudge(folder, packages)
    names = [(source, record["key"]) for source in lists for record in lists[source]]
    votes = [judge(e, p) for embeddings, pitches in found.values() for e, p in zip(embeddings, pitches, strict=True)]
    members: dict[int, list[int]] = {}
    for index, number in enumerate(numbers):
        members.setdefault(number, []).append(index)
    genders = {number: majority([votes[i] for i in some]) for number, some in members.items()}
    sets: dict[int, str] = {}
    for kind in ("coffee", "wakewords"):  # each source and gender is divided for itself
        for gender in ("female", "male", ""):
            groups = {
                str(number): len(some)
                for number, some in members.items()
                if number not in sets and genders[number] == gender and any(names[i][0] == kind for i in some)
            }
            sets |= {int(number): chosen for number, chosen in divide(groups).items()}
    out: dict[str, list[Clip]] = {source: [] for source in lists}
    for (source, _), record, number in zip(names, [r for some in lists.values() for r in some], numbers, strict=True):
        slots = slot_words(record) if source == "coffee" else ""
        words = agreed(heard.get(record["key"], ""), slots) if source == "coffee" else texts.normalise(record["txt"])
        out[source].append(Clip(source, record["key"], sets[number], number + 2, genders[number], words, slots))
    return out


def write_sets(folder: Path, out: Path, packages: Path) -> None:
    for source, clips in {**readers(folder), **crowds(folder, read_heard(out / HEARD), packages)}.items():
        path = people.write_clips(source, clips, out)
        told = []
        for name in people.SETS:
            some = [clip for clip in clips if clip.set == name]
            counts = Counter(clip.gender or "?" for clip in some)
            told.append(
                f"{name} {len(some)} of {len({c.cluster for c in some})} ({dict(counts)}, {sum(bool(c.words) for c in some)} with words)"
            )
        print(f"{path}: {'; '.join(told)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("words", "sets"))
    parser.add_argument("--people", type=Path, help=f"folder of the recordings (default: ${people.FOLDER_VARIABLE})")
    parser.add_argument("--out", type=Path, default=people.CLIPS)
    parser.add_argument("--packages", type=Path, default=Path("out/mini/packages"), help="where downloaded packages are kept")
    parser.add_argument("--whisper", type=Path, help="folder with the recogniser's data")
    arguments = parser.parse_args()
    try:
        folder = people.folder(arguments.people)
        if arguments.step == "words":
            wheels = arguments.packages if arguments.packages.is_dir() else None
            print(write_heard(folder, arguments.out, arguments.whisper, wheels))
        else:
            write_sets(folder, arguments.out, arguments.packages)
    except ValueError as error:
        print(f"collect: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
