"""One thread for every test: two spinning OpenMP threads on a busy two-core machine are slower than one."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """Folder of the small files that tests read."""
    return Path(__file__).parent / "data"


@pytest.fixture(scope="session")
def root_dir() -> Path:
    """The checkout."""
    return Path(__file__).parent.parent
