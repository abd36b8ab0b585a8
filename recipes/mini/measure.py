"""What a checkpoint makes of people, and of earlier turns: the numbers behind ``people_*`` and ``reply_fit_*`` of the evaluation.

    python -m recipes.mini.measure people --checkpoint checkpoints/mini --set choice
    python -m recipes.mini.measure people --checkpoint checkpoints/mini --set report --limit 60
    python -m recipes.mini.measure turns  --checkpoint checkpoints/mini --data out/mini/data

The last line is one JSON object, in percent. `people` needs the recordings (README, "Recordings of people"). The set ``choice`` is for choosing a checkpoint
or a setting; ``report`` is looked at when nothing is chosen any more. ``--limit`` takes that many clips of each source, by the hash of their names, so that
a smaller set is always a part of a larger one.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from osum_echat import metrics
from osum_echat.audio.features import LogMel
from osum_echat.audio.io import to_mono_16k
from osum_echat.pipeline import Ask, EChat
from recipes.mini import dialogues, people
from recipes.mini.people import Clip
from recipes.mini.people.collect import rank

LONGEST = 12.0  # seconds: longer recordings are cut elsewhere
NEUTRAL_SOURCES = ("kathleen", "lj", "coffee")
UNSURE = ("unknown", "unsure", None)


@dataclass(frozen=True)
class Heard:
    """A clip, and what the think says of it (empty where it cannot be read); ``ctc``: the words of the CTC head alone."""

    clip: Clip
    words: str
    tags: dict[str, str | None]
    parsed: bool
    ctc: str


def choose(name: str, limit: int | None) -> list[Clip]:
    """Clips of a set: at most ``limit`` of each source."""
    out = []
    for source in people.SOURCES:
        clips = people.read_clips(source, (name,))
        out += sorted(clips, key=lambda clip: rank(clip.key))[:limit]
    return out


@torch.inference_mode()
def greedy_ctc(echat: EChat, samples: Any) -> str:
    """The best path of the CTC head as text, "" for a model without one."""
    model = echat.model
    if model.ctc is None:
        return ""
    feats_TF = LogMel(model.config.encoder.mels)(samples)
    audio = model.encode_audio(feats_TF[None].to(model.dtype), torch.tensor([len(feats_TF)]))
    assert audio.ctc_log_probs_NPC is not None
    return str(echat.tokenizer.decode(model.ctc.transcribe(audio.ctc_log_probs_NPC, audio.lengths_N)[0])).strip()


def hear(echat: EChat, clips: Sequence[Clip], folder: Path, size: int = 16) -> list[Heard]:
    """Let the model think about every clip of at most 12 s."""
    found = [(clip, to_mono_16k(clip.path(folder))) for clip in clips]
    found = [(clip, samples) for clip, samples in found if len(samples) <= LONGEST * 16_000]
    out = []
    for start in range(0, len(found), size):
        part = found[start : start + size]
        replies = echat.batch([Ask(wav=(samples, 16_000), think="tag") for _, samples in part], size=size)
        for (clip, samples), reply in zip(part, replies, strict=True):
            think = reply.think
            tags = {name: getattr(think, name, None) for name in ("gender", "age", "emotion", "event")}
            words = (think.transcript or "") if think is not None else ""
            out.append(Heard(clip, words, tags, think is not None, greedy_ctc(echat, samples)))
        print(f"\r{len(out)}/{len(found)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    return out


def word_error_rate(rows: Sequence[Heard], ctc: bool = False) -> float:
    said, heard = [row.clip.words for row in rows], [row.ctc if ctc else row.words for row in rows]
    return 100 * metrics.total_errors(said, heard).rate


def recall(rows: Sequence[Heard], ctc: bool = False) -> float:
    """Share of the words of the slots that are in the transcript, in percent; every word counts as often as it is wanted."""
    wanted = found = 0
    for row in rows:
        words = Counter(row.clip.slots.split())
        wanted += words.total()
        found += (words & Counter(metrics.normalize(row.ctc if ctc else row.words).split())).total()
    return 100 * found / max(wanted, 1)


def balanced_gender(rows: Sequence[Heard]) -> float:
    """Mean of the shares of women and of men that were called so, in percent."""
    shares = []
    for gender in ("female", "male"):
        some = [row for row in rows if row.clip.gender == gender]
        if some:
            shares.append(sum(row.tags["gender"] == gender for row in some) / len(some))
    return 100 * sum(shares) / max(len(shares), 1)


def people_numbers(rows: Sequence[Heard]) -> dict[str, float]:
    """The numbers of the issue, and those of each source."""
    by = {source: [row for row in rows if row.clip.source == source] for source in people.SOURCES}
    readers = by["kathleen"] + by["lj"]
    calm = [row for source in NEUTRAL_SOURCES for row in by[source]]
    crowds = by["coffee"] + by["wakewords"]
    out: dict[str, float] = {}
    if readers:
        out |= {"people_read_wer": word_error_rate(readers), "ctc_read_wer": word_error_rate(readers, ctc=True)}
    for source in ("kathleen", "lj"):
        if by[source]:
            out |= {f"{source}_wer": word_error_rate(by[source]), f"{source}_ctc_wer": word_error_rate(by[source], ctc=True)}
    out |= {"people_order_recall": recall(by["coffee"]), "ctc_order_recall": recall(by["coffee"], ctc=True)}
    out |= {"people_gender": balanced_gender(crowds)}
    if calm:
        out["people_neutral"] = 100 * sum(row.tags["emotion"] == "neutral" for row in calm) / len(calm)
        out["people_unsure"] = 100 * sum(row.tags["emotion"] in UNSURE for row in calm) / len(calm)
    out["people_unparsed"] = 100 * sum(not row.parsed for row in rows) / max(len(rows), 1)
    return out


# Earlier turns ----------------------------------------------------------------------------------------------------------------------


def fit_turns(echat: EChat, data: Path, limit: int | None = None, think: bool = True) -> dict[str, float]:
    """Held-out conversations (`heldout/dialogues.jsonl` of `recipes.mini.synthesize`), answered turn after turn; the last answer must use the fact.

    ``without_past``: the same when the last turn is asked alone, which is what a lucky guess comes to.
    """
    lines = (data / "heldout" / "dialogues.jsonl").read_text(encoding="utf-8").splitlines()[:limit]
    wanted = dialogues.held_out_dialogues()
    fits = alone = 0
    for line, dialogue in zip(lines, wanted, strict=False):
        session = echat.session()
        reply = None
        for turn in json.loads(line)["turns"]:
            reply = session.chat(turn["wav"], think="tag" if think else None)
        assert reply is not None, "a conversation has turns"
        fits += dialogue.fits(reply.text)
        alone += dialogue.fits(echat.chat(json.loads(line)["turns"][-1]["wav"], think="tag" if think else None).text)
    count = max(len(lines), 1)
    return {"reply_fit_turns": 100 * fits / count, "without_past": 100 * alone / count, "dialogues": len(lines)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("people", "turns"))
    parser.add_argument("--checkpoint", default="checkpoints/mini")
    parser.add_argument("--set", choices=("choice", "report"), default="choice", dest="name")
    parser.add_argument("--people", type=Path, help=f"folder of the recordings (default: ${people.FOLDER_VARIABLE})")
    parser.add_argument("--data", type=Path, default=Path("out/mini/data"), help="folder of recipes.mini.synthesize")
    parser.add_argument("--limit", type=int, help="clips of each source, or conversations")
    parser.add_argument("--rows", type=Path, help="write what was heard, one JSON a line")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    try:
        echat = EChat.load(arguments.checkpoint, token2wav=None)
        if arguments.what == "turns":
            print(json.dumps(fit_turns(echat, arguments.data, arguments.limit)))
            return 0
        rows = hear(echat, choose(arguments.name, arguments.limit), people.folder(arguments.people))
    except ValueError as error:
        print(f"measure: {error}", file=sys.stderr)
        return 2
    if arguments.rows is not None:
        lines = [
            json.dumps({"key": r.clip.key, "said": r.clip.words or r.clip.slots, "words": r.words, "ctc": r.ctc, **r.tags})
            for r in rows
        ]
        arguments.rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
    counts = Counter(row.clip.source for row in rows)
    print(f"{arguments.name}: {dict(counts)}; emotions {dict(Counter(row.tags['emotion'] for row in rows))}")
    print(json.dumps({name: round(value, 2) for name, value in people_numbers(rows).items()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
