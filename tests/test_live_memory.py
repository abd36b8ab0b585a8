"""Memory that ended sessions leave with the C library."""

from __future__ import annotations

import threading

import pytest

from osum_echat.serving import memory
from osum_echat.serving.memory import Trimmer, trim
from tests.live_case import Clock, live
from tests.test_live_server import _no_uname, connect, serving  # noqa: F401  the fixture is used by being here


def test_memory_is_given_back_after_a_session_and_not_all_the_time() -> None:
    clock, done = Clock(), threading.Semaphore(0)
    trimmer = Trimmer(60.0, done.release, clock)
    for now, expected in ((0.0, True), (1.0, False), (59.0, False), (61.0, True), (90.0, False), (200.0, True)):
        clock.now = now
        trimmer.session_ended()
        assert done.acquire(timeout=10 if expected else 0.05) is expected, now


@live
async def test_a_server_does_it_when_a_session_ends() -> None:
    done = threading.Event()
    async with serving() as running:
        running.server._trimmer = Trimmer(work=done.set)
        async with connect(f"{running.ws}/v1/realtime") as client:
            await client.recv()
            assert not done.is_set()
    assert done.wait(10)


def test_a_c_library_without_it_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    trim()
    monkeypatch.setattr(memory, "_malloc_trim", lambda: None)
    trim()
