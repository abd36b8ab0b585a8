"""vLLM in its own environment (`make test-vllm`): no thread is bound to a core, and the checkout is importable in its processes too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # as `VllmDecoder` does on a CPU
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(scope="session")
def mini() -> Any:
    """mini with our own engine, in float32, its weights as they are."""
    from osum_echat.pipeline import EChat

    return EChat.load("mini", dtype="float32", device="cpu", pack=False)


@pytest.fixture(scope="session")
def mini_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """mini, exported as a person would."""
    from osum_echat.cli import main

    folder = tmp_path_factory.mktemp("vllm") / "mini"
    assert main(["export", "--for", "vllm", "mini", str(folder), "--dtype", "float32"]) == 0
    return folder


@pytest.fixture(scope="session")
def mini_vllm(mini_folder: Path) -> Iterator[Any]:
    """mini whose LLM runs in vLLM."""
    from osum_echat.pipeline import EChat

    echat = EChat.load("mini", device="cpu", llm_engine="vllm", vllm_folder=mini_folder)
    yield echat
    echat.generator.close()
