"""Speech for mini: recordings of what users say (labelled) and of what mini answers (one voice), as raw lists with audio files.

    python -m recipes.mini.synthesize --out work/mini/data --user-hours 6 --reply-hours 4 --open-hours 8 --processes 2

writes `user/*.jsonl`, `reply/*.jsonl` and `open/*.jsonl` (the reply voice again, open vocabulary) in parts that are made independently and
skipped when they exist, so a run can be interrupted, repeated and extended (larger hours make more parts). `README.md` in the folder
explains the lists. Every record of a user carries what the later stages need: the words, topic, labels and the answer that the rule
wants; every record of the reply voice carries phones and words with their end times.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import soxr

from recipes.mini import dialogues, kokoro, labels, texts
from recipes.mini.kokoro import Kokoro

PART = 250  # records a part
DIALOGUES = 60  # of a part of dialogues
REPLY_RATE = 22_050  # of the vocoder
MEAN_SECONDS = {"reply": 3.1, "user": 3.2, "open": 2.3, "dialogue": 19.0}  # of a recording, to turn hours into parts
WORDNET_SHARE = 0.45  # of user recordings: open vocabulary, without topic and reply
HELD_OUT_WORDNET = 400

README = """# Speech of mini

Synthesised by free engines (flite, espeak-ng, Kokoro), written by `recipes/mini/synthesize.py`; nothing here is a person.

- `user/*.jsonl`: what users say, 16 kHz. `txt`: the words. `extra`: age, gender, emotion, event, voice, topic (null: open vocabulary), reply.
- `reply/*.jsonl`: the reply voice ({reply_voice}), {reply_rate} Hz. `txt`: the sentence. `extra`: phones, words = [[name, end in s]].
- `open/*.jsonl`: the same voice and form; sentences of open vocabulary and of what users say, so that text to speech meets words in any company.
- `dialogue/*.jsonl`: conversations of three or four turns (`turns`: wav, txt, topic, reply) whose last turn asks for a fact of an earlier one (`extra`: fact, value).
- `heldout/*.jsonl`: never in training: sentences (`grammar`), hand-written sentences (`handwritten`), voices (`new_voices`), sentences of the reply
  voice (`reply`).
