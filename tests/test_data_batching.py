"""Plans of batches: nothing lost, limits kept, little padding."""

from __future__ import annotations

import random

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.data.batch import Example, SampleInfo, collate
from osum_echat.data.batching import Cost, plan_batch
from osum_echat.data.config import BatchConfig
from osum_echat.dialogue.layout import IGNORE, Segment, audio_positions, flatten


def costs(rng: random.Random, longest: int) -> Cost:
    if rng.random() < 0.3:
        return Cost(rng.randint(30, 300))
    frames = rng.randint(30, 2000)
    return Cost(min(longest, frames // 8 + rng.randint(60, 700)), frames, 1)


def batches(samples: list[Cost], config: BatchConfig) -> list[list[list[int]]]:
    """Plans of a whole epoch, in numbers of ``samples``."""
    pool: list[int] = []
    waiting, out = list(range(len(samples))), []
    while waiting or pool:
        while waiting and len(pool) < config.pool:
            pool.append(waiting.pop(0))
        plan = [[pool[i] for i in row] for row in plan_batch([samples[i] for i in pool], config)]
        taken = {i for row in plan for i in row}
        assert pool[0] in taken, "the oldest sample must not wait"
        pool = [i for i in pool if i not in taken]
        out.append(plan)
    return out


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    number=st.integers(1, 60),
    rows=st.integers(1, 4),
    packing=st.booleans(),
    max_samples=st.sampled_from([0, 1, 5]),
)
def test_every_sample_is_in_one_batch_within_the_limits(seed: int, number: int, rows: int, packing: bool, max_samples: int):
    rng = random.Random(seed)
    config = BatchConfig(rows=rows, row_positions=1000, max_frames=6000, pool=16, packing=packing, max_samples=max_samples)
    samples = [costs(rng, 1000) for _ in range(number)]
    plans = batches(samples, config)
    assert sorted(i for plan in plans for row in plan for i in row) == list(range(number))
    for plan in plans:
        chosen = [samples[i] for row in plan for i in row]
        if packing:
            assert len(plan) <= rows and all(sum(samples[i].positions for i in row) <= 1000 for row in plan)
        else:
            assert all(len(row) == 1 for row in plan)
            assert len(plan) == 1 or len(plan) * max(c.positions for c in chosen) <= rows * 1000
        assert len(chosen) == 1 or sum(c.recordings for c in chosen) * max(c.longest for c in chosen) <= 6000
        assert not max_samples or len(chosen) <= max_samples


def test_padding_is_below_five_percent_on_mixed_lengths():
    rng = random.Random(0)
    for config in (BatchConfig(), BatchConfig(rows=4, row_positions=2048), BatchConfig(rows=2, multiple_of=8)):
        samples = [costs(rng, 2000) for _ in range(1500)]
        filled = slots = 0
        for plan in batches(samples, config):
            lengths = [sum(samples[i].positions for i in row) for row in plan]
            filled += sum(lengths)
            slots += len(plan) * (-(-max(lengths) // config.multiple_of) * config.multiple_of)
        assert 1 - filled / slots <= 0.05


def example(key: str, ids: list[int], frames: list[int]) -> Example:
    segments = [Segment("audio", audio=i) for i in range(len(frames))] + [Segment("text", tuple(ids), supervised=True)]
    row = flatten(segments, [audio_positions(f) for f in frames])
    feats = [torch.full((f, 4), float(f)) for f in frames]
    said = tuple((ids[0], number) for number in range(len(frames)))
    return Example(SampleInfo(key, "<TRANSCRIBE>", tags={"age": key.upper()}, transcripts=said), row, feats)


def test_collate_keeps_each_sample_as_it_was():
    examples = [example("a", [5, 6], [16]), example("b", [7], []), example("c", [8, 9], [8, 24])]
    batch = collate(examples, 4, plan=[[0, 1], [2]])
    assert batch.keys == ["a", "b", "c"] and [t.tolist() for t in batch.transcripts()] == [[5, 0], [8, 0], [8, 1]]
    assert batch.sample_N.tolist() == [0, 2, 2] and batch.last_recording().tolist() == [0, -1, 2]
    assert batch.feats_lengths_N.tolist() == [16, 8, 24] and batch.feats_NTF.shape == (3, 24, 4)
    assert batch.feats_NTF[1, 8:].abs().sum() == 0
    assert batch.tag_ids("age", ["a", "c"]).tolist() == [0, IGNORE, 1]
    for number, item in enumerate(examples):
        mine = batch.rows.documents_BT == number
        assert batch.rows.ids_BT[mine].tolist() == item.row.ids_T.tolist()
        assert batch.rows.positions_BT[mine].tolist() == item.row.positions_T.tolist()
        assert batch.rows.targets_BT[mine].tolist() == item.row.targets_T.tolist()
    assert batch.num_targets == sum(int((e.row.targets_T != IGNORE).sum()) for e in examples)
