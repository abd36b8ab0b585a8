"""Imports point one way, and the core needs none of the optional packages."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = [
    "deepspeed",
    "gradio",
    "torch_npu",
    "liger_kernel",
    "flash_attn",
    "faster_whisper",
    "speechmos",
    "webdataset",
    "ray",
    "pyarrow",
    "vllm",
]
NEED_AN_EXTRA = {
    "osum_echat.serving.page.app",  # made of gradio's components; `osum-echat page` names the extra
    "osum_echat.generation.vllm.processor",  # vLLM itself opens it
}
UNIX_MODULES = ["fcntl", "grp", "pty", "pwd", "resource", "syslog", "termios", "tty"]
UNIX_FUNCTIONS = ["fork", "forkpty", "getuid", "geteuid", "killpg", "nice", "sched_getaffinity", "setsid"]
WINDOWS_SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM"}
OTHERS = [
    *(
        "asyncio",
        "fastapi",
        "fsspec.asyn",
        "huggingface_hub.utils",
        "jiwer",
        "kaldi_native_fbank",
        "matplotlib.pyplot",
        "onnxruntime",
    ),
    *(
        "multiprocessing.forkserver",
        "multiprocessing.popen_fork",
        "openai",
        "peft",
        "prometheus_client",
        "psutil",
        "soundfile",
        "tqdm",
    ),
    *("torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.utils.data", "torch.utils.tensorboard", "transformers"),
    *("uvicorn", "websockets"),
]


def test_imports_point_one_way(root_dir):
    # In a process of its own: import-linter sets logging up anew, which would silence the loggers of the other tests.
    code = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"
    done = subprocess.run([sys.executable, "-c", code], cwd=root_dir, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:]


def test_core_imports_without_optional_packages_and_without_linux(root_dir):
    """As on another system: what Python has on Unix only is taken away after other people's packages have been imported."""
    code = (
        "import sys, importlib, os, pkgutil, signal\n"
        f"for name in {OPTIONAL!r}: sys.modules[name] = None  # importing any of them now raises ImportError\n"
        f"for name in {OTHERS!r}: importlib.import_module(name)\n"
        f"for name in {UNIX_MODULES!r}: sys.modules[name] = None\n"
        f"for name in {UNIX_FUNCTIONS!r}:\n"
        "    if hasattr(os, name): delattr(os, name)\n"
        f"for name in set(signal.Signals.__members__) - {WINDOWS_SIGNALS!r}: delattr(signal, name)\n"
        "import osum_echat\n"
        "names = [m.name for m in pkgutil.walk_packages(osum_echat.__path__, 'osum_echat.')]\n"
        "for name in names:\n"
        f"    if not name.endswith('__main__') and name not in {NEED_AN_EXTRA!r}: importlib.import_module(name)\n"
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