- reply_voice: {reply_voice} of Kokoro-82M
- voices never in training: {held_out}
"""


def user_record(
    sentence: str, topic: str | None, voice_name: str, said_as: texts.Labels, rng: random.Random, wav: Path
) -> dict[str, Any]:
    """Synthesise one user recording to ``wav`` and describe it."""
    samples = labels.speak(sentence, labels.VOICES[voice_name], said_as, rng)
    soundfile.write(wav, samples, labels.RATE, subtype="PCM_16")
    extra: dict[str, Any] = {**vars(said_as), "voice": voice_name, "topic": topic, "question": sentence}
    if topic is not None:
        extra["reply"] = texts.reply(topic, said_as, rng, sentence)
    return {
        "key": wav.stem,
        "wav": str(wav),
        "txt": sentence,
        "task": "<TRANSCRIBE>",
        "extra": {**extra, "duration": round(len(samples) / labels.RATE, 3)},
    }


@functools.cache
def reply_engine(model: Path) -> Kokoro:
    """What speaks for mini, one a process. ``model``: the folder of its network, fetched if it is missing."""
    return Kokoro(kokoro.fetch(model))


def reply_record(sentence: str, wav: Path, engine: Kokoro) -> dict[str, Any]:
    """The reply voice saying ``sentence``, with the times of its phones and words. Raises `kokoro.TooShortOrLong`."""
    spoken = engine.speak_timed(sentence, labels.REPLY_VOICE, labels.REPLY_SPEED)
    samples = spoken.samples * np.float32(0.1 / (spoken.samples.std() + 1e-6))
    samples = np.clip(soxr.resample(samples, spoken.rate, REPLY_RATE), -1, 1)
    soundfile.write(wav, samples, REPLY_RATE, subtype="PCM_16")
    extra = {
        "voice": labels.REPLY_VOICE,
        "duration": round(len(samples) / REPLY_RATE, 3),
        "phones": spoken.phones,
        "words": spoken.words,
    }
    return {"key": wav.stem, "wav": str(wav), "txt": sentence, "task": "<TEXT2TOKEN>", "extra": extra}


def dialogue_record(
    spoken: dialogues.Dialogue, voice_name: str, said_as: texts.Labels, rng: random.Random, stem: Path, engine: Kokoro
) -> dict[str, Any]:
    """A conversation: every turn of the user in one voice and manner, every answer in the reply voice. ``stem``: path of its recordings, without suffix.

    ``turns``: wav, txt, topic, and reply: a record as `reply_record` gives it.
    """
    turns, seconds = [], 0.0
    for number, turn in enumerate(spoken.turns):
        wav = stem.with_name(f"{stem.name}_{number}.wav")
        samples = labels.speak(turn.said, labels.VOICES[voice_name], said_as, rng)
        soundfile.write(wav, samples, labels.RATE, subtype="PCM_16")
        answer = reply_record(turn.reply(said_as, rng), stem.with_name(f"{stem.name}_{number}_reply.wav"), engine)
        seconds += len(samples) / labels.RATE + answer["extra"]["duration"]
        turns.append({"wav": str(wav), "txt": turn.said, "topic": turn.topic, "reply": answer})
    extra = {**vars(said_as), "voice": voice_name, "fact": spoken.fact, "value": spoken.value, "duration": round(seconds, 3)}
    return {"key": stem.name, "turns": turns, "extra": extra}


def draw_user(
    rng: random.Random, grammar: list[tuple[str, str]], wordnet: list[str]
) -> tuple[str, str | None, str, texts.Labels]:
    """Sentence, topic, voice and labels of one training recording."""
    if rng.random() < WORDNET_SHARE:
        sentence, topic = rng.choice(wordnet), None
    else:
        sentence, topic = texts.about_a_topic(rng, grammar)
    return sentence, topic, *draw_voice(rng, labels.training_voices())


def draw_voice(rng: random.Random, voices: tuple[str, ...]) -> tuple[str, texts.Labels]:
    """A voice and how it is to speak; combinations that the voice cannot do are drawn again."""
    while True:
        voice, said_as = rng.choice(voices), texts.draw_labels(rng)
        if labels.allowed(labels.VOICES[voice], said_as):
            return voice, said_as


def draw_reply(rng: random.Random, replies: list[str], wordnet: list[str]) -> str:
    """A sentence for the reply voice: replies of the rule in the topics and outside, the same words in new company, and open vocabulary."""
    kind = rng.random()
    if kind < 0.4:
        return rng.choice(replies)
    if kind < 0.6:
        sentence = rng.choice(wordnet) if rng.random() < 0.4 else texts.said("open" if rng.random() < 0.8 else "commands", rng)
        return texts.reply(None, texts.draw_labels(rng), rng, sentence)
    if kind < 0.75:
        return texts.free_sentence(rng)
    if kind < 0.85:
        return texts.word_salad(rng)
    sentence = rng.choice(wordnet)
    return sentence[:1].upper() + sentence[1:] + "."


def draw_open(rng: random.Random, grammar: list[tuple[str, str]], wordnet: list[str]) -> str:
    """A sentence for the reply voice that is no reply: mostly open vocabulary, as people write it, and the reply's words in free sentences."""
    kind = rng.random()
    if kind < 0.3:
        return texts.free_sentence(rng)
    return texts.written(rng.choice(wordnet) if kind < 0.8 else texts.about_a_topic(rng, grammar)[0])


def make_part(job: tuple[str, int, Path, Path]) -> float:
    """One part of ``PART`` records; returns the seconds of audio. The list appears under its name only when its recordings are complete.

    Args:
        job: kind, number, the folder of all, and that of Kokoro's network.
    """
    kind, number, out, model = job
    list_path = out / kind / f"part_{number:04d}.jsonl"
    if list_path.exists():
        return sum(json.loads(line)["extra"]["duration"] for line in list_path.read_text(encoding="utf-8").splitlines())
    folder = out / kind / f"part_{number:04d}"
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{kind}-{number}")
    if kind == "dialogue":
        made = []
        for index, spoken in enumerate(dialogues.training_dialogues(DIALOGUES, number)):
            voice, said_as = draw_voice(rng, labels.training_voices())
            made.append(
                dialogue_record(spoken, voice, said_as, rng, folder / f"dialogue_{number:04d}_{index:02d}", reply_engine(model))
            )
        _write_list(list_path, made)
        return sum(record["extra"]["duration"] for record in made)
    wordnet = texts.wordnet_examples()[:-HELD_OUT_WORDNET]
    grammar = list(texts.training_user_sentences())
    replies = list(texts.all_replies()) if kind == "reply" else []
    tested = {texts.normalise(sentence) for sentence, _ in texts.hand_written("speech")}
    records: list[dict[str, Any]] = []
    while len(records) < PART:
        wav = folder / f"{kind}_{number:04d}_{len(records):03d}.wav"
        if kind == "user":
            sentence, topic, voice, said_as = draw_user(rng, grammar, wordnet)
            record = user_record(sentence, topic, voice, said_as, rng, wav)
        else:
            text = draw_reply(rng, replies, wordnet) if kind == "reply" else draw_open(rng, grammar, wordnet)
            if texts.normalise(text) in tested:  # by chance
                continue
            try:
                record = reply_record(text, wav, reply_engine(model))
            except kokoro.TooShortOrLong:
                continue
        if 0.5 < record["extra"]["duration"] < 8.0:  # an engine may drop a text it cannot read
            records.append(record)
    _write_list(list_path, records)
    return sum(record["extra"]["duration"] for record in records)


