"""Two processes with uneven data: equal numbers of steps, no hang, no sample lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.data_case import record, write_raw, write_shard

RANK = """
import json, os, sys
import torch, torch.distributed as dist
from osum_echat.data.loader import build_loader
from osum_echat.data.plain_tokenizer import PlainTokenizer, plain_vocabulary
from tests.data_case import PROMPTS, config
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method=sys.argv[2], rank=rank, world_size=2)
settings = config(json.loads(sys.argv[3]), workers=int(sys.argv[4]), shuffle_buffer=2)
settings.batch.pool, settings.batch.row_positions, settings.batch.max_samples = 2, 2000, 1
loader = build_loader(settings, PlainTokenizer(), plain_vocabulary(), rank, 2, prompts=PROMPTS)
epochs = []
for _ in range(2):
    steps = []
    for batch in loader:
        total = torch.tensor([len(batch)])
        dist.all_reduce(total)  # what a training step does: it hangs when a rank has left
        steps.append(batch.keys)
    epochs.append(steps)
print(json.dumps(epochs))
"""


def run_two(tmp_path: Path, streams: dict[str, str], workers: int) -> list[list[list[list[str]]]]:
    """Batches by rank, epoch and step."""
    store = f"file://{tmp_path}/store"
    root = Path(__file__).parent.parent
    command = [sys.executable, "-W", "ignore", "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), store, json.dumps(streams), str(workers)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
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
    ranks = run_two(tmp_path, {"shards": str(both), "raw": raw}, workers=1)
    wanted = sorted(f"k{n:03d}" for n in [*range(12), *range(100, 103), 200, 202, 204])
    for epoch in range(2):
        steps = [rank[epoch] for rank in ranks]
        assert len(steps[0]) == len(steps[1]) >= 12
        assert sorted(key for rank in steps for step in rank for key in step) == wanted
        assert any(step == [] for step in steps[0] + steps[1]), "the rank that is dry goes on with fillers"
