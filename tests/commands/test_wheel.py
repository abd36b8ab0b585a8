"""The package as a wheel: built, installed into an environment of its own, and used from an empty folder.

The environment borrows the packages of this one (nothing is downloaded) through a line in a ``.pth`` file. Such a line adds a folder, it does not
read the ``.pth`` files there, so an editable install of this checkout stays out; and `test_it_is_the_wheel_that_runs` looks at where the package
was imported from.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest
from filelock import FileLock

from osum_echat.cli import COMMANDS
from osum_echat.locations import MINI_VARIABLE
from osum_echat.metrics import word_errors

ROOT = Path(__file__).parents[2]
BUILD = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
HELP = """
import contextlib, io
from osum_echat.cli import COMMANDS, main
for name in COMMANDS:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        try: code = main([name, "--help"])
        except SystemExit as stopped: code = stopped.code
    assert not code, (name, code)
    print(shown.getvalue().splitlines()[0])
"""
API = """
import sys
from osum_echat import EChat
reply = EChat.load("mini").chat(sys.argv[1], think="tag", speak=True)
think = reply.think
print(think.transcript, think.age, think.gender, think.emotion, think.event, sep="|")
assert reply.text and reply.finish_reason == "stop" and len(reply.audio) > 22_050
"""


@dataclass(frozen=True)
class Installed:
    """The environment with the wheel in it."""

    folder: Path
    wheel: Path

    def run(self, *command: str, cwd: Path, mini: bool = True) -> subprocess.CompletedProcess[str]:
        """A program of the environment (``python``, ``osum-echat``) in an empty folder; of this checkout it knows mini at most."""
        kept = {name: value for name, value in os.environ.items() if name not in ("VIRTUAL_ENV", "PYTHONHOME", MINI_VARIABLE)}
        kept["PYTHONPATH"] = str(ROOT / "tests" / "hermetic")
        if mini:
            kept[MINI_VARIABLE] = str(ROOT / "checkpoints" / "mini")
        program = str(self.folder / "bin" / command[0])
        return subprocess.run(
            [program, *command[1:]], cwd=cwd, env=kept, capture_output=True, text=True, check=False, timeout=600
        )


def build(folder: Path) -> Installed:
    """Build from a copy of what the wheel is made of, and install."""
    source, env = folder / "source", folder / "env"
    for name in ("osum_echat", "assets/demo"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    built = subprocess.run([sys.executable, "-c", BUILD], cwd=source, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(env)], check=True)
    (packages,) = env.glob("lib/*/site-packages")
    (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n", encoding="utf-8")
    pip = [sys.executable, "-m", "pip", "--python", str(env / "bin" / "python"), "install", "--quiet", "--no-index", "--no-deps"]
    # pip is not watched: it starts lsb_release, rustc and others for what it would tell a registry about this machine. It asks none here.
    quiet = {**os.environ, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    del quiet["PYTHONPATH"]
    done = subprocess.run([*pip, str(wheel)], env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Installed(env, wheel)


@pytest.fixture(scope="session")
def installed() -> Installed:
    """One environment for the whole run, whichever test process comes first."""
    folder = Path(os.environ["OSUM_TESTS_TEMPORARY"]) / "wheel"
    with FileLock(f"{folder}.lock"):
        if (folder / "done").exists():
            return Installed(folder / "env", next((folder / "source" / "dist").glob("*.whl")))
        shutil.rmtree(folder, ignore_errors=True)
        made = build(folder)
        (folder / "done").touch()
        return made


@pytest.fixture(scope="session")
def recording() -> dict[str, str]:
    """The first recording of the demo: its path, and what is said and how."""
    record = json.loads((ROOT / "assets/demo/demo.jsonl").read_text(encoding="utf-8").splitlines()[0])
    return {**record["extra"], "txt": record["txt"], "wav": str(ROOT / "assets/demo" / record["wav"])}


def test_the_wheel_holds_the_package_and_its_files_and_nothing_else(installed: Installed):
    names = zipfile.ZipFile(installed.wheel).namelist()
    package = {name for name in names if name.startswith("osum_echat/")}
    others = [name for name in names if name not in package and ".dist-info/" not in name]
    assert all(".data/data/share/osum-echat/demo/" in name for name in others) and len(others) == 9
    for path in (ROOT / "osum_echat").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            assert path.relative_to(ROOT).as_posix() in package


def test_it_is_the_wheel_that_runs(installed: Installed, tmp_path: Path):
    done = installed.run("python", "-c", "import osum_echat; print(osum_echat.__file__)", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed.folder)


def test_importing_the_package_is_light(installed: Installed, tmp_path: Path):
    code = "import sys, osum_echat; print([m for m in ('torch', 'numpy', 'transformers') if m in sys.modules])"
    assert installed.run("python", "-c", code, cwd=tmp_path).stdout == "[]\n"


def test_every_command_has_help(installed: Installed, tmp_path: Path):
    listed = installed.run("osum-echat", "--help", cwd=tmp_path)
    assert listed.returncode == 0 and listed.stdout.startswith("usage: osum-echat")
    assert [line.split()[0] for line in listed.stdout.splitlines() if line.startswith("  ")] == list(COMMANDS)
    done = installed.run("python", "-c", HELP, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(COMMANDS)
    for name, line in zip(COMMANDS, lines, strict=True):
        assert line.startswith(f"usage: osum-echat {name}")


def test_the_released_models_config_is_known(installed: Installed, tmp_path: Path):
    done = installed.run("osum-echat", "inspect", "package:ct_config.yaml", cwd=tmp_path)
    assert done.returncode == 0 and "3,458,797,569" in done.stdout, done.stderr


def test_infer_hears_a_recording(installed: Installed, tmp_path: Path, recording: dict[str, str]):
    done = installed.run("osum-echat", "infer", "--task", "asr", "--wav", recording["wav"], "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert word_errors(recording["txt"], json.loads(done.stdout)["text"]).rate < 0.3


def test_without_mini_a_sentence_says_where_to_get_it(installed: Installed, tmp_path: Path, recording: dict[str, str]):
    done = installed.run("osum-echat", "infer", "--task", "asr", "--wav", recording["wav"], cwd=tmp_path, mini=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert "the mini model is not here" in done.stderr and MINI_VARIABLE in done.stderr and "--checkpoint" in done.stderr


def test_the_python_interface_hears_and_speaks(installed: Installed, tmp_path: Path, recording: dict[str, str]):
    done = installed.run("python", "-c", API, recording["wav"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    words, *tags = done.stdout.strip().split("|")
    assert word_errors(recording["txt"], words).rate < 0.3
    assert sum(tag == recording[name] for name, tag in zip(("age", "gender", "emotion", "event"), tags, strict=True)) >= 3


def test_the_demo_runs_on_its_own_recordings(installed: Installed, tmp_path: Path):
    done = installed.run("osum-echat", "demo", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "demo" / "index.html").stat().st_size > 100_000
    for line in (ROOT / "assets/demo/demo.jsonl").read_text(encoding="utf-8").splitlines():
        assert Path(json.loads(line)["wav"]).stem.split("_")[0] in done.stdout
