"""Every test runs with one thread, an empty home folder, a temporary folder of this run, and a watch on what it opens and starts.

One thread: two spinning OpenMP threads on a busy two-core machine are slower than one. The rules of the watch: `tests/hermetic/hermetic_watch.py`.
"""

# ruff: noqa: E402
from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

HERMETIC = Path(__file__).parent / "hermetic"
BASE_VARIABLE = "OSUM_TESTS_TEMPORARY"  # set for the processes of pytest-xdist, which share the folder
# Each names a folder of the person who runs the tests; without it, what it names is under HOME.
HOME_VARIABLES = (
    "XDG_CACHE_HOME",
    "XDG_CONFIG_HOME",
    "HF_HOME",
    "HF_HUB_CACHE",
    "TORCH_HOME",
    "MPLCONFIGDIR",
    "TRITON_CACHE_DIR",
)


def _load_watch() -> Any:
    """The module, once in a process: a pytest that a test starts has it from its `sitecustomize`."""
    if "hermetic_watch" not in sys.modules:
        spec = importlib.util.spec_from_file_location("hermetic_watch", HERMETIC / "hermetic_watch.py")
        assert spec is not None and spec.loader is not None
        sys.modules["hermetic_watch"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["hermetic_watch"]


KEEP: list[bool] = []


def _clean_up(folder: Path) -> None:
    """Runs last: registered before everything that uses the folder."""
    if KEEP and not any(KEEP):
        shutil.rmtree(folder, ignore_errors=True)


def _prepare() -> tuple[Path, bool]:
    """Set this process (and by its environment its children) up; the temporary folder, and whether it was made here."""
    mine = BASE_VARIABLE not in os.environ
    base = Path(tempfile.mkdtemp(prefix="osum-tests-") if mine else os.environ[BASE_VARIABLE])
    if mine:
        atexit.register(_clean_up, base)
    (base / "home").mkdir(exist_ok=True)
    for name in HOME_VARIABLES:
        os.environ.pop(name, None)
    os.environ.update({BASE_VARIABLE: str(base), "TMPDIR": str(base), "HOME": str(base / "home")})
    tempfile.tempdir = str(base)
    for name, value in {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "MPLBACKEND": "Agg",
    }.items():
        os.environ.setdefault(name, value)
    return base, mine


WATCH_MODULE = _load_watch()
BASE, BASE_IS_MINE = _prepare()
WATCH = WATCH_MODULE.install([BASE], str(BASE / f"stopped-{os.getpid()}.log"))
WATCH.watching = False  # `sitecustomize` has it on

import hypothesis
import pytest
import torch

# The same examples every time, so that a suite that passed passes again; `--hypothesis-profile=random` looks for new ones.
hypothesis.settings.register_profile("random", deadline=None)
hypothesis.settings.register_profile("same", deadline=None, derandomize=True)
hypothesis.settings.load_profile("same")
torch.set_num_threads(1)


def _watched() -> Generator[None, Any, Any]:
    """Watch while something of a test runs; fail it for what it touched, even where the code under test swallowed the error."""
    WATCH.watching = True
    try:
        result = yield
    except BaseException as error:
        WATCH.watching = False
        found = WATCH.take()
        if found and not isinstance(error, WATCH_MODULE.HermeticError):
            raise AssertionError("\n".join(found)) from error
        raise
    WATCH.watching = False
    found = WATCH.take()
    if found:
        pytest.fail("\n".join(found), pytrace=False)
    return result


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_setup() -> Generator[None, Any, Any]:
    return (yield from _watched())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_call() -> Generator[None, Any, Any]:
    return (yield from _watched())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown() -> Generator[None, Any, Any]:
    return (yield from _watched())


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    """Importing a test file is watched as well."""
    WATCH.watching = True
    try:
        report = yield
    finally:
        WATCH.watching = False
    found = WATCH.take()
    if found:
        report.outcome, report.longrepr = "failed", f"{collector.nodeid}: " + "\n".join(found)
    return report


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """pytest-xdist gives each process a part of the list and moves tests from the end of a part."""
    items.sort(key=lambda item: item.get_closest_marker("together") is None)


def pytest_configure(config: pytest.Config) -> None:
    """The folder of the test files (the checkout, but for planted ones) and a temporary folder of the person's choice are inside.

    Processes that tests start are watched by PYTHONPATH; those that xdist starts are not, they come through here themselves.
    """
    WATCH_MODULE.install([BASE, config.rootpath, *filter(None, [config.option.basetemp])], WATCH.log)
    if hasattr(config, "workerinput") or not getattr(config.option, "numprocesses", None):
        others = [p for p in os.environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != str(HERMETIC)]
        os.environ["PYTHONPATH"] = os.pathsep.join([str(HERMETIC), *others])


def pytest_sessionfinish(exitstatus: int) -> None:
    """The temporary files of a run that passed go, when everything else of this process has ended."""
    if BASE_IS_MINE:
        KEEP.append(exitstatus != pytest.ExitCode.OK)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if any(KEEP):
        terminalreporter.write_line(f"temporary files of this run are kept: {BASE}")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the small files that tests read."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def root_dir() -> Path:
    """The checkout."""
    return Path(__file__).parent.parent
