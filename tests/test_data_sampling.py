"""Which lines an epoch reads, in which order, by whom."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat import config as config_io
from osum_echat.config import ConfigError
from osum_echat.data.config import StreamConfig
from osum_echat.data.lists import Stream, read_data_yaml
from osum_echat.data.sampling import Shares, draw, epoch_order, weighted_lines
from osum_echat.training.config import TrainConfig
from tests.data_case import record, write_raw


def test_order_is_that_of_the_published_sampler(data_dir: Path):
    cases = json.loads((data_dir / "data" / "sampling_cases.json").read_text())["sampler"]
    for case in cases:
        lines = [f"l{i}" for i in range(case["n_items"])] * case["multi_num"]
        lines = lines[case["data_recover_start"] :]
        for epoch, wanted in enumerate(case["epochs_from_minus1"], start=-1):
            shuffle = case["shuffle"] and case["partition"]
            order = [lines[i] for i in epoch_order(len(lines), epoch, 0, case["split_num"], shuffle)]
            if case["partition"]:
                order = order[case["rank"] :: case["world"]][case["worker"] :: case["num_workers"]]
            assert order == wanted, case


@pytest.mark.parametrize(("weight", "lines"), [(1, 10), (2.7, 20), (0.25, 2), (0, 0), (3, 30)])
def test_weights_repeat_whole_lists_and_draw_a_part_below_one(weight: float, lines: int):
    chosen = weighted_lines(10, weight, random.Random(0))
    assert len(chosen) == lines
    assert max(Counter(chosen).values(), default=0) <= max(1, int(weight))


@settings(deadline=None)
@given(lines=st.integers(0, 40), readers=st.integers(1, 9), samples=st.integers(1, 12), epoch=st.integers(-1, 5))
def test_readers_share_every_sample_of_every_line_once(lines: int, readers: int, samples: int, epoch: int):
    order = epoch_order(lines, epoch)
    seen: Counter[tuple[int, int]] = Counter()
    loads = []
    for reader in range(readers):
        mine = [(s.line, n) for s in Shares(order, reader, readers) for n in range(samples) if n % s.parts == s.part]
        seen.update(mine)
        loads.append(len(mine))
    assert seen == Counter({(line, n): 1 for line in range(lines) for n in range(samples)})
    assert max(loads) - min(loads) <= lines % readers + (samples == 1)


@given(split=st.integers(1, 5), lines=st.integers(5, 30))
def test_slices_of_a_split_list_cover_it_once(split: int, lines: int):
    seen = [i for epoch in range(-1, split - 1) for i in epoch_order(lines, epoch, 3, split)]
    assert sorted(seen) == list(range(lines))


def test_a_dry_stream_leaves_the_others_their_own_weights():
    rng = random.Random(0)
    counts = Counter(draw([5, 3, 2], [True, False, True], rng) for _ in range(7000))
    assert counts[1] == 0
    assert counts[0] / counts[2] == pytest.approx(5 / 2, rel=0.1)


def test_data_yaml_is_read_with_weights_and_seed(tmp_path: Path):
    write_raw(tmp_path / "a", [record(n) for n in range(8)])
    (tmp_path / "data.yaml").write_text(
        "seed: 5\na: {path: a/data.list, weight: 2}\nb: {path: a/data.list, weight: 0.5}\nc: {path: gone, weight: 0}\n"
    )
    entries, seed = read_data_yaml(str(tmp_path / "data.yaml"))
    assert seed == 5 and [(e.name, e.weight) for e in entries] == [("a", 2.0), ("b", 0.5), ("c", 0.0)]
    stream = Stream("s2t", StreamConfig(str(tmp_path / "data.yaml")))
    assert len(stream) == 16 + 4 and stream.weight == 20


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: {weight: 1}", "must be a mapping with a path"),
        ("a: {path: x, weight: -1}", "weight must be a number >= 0"),
        ("a: {path: x, wieght: 1}", "unknown key"),
        ("seed: now", "seed must be a whole number"),
    ],
)
def test_a_wrong_data_yaml_is_refused_with_a_reason(tmp_path: Path, text: str, message: str):
    (tmp_path / "data.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_data_yaml(str(tmp_path / "data.yaml"))


def test_the_lists_of_a_data_yaml_start_at_its_folder_then_where_one_stands(tmp_path, monkeypatch):
    here, data = tmp_path / "here", tmp_path / "data"
    for folder, names in ((data, ["both.txt"]), (here, ["both.txt", "here.txt"])):
        folder.mkdir()
        for name in names:
            (folder / name).touch()
    monkeypatch.chdir(here)
    (data / "data.yaml").write_text("a: {path: both.txt}\nb: {path: here.txt}\n", encoding="utf-8")
    entries, _ = read_data_yaml(str(data / "data.yaml"))
    assert [entry.path for entry in entries] == [str(data / "both.txt"), "here.txt"]


@pytest.mark.parametrize("stage", ["stage1_understanding", "stage2_tts", "stage2_s2s", "stage3_empathy_tag"])
def test_published_stages_find_their_files_from_anywhere(root_dir, tmp_path, monkeypatch, stage):
    monkeypatch.chdir(tmp_path)
    config = config_io.load(TrainConfig, root_dir / "conf" / f"{stage}.yaml")
    for stream in config.data.streams.values():
        assert Path(stream.list).is_file()
        assert all(Path(entry.path).is_file() for entry in read_data_yaml(stream.list)[0])
    assert config.model is not None and Path(config.model).is_file()
