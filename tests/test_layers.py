"""The house rule: imports point one way, and the core needs none of the optional packages."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = ["deepspeed", "gradio", "torch_npu", "liger_kernel", "flash_attn", "faster_whisper", "speechmos", "webdataset"]


def test_imports_point_one_way(root_dir):
    # In a process of its own: import-linter sets logging up anew, which would silence the loggers of the other tests.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], cwd=root_dir, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_core_imports_without_optional_packages(root_dir):
    code = (
        "import sys, importlib, pkgutil\n"
        f"for name in {OPTIONAL!r}: sys.modules[name] = None  # importing any of them now raises ImportError\n"
        "import osum_echat\n"
        "names = [m.name for m in pkgutil.walk_packages(osum_echat.__path__, 'osum_echat.')]\n"
        "for name in names:\n"
        "    if not name.endswith('__main__'): importlib.import_module(name)\n"
        "print(len(names))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root_dir, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) > 10


def test_importing_does_nothing(root_dir):
    scripts = ["infer_runtime", "infer_multiturn", "infer_gradio", "do_test_dataloader"]
    code = "\n".join(f"import {name}" for name in scripts)
    done = subprocess.run([sys.executable, "-c", code], cwd=root_dir, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == ""