def make_held_out(out: Path, model: Path, each: int = 220) -> None:
    """The sets that never enter training: new sentences, hand-written sentences, new voices, and sentences of the reply voice."""
    sentences = list(texts.held_out_user_sentences())
    train_voices = labels.training_voices()
    sets = {
        "grammar": (sentences[:each], train_voices),
        "handwritten": (texts.hand_written("user") * 2, train_voices),
        "new_voices": (sentences[each : 2 * each], labels.HELD_OUT_VOICES),
        "validation": (sentences[2 * each :][:64], train_voices),
    }
    for name, (pairs, voices) in sets.items():
        path = out / "heldout" / f"{name}.jsonl"
        if path.exists():
            continue
        rng = random.Random(f"held out {name}")
        (out / "heldout" / name).mkdir(parents=True, exist_ok=True)
        records = []
        for number, (sentence, topic) in enumerate(pairs):
            voice, said_as = draw_voice(rng, voices)
            wav = out / "heldout" / name / f"{name}_{number:03d}.wav"
            records.append(user_record(sentence, topic, voice, said_as, rng, wav))
        _write_list(path, records)
    path = out / "heldout" / "dialogues.jsonl"
    if not path.exists():
        (out / "heldout" / "dialogues").mkdir(parents=True, exist_ok=True)
        rng, records = random.Random("held out dialogues"), list[dict[str, Any]]()
        for number, spoken in enumerate(dialogues.held_out_dialogues()):
            voice, said_as = draw_voice(rng, train_voices)
            records.append(
                dialogue_record(
                    spoken, voice, said_as, rng, out / "heldout" / "dialogues" / f"dialogue_{number:03d}", reply_engine(model)
                )
            )
        _write_list(path, records)
    path = out / "heldout" / "reply.jsonl"
    if not path.exists():
        (out / "heldout" / "reply").mkdir(parents=True, exist_ok=True)
        lines = [sentence for sentence, _ in texts.hand_written("speech")]
        folder, engine = path.with_suffix(""), reply_engine(model)
        _write_list(path, [reply_record(line, folder / f"reply_{n:03d}.wav", engine) for n, line in enumerate(lines)])


def _write_list(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    os.replace(temporary, path)


def synthesize(
    out: Path,
    model: Path,
    user_hours: float,
    reply_hours: float,
    open_hours: float,
    dialogue_hours: float = 0.0,
    processes: int = 2,
) -> dict[str, float]:
    """Make what is missing; returns hours by kind. ``model``: the folder of Kokoro's network."""
    out.mkdir(parents=True, exist_ok=True)
    held_out = ", ".join(labels.HELD_OUT_VOICES)
    (out / "README.md").write_text(
        README.format(reply_voice=labels.REPLY_VOICE, reply_rate=REPLY_RATE, held_out=held_out), encoding="utf-8"
    )
    kokoro.fetch(model)
    make_held_out(out, model)
    hours = {"reply": reply_hours, "user": user_hours, "open": open_hours, "dialogue": dialogue_hours}
    jobs_by_kind = [
        [
            (kind, n, out, model)
            for n in range(round(hours[kind] * 3600 / MEAN_SECONDS[kind] / (DIALOGUES if kind == "dialogue" else PART)))
        ]
        for kind in hours
    ]
    jobs = [job for some in itertools.zip_longest(*jobs_by_kind) for job in some if job is not None]
    seconds = dict.fromkeys(hours, 0.0)
    start = time.monotonic()
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for (kind, number, *_), length in zip(jobs, pool.imap(make_part, jobs), strict=True):
            seconds[kind] += length
            total = ", ".join(f"{name} {value / 3600:.2f} h" for name, value in seconds.items())
            print(f"{kind} part {number}: {total}; {time.monotonic() - start:.0f} s", flush=True)
    return {kind: value / 3600 for kind, value in seconds.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--user-hours", type=float, default=6.0)
    parser.add_argument("--reply-hours", type=float, default=4.0)
    parser.add_argument("--open-hours", type=float, default=8.0)
    parser.add_argument("--dialogue-hours", type=float, default=2.0, help="users and answers together")
    parser.add_argument(
        "--kokoro", type=Path, default=Path("out/mini/kokoro/model"), help="folder of Kokoro's network, which speaks the answers"
    )
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    try:
        synthesize(
            arguments.out,
            arguments.kokoro,
            arguments.user_hours,
            arguments.reply_hours,
            arguments.open_hours,
            arguments.dialogue_hours,
            arguments.processes,
        )
    except ValueError as error:
        print(f"synthesize: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
