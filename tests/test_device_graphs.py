"""Work that is recorded once and replayed, as far as a CPU can show it: inputs and outputs in memory that stays, the same results."""

from __future__ import annotations

import copy
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from osum_echat import device as devices
from osum_echat.device import accelerators
from tests.token2wav_case import recorded_speaker, recorded_tokens, tiny_model


class Adding:
    """Counts how often it really ran."""

    def __init__(self) -> None:
        self.runs = 0

    def add(self, a: Tensor, b: Tensor, factor: float = 1.0) -> Tensor:
        self.runs += 1
        return a + factor * b


@torch.inference_mode()
def test_a_shape_is_recorded_when_it_comes_again_and_gives_what_it_gave() -> None:
    recordings, adding = devices.Recordings(always=True), Adding()
    for turn in range(4):
        a, b = torch.full((3,), float(turn)), torch.ones(3)
        found = recordings(adding.add, a, b, fixed=(2.0,))
        assert torch.equal(found, a + 2 * b)
        assert torch.equal(recordings(adding.add, a, b, fixed=(3.0,)), a + 3 * b)
        assert torch.equal(recordings(adding.add, a[:2], b[:2]), a[:2] + b[:2])
    assert len(recordings._known) == 3
    kept = recordings(adding.add, torch.zeros(2), torch.ones(2))
    recordings(adding.add, torch.ones(2), torch.ones(2))
    assert torch.equal(kept, torch.ones(2)), "a result is not overwritten by the next"
    assert not copy.deepcopy(recordings)._known


@torch.inference_mode()
def test_no_more_is_kept_than_the_limit() -> None:
    recordings, adding = devices.Recordings(limit=2, always=True), Adding()
    for size in (1, 2, 3, 1, 2, 3):
        recordings(adding.add, torch.ones(size), torch.ones(size))
    assert len(recordings._known) == 2


def test_without_a_device_that_records_or_with_gradients_nothing_is_recorded() -> None:
    recordings, adding = devices.Recordings(), Adding()
    for _ in range(3):
        recordings(adding.add, torch.ones(1), torch.ones(1))
    assert not recordings._known and not devices.records(torch.device("cpu"))


class FakeGraph:
    def __init__(self, log: list[str]) -> None:
        self.log = log

    def replay(self) -> None:
        self.log.append("replay")


@pytest.mark.parametrize("name", ["CUDAGraph", "NPUGraph"])
def test_a_device_records_after_running_twice_on_a_side_stream(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    class Entered:
        def __init__(self, what: str) -> None:
            self.what = what

        def __enter__(self) -> None:
            log.append(self.what)

        def __exit__(self, *_: object) -> None:
            log.append(f"end of {self.what}")

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    module = types.SimpleNamespace(
        Stream=lambda device: stream,
        current_stream=lambda device: stream,
        stream=lambda side: Entered("side"),
        synchronize=lambda device: log.append("synchronize"),
        graph=lambda graph, pool, capture_error_mode: Entered("graph"),
        **{name: lambda: FakeGraph(log)},
    )
    monkeypatch.setattr(accelerators, "_accelerator", lambda kind: module)
    device = torch.device("meta")
    assert devices.records(device)
    replay = devices.record(lambda: log.append("run"), device)
    assert log == ["side", "run", "run", "end of side", "synchronize", "graph", "run", "end of graph"]
    replay()
    assert log[-1] == "replay"


def test_sound_is_the_same_by_recordings(tmp_path: Path) -> None:
    model = tiny_model(tmp_path)
    usual = [list(model.stream(recorded_tokens(150), recorded_speaker(), steps=2, seed=seed)) for seed in (0, 1)]
    model.flow.decoder._recordings = flow = devices.Recordings(always=True)
    model.vocoder._recordings = vocoder = devices.Recordings(always=True)
    for seed, chunks in enumerate(usual):
        for found, expected in zip(
            model.stream(recorded_tokens(150), recorded_speaker(), steps=2, seed=seed), chunks, strict=True
        ):
            assert np.array_equal(found, expected)
    assert flow._known and vocoder._known
