"""`osum-echat data doctor LIST`: everything that is wrong with a set, without training on it.

Reads every record and decodes every recording as the loader does, and tells: faults by file, line and key; duplicate
keys; what tars and lists of a combined set do not agree on; durations; how many samples each task has, and which
labels. Writes ``report.json`` and ``report.png`` and ends with 0 (nothing found), 1 (something found) or 2 (the list
cannot be read).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from osum_echat.audio.features import HOP
from osum_echat.audio.io import SAMPLE_RATE, AudioError, duration, read
from osum_echat.data import paths
from osum_echat.data.config import LimitConfig, ProcessingConfig, StreamConfig
from osum_echat.data.drops import Drop
from osum_echat.data.label_rules import LABEL_RULES
from osum_echat.data.lists import Stream
from osum_echat.data.plain_tokenizer import PlainTokenizer, plain_vocabulary
from osum_echat.data.processing import Processed, Processor, check_limits
from osum_echat.data.sampling import Share
from osum_echat.data.sources import ListItem, Source
from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.record import Record, RecordError
from osum_echat.dialogue.tokens import Tokenizer
from osum_echat.dialogue.vocabulary import Vocabulary

_DISAGREEMENTS = ("not_in_list", "missing_in_tar")
_SHOWN = 50  # faults that are printed; all are in report.json
_JOBS_PER_WORKER = 8


@dataclass
class Findings:
    """What was seen. Lengths are lists, for histograms.

    Attributes:
        tasks: samples by task; labels: by task and tag (or by tag name for what ``extra`` says).
        seconds: of every recording; label_lengths: characters; codes: speech codes of every sample that has some.
        keys: places (file, line) of each key.
    """

    samples: int = 0
    faults: list[Drop] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    labels: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    seconds: list[float] = field(default_factory=list)
    label_lengths: list[int] = field(default_factory=list)
    codes: list[int] = field(default_factory=list)
    keys: dict[str, list[tuple[str, int]]] = field(default_factory=lambda: defaultdict(list))

    def add(self, other: Findings) -> None:
        self.samples += other.samples
        self.faults += other.faults
        self.notes += other.notes
        self.tasks += other.tasks
        for name, counts in other.labels.items():
            self.labels[name] += counts
        for name, places in other.keys.items():
            self.keys[name] += places
        self.seconds += other.seconds
        self.label_lengths += other.label_lengths
        self.codes += other.codes

    @property
    def duplicates(self) -> dict[str, list[tuple[str, int]]]:
        """Keys that several records have, with their places."""
        return {key: places for key, places in self.keys.items() if len(places) > 1}

    @property
    def clean(self) -> bool:
        return not self.faults and not self.duplicates

    def summary(self) -> dict[str, Any]:
        """Plain data for report.json."""
        seconds = np.asarray(self.seconds or [0.0])
        reasons = Counter(fault.reason for fault in self.faults)
        return {
            "samples": self.samples,
            "usable": sum(self.tasks.values()),
            "faults_by_reason": dict(reasons.most_common()),
            "tar_and_list_disagree": sum(reasons[name] for name in _DISAGREEMENTS),
            "duplicate_keys": len(self.duplicates),
            "assumed": dict(self.notes),
            "tasks": dict(self.tasks.most_common()),
            "labels": {name: dict(counts.most_common()) for name, counts in sorted(self.labels.items())},
            "recordings": len(self.seconds),
            "hours": float(seconds.sum() / 3600),
            "seconds": {f"p{p}": float(np.percentile(seconds, p)) for p in (0, 5, 50, 95, 100)},
            "label_characters_mean": float(np.mean(self.label_lengths or [0])),
            "speech_codes_mean": float(np.mean(self.codes or [0])),
        }


@dataclass
class Checker:
    """Examines lines of a list; in a form that worker processes take.

    Attributes:
        decode: False: only headers of recordings are read.
        limits: None: no filter on lengths (which needs the real tokenizer).
    """

    source: Source
    processor: Processor
    decode: bool
    limits: LimitConfig | None
    max_seconds: float

    def __call__(self, lines: range) -> Findings:
        found = Findings()
        for line in lines:
            for item in self.source.read(Share(line)):
                self._item(item, found)
        return found

    def _item(self, item: ListItem, found: Findings) -> None:
        for problem in item.problems:
            found.faults.append(_fault(problem, item))
        if item.fields is None:
            found.samples += any(problem.reason not in _DISAGREEMENTS for problem in item.problems)
            return
        found.samples += 1
        if item.problems:
            return
        key = str(item.fields.get("key", ""))
        found.keys[key].append((item.source, item.number))
        try:
            record = item.record()
            found.notes.update(f"{item.source}: {note}" for note in record.notes)
            processed = self.processor(record, random.Random(0))
            seconds = list(self._durations(record, processed))
            if self.limits is not None:
                check_limits(processed, [s * SAMPLE_RATE / HOP for s in seconds], self.limits)
        except RecordError as error:
            found.faults.append(_fault(error, item))
            return
        found.tasks[processed.task] += 1
        found.seconds += seconds
        found.label_lengths.append(len(processed.label))
        if processed.sample.speech:
            found.codes.append(len(processed.sample.speech))
        for name, value in processed.tags.items():
            found.labels[name][value] += 1

    def _durations(self, record: Record, processed: Processed) -> Iterator[float]:
        for n, wav in enumerate(processed.recordings):
            if wav is None:
                raise record.error("audio_missing", f"task {processed.task} needs a recording, the record has none")
            current = n == len(processed.recordings) - 1
            try:
                if isinstance(wav, str):
                    path = self.source.resolve(wav)
                    wav = paths.read_bytes(path) if paths.is_url(path) else path
                if self.decode:
                    start, end = (record.start, record.end) if current else (None, None)
                    yield read(wav, start, end, max_seconds=self.max_seconds).seconds
                else:
                    yield duration(wav)
            except AudioError as error:
                raise record.error(f"audio_{error.reason}", str(error)) from error
            except OSError as error:
                raise record.error("audio_missing", str(error)) from error


def examine(
    path: str,
    label_rules: str = "language_think",
    tokenizer: Tokenizer | None = None,
    vocab: Vocabulary | None = None,
    decode: bool = True,
    workers: int = 0,
    limits: LimitConfig | None = None,
    progress: bool = False,
) -> Findings:
    """Read a whole list (or data yaml).

    Args:
        tokenizer, vocab: with them, samples that ``limits`` would keep out are told as well; without, lengths in ids
            are not judged.
        workers: processes; 0: in this one.
    """
    settings = ProcessingConfig(label_rules=label_rules, tag_alone_rate=0.0)
    processor = Processor(settings, tokenizer or PlainTokenizer(), vocab or plain_vocabulary(), Dialect(refuse_unlisted=True))
    judged = (limits or LimitConfig()) if tokenizer is not None else None
    max_seconds = (limits or LimitConfig()).max_audio_seconds
    found = Findings()
    for source in Stream("all", StreamConfig(path)).sources:
        check = Checker(source, processor, decode, judged, max_seconds)
        step = max(1, -(-len(source) // (_JOBS_PER_WORKER * max(1, workers))))
        jobs = [range(start, min(start + step, len(source))) for start in range(0, len(source), step)]
        for part in tqdm(_run(check, jobs, workers), total=len(jobs), desc=source.form, disable=not progress):
            found.add(part)
    return found


def _run(check: Checker, jobs: Sequence[range], workers: int) -> Iterator[Findings]:
    if workers < 1 or len(jobs) < 2:
        yield from map(check, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(check, jobs)


def _fault(error: RecordError, item: ListItem) -> Drop:
    drop = Drop.of(error)
    return Drop(
        drop.key or str((item.fields or {}).get("key", "")), drop.file or item.source, drop.line, drop.reason, drop.detail
    )


def draw(found: Findings, path: Path) -> None:
    """Samples by task, labels by tag, and histograms of durations, label lengths and speech codes, as one PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tags = sorted(found.labels)
    figure, axes = plt.subplots(2, max(3, len(tags)), figsize=(5 * max(3, len(tags)), 10), squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)

    def bars(axis: Any, counts: Counter[str], title: str) -> None:
        names, numbers = zip(*counts.most_common(25), strict=True)
        axis.barh(range(len(names)), numbers)
        axis.set_yticks(range(len(names)), [_latin(name) for name in names], fontsize=7)
        axis.invert_yaxis()
        axis.set(title=title, visible=True)

    for axis, values, title in (
        (axes[0, 1], found.seconds, "seconds of a recording"),
        (axes[0, 2], found.label_lengths, "characters of a label"),
    ):
        if values:
            axis.hist(values, bins=min(50, max(5, len(values) // 4)))
            axis.set(title=title, visible=True)
    if found.tasks:
        bars(axes[0, 0], found.tasks, "samples by task")
    for axis, tag in zip(axes[1], tags, strict=False):
        bars(axis, found.labels[tag], f"labels: {tag}")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def _latin(text: str) -> str:
    """Text that the plot's own font can show; other letters as code points."""
    return "".join(c if ord(c) < 0x250 else f"\\u{ord(c):04x}" for c in text)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Command line of the doctor; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog=prog or "osum-echat data doctor", description="Examine a data list without training on it."
    )
    parser.add_argument("list", help="raw, shard or combine list, or a data yaml")
    parser.add_argument("--out", help="folder for report.json and report.png (default: neither is written)")
    parser.add_argument(
        "--label-rules",
        default="language_think",
        choices=list(LABEL_RULES),
        help="how labels are read: of the published checkpoint with this kind of think (default: %(default)s)",
    )
    parser.add_argument("--tokenizer", help="tokenizer folder or hub name: judge lengths in ids, too")
    parser.add_argument("--speech-codes", type=int, default=4096, help="codes of the speech tokenizer (default: %(default)s)")
    parser.add_argument("--headers-only", action="store_true", help="do not decode recordings (faster; finds no NaN)")
    parser.add_argument("--workers", type=int, default=0, help="processes (default: %(default)s, this one)")
    args = parser.parse_args(argv)
    tokenizer, vocab = None, plain_vocabulary(args.speech_codes)
    if args.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        vocab = Vocabulary(max(len(tokenizer), Vocabulary().text_size), tokenizer.eos_token_id, None, args.speech_codes)
    try:
        found = examine(
            args.list, args.label_rules, tokenizer, vocab, not args.headers_only, args.workers, progress=sys.stderr.isatty()
        )
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{parser.prog}: {error}\n")
        return 2
    summary = found.summary()
    sys.stdout.write("\n".join(_lines(found, summary)) + "\n")
    if args.out:
        folder = Path(args.out)
        folder.mkdir(parents=True, exist_ok=True)
        faults = [asdict(fault) for fault in found.faults]
        duplicates = {key: [f"{file}:{line}" for file, line in places] for key, places in found.duplicates.items()}
        report = {"list": args.list, **summary, "faults": faults, "duplicates": duplicates}
        (folder / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=1), encoding="utf-8")
        draw(found, folder / "report.png")
        sys.stdout.write(f"written: {folder / 'report.json'}, {folder / 'report.png'}\n")
    return 0 if found.clean else 1


def _lines(found: Findings, summary: dict[str, Any]) -> Iterator[str]:
    for fault in found.faults[:_SHOWN]:
        yield str(fault)
    if len(found.faults) > _SHOWN:
        yield f"... and {len(found.faults) - _SHOWN} more (all of them in report.json, with --out)"
    for key, places in list(found.duplicates.items())[:_SHOWN]:
        yield f"key {key!r} {len(places)} times: " + ", ".join(f"{file}:{line}" if line else file for file, line in places[:5])
    for note, count in found.notes.items():
        yield f"{note} ({count} times)"
    spread = summary["seconds"]
    yield f"{summary['samples']} samples, {summary['usable']} usable, {summary['hours']:.2f} hours in {summary['recordings']} recordings"
    yield "seconds: " + ", ".join(f"{name} {value:.2f}" for name, value in spread.items())
    for task, count in found.tasks.most_common():
        yield f"  {count:7}  {task}"
    for name, counts in sorted(found.labels.items()):
        yield f"  {name}: " + ", ".join(f"{label} {count}" for label, count in counts.most_common(12))
    reasons = ", ".join(f"{reason} {count}" for reason, count in summary["faults_by_reason"].items()) or "none"
    yield f"faults: {reasons}; duplicate keys: {summary['duplicate_keys']}; tar and list disagree: {summary['tar_and_list_disagree']}"


if __name__ == "__main__":
    sys.exit(main())
