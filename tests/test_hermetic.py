"""The watch of `conftest.py` works: planted tests that reach outside fail with a sentence, ordinary ones pass."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

PLANTED = """
import contextlib, json, os, socket, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path({root!r})
WORDS = "/usr/share/dict/words"

def test_opens_words():
    open(WORDS).close()

def test_opens_words_and_hides_the_error():
    with contextlib.suppress(Exception):
        Path(WORDS).read_text()

def test_child_process_opens_words():
    subprocess.run([sys.executable, "-c", f"open({{WORDS!r}})"], capture_output=True)

def test_starts_flite():
    subprocess.run(["flite", "-t", "hello"], check=False)

def test_starts_flite_in_a_shell():
    os.system("flite -t hello")

def test_starts_git():
    subprocess.run(["git", "--version"], check=False)

def test_connects_to_another_machine():
    socket.create_connection(("192.0.2.1", 80), timeout=0.1)

def test_reads_another_temporary_folder():
    Path({elsewhere!r}, "left_behind.txt").read_text()

def test_stays_inside(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    assert tmp_path.is_relative_to(tempfile.gettempdir())
    Path.home().joinpath("b.txt").write_text("b")
    assert "osum-echat" in (ROOT / "pyproject.toml").read_text()
    Path(json.__file__).read_text()
    subprocess.run([sys.executable, "-c", "import json, osum_echat"], check=True)
    done = subprocess.run(["bash", str(ROOT / "infer_with_shards_or_raw.sh")], capture_output=True)
    assert done.returncode == 2
"""


@pytest.fixture(scope="module")
def planted(root_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name of a planted test: why it failed, empty when it passed. All are run once, by a pytest of their own."""
    folder = tmp_path_factory.mktemp("planted")
    elsewhere = tmp_path_factory.mktemp("elsewhere")  # outside the temporary folder of that pytest
    (elsewhere / "left_behind.txt").write_text("by another run")
    (folder / "test_planted.py").write_text(PLANTED.format(root=str(root_dir), elsewhere=str(elsewhere)))
    (folder / "pytest.ini").write_text("[pytest]\n")
    env = {name: value for name, value in os.environ.items() if not name.startswith(("OSUM_TESTS_", "PYTEST_"))}
    env["PYTHONPATH"] = str(root_dir)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "tests.conftest", "-p", "no:cacheprovider", "--junitxml=out.xml"]
    done = subprocess.run([*command, "test_planted.py"], cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout[-3000:] + done.stderr[-3000:]
    found = {}
    for case in ElementTree.parse(folder / "out.xml").iter("testcase"):
        faults = [*case.iter("failure"), *case.iter("error")]
        found[case.attrib["name"]] = faults[0].attrib["message"] if faults else ""
    return found


@pytest.mark.parametrize(
    ("test", "what", "rule"),
    [
        ("opens_words", "opened /usr/share/dict/words", "opens files of the checkout"),
        ("opens_words_and_hides_the_error", "opened /usr/share/dict/words", "opens files of the checkout"),
        ("child_process_opens_words", "opened /usr/share/dict/words", "opens files of the checkout"),
        ("starts_flite", "started flite", "starts the interpreter"),
        ("starts_flite_in_a_shell", "started 'flite -t hello'", "starts the interpreter"),
        ("starts_git", "started git", "starts the interpreter"),
        ("connects_to_another_machine", "connected to 192.0.2.1", "connects to this machine only"),
        ("reads_another_temporary_folder", "left_behind.txt", "opens files of the checkout"),
    ],
)
def test_a_test_that_reaches_outside_fails(planted: dict[str, str], test: str, what: str, rule: str):
    assert what in planted[f"test_{test}"] and rule in planted[f"test_{test}"]


def test_a_test_that_stays_inside_passes(planted: dict[str, str]):
    assert planted["test_stays_inside"] == ""
