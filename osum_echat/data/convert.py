"""Raw to shard to combine and back, without losing a byte of audio or a field of a record.

One job makes one output (a tar, a side list, a part of a raw list), so jobs run in parallel, a stopped conversion goes
on where it was, and the result does not depend on how many ran at once. Every file is written beside its name
(``.tmp``) and renamed when it is whole; a note ``.<name>.job.json`` says that a job is done (and, for other tools, an
empty ``.finished`` beside each tar). What cannot be converted is left out, listed in ``dropped.jsonl`` and counted.

    python -m osum_echat.data.convert --to shard data/raw/data.list data/shard
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import soundfile
from tqdm import tqdm

from osum_echat.audio.io import AudioError, to_mono_16k
from osum_echat.data import paths
from osum_echat.data.drops import Drop
from osum_echat.data.members import AUDIO, ONLY_META, audio_fields, audio_member, to_members
from osum_echat.data.sampling import Share
from osum_echat.data.sources import CombineSource, ListItem, RawSource, ShardSource, Source, open_source
from osum_echat.data.tar import TarWriter
from osum_echat.dialogue.record import RecordError

Form = Literal["raw", "shard", "combine"]
LIST_NAMES: dict[str, str] = {"raw": "data.list", "shard": "shards_list.txt", "combine": "combines_list.txt"}
_MANIFEST = ".convert.json"
_CONTENT = ((b"RIFF", "wav"), (b"RF64", "wav"), (b"fLaC", "flac"), (b"OggS", "ogg"), (b"ID3", "mp3"), (b"\xff\xfb", "mp3"))


@dataclass
class Job:
    """Lines ``[first, last)`` of a source, which become the output ``stem``."""

    first: int
    last: int
    stem: str


@dataclass
class Result:
    """What a conversion did. ``path`` is the list to train with."""

    path: str
    written: int = 0
    skipped_jobs: int = 0
    drops: list[Drop] = field(default_factory=list)

    def text(self) -> str:
        reasons = Counter(drop.reason for drop in self.drops)
        left_out = ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items())) or "none"
        return f"{self.written} records written, left out: {left_out}; list: {self.path}"


def convert(
    source: str | Source,
    out_dir: str,
    to: Form,
    prefix: str = "shards",
    per_tar: int = 1000,
    workers: int | None = None,
    overwrite: bool = False,
    rewrite_16k: bool = False,
    progress: bool = True,
) -> Result:
    """Write the records of a list in another form.

    Args:
        source: raw, shard or combine list (or one that is open).
        out_dir: folder for the new list and its files.
        prefix, per_tar: names (``<prefix>_%09d.tar``) and size of new tars; a tar made from a tar keeps its name and
            records.
        workers: processes; default one per core. The result does not depend on it.
        overwrite: do finished jobs again.
        rewrite_16k: store recordings as 16 kHz, 16-bit, mono wav instead of their own bytes.

    Raises:
        ValueError: the folder holds the results of another conversion, or this pair of forms needs a step between.
    """
    source = open_source(source) if isinstance(source, str) else source
    if to == source.form:
        raise ValueError(f"{source.name} is a {source.form} list already")
    if to == "combine" and source.form != "shard":
        raise ValueError(f"combined sets are made of shards: convert {source.name} to shard first")
    os.makedirs(out_dir, exist_ok=True)
    settings = {"from": os.path.abspath(source.name), "to": to, "prefix": prefix, "per_tar": per_tar, "rewrite_16k": rewrite_16k}
    if not paths.is_url(source.name):
        stat = os.stat(source.name)
        settings["stamp"] = [stat.st_size, stat.st_mtime_ns]
    _check_manifest(Path(out_dir) / _MANIFEST, settings, overwrite)
    jobs = _jobs(source, prefix, per_tar)
    work = {"shard": _to_tar, "combine": _to_side_list, "raw": _to_raw_part}[to]
    run = _Run(work, source, out_dir, overwrite, rewrite_16k)
    result = Result(os.path.join(out_dir, LIST_NAMES[to]))
    for written, skipped, drops in tqdm(
        _map(run, jobs, workers), total=len(jobs), desc=f"to {to}", disable=not progress, unit="file"
    ):
        result.written += written
        result.skipped_jobs += skipped
        result.drops += drops
    _finish(to, source, out_dir, jobs, result.path)
    _write(Path(out_dir) / "dropped.jsonl", (json.dumps(asdict(d), ensure_ascii=False) for d in result.drops))
    if not result.drops:
        os.unlink(os.path.join(out_dir, "dropped.jsonl"))
    return result


def _check_manifest(path: Path, settings: dict[str, Any], overwrite: bool) -> None:
    if path.exists() and not overwrite:
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [f"{k}: {before.get(k)!r}, now {v!r}" for k, v in settings.items() if before.get(k) != v]
        if changed:
            raise ValueError(
                f"{path.parent} holds another conversion ({'; '.join(changed)}): choose another folder, or --overwrite"
            )
    _write(path, [json.dumps(settings, ensure_ascii=False)])


def _jobs(source: Source, prefix: str, per_tar: int) -> list[Job]:
    if isinstance(source, RawSource):
        starts = range(0, len(source), per_tar)
        return [Job(start, min(start + per_tar, len(source)), f"{prefix}_{n:09d}") for n, start in enumerate(starts)]
    stems = [os.path.splitext(os.path.basename(_archive(source, line)))[0] for line in range(len(source))]
    double = [stem for stem, count in Counter(stems).items() if count > 1]
    if double:
        raise ValueError(f"{source.name} names several tars called {', '.join(double[:5])}.tar: rename them, names must differ")
    return [Job(n, n + 1, stem) for n, stem in enumerate(stems)]


def _archive(source: Source, line: int) -> str:
    assert isinstance(source, (ShardSource, CombineSource))
    return source.path(line) if isinstance(source, ShardSource) else source.pair(line)[1]


@dataclass
class _Run:
    """One conversion, in a form that worker processes take."""

    work: Callable[[_Run, Job], tuple[int, list[Drop]]]
    source: Source
    out_dir: str
    overwrite: bool
    rewrite_16k: bool

    def path(self, name: str) -> Path:
        return Path(self.out_dir) / name

    def __call__(self, job: Job) -> tuple[int, int, list[Drop]]:
        """(records written, 1 when it was done before, what was left out)."""
        notes = self.path(f".{job.stem}.job.json")
        if notes.exists() and not self.overwrite:
            past = json.loads(notes.read_text(encoding="utf-8"))
            return past["written"], 1, [Drop(**drop) for drop in past["drops"]]
        written, drops = self.work(self, job)
        _write(notes, [json.dumps({"written": written, "drops": [asdict(d) for d in drops]}, ensure_ascii=False)])
        return written, 0, drops

    def items(self, job: Job) -> Iterator[ListItem]:
        for line in range(job.first, job.last):
            yield from self.source.read(Share(line))


def _map(run: _Run, jobs: Sequence[Job], workers: int | None) -> Iterator[tuple[int, int, list[Drop]]]:
    workers = min(workers if workers is not None else os.cpu_count() or 1, len(jobs))
    if workers <= 1:
        yield from map(run, jobs)
        return
    with ProcessPoolExecutor(workers) as pool:
        yield from pool.map(run, jobs)


def _usable(run: _Run, job: Job, drops: list[Drop]) -> Iterator[tuple[ListItem, dict[str, Any], dict[str, tuple[str, bytes]]]]:
    """Items of a job with their record and audio; what cannot be used goes to ``drops``."""
    for item in run.items(job):
        try:
            record, audio = _load(run, item)
        except (RecordError, AudioError) as error:
            drops.append(_drop(error, item))
            continue
        if record is None:
            drops += [_drop(problem, item) for problem in item.problems]
        else:
            yield item, record, audio


def _to_tar(run: _Run, job: Job) -> tuple[int, list[Drop]]:
    path, written = run.path(f"{job.stem}.tar"), 0
    drops: list[Drop] = []
    keys: set[str] = set()
    with TarWriter(f"{path}.tmp") as tar:
        for _, record, audio in _usable(run, job, drops):
            key = name = str(record["key"])
            copies = 1
            while name in keys:  # two groups of one key side by side would be read as one; the record keeps its key
                copies += 1
                name = f"{key}#{copies}"
            keys.add(name)
            tar.add(name, to_members(name, record, audio))
            written += 1
    os.replace(f"{path}.tmp", path)
    _write(run.path(f"{job.stem}.tar.finished"), [])
    return written, drops


def _to_side_list(run: _Run, job: Job) -> tuple[int, list[Drop]]:
    lines, drops = [], []
    for item in run.items(job):
        if item.fields is None or item.problems:
            drops += [_drop(problem, item) for problem in item.problems]
            continue
        record = item.fields
        front = {"key": item.name} | {name: record[name] for name in ("txt", "task", "extra") if name in record}
        if isinstance(record.get("wav"), bytes):
            front["wav"] = ONLY_META
        text = {name: value for name, value in record.items() if not isinstance(value, bytes) and name != "key"}
        lines.append(json.dumps({**front, "tar_path_key": job.stem, **text}, ensure_ascii=False))
    _write(run.path(f"{job.stem}.list"), lines)
    return len(lines), drops


def _to_raw_part(run: _Run, job: Job) -> tuple[int, list[Drop]]:
    lines: list[str] = []
    drops: list[Drop] = []
    folder = run.path("wav")
    for item, record, audio in _usable(run, job, drops):
        for name, (kind, data) in audio.items():
            turn = name.removeprefix("wav")
            path = folder / job.stem / f"{_file_name(str(record['key']))}_{item.index:06d}{turn}.{kind}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.with_name(path.name + ".tmp").write_bytes(data)
            os.replace(path.with_name(path.name + ".tmp"), path)
            record[name] = str(path)
        lines.append(json.dumps(record, ensure_ascii=False))
    _write(run.path(f".{job.stem}.part"), lines)
    return len(lines), drops


def _file_name(key: str) -> str:
    """A key as a safe file name; the record keeps the key itself."""
    return re.sub(r"[^\w.-]+", "_", key)[:150].lstrip(".") or "_"


def _load(run: _Run, item: ListItem) -> tuple[dict[str, Any] | None, dict[str, tuple[str, bytes]]]:
    """The record of an item with its recordings as (format, bytes); None for an item that only tells problems."""
    if item.fields is None or item.problems:
        return None, {}
    item.record()  # a record that no reader would take is not carried on
    record = dict(item.fields)
    audio: dict[str, tuple[str, bytes]] = {}
    for name in audio_fields(record):
        value = record[name]
        data = value if isinstance(value, bytes) else _read(run.source.resolve, value, record, item)
        if name == "wav" and ("start" in record or "end" in record):
            data = _cut(data, record.pop("start", None), record.pop("end", None))
        if run.rewrite_16k:
            buffer = io.BytesIO()
            soundfile.write(buffer, to_mono_16k(data), 16_000, format="WAV", subtype="PCM_16")
            data = buffer.getvalue()
        audio[name] = (_kind(data, value if isinstance(value, str) else audio_member(item.members, name)), data)
    return record, audio


def _read(resolve: paths.Resolver, path: str, record: dict[str, Any], item: ListItem) -> bytes:
    try:
        return paths.read_bytes(resolve(path))
    except OSError as error:
        raise RecordError("audio_missing", str(error), item.source, item.number, str(record["key"])) from error


def _kind(data: bytes, name: str) -> str:
    """Format of a recording: the suffix of its path (or its member's name) when that is one of `AUDIO`, else what its
    first bytes say."""
    _, dot, suffix = name.rpartition(".")
    kind = suffix.lower() if dot else suffix.partition("_")[0]
    if kind in AUDIO:
        return kind
    for start, kind in _CONTENT:
        if data.startswith(start):
            return kind
    raise AudioError("not_audio", f"unknown audio format {name!r}: use one of {', '.join(AUDIO)}")


def _cut(data: bytes, start: Any, end: Any) -> bytes:
    """The samples from ``start`` to ``end`` seconds as a file of the same format and sample type; times are not needed
    after it."""
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            first = round(float(start or 0) * file.samplerate)
            last = file.frames if end is None else min(file.frames, round(float(end) * file.samplerate))
            if not 0 <= first < last:
                raise AudioError(
                    "empty", f"the segment {start} to {end} s is outside the recording of {file.frames / file.samplerate:.2f} s"
                )
            file.seek(first)
            kind = (
                "int32" if file.subtype in ("PCM_24", "PCM_32") else "float64" if file.subtype in ("FLOAT", "DOUBLE") else "int16"
            )
            samples = file.read(last - first, dtype=kind)
            buffer = io.BytesIO()
            soundfile.write(buffer, samples, file.samplerate, format=file.format, subtype=file.subtype)
    except soundfile.LibsndfileError as error:
        raise AudioError("not_audio", f"cannot cut the segment: {error}") from error
    return buffer.getvalue()


def _finish(to: Form, source: Source, out_dir: str, jobs: Sequence[Job], list_path: str) -> None:
    """Write the list of the new form (and, for combine, `data.list` and the tar root)."""
    out = Path(out_dir)
    if to == "shard":
        _write(Path(list_path), (os.path.join(out_dir, f"{job.stem}.tar") for job in jobs))
    elif to == "raw":
        parts = [out / f".{job.stem}.part" for job in jobs]
        _write(Path(list_path), _lines(parts))
    else:
        roots = {os.path.dirname(_archive(source, line)) for line in range(len(source))}
        if len(roots) > 1:
            raise ValueError(
                f"the tars of {source.name} lie in {len(roots)} folders; a combined set needs them in one: move or link them"
            )
        _write(out / "combines_tar_root.txt", sorted(roots))
        _write(out / "data.list", _lines(out / f"{job.stem}.list" for job in jobs))
        _write(Path(list_path), (os.path.join(out_dir, f"{job.stem}.list") for job in jobs))


def _lines(files: Iterable[Path]) -> Iterator[str]:
    for path in files:
        with open(path, encoding="utf-8", errors="surrogatepass", newline="\n") as lines:
            yield from (line.rstrip("\n") for line in lines)


def _write(path: Path, lines: Iterable[str]) -> None:
    """A text file that appears whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8", errors="surrogatepass", newline="\n") as file:
        file.writelines(f"{line}\n" for line in lines)
    os.replace(temporary, path)


def _drop(error: RecordError | AudioError, item: ListItem) -> Drop:
    if isinstance(error, RecordError):
        return Drop.of(error)
    return Drop(str((item.fields or {}).get("key", "")), item.source, item.number, f"audio_{error.reason}", str(error))


def main(
    argv: Sequence[str] | None = None,
    to: Form | None = None,
    default_list: str = "",
    default_out: str = "",
    prog: str | None = None,
) -> int:
    """Command line. Exit code 1 when records were left out, 2 when nothing could be done.

    Args:
        to, default_list, default_out: fixed direction and default paths (for the scripts in common_utils/fake_data).
    """
    parser = argparse.ArgumentParser(
        prog=prog or "osum-echat data convert", description="Convert data lists: raw, shard, combine."
    )
    if to is None:
        parser.add_argument("--to", required=True, choices=list(LIST_NAMES), help="form to write")
    optional: dict[str, Any] = {"nargs": "?"} if default_list else {}
    parser.add_argument(
        "list", help="list to read: data.list, shards_list.txt or combines_list.txt", default=default_list, **optional
    )
    parser.add_argument("out_dir", help="folder to write to", default=default_out, **optional)
    parser.add_argument("--prefix", default="shards", help="new tars are <prefix>_000000000.tar ... (default: %(default)s)")
    parser.add_argument("--per-tar", type=int, default=1000, help="records a tar (default: %(default)s)")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    parser.add_argument("--overwrite", action="store_true", help="do finished files again")
    parser.add_argument(
        "--rewrite-16k", action="store_true", help="store 16 kHz 16-bit mono wav instead of the recordings' own bytes"
    )
    args = parser.parse_args(argv)
    try:
        result = convert(
            args.list,
            args.out_dir,
            to or args.to,
            prefix=args.prefix,
            per_tar=args.per_tar,
            workers=args.workers,
            overwrite=args.overwrite,
            rewrite_16k=args.rewrite_16k,
        )
    except (ValueError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    for drop in result.drops[:20]:
        sys.stderr.write(f"left out: {drop}\n")
    sys.stdout.write(result.text() + "\n")
    return 1 if result.drops else 0


if __name__ == "__main__":
    sys.exit(main())
