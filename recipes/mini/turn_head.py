"""The turn head: does the speaker pause, is the turn complete, was it a listener's "mm-hm", or does somebody ask for time?

    python -m recipes.mini.turn_head data     --checkpoint checkpoints/mini --out out/mini/turn_head
    python -m recipes.mini.turn_head train    --checkpoint checkpoints/mini --out out/mini/turn_head   # adds the head to the checkpoint
    python -m recipes.mini.turn_head measure  --checkpoint checkpoints/mini --out out/mini/turn_head   # beside smart-turn

Examples are made of the recipe's recordings: whole ones are *complete*; cut before a word inside, or ended by a filler, they are *incomplete*; *backchannel* and
*wait* are the phrases of `turn_taking.yaml` in the training voices. Behind each stands a pause of 0.2 to 0.3 s, which is when a live server asks; beginnings and half
of the backchannels have none, since an interruption is asked about while it lasts. The encoder does not change, so its frames are computed once and kept. Three sets, by the rules of `people`: ``train``; ``choice`` (people of the choice set, voices and phrases that are never in
training), which chooses the epoch; ``report`` (people of the report set).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from osum_echat import config as config_io
from osum_echat.audio.features import LogMel
from osum_echat.model.config import load_config
from osum_echat.model.turn import LABELS, LAST_FRAMES, TurnHead
from osum_echat.pipeline import EChat
from osum_echat.pipeline.words import words_of
from recipes.mini import augment, labels, people, texts
from recipes.mini.kokoro import Kokoro, TooShortOrLong, english
from recipes.mini.people import build
from recipes.mini.prepare import read_list, read_lists

RATE = labels.RATE
LONGEST = 8 * RATE  # of a turn, that the live server shows
SETS = ("train", "choice", "report")
COUNTS = {"user": 900, "unfinished": 500, "phrases": 700, "neural_phrases": 160, "neural": 700, "kathleen": 500}
NEURAL_HELD_OUT = 4
EPOCHS, BATCH, RATE_OF_LEARNING = 20, 64, 1e-3

Samples = augment.Samples
Example = tuple[Samples, str, str]  # samples, label, source


@functools.cache
def phrases() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((Path(__file__).parent / "turn_taking.yaml").read_text(encoding="utf-8"))
    return found


# Examples ---------------------------------------------------------------------------------------------------------------------------


def paused(samples: Samples, rng: random.Random, shortest: float = 0.2) -> Samples:
    """The last seconds of speech with a pause of at least ``shortest`` seconds behind it, of the recording's own background."""
    speech = augment.trimmed(samples)[-LONGEST:]
    frames = speech[: len(speech) // 320 * 320].reshape(-1, 320)
    background = float(np.sqrt(np.min(np.mean(frames**2, axis=1), initial=1e-4)))
    noise = np.random.default_rng(rng.getrandbits(32))
    pause = noise.standard_normal(int(RATE * rng.uniform(shortest, 0.3)), dtype=np.float32) * np.float32(max(background, 1e-5))
    fade = np.linspace(1, 0, 160, dtype=np.float32)
    speech = speech.copy()
    speech[-160:] *= fade
    return np.concatenate([speech, pause])


def cut_inside(samples: Samples, echat: EChat, rng: random.Random) -> Samples | None:
    """Up to a word inside, found by the CTC head; None where none is found."""
    starts = [round(word.start * RATE) for word in words_of(echat, (samples, RATE))]
    starts = [start for start in starts if 0.2 * len(samples) < start < 0.9 * len(samples) and start > 0.5 * RATE]
    if not starts:
        return None
    start = rng.choice(starts)
    around = samples[start - int(0.16 * RATE) : start + int(0.04 * RATE)]
    quietest = int(np.convolve(around**2, np.ones(320), mode="valid").argmin()) + 160
    return samples[: start - int(0.16 * RATE) + quietest]


def both(samples: Samples, source: str, echat: EChat, rng: random.Random, share: float = 0.5) -> Iterator[Example]:
    """A whole recording as complete, and (or) cut as incomplete."""
    if rng.random() < share:
        yield paused(samples, rng), "complete", source
    cut = cut_inside(samples, echat, rng) if rng.random() < share else None
    if cut is not None:
        yield paused(cut, rng), "incomplete", source
    if rng.random() < share / 3:  # somebody begins to speak: what an interruption sounds like when it is noticed
        yield augment.trimmed(samples)[: int(RATE * rng.uniform(0.45, 1.0))], "incomplete", f"{source} (beginning)"


def unfinished(sentence: str, rng: random.Random) -> str | None:
    """The beginning of a sentence, up to a word that never ends one, perhaps with a filler."""
    words = sentence.split()
    ends = [n for n, word in enumerate(words[:-1]) if n >= 1 and word in phrases()["unfinished_after"]]
    if ends:
        begun = words[: rng.choice(ends) + 1]
    elif len(words) > 3:
        begun = [*words[: rng.randrange(2, len(words))], rng.choice(phrases()["fillers"])]
    else:
        return None
    return " ".join(begun + ([rng.choice(phrases()["fillers"])] if rng.random() < 0.3 else []))


def neutral(voice: labels.Voice, rng: random.Random) -> texts.Labels:
    """Labels that a voice may speak for: mostly neutral adults."""
    while True:
        drawn = dataclasses.replace(texts.draw_labels(rng), event="none")
        if rng.random() < 0.7:
            drawn = dataclasses.replace(drawn, emotion="neutral", age="adult")
        if labels.allowed(voice, drawn):
            return drawn


def spoken(text: str, held_out: bool, rng: random.Random) -> tuple[Samples, str]:
    name = rng.choice(labels.HELD_OUT_VOICES if held_out else labels.training_voices())
    voice = labels.VOICES[name]
    return labels.speak(text, voice, neutral(voice, rng), rng), name


def said_phrases(held_out: bool, count: int, kokoro: Kokoro | None, neural: int, rng: random.Random) -> Iterator[Example]:
    """Backchannels and requests to wait. ``neural``: how many of them Kokoro says."""
    edge = phrases()["held_out"]
    names = [] if kokoro is None else sorted(english(list(kokoro.voices)))
    own = names[-NEURAL_HELD_OUT:] if held_out else names[:-NEURAL_HELD_OUT]
    for label in ("backchannel", "wait"):
        known = phrases()[label][-edge:] if held_out else phrases()[label][:-edge]
        for number in range(count):
            text = rng.choice(known)
            samples, voice = spoken(text, held_out, rng)
            if kokoro is not None and number < neural:
                with contextlib.suppress(TooShortOrLong):
                    samples, voice = _kokoro(kokoro, text, rng.choice(own), rng), "kokoro"
            shortest = 0.0 if label == "backchannel" and rng.random() < 0.5 else 0.2  # it is asked about while it lasts, too
            yield paused(samples, rng, shortest), label, voice


def _kokoro(kokoro: Kokoro, text: str, voice: str, rng: random.Random) -> Samples:
    import soxr

    found = soxr.resample(kokoro.speak(text, voice, speed=rng.uniform(0.85, 1.1)), 24_000, RATE)
    return np.asarray(found, dtype=np.float32)


def examples(name: str, echat: EChat, data: Path, clips: Path, kokoro: Kokoro | None) -> Iterator[Example]:
    """Those of a set."""
    rng = random.Random(f"turns {name}")
    if name == "train":
        users = rng.sample(list(read_lists(data / "user")), COUNTS["user"])
        neural = [r for r in read_lists(data / "neural") if r["key"].endswith("_0") and r["txt"] != texts.NOT_ENGLISH]
        recordings = [(record["wav"], "synthetic") for record in users]
        recordings += [(record["wav"], "neural") for record in rng.sample(neural, min(len(neural), COUNTS["neural"]))]
    else:
        held_out = read_list(data / "heldout" / "new_voices.jsonl") if name == "report" else []
        recordings = [(record["wav"], "synthetic") for record in held_out[:80]]
    for source in ("kathleen", "coffee"):
        own = [clip for clip in people.read_clips(source, (name,)) if clip.words or source == "coffee"]
        rng.shuffle(own)
        recordings += [(str(clip.path(clips)), source) for clip in own[: COUNTS["kathleen"]]]
    for wav, source in recordings:
        samples = build.read(Path(wav))
        yield from both(samples, source, echat, rng, share=1.0 if name != "train" else 0.8)
    if name == "report":
        return
    held_out = name == "choice"
    sentences = texts.training_user_sentences()
    few = 8 if held_out else 1
    for _ in range(COUNTS["unfinished"] // few):
        text = unfinished(rng.choice(sentences)[0], rng)
        if text is not None:
            samples, _ = spoken(text, held_out, rng)
            yield paused(samples, rng), "incomplete", "unfinished"
    yield from said_phrases(held_out, COUNTS["phrases"] // few, kokoro, COUNTS["neural_phrases"] // (2 if held_out else 1), rng)


def frames(echat: EChat, sounds: Sequence[Samples]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The encoder's frames, those of the last four seconds [n, `LAST_FRAMES`, E] in float16, and how many there are."""
    out = np.zeros(
        (len(sounds), LAST_FRAMES, len(echat.model.config.encoder_layers) * echat.model.config.encoder.dim), np.float16
    )
    counts = np.zeros(len(sounds), np.int64)
    log_mel = LogMel(echat.model.config.encoder.mels)
    for n, samples in enumerate(sounds):
        mel = log_mel(samples)
        with torch.inference_mode():
            layers, lengths = echat.model.encode(mel[None].to(echat.model.dtype), torch.tensor([len(mel)]))
        found = torch.cat(layers, dim=2)[0, : int(lengths[0])][-LAST_FRAMES:].float().numpy()
        out[n, : len(found)] = found
        counts[n] = len(found)
    return out, counts


def make_data(echat: EChat, data: Path, out: Path, clips: Path, kokoro_folder: Path | None) -> None:
    """``out/SET.npz`` (frames, lengths, labels, sources) and, but for training, ``out/SET_sounds.npz``. Sets that are there are left alone."""
    kokoro = None if kokoro_folder is None else Kokoro(kokoro_folder)
    build_sounds = build.Sounds(clips)
    out.mkdir(parents=True, exist_ok=True)
    for name in SETS:
        path = out / f"{name}.npz"
        if path.exists():
            continue
        rng = random.Random(f"variants {name}")
        made = list(examples(name, echat, data, clips, kokoro))
        if name == "train":
            made = [
                (augment.vary(sound, build_sounds.noises, rng) if rng.random() < 0.5 else sound, label, source)
                for sound, label, source in made
            ]
        sounds = [sound[-LONGEST:] for sound, _, _ in made]
        kept, counts = frames(echat, sounds)
        numbers = np.array([LABELS.index(label) for _, label, _ in made])
        np.savez(path, frames=kept, lengths=counts, labels=numbers, sources=np.array([source for _, _, source in made]))
        if name != "train":
            np.savez(out / f"{name}_sounds.npz", *sounds)
        print(name, {label: int((numbers == n).sum()) for n, label in enumerate(LABELS)}, flush=True)


# Training ---------------------------------------------------------------------------------------------------------------------------


@dataclass
class Set:
    """Kept frames of a set."""

    frames: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    sources: list[str]

    @classmethod
    def read(cls, path: Path) -> Set:
        with np.load(path) as found:
            return cls(
                torch.from_numpy(found["frames"]),
                torch.from_numpy(found["lengths"]),
                torch.from_numpy(found["labels"]),
                [str(source) for source in found["sources"]],
            )

    def logits(self, head: TurnHead, rows: torch.Tensor) -> torch.Tensor:
        return head([self.frames[rows].float()], self.lengths[rows])


def train(sets: dict[str, Set], seed: int = 0) -> tuple[TurnHead, dict[str, float]]:
    """The head of the epoch that is best on the choice set, by balanced accuracy."""
    torch.manual_seed(seed)
    own = sets["train"]
    head = TurnHead(own.frames.shape[2])
    counts = torch.bincount(own.labels, minlength=len(LABELS)).float()
    weight = (counts.sum() / counts / len(LABELS)).sqrt()
    steps = EPOCHS * -(-len(own.labels) // BATCH)
    optimizer = torch.optim.AdamW(head.parameters(), lr=RATE_OF_LEARNING, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE_OF_LEARNING, total_steps=steps)
    best: tuple[float, dict[str, torch.Tensor], dict[str, float]] | None = None
    for epoch in range(EPOCHS):
        head.train()
        for rows in torch.randperm(len(own.labels)).split(BATCH):
            loss = F.cross_entropy(own.logits(head, rows), own.labels[rows], weight=weight, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        found = scores(probabilities(head, sets["choice"]), sets["choice"])
        print(epoch, json.dumps({name: round(value, 3) for name, value in found.items()}), flush=True)
        if best is None or found["balanced"] > best[0]:
            best = found["balanced"], {k: v.clone() for k, v in head.state_dict().items()}, found
    assert best is not None
    head.load_state_dict(best[1])
    return head.eval(), best[2]


@torch.inference_mode()
def probabilities(head: TurnHead, some: Set) -> np.ndarray[Any, Any]:
    head.eval()
    rows = torch.arange(len(some.labels)).split(BATCH)
    return torch.cat([some.logits(head, part) for part in rows]).softmax(dim=1).numpy()


def scores(found: np.ndarray[Any, Any], some: Set) -> dict[str, float]:
    """Recall of each label, their mean, and recall of complete and incomplete for each source of people."""
    wanted, best = some.labels.numpy(), found.argmax(axis=1)
    out = {label: float((best[wanted == n] == n).mean()) for n, label in enumerate(LABELS) if (wanted == n).any()}
    out["balanced"] = float(np.mean(list(out.values())))
    for source in ("kathleen", "coffee"):
        own = np.array([s == source for s in some.sources])
        for n in (0, 1):
            rows = own & (wanted == n)
            if rows.any():
                out[f"{source}_{LABELS[n]}"] = float((best[rows] == n).mean())
    return out


def add_head(folder: Path, head: TurnHead) -> None:
    """Write the head into a checkpoint folder of one file; the other weights stay as they are stored."""
    path, config = folder / "model.safetensors", folder / "config.yaml"
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = {name: tensor for name, tensor in load_file(path).items() if not name.startswith("turn.")}
    tensors |= {f"turn.{name}": tensor.half().contiguous() for name, tensor in head.state_dict().items()}
    save_file(tensors, path.with_suffix(".new"), metadata=metadata)
    path.with_suffix(".new").replace(path)
    path.chmod(0o644)
    known = load_config(config)
    known = dataclasses.replace(known, adapter=dataclasses.replace(known.adapter, turn=head.labels))
    config.write_text(config_io.to_yaml(known), encoding="utf-8")


def recalls(finished: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> dict[str, float]:
    """Share of complete and incomplete turns that a probability of having finished puts on the right side of a half."""
    right = {"complete": finished[wanted == 0] >= 0.5, "incomplete": finished[wanted == 1] < 0.5}
    return {label: float(some.mean()) for label, some in right.items() if len(some)}


def measure(echat: EChat, out: Path, name: str) -> dict[str, Any]:
    """The checkpoint's head and smart-turn on the same sounds: recall of complete turns, and of incomplete ones."""
    from osum_echat.serving.vad import TurnModels

    assert echat.model.turn is not None, "this checkpoint has no turn head"
    some = Set.read(out / f"{name}.npz")
    with np.load(out / f"{name}_sounds.npz") as kept:
        sounds = [kept[key] for key in kept.files]
    other = TurnModels.load().end_of_turn
    head = np.concatenate([torch.softmax(_logits(echat, sound), 1).numpy() for sound in sounds])
    found: dict[str, Any] = {"head": scores(head, some)}
    if other is not None:
        wanted = some.labels.numpy()
        found["smart-turn"] = recalls(np.array([other(sound) for sound in sounds]), wanted)
        found["head as smart-turn is used"] = recalls(head[:, 0] + head[:, 2], wanted)
    return found


def _logits(echat: EChat, sound: Samples) -> torch.Tensor:
    [heard] = echat.hear([(sound, RATE)])
    assert heard.turn_logits_NC is not None
    return heard.turn_logits_NC


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("data", "train", "measure"))
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("out/mini/turn_head"))
    parser.add_argument("--data", type=Path, default=Path("out/mini/data"))
    parser.add_argument("--people", type=Path)
    parser.add_argument(
        "--kokoro", type=Path, help="folder of the neural voices' model (`kokoro.fetch`); without it, engines only"
    )
    parser.add_argument("--set", choices=SETS[1:], default="report")
    arguments = parser.parse_args()
    try:
        if arguments.what == "train":
            head, found = train({name: Set.read(arguments.out / f"{name}.npz") for name in ("train", "choice")})
            add_head(arguments.checkpoint, head)
            print(json.dumps(found))
            return 0
        echat = EChat.load(arguments.checkpoint)
        if arguments.what == "data":
            make_data(echat, arguments.data, arguments.out, people.folder(arguments.people), arguments.kokoro)
        else:
            print(json.dumps(measure(echat, arguments.out, arguments.set)))
    except ValueError as error:
        print(f"turn_head: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
