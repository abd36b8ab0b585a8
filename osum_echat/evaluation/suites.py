"""Suites: run the pipeline over a test set and count.

`hear_and_answer` asks for think and answer (with speech or without); one pass gives transcript, tags, think and reply. `understand` asks one
understanding task. `say` speaks texts. `judge_speech` lets judges listen. Every suite returns rows, one an item, and `summarise` makes
numbers of rows, so a report can show both.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import soxr

from osum_echat import metrics
from osum_echat.evaluation.judge import RATE, Dnsmos, Recogniser, Samples
from osum_echat.evaluation.sets import TAGS, Item
from osum_echat.pipeline import Ask, EChat, Reply

Progress = Callable[[str], None]


@dataclass
class Row:
    """What the model made of an item."""

    item: Item
    reply: Reply
    seconds: float = 0.0
    heard: str | None = None
    dnsmos: float | None = None

    @property
    def think(self) -> dict[str, str | None]:
        """Fields of a think that was parsed, else empty."""
        return {} if self.reply.think is None else {name: getattr(self.reply.think, name) for name in ("transcript", *TAGS)}

    @property
    def fits(self) -> bool | None:
        """Whether the answer is one that the set allows; None where it does not say."""
        if not self.item.replies:
            return None
        return metrics.normalize(self.reply.text) in {metrics.normalize(text) for text in self.item.replies}


@dataclass
class Summary:
    """Numbers of one set in percent (``dnsmos``: 1 to 5); ``confusions`` by tag."""

    name: str
    count: int
    values: dict[str, float] = field(default_factory=dict)
    confusions: dict[str, metrics.Confusion] = field(default_factory=dict)


def _ask_all(echat: EChat, asks: Sequence[Ask], items: Sequence[Item], progress: Progress | None, size: int = 16) -> list[Row]:
    rows: list[Row] = []
    for start in range(0, len(asks), size):
        began = time.perf_counter()
        replies = echat.batch(asks[start : start + size], size=size)
        each = (time.perf_counter() - began) / len(replies)
        rows += [Row(item, reply, each) for item, reply in zip(items[start : start + size], replies, strict=True)]
        if progress is not None:
            progress(f"{len(rows)}/{len(asks)}")
    return rows


def hear_and_answer(
    echat: EChat,
    items: Sequence[Item],
    speak: bool = False,
    seed: int = 0,
    progress: Progress | None = None,
    think: Literal["tag", "language"] = "tag",
) -> list[Row]:
    """Think, then answer each recording."""
    return _ask_all(echat, [Ask(wav=item.wav, think=think, speak=speak, seed=seed) for item in items], items, progress)


def understand(echat: EChat, items: Sequence[Item], task: str = "<TRANSCRIBE>", progress: Progress | None = None) -> list[Row]:
    """One understanding task for each recording."""
    return _ask_all(echat, [Ask(wav=item.wav, kind="understand", task=task) for item in items], items, progress)


def say(echat: EChat, items: Sequence[Item], seed: int = 0, progress: Progress | None = None) -> list[Row]:
    """Speak each item's text."""
    return _ask_all(echat, [Ask(text=item.txt, kind="speak", seed=seed) for item in items], items, progress)


def judge_speech(
    rows: Sequence[Row], recogniser: Recogniser | None, dnsmos: Dnsmos | None, progress: Progress | None = None
) -> None:
    """Let the judges listen to the rows' speech; rows without sound get an empty transcript."""
    for number, row in enumerate(rows, start=1):
        if row.reply.audio is None or len(row.reply.audio) < row.reply.sample_rate // 10:
            row.heard = ""
            continue
        samples = at_16k(row.reply)
        if recogniser is not None:
            row.heard = recogniser.transcribe(samples)
        if dnsmos is not None:
            row.dnsmos = dnsmos.overall(samples)
        if progress is not None and number % 20 == 0:
            progress(f"{number}/{len(rows)}")


def at_16k(reply: Reply) -> Samples:
    """The reply's sound at the judges' rate, its peak at half scale (a judge's score must not depend on the level)."""
    assert reply.audio is not None
    samples = np.asarray(soxr.resample(reply.audio, reply.sample_rate, RATE), dtype=np.float32)
    return samples * np.float32(0.5 / max(float(np.abs(samples).max(initial=0.0)), 1e-4))


def summarise_answers(name: str, rows: Sequence[Row]) -> Summary:
    """Transcript WER, tag accuracies, thinks that parse, answers that fit."""
    summary = Summary(name, len(rows))
    thinks = [row.think for row in rows]
    summary.values["wer"] = (
        100 * metrics.total_errors([r.item.txt for r in rows], [t.get("transcript") or "" for t in thinks]).rate
    )
    for tag in TAGS:
        known = [(row.item.tags[tag], think.get(tag)) for row, think in zip(rows, thinks, strict=True) if tag in row.item.tags]
        if known:
            found = metrics.confusion([true for true, _ in known], [said for _, said in known])
            summary.confusions[tag] = found
            summary.values[tag] = 100 * found.accuracy
    allowed = {tag: sorted({row.item.tags[tag] for row in rows if tag in row.item.tags}) for tag in TAGS}
    validity = metrics.think_validity([think or None for think in thinks], ("transcript", *TAGS), allowed)
    summary.values["think_parsed"] = 100 * validity.complete_rate
    ruled = [row.fits for row in rows if row.fits is not None]
    if ruled:
        summary.values["reply_fit"] = 100 * sum(ruled) / len(ruled)
    summary.values["seconds"] = float(np.mean([row.seconds for row in rows]))
    return summary


def summarise_natural(name: str, rows: Sequence[Row]) -> Summary:
    """Thinks in natural language: how many came to their end, their word errors against the one that is wanted, answers that fit."""
    summary = Summary(name, len(rows))
    thinks = [(row.reply.think.raw or "") if row.reply.think is not None else "" for row in rows]
    summary.values["think_closed"] = 100 * sum(map(bool, thinks)) / len(rows)
    wanted = [
        (str(row.item.extra["think_str"]), think)
        for row, think in zip(rows, thinks, strict=True)
        if "think_str" in row.item.extra
    ]
    if wanted:
        summary.values["think_wer"] = 100 * metrics.total_errors(*map(list, zip(*wanted, strict=True))).rate
    ruled = [row.fits for row in rows if row.fits is not None]
    if ruled:
        summary.values["reply_fit"] = 100 * sum(ruled) / len(ruled)
    return summary


def summarise_transcripts(name: str, rows: Sequence[Row]) -> Summary:
    """WER of the understanding task's own text."""
    errors = metrics.total_errors([r.item.txt for r in rows], [r.reply.text for r in rows])
    return Summary(name, len(rows), {"wer": 100 * errors.rate})


def summarise_speech(name: str, rows: Sequence[Row], said: Callable[[Row], str]) -> Summary:
    """What the judge heard against what was to be said; DNSMOS; how often speech was cut off."""
    summary = Summary(name, len(rows))
    summary.values["wer"] = 100 * metrics.total_errors([said(row) for row in rows], [row.heard or "" for row in rows]).rate
    scores = [row.dnsmos for row in rows if row.dnsmos is not None]
    if scores:
        summary.values["dnsmos"] = float(np.mean(scores))
    summary.values["cut_off"] = 100 * sum(row.reply.finish_reason != "stop" for row in rows) / len(rows)
    summary.values["speech_seconds"] = float(np.mean([len(row.reply.speech_tokens) / 25 for row in rows]))
    return summary
