"""What the soak of the live server judges memory by (benchmarks/live_soak.py)."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("psutil")


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    return importlib.import_module("live_soak")


def memory(sessions: int, rise: float) -> list[int]:
    """A gigabyte of weights, answers in progress of up to 40 MiB, and what each session leaves behind, in MiB."""
    return [int((1000 + number * 37 % 41 + number * rise) * 2**20) for number in range(sessions)]


def test_what_each_session_leaves_behind_is_seen_beside_the_weights(soak: ModuleType) -> None:
    leak = memory(500, 0.2)
    assert soak.growth(leak) <= 1.10, "the ratio alone lets it pass"
    assert soak.slope(leak) == pytest.approx(0.2, abs=0.02) and soak.slope(leak) > soak.SLOPE_MIB
    assert abs(soak.slope(memory(500, 0))) < 0.02
    early = [*memory(250, 0.4), *(value + 100 * 2**20 for value in memory(250, 0))]
    assert abs(soak.slope(early)) < 0.02, "what the first half needs once is no leak"
    assert soak.slope(memory(100, 0.2)) is None
