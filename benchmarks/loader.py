"""How many utterances a second one loader worker delivers: raw, shard, combine, and a plain webdataset pipeline beside them.

Makes its own data (5 s utterances of 16-bit wav at 16 kHz, 100 s of distinct noise-like audio cut at random places), then runs the full
pipeline (read, decode, process, spec-augment, log-mel, flatten, pack) with one worker process, as training does. webdataset does the same
features (decode, log-mel by torch, spec-augment, spec-substitution), pads instead of packing, and makes no sequences: an upper bound for it.

Start-up is left out on both sides: utterances count from the second batch of the first epoch on (starting a worker takes a second, which
training pays once). `shard_to_webdataset` compares what both need: CPU milliseconds an utterance, of this process and its worker together,
which neighbours on the machine disturb less than utterances a second (`shard_to_webdataset_wall`); `shard_to_webdataset_same_code` gives
webdataset the same code for log-mels as ours (asrfront, where it is installed).

    python benchmarks/loader.py --json         # 2,000 utterances, about two minutes
    python benchmarks/loader.py --quick        # 300 utterances, within 50 s
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import psutil
import soundfile
import torch
from common import add_device, commit, device_of, now

from osum_echat.audio import augment
from osum_echat.audio.features import LogMel, has_native
from osum_echat.audio.io import to_mono_16k
from osum_echat.data.batch import pad_features
from osum_echat.data.config import DataConfig, ProcessingConfig, StreamConfig
from osum_echat.data.convert import convert
from osum_echat.data.loader import build_loader
from osum_echat.data.plain_tokenizer import PlainTokenizer, plain_vocabulary
from osum_echat.data.sound import Sound, Sounds

RATE, SECONDS = 16_000, 5.0
REFERENCE_PER_SECOND = 116  # the published loader, per worker, on a machine like this


def make_data(folder: str, count: int) -> dict[str, str]:
    """The three lists of ``count`` utterances."""
    rng = np.random.default_rng(0)
    noise = np.cumsum(rng.standard_normal(100 * RATE)) % 1.0 - 0.5
    audio = (0.3 * 32767 * noise).astype(np.int16)
    os.makedirs(f"{folder}/raw/wav")
    with open(f"{folder}/raw/data.list", "w", encoding="utf-8") as file:
        for n in range(count):
            start = int(rng.integers(len(audio) - int(SECONDS * RATE)))
            wav = f"{folder}/raw/wav/{n:06d}.wav"
            soundfile.write(wav, audio[start : start + int(SECONDS * RATE)], RATE, subtype="PCM_16")
            extra = {"age": "<ADULT>", "gender": "<MALE>", "q_txt": "今天下午有没有空一起喝杯茶", "dataset": "bench"}
            extra["speech_token"] = rng.integers(0, 4096, 120).tolist()
            task = ("<TRANSCRIBE>", "<S2TCHAT>", "<S2TCHAT> <TEXT2TOKEN>")[n % 3]
            record = {"key": f"utt{n:06d}", "wav": wav, "txt": "有空呀，我们三点在老地方见，好吗？", "task": task, "extra": extra}
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    shard = convert(f"{folder}/raw/data.list", f"{folder}/shard", "shard", per_tar=max(1, count // 4), workers=1, progress=False)
    combine = convert(shard.path, f"{folder}/combine", "combine", workers=1, progress=False)
    return {"raw": f"{folder}/raw/data.list", "shard": shard.path, "combine": combine.path}


class Meter:
    """Utterances a second and CPU milliseconds an utterance, from the second batch on."""

    def __init__(self, device: torch.device) -> None:
        self.used, self.batches, self._device = 0, 0, device

    def batch(self, count: int) -> None:
        self.batches += 1
        if self.batches == 1:
            self._wall, self._cpu, self._worker = now(self._device), _cpu_seconds(), _cpu_seconds(workers_only=True)
        else:
            self.used += count
            self._ends = now(self._device), _cpu_seconds(), _cpu_seconds(workers_only=True)

    @property
    def per_second(self) -> float:
        return self.used / (self._ends[0] - self._wall)

    @property
    def cpu_ms(self) -> float:
        return 1000 * (self._ends[1] - self._cpu) / self.used

    @property
    def worker_cpu_ms(self) -> float:
        """Of the worker alone: what bounds the utterances a second of one worker."""
        return 1000 * (self._ends[2] - self._worker) / self.used


def _cpu_seconds(workers_only: bool = False) -> float:
    """Of this process and its children, running ones among them; or of the children alone."""
    own = psutil.Process()
    processes = [*([] if workers_only else [own]), *own.children(recursive=True)]
    total = 0.0
    for process in processes:
        times = process.cpu_times()
        total += times.user + times.system
    return total


def ours(path: str, epochs: int, features: str, device: torch.device, workers: int = 1) -> tuple[Meter, list[float]]:
    """What was measured, batches on ``device`` (a batch's log-mels are computed there with ``features`` "device"); resident MB of the worker after each
    epoch."""
    config = DataConfig(
        streams={"all": StreamConfig(path)},
        workers=workers,
        shuffle_buffer=200,
        processing=ProcessingConfig(tag_alone_rate=0.0),
        features=features,  # type: ignore[arg-type]
    )
    loader = build_loader(config, PlainTokenizer(), plain_vocabulary())
    meter, memory = Meter(device), []
    for _ in range(epochs):
        peak = 0.0
        for batch in loader:
            batch.to(device)
            meter.batch(len(batch))
            peak = max(peak, _worker_mb()) if workers else _mb(os.getpid())
        memory.append(peak)
        assert loader.report.bad == 0, loader.report.text()
    return meter, memory


def plain_webdataset(shard_list: str, epochs: int, features_by: str) -> Meter:
    """webdataset with the same features, one worker, kept between epochs."""
    import webdataset

    log_mel = LogMel(80, native=has_native(features_by))

    def features(sample: dict[str, Any]) -> dict[str, Any]:
        feats = log_mel(to_mono_16k(sample["wav"])).numpy()
        rng = np.random.default_rng()
        feats = augment.spec_augment(augment.spec_substitute(feats, rng), rng)
        return {
            "key": sample["__key__"],
            "txt": sample["txt"].decode(),
            "extra": json.loads(sample["extra"]),
            "feats": torch.from_numpy(feats),
        }

    def batch(samples: list[dict[str, Any]]) -> tuple[list[str], torch.Tensor, torch.Tensor]:
        feats, lengths = pad_features([s["feats"] for s in samples], 80)
        return [s["key"] for s in samples], feats, lengths

    tars = Path(shard_list).read_text(encoding="utf-8").split()
    data = webdataset.WebDataset(tars, shardshuffle=False, empty_check=False).shuffle(200).map(features)
    data = data.batched(8, collation_fn=batch, partial=True)
    loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=4, persistent_workers=True)
    meter = Meter(torch.device("cpu"))
    for _ in range(epochs):
        for keys, _, _ in loader:
            meter.batch(len(keys))
    return meter


def parts(folder: str) -> dict[str, float]:
    """Milliseconds of one utterance's steps, in this process: what bounds the loader."""
    data = Path(folder, "raw/wav/000000.wav").read_bytes()
    samples = to_mono_16k(data)
    log_mel, native = LogMel(80), LogMel(80, native=has_native("auto"))
    feats = log_mel(samples).numpy()
    rng = np.random.default_rng(0)

    def milliseconds(step: Any, count: int = 50) -> float:
        step()
        began = time.perf_counter()
        for _ in range(count):
            step()
        return 1000 * (time.perf_counter() - began) / count

    sound = Sound.of(samples)
    one = Sounds.of([sound], 80)
    frames_N = torch.tensor([len(sound)])
    return {
        "decode_ms": milliseconds(lambda: to_mono_16k(data)),
        "log_mel_ms": milliseconds(lambda: log_mel(samples)),
        "log_mel_native_ms": milliseconds(lambda: native(samples)),
        "as_16_bits_ms": milliseconds(lambda: Sound.of(samples)),
        "log_mel_of_16_bits_ms": milliseconds(lambda: one.features(frames_N, torch.device("cpu"))),
        "augment_ms": milliseconds(lambda: augment.spec_augment(augment.spec_substitute(feats, rng), rng)),
        "copy_to_parent_ms": milliseconds(lambda: io.BytesIO(feats.tobytes()).read()),
    }


def _mb(pid: int) -> float:
    """Memory of a process that is its own (resident, without what it shares), in MB."""
    with open(f"/proc/{pid}/statm", encoding="ascii") as statm:
        _, resident, shared, *_ = statm.read().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE") / 1e6


def _worker_mb() -> float:
    """The same summed over this process and its children."""
    children = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text(encoding="ascii").split()
    total = _mb(os.getpid())
    for child in children:
        try:
            total += _mb(int(child))
        except FileNotFoundError:  # it has just ended
            continue
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer utterances: ends within 50 s")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument(
        "--features",
        choices=("auto", "torch", "asrfront", "device"),
        default="auto",
        help="who computes log-mels (data.features)",
    )
    add_device(parser)
    parser.add_argument("--utterances", type=int, help="default 2000, with --quick 300")
    args = parser.parse_args()
    device = device_of(args)
    logging.disable(logging.WARNING)
    count = args.utterances or (300 if args.quick else 2000)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"utterances": count}
    with tempfile.TemporaryDirectory() as folder:
        lists = make_data(folder, count)
        for form in ("raw", "shard", "combine"):
            meter, memory = ours(lists[form], 3 if form == "shard" else 1, args.features, device)
            result[f"{form}_utt_per_s"], result[f"{form}_cpu_ms"] = meter.per_second, meter.cpu_ms
            if form == "shard":
                result["shard_worker_cpu_ms"] = meter.worker_cpu_ms
                # The first epoch fills caches; what comes on top afterwards would be a leak.
                result["memory_growth_mb"] = memory[-1] - memory[0]
                result["memory_mb"] = memory
        # With log-mels by torch, and by the code that ours uses now: what the choice of code gives, and what the rest does.
        webdataset = plain_webdataset(lists["shard"], 3, "torch")
        result["webdataset_utt_per_s"], result["webdataset_cpu_ms"] = webdataset.per_second, webdataset.cpu_ms
        result["webdataset_same_code_cpu_ms"] = plain_webdataset(
            lists["shard"], 3, "torch" if args.features == "device" else args.features
        ).cpu_ms
        result |= parts(folder)
    result["shard_to_webdataset"] = result["webdataset_cpu_ms"] / result["shard_cpu_ms"]
    result["shard_to_webdataset_same_code"] = result["webdataset_same_code_cpu_ms"] / result["shard_cpu_ms"]
    result["shard_to_webdataset_wall"] = result["shard_utt_per_s"] / result["webdataset_utt_per_s"]
    result["shard_to_reference"] = result["shard_utt_per_s"] / REFERENCE_PER_SECOND
    result |= {"hardware": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__, "commit": commit()}
    result = {k: round(v, 3) if isinstance(v, float) else v for k, v in result.items()}
    if args.json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:22} {value}")


if __name__ == "__main__":
    main()
