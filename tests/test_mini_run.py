"""The recipe's steps: done once, gone on with after an interruption."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from recipes.mini import run

# As a training does: a signal makes it save and end well.
SAVES_AND_ENDS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (pathlib.Path(sys.argv[1], "saved").touch(), sys.exit(0)))
pathlib.Path(sys.argv[1], "started").touch()
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(run, "DONE", tmp_path / "done")
    return tmp_path / "done"


def writes(path: Path, code: int = 0) -> tuple[str, ...]:
    return (sys.executable, "-c", f"open({str(path)!r}, 'a').write('x'); raise SystemExit({code})")


def test_a_step_is_done_once_and_again_only_when_asked(tmp_path: Path, done: Path):
    step = run.Step("one", "", writes(tmp_path / "ran"))
    run.run(step, again=False)
    run.run(step, again=False)
    assert (done / "one").is_file() and (tmp_path / "ran").read_text() == "x"
    run.run(step, again=True)
    assert (tmp_path / "ran").read_text() == "xx"


def test_a_failed_step_is_not_done(tmp_path: Path, done: Path):
    with pytest.raises(ValueError, match="one ended with code 3"):
        run.run(run.Step("one", "", writes(tmp_path / "ran", 3)), again=False)
    assert not (done / "one").exists()


def test_a_step_waits_for_what_it_needs(tmp_path: Path):
    with pytest.raises(ValueError, match="two needs one"):
        run.run(run.Step("two", "", writes(tmp_path / "ran"), ("one",)), again=False)
    assert not (tmp_path / "ran").exists()


def test_a_stopped_step_saves_and_is_not_done(tmp_path: Path, done: Path):
    def stop_when_it_runs() -> None:
        while not (tmp_path / "started").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=stop_when_it_runs)
    thread.start()
    with pytest.raises(ValueError, match=f"code -{int(signal.SIGTERM)}"):
        run.run(run.Step("one", "", (sys.executable, "-c", SAVES_AND_ENDS, str(tmp_path))), again=False)
    thread.join()
    assert (tmp_path / "saved").exists() and not (done / "one").exists()
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_every_step_has_a_command_that_exists_and_needs_earlier_steps():
    before: set[str] = set()
    for step in run.STEPS:
        assert set(step.needs) <= before, step.name
        before.add(step.name)
        assert importlib.util.find_spec(step.command[2]) is not None, step.command
        configs = [part for part in step.command if part.endswith(".yaml")]
        assert all(Path(config).is_file() for config in configs)
