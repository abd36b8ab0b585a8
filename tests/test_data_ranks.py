"""Two processes with uneven data: equal numbers of steps, no hang, no sample lost."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from osum_echat.dialogue.layout import IGNORE
from osum_echat.training.objective import placeholder
from tests.data_case import record, write_raw, write_shard

RANK = """
import json, sys
from types import SimpleNamespace
import torch
from osum_echat.data.loader import build_loader
from osum_echat.data.plain_tokenizer import PlainTokenizer, plain_vocabulary
from osum_echat.training import distributed
from osum_echat.training.objective import MicroBatch
from osum_echat.training.steps import Steps
from tests.data_case import DIALECT, MELS, config

class Counting:
    names = ["lm"]
    model = SimpleNamespace(config=SimpleNamespace(encoder=SimpleNamespace(mels=8)))
    def prepare(self, batch, device, input_noise=0.0):
        return MicroBatch(batch, None, torch.ones(len(batch)), counts={"lm": float(batch.num_targets)})

world = distributed.start(torch.device("cpu"), needs_group=True)
settings = config(json.loads(sys.argv[1]), workers=int(sys.argv[2]), shuffle_buffer=2)
settings.batch.pool, settings.batch.row_positions, settings.batch.max_samples = 2, 2000, 1
loader = build_loader(settings, PlainTokenizer(), plain_vocabulary(), DIALECT, MELS, world.rank, 2)
epochs = []
for epoch in range(2):
    steps = Steps(iter(loader), Counting(), world, torch.device("cpu"), accumulation=int(sys.argv[3]))
    made = []
    while (step := steps.next(flags=[world.rank == 1])) is not None:
        assert step.flags == [True]
        mine = sum(m.batch.num_targets for m in step.micros)
        assert step.totals == {"lm": float(world.table([float(mine)]).sum())}
        made.append([m.batch.keys for m in step.micros])
    epochs.append(made)
    loader.set_epoch(epoch + 1)
print(json.dumps(epochs))
distributed.stop()
"""


def run_two(streams: dict[str, str], workers: int, accumulation: int) -> list[list[list[list[list[str]]]]]:
    """Keys by rank, epoch, step and micro-batch."""
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", RANK, json.dumps(streams), str(workers), str(accumulation)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"PYTHONPATH": str(root), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            command,
            cwd=root,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    out = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0]
    return [json.loads(text) for text in out]


def test_two_ranks_with_uneven_data_make_equal_steps(tmp_path: Path):
    # One rank's tars hold four times as many samples as the other's, and the filter leaves one with less still.
    big = write_shard(tmp_path / "big", [record(n) for n in range(12)], per_tar=12)
    small = write_shard(tmp_path / "small", [record(100 + n) for n in range(3)], per_tar=3)
    both = tmp_path / "both.txt"
    both.write_text(Path(big).read_text() + Path(small).read_text())
    raw = write_raw(tmp_path / "raw", [{**record(200 + n), "wav": "gone.wav"} if n % 2 else record(200 + n) for n in range(5)])
    ranks = run_two({"shards": str(both), "raw": raw}, workers=1, accumulation=2)
    wanted = sorted(f"k{n:03d}" for n in [*range(12), *range(100, 103), 200, 202, 204])
    placeholder_keys = placeholder(8).keys
    for epoch in range(2):
        steps = [rank[epoch] for rank in ranks]
        assert len(steps[0]) == len(steps[1]) >= 6
        assert all(len(a) == len(b) for a, b in zip(*steps, strict=True)), "and equal numbers of micro-batches"
        micros = [keys for rank in steps for step in rank for keys in step]
        assert sorted(key for keys in micros if keys != placeholder_keys for key in keys) == wanted
        assert placeholder_keys in micros, "the rank that is through goes on with placeholders"


def test_a_placeholder_teaches_nothing():
    batch = placeholder(8)
    assert batch.num_targets == 0 and bool((batch.rows.targets_BT == IGNORE).all())
    assert len(batch.feats_lengths_N) == 0 and not bool((batch.rows.audio_index_BT >= 0).any())
