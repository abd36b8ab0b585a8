"""The loader: nothing lost, order from seed and epoch alone, mixing, exact resume."""

from __future__ import annotations

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osum_echat.data.batch import Batch
from osum_echat.data.config import ProcessingConfig, StreamConfig
from osum_echat.data.convert import convert
from osum_echat.data.examples import ExampleBuilder
from osum_echat.data.loader import Loader
from tests.data_case import MELS, config, loader, record, same, write_raw, write_shard


@pytest.fixture(scope="module")
def lists(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A raw list of 13, 3 tars of 11 and a combined set of 9 samples, keys different."""
    folder = tmp_path_factory.mktemp("lists")
    codes = list(range(40))
    raw = write_raw(folder / "raw", [record(n) for n in range(13)])
    shard = write_shard(folder / "shard", [record(100 + n, "<S2TCHAT>", q_txt="what") for n in range(11)])
    speech = [{**record(200 + n, "<S2TCHAT> <TEXT2TOKEN>", speech_token=codes), "txt": "short"} for n in range(9)]
    combine = convert(write_shard(folder / "base", speech), str(folder / "combine"), "combine", workers=1, progress=False).path
    return {"raw": raw, "shard": shard, "combine": combine}


def keys(batches: list[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


ALL = [f"k{n:03d}" for n in [*range(13), *range(100, 111), *range(200, 209)]]


@pytest.mark.parametrize(("workers", "world_size"), [(0, 1), (1, 1), (4, 1), (0, 3), (2, 2)])
def test_an_epoch_holds_every_sample_once(lists: dict[str, str], workers: int, world_size: int):
    seen: list[str] = []
    for rank in range(world_size):
        reader = loader(lists, rank, world_size, workers=workers)
        seen += keys(list(reader))
        assert reader.report.bad == 0
    assert sorted(seen) == sorted(ALL)


def test_order_depends_on_seed_and_epoch_only(lists: dict[str, str]):
    first, second = loader(lists), loader(lists)
    one, two = list(first), list(second)
    assert all(same(a, b) for a, b in zip(one, two, strict=True))
    next_epoch = list(first)
    assert sorted(keys(next_epoch)) == sorted(keys(one)) and keys(next_epoch) != keys(one)
    second.set_epoch(1)
    assert all(same(a, b) for a, b in zip(next_epoch, list(second), strict=True))
    assert keys(list(loader(lists, seed=1))) != keys(one)


def test_augmentation_differs_by_epoch_and_not_by_batch_mates(lists: dict[str, str]):
    def features(reader: Loader, key: str) -> torch.Tensor:
        for batch in reader:
            if key in batch.keys:
                n = batch.last_recording()[batch.keys.index(key)]
                return batch.feats_NTF[n, : batch.feats_lengths_N[n]]
        raise AssertionError(key)

    mixed = features(loader(lists), "k003")
    alone = features(loader({"raw": lists["raw"]}, shuffle_buffer=0), "k003")
    assert torch.equal(mixed, alone)
    later = loader(lists)
    later.set_epoch(1)
    assert not torch.equal(mixed, features(later, "k003"))


def test_held_out_data_comes_in_order_without_augmentation(lists: dict[str, str]):
    one, two = loader({"raw": lists["raw"]}, train=False), loader({"raw": lists["raw"]}, train=False, seed=9)
    first, second = list(one), list(two)
    assert all(same(a, b) for a, b in zip(first, second, strict=True))
    two.set_epoch(5)
    assert all(same(a, b) for a, b in zip(first, list(two), strict=True))


def check_resume(make: Any, stop: int) -> None:
    """Interrupted after ``stop`` batches and restored equals uninterrupted, over the end of the epoch."""
    whole = make()
    batches = list(whole)
    after = list(whole)
    stop %= len(batches)
    first = make()
    running = iter(first)
    for _ in range(stop):
        next(running)
    state = pickle.loads(pickle.dumps(first.state_dict()))
    running.close()
    restored = make()
    restored.load_state_dict(state)
    rest = list(restored)
    assert len(rest) == len(batches) - stop
    assert all(same(a, b) for a, b in zip(batches[stop:], rest, strict=True))
    assert all(same(a, b) for a, b in zip(after, list(restored), strict=True))
    assert restored.report == whole.report


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    stop=st.integers(0, 20),
    buffer=st.sampled_from([0, 3, 50]),
    pool=st.sampled_from([1, 5, 40]),
    world_size=st.integers(1, 2),
    restart=st.booleans(),
    seed=st.integers(0, 3),
)
def test_interrupted_and_restored_equals_uninterrupted(
    lists: dict[str, str], stop: int, buffer: int, pool: int, world_size: int, restart: bool, seed: int
):
    streams: dict[str, Any] = dict(lists)
    if restart:
        streams["raw"] = StreamConfig(lists["raw"], weight=3.0, when_dry="restart")

    def make() -> Loader:
        reader = loader(streams, world_size - 1, world_size, shuffle_buffer=buffer, seed=seed)
        reader.config.batch.pool, reader.config.batch.row_positions = pool, 700
        return reader

    check_resume(make, stop)


@pytest.mark.parametrize(("workers", "stop"), [(1, 1), (4, 3), (4, 6)])
def test_restore_with_worker_processes(lists: dict[str, str], workers: int, stop: int):
    check_resume(lambda: loader(lists, workers=workers), stop)


def test_restore_with_a_worker_process_and_a_large_shuffle_buffer(tmp_path: Path):
    """The state of a reader is then larger than what a pipe to a worker that has not started takes (64 KiB)."""
    raw = write_raw(tmp_path, [{**record(n, "<TEXT2TEXT>"), "question": "why", "wav": None} for n in range(4000)])

    def make() -> Loader:
        return loader({"raw": raw}, shuffle_buffer=3000, workers=1)

    with time_limit(120):
        first = make()
        running = iter(first)
        next(running)
        state = pickle.loads(pickle.dumps(first.state_dict()))
        assert len(pickle.dumps(state)) > 65_536
        second = make()
        second.load_state_dict(state)
        restored = iter(second)
        assert all(same(next(running), next(restored)) for _ in range(5))


KILLED = """
import json, multiprocessing, os, signal, sys
from multiprocessing.connection import Connection
from pathlib import Path
from tests.test_data_loader import loader

def killed(*_):
    Path(sys.argv[2]).write_text(json.dumps([child.pid for child in multiprocessing.active_children()]))
    os.kill(os.getpid(), signal.SIGKILL)

Connection.send = killed
next(iter(loader({"raw": json.loads(sys.argv[1])}, workers=1)))
"""


def test_a_worker_ends_where_its_parent_is_killed_before_it_gave_orders(tmp_path: Path):
    raw = write_raw(tmp_path, [{**record(n, "<TEXT2TEXT>"), "question": "why", "wav": None} for n in range(8)])
    pids = tmp_path / "pids.json"
    command = [sys.executable, "-c", KILLED, json.dumps(raw, default=str), str(pids)]
    root = Path(__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(root), str(root / "tests")])}
    done = subprocess.run(command, env=environment, cwd=root, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    [worker] = json.loads(pids.read_text())
    deadline = time.monotonic() + 60
    while psutil.pid_exists(worker) and psutil.Process(worker).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker waits for orders that nobody will give"
        time.sleep(0.1)


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """`TimeoutError` where the body has not ended by then, also within a system call that waits."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done within {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_a_rank_that_is_through_says_so_until_the_next_epoch_begins(lists: dict[str, str]):
    """Its state may be saved while other ranks are still in the epoch: restored, it has nothing left there and is ready for the next."""
    whole = loader(lists)
    list(whole)
    state = whole.state_dict()
    assert state["epoch"] == 0 and whole.epoch == 1
    restored = loader(lists)
    restored.load_state_dict(state)
    assert list(restored) == [] and restored.epoch == 1
    assert all(same(a, b) for a, b in zip(list(restored), list(whole), strict=True))
    whole.set_epoch(2)
    restored.load_state_dict(whole.state_dict())
    assert all(same(a, b) for a, b in zip(list(restored), list(whole), strict=True)), "the start of an epoch"


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_does_not_move_the_random_state_of_the_training(lists: dict[str, str], workers: int):
    """Else a run that is restored in the middle of an epoch, and opens its lists once more, would draw other noise and dropout."""
    reader = loader({"raw": lists["raw"]}, workers=workers)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    list(reader)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_rest_of_an_epoch_is_dealt_to_another_number_of_ranks(lists: dict[str, str]):
    old = [loader(lists, rank, 2, workers=0) for rank in range(2)]
    done: list[str] = []
    states = []
    for reader in old:
        running = iter(reader)
        done += next(running).keys
        states.append(reader.state_dict())
    for world_size in (1, 3):
        new = [loader(lists, rank, world_size) for rank in range(world_size)]
        rest: list[str] = []
        for reader in new:
            assert "no sample is lost" in reader.load_state_dicts(states)
            rest += keys(list(reader))
            assert reader.epoch == 1
        assert sorted(done + rest) == sorted(ALL)
        assert sorted(k for reader in new for k in keys(list(reader))) == sorted(ALL), "the next epoch has the new shares"


def test_a_state_that_means_nothing_here_is_refused(lists: dict[str, str]):
    state = loader(lists).state_dict()
    with pytest.raises(ValueError, match="seed: 0, now 1"):
        loader(lists, seed=1).load_state_dict(state)
    with pytest.raises(ValueError, match="load_state_dicts"):
        loader(lists, 0, 2).load_state_dict(state)
    with pytest.raises(ValueError, match="lines"):
        loader({"raw": lists["raw"]}).load_state_dict(state)


def test_another_number_of_workers_keeps_the_shares_until_the_epoch_ends(lists: dict[str, str]):
    first = loader(lists, workers=3)
    running = iter(first)
    done = next(running).keys
    state = first.state_dict()
    running.close()
    second = loader(lists, workers=0)
    second.load_state_dict(state)
    assert sorted(done + keys(list(second))) == sorted(ALL)


def test_streams_take_their_own_tasks_only(lists: dict[str, str], tmp_path: Path):
    (tmp_path / "all.yaml").write_text("\n".join(f"{name}: {{path: {path}}}" for name, path in lists.items()))
    reader = loader({name: str(tmp_path / "all.yaml") for name in ("s2t", "s2s")})
    batches = list(reader)
    assert sorted(keys(batches)) == sorted(ALL)
    assert Counter(s.stream for b in batches for s in b.samples) == {"s2t": 24, "s2s": 9}
    assert reader.report.reasons == {"other_stream": 33} and reader.report.bad == 0


def test_streams_are_mixed_by_their_weights_and_a_dry_one_restarts_or_leaves(tmp_path: Path):
    big = write_raw(tmp_path / "big", [record(n) for n in range(60)])
    small = write_raw(tmp_path / "small", [record(100 + n) for n in range(10)])
    streams = {"a": StreamConfig(big, weight=1.0), "b": StreamConfig(small, weight=1.0, when_dry="restart")}
    counts = Counter("b" if int(k[1:]) >= 100 else "a" for k in keys(list(loader(streams))))
    assert counts["a"] == 60 and 40 <= counts["b"] <= 80, "drawn half of the time until the other stream ends"
    streams["b"] = StreamConfig(small, weight=1.0)
    order = keys(list(loader(streams, shuffle_buffer=0)))
    assert sorted(order) == [f"k{n:03d}" for n in [*range(60), *range(100, 110)]]
    streams = {name: StreamConfig(path, weight=1.0, when_dry="restart") for name, path in (("a", big), ("b", small))}
    assert set(keys(list(loader(streams)))) == set(order), "when all begin again the epoch ends after the last has been through"
    streams["a"] = StreamConfig(big, weight=0.0)
    assert set(keys(list(loader(streams)))) == {f"k{n:03d}" for n in range(100, 110)}


def test_restoring_builds_only_what_was_held_back(lists: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    def make() -> Loader:
        reader = loader(lists, shuffle_buffer=3)
        reader.config.batch.pool, reader.config.batch.max_samples = 4, 1
        return reader

    first = make()
    running = iter(first)
    for _ in range(25):
        next(running)
    second = make()
    second.load_state_dict(first.state_dict())
    built = 0
    build = ExampleBuilder.build

    def counted(*args: Any) -> Any:
        nonlocal built
        built += 1
        return build(*args)

    monkeypatch.setattr(ExampleBuilder, "build", counted)
    assert same(next(iter(second)), next(running))
    assert built <= 2 * 4, "the 25 samples before are not read again"


def test_usual_wavs_are_read_like_any_other(tmp_path: Path):
    from osum_echat.audio.io import to_mono_16k
    from osum_echat.audio.wav import pcm16_mono_16k
    from tests.data_case import wav_bytes

    data = wav_bytes(0.5)
    samples = pcm16_mono_16k(data)
    assert samples is not None and samples.dtype == np.float32 and (samples == to_mono_16k(data)).all()
    listed = data[:36] + b"LIST\x03\x00\x00\x00abc\x00" + data[36:]
    assert (pcm16_mono_16k(listed) == samples).all()
    for other in (wav_bytes(0.5, rate=8000), data[:-100], b"RIFF", b"", data[:40]):
        assert pcm16_mono_16k(other) is None


def test_dialogues_are_expanded_and_survive_a_restore(tmp_path: Path):
    from tests.data_case import wav_bytes

    (tmp_path / "past.wav").write_bytes(wav_bytes())
    turn = {"wav_1": str(tmp_path / "past.wav"), "txt_1": "yes", "wav_2": str(tmp_path / "past.wav"), "txt_2": "no"}
    raw = write_raw(tmp_path, [{**record(n, "<S2TCHAT>", q_txt="q"), **turn} for n in range(4)])

    def make() -> Loader:
        reader = loader({"all": raw}, processing=ProcessingConfig(expand_dialogues=True))
        reader.config.batch.max_samples = 2
        return reader

    batches = list(make())
    assert Counter(keys(batches)) == Counter(f"k00{n}{turn}" for n in range(4) for turn in ("", "#1", "#2"))
    assert {len(b.transcripts()) > len(b) for b in batches} >= {True}
    for stop in range(len(batches)):
        check_resume(make, stop)


def test_speed_noise_and_reverberation_are_repeatable(lists: dict[str, str], tmp_path: Path):
    wavs = write_raw(tmp_path, [record(n) for n in range(2)])
    (tmp_path / "noise.txt").write_text("\n".join(str(p) for p in (tmp_path / "wav").glob("*.wav")))

    def make() -> Loader:
        settings = config({"raw": lists["raw"]})
        settings.augment.speeds = [0.9, 1.0, 1.1]
        settings.augment.noise_list = settings.augment.reverb_list = str(tmp_path / "noise.txt")
        from osum_echat.data.loader import build_loader
        from osum_echat.data.plain_tokenizer import PlainTokenizer, plain_vocabulary

        return build_loader(settings, PlainTokenizer(), plain_vocabulary(), mels=MELS)

    assert wavs and list(make())
    check_resume(make, 1)


def test_packing_keeps_padding_low(lists: dict[str, str]):
    reader = loader({"raw": lists["raw"]}, shuffle_buffer=0)
    reader.config.batch.pool, reader.config.batch.row_positions = 64, 900
    batches = list(reader)
    positions = sum(b.num_positions for b in batches)
    assert sum(b.rows.padding_fraction * b.num_positions for b in batches) / positions <= 0.05
