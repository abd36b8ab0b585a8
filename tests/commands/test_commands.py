"""`osum-echat` as a person at a keyboard meets it: help of every command, older names, wrong calls, missing packages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from osum_echat.cli import COMMANDS, EXTRAS, main, missing_package, usage
from osum_echat.cli.data import COMMANDS as DATA_COMMANDS

OLDER_NAMES = {
    "average_checkpoints": "average",
    "check_golden": "golden",
    "convert_checkpoint": "convert",
    "convert_whisper": "convert-whisper",
    "draw_streaming": "draw-streaming",
    "extract_speech_tokens": "tokens",
    "hub": "hub",
}


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=120
    )


def one_sentence(done: subprocess.CompletedProcess[str]) -> str:
    """What a wrong call prints: one line on stderr, nothing on stdout, exit code 2."""
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr
    return done.stderr


def shown_help(*arguments: str) -> int:
    """The exit code of ``osum-echat ARGUMENTS --help``."""
    try:
        return main([*arguments, "--help"])
    except SystemExit as stopped:
        return int(stopped.code or 0)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_every_command_names_it(name, capsys):
    assert shown_help(name) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: osum-echat {name}") and len(shown) > 100


@pytest.mark.parametrize("name", DATA_COMMANDS)
def test_help_of_every_data_command_names_it(name, capsys):
    assert shown_help("data", name) == 0
    assert capsys.readouterr().out.startswith(f"usage: osum-echat data {name}")


def test_the_list_of_commands_has_a_line_for_each():
    lines = [line.split(maxsplit=1) for line in usage().splitlines() if line.startswith("  ")]
    assert [name for name, _ in lines] == list(COMMANDS) and all(text for _, text in lines)


def test_an_unknown_command_is_one_sentence():
    assert "unknown command 'dance'" in one_sentence(python("-m", "osum_echat.cli", "dance"))
    assert "unknown command 'dance'; there are doctor, show, convert" in one_sentence(
        python("-m", "osum_echat.cli", "data", "dance")
    )


def test_a_missing_extra_is_named_with_what_installs_it():
    code = "import sys; sys.modules['gradio'] = None; from osum_echat.cli import main; sys.exit(main(['page']))"
    assert "pip install 'osum-echat[ui]'" in one_sentence(python("-c", code))


def test_every_extra_of_the_table_exists(root_dir: Path):
    text = (root_dir / "pyproject.toml").read_text(encoding="utf-8")
    for package, extra in EXTRAS.items():
        sentence = missing_package(ModuleNotFoundError("gone", name=f"{package}.inner"))
        assert sentence is not None and f"osum-echat[{extra}]" in sentence
        listed = text.partition(f"\n{extra} = [")[2].partition("]")[0]
        assert package.replace("_", "-") in listed
    assert missing_package(ModuleNotFoundError("ours", name="osum_echat.nothing")) is None


def test_a_python_that_is_too_old_is_one_sentence():
    code = (
        "import runpy, sys; sys.version_info = (3, 9, 2); sys.version = '3.9.2 (default)'\n"
        "runpy.run_module('osum_echat.cli', run_name='__main__')"
    )
    assert "needs Python 3.10 or newer, this is 3.9.2" in one_sentence(python("-c", code))


FOR_ACCELERATORS = {"gpu_check", "pack_tree"}  # programs of their own: tests/test_accelerator_check.py


def test_older_names_of_the_tools_run_the_commands(root_dir: Path):
    """All in one process, because each imports torch."""
    code = (
        "import contextlib, runpy, sys\n"
        "for name in sys.argv[2:]:\n"
        "    sys.argv[:] = [name, '--help']\n"
        "    with contextlib.suppress(SystemExit): runpy.run_path(f'{folder}/{name}.py', run_name='__main__')\n"
    ).replace("import contextlib", "import sys; folder = sys.argv[1]; names = sys.argv[2:]\nimport contextlib")
    code = code.replace("for name in sys.argv[2:]", "for name in names")
    tools = root_dir / "tools"
    assert {path.stem for path in tools.glob("*.py")} == {*OLDER_NAMES, "older_name", *FOR_ACCELERATORS}
    done = python("-c", code, str(tools), *OLDER_NAMES, PYTHONPATH=os.pathsep.join([str(tools), os.environ["PYTHONPATH"]]))
    assert done.returncode == 0, done.stderr
    for command in OLDER_NAMES.values():
        assert f"usage: osum-echat {command} " in done.stdout


def test_an_older_name_says_what_to_do_where_the_package_is_not_installed(root_dir: Path):
    sentence = one_sentence(python("-S", "-E", str(root_dir / "tools" / "check_golden.py")))
    assert "this Python has no osum_echat" in sentence and ".venv/bin/osum-echat golden" in sentence
