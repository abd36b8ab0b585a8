"""Training checkpoints: everything a run needs to go on as if it had never stopped, and the way out of it.

    <out>/checkpoints/step_00001250/   dcp/ or deepspeed/   weights and optimiser, written by the engine
                                       rank_00000.pt ...    random states and data position of each rank
                                       state.json           step, epoch, config, code version, world size: written last
    <out>/checkpoints/latest           name of the newest complete one

A checkpoint is written into a hidden folder, flushed to disk and renamed; ``latest`` moves after that. A process killed at any moment leaves
the previous checkpoint as it was; a full disk costs this checkpoint, not the run and not the one before.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import osum_echat
from osum_echat.training.distributed import World
from osum_echat.training.engines.base import Engine

log = logging.getLogger(__name__)

STATE_FILE = "state.json"
LATEST = "latest"


@dataclass
class TrainState:
    """Where a run stands, the same on every rank."""

    step: int = 0
    epoch: int = 0
    targets: int = 0
    bad_steps: int = 0
    seconds: float = 0.0
    engine: dict[str, Any] = field(default_factory=dict)


def code_version() -> str:
    """Package version and, in a git checkout, its commit."""
    commit = _commit(Path(osum_echat.__file__).resolve().parent.parent / ".git")
    return f"{osum_echat.__version__}+{commit}" if commit else osum_echat.__version__


def _commit(git: Path) -> str:
    """The commit checked out by the repository folder ``git``, read from its files, because git need not be installed; "" without one."""
    try:
        head = (git / "HEAD").read_text(encoding="utf-8").strip()
        if not head.startswith("ref: "):
            return head[:12]
        branch = head.removeprefix("ref: ")
        if (git / branch).is_file():
            return (git / branch).read_text(encoding="utf-8")[:12]
        packed = (git / "packed-refs").read_text(encoding="utf-8").splitlines()
    except OSError:  # an installed package; or a work tree whose repository is elsewhere
        return ""
    return next((line[:12] for line in packed if line.endswith(f" {branch}")), "")


def fingerprint(module: nn.Module) -> dict[str, str]:
    """A cheap sum of every frozen parameter: tells whether two runs started from the same weights."""
    out = {}
    for name, param in module.named_parameters():
        if not param.requires_grad and param.numel():
            flat = param.detach().reshape(-1)
            sample = flat[:: max(1, flat.numel() // 4096)].double()
            out[name] = f"{float(sample.sum()):.10e}/{float(sample.abs().sum()):.10e}"
    return out


class Checkpoints:
    """The checkpoints of one run in ``folder``. All ranks hold one and call its methods together."""

    def __init__(self, folder: Path, world: World, keep: int = 3):
        self.folder, self.world, self.keep = folder, world, keep
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".tmp-*"):  # of a killed process
                shutil.rmtree(leftover)
        world.barrier()

    def latest(self) -> Path | None:
        """The newest complete checkpoint, or None. Raises ValueError when ``latest`` names one that is not there."""
        return latest(self.folder)

    def save(self, engine: Engine, state: TrainState, rank_state: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
        """Write one checkpoint; False (with an error in the log) when it could not be written. Call on all ranks.

        ``rank_state``: this rank's random states and data position; ``facts``: what else state.json shall say (config, fingerprint).
        """
        name = f"step_{state.step:08d}"
        temporary = self.folder / f".tmp-{name}"
        if self.world.is_main:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.world.barrier()
        state.engine = engine.extra_state()
        error = ""
        try:
            engine.save(temporary)
            torch.save(_plain(rank_state), temporary / f"rank_{self.world.rank:05d}.pt")
            _flush(temporary / f"rank_{self.world.rank:05d}.pt")
        except (OSError, RuntimeError, torch.distributed.checkpoint.CheckpointException) as problem:
            error = f"rank {self.world.rank}: {type(problem).__name__}: {problem}"
        errors = [e for e in self.world.gather(error) if e]
        if not errors and self.world.is_main:
            try:
                self._finish(temporary, name, state, facts)
            except OSError as problem:
                errors = [f"{type(problem).__name__}: {problem}"]
        errors = self.world.broadcast(errors)
        if errors:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free / 2**30
            log.error("checkpoint %s was not written (%.1f GB free): %s", name, free, "; ".join(errors))
        return not errors

    def _finish(self, temporary: Path, name: str, state: TrainState, facts: Mapping[str, Any]) -> None:
        content = {**vars(state), "world_size": self.world.size, "code": code_version(), **facts}
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        for path in sorted(temporary.rglob("*")):
            _flush(path)
        final = self.folder / name
        if final.exists():  # the same step again, after a resume from an older one
            old = self.folder / f".tmp-old-{name}"
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        temporary.rename(final)
        _flush(self.folder)
        pointer = self.folder / f".{LATEST}"
        pointer.write_text(name + "\n", encoding="utf-8")
        _flush(pointer)
        pointer.replace(self.folder / LATEST)
        _flush(self.folder)
        for leftover in self.folder.glob(".tmp-old-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for stale in sorted(self.folder.glob("step_*"))[: -self.keep]:
            if stale.name != name:
                shutil.rmtree(stale)

    def load(self, path: Path, engine: Engine) -> tuple[TrainState, list[dict[str, Any]], dict[str, Any]]:
        """Read weights and optimiser into ``engine``.

        Returns:
            The run's state, the per-rank states of *all* ranks that wrote it, and the content of state.json.
        """
        content = read_state(path)
        engine.load(path)
        state = TrainState(**{k: content[k] for k in vars(TrainState()) if k in content})
        engine.load_extra_state(state.engine)
        ranks = [
            torch.load(path / f"rank_{rank:05d}.pt", map_location="cpu", weights_only=True)
            for rank in range(content["world_size"])
        ]
        return state, ranks, content


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint in a ``checkpoints`` folder."""
    pointer = folder / LATEST
    if pointer.is_file():
        path = folder / pointer.read_text(encoding="utf-8").strip()
        if (path / STATE_FILE).is_file():
            return path
        # Killed while the same step was being replaced: the newest complete one serves.
    complete = sorted(p for p in folder.glob("step_*") if (p / STATE_FILE).is_file())
    if pointer.is_file() and not complete:
        raise ValueError(f"{pointer} names a checkpoint that is not there; restore it, or remove the file to start anew")
    return complete[-1] if complete else None


def is_training_folder(folder: Path) -> bool:
    """Whether ``folder`` is a training run's output or one ``step_*`` folder of it."""
    return (folder / "checkpoints").is_dir() or (folder / STATE_FILE).is_file()


def step_folder(folder: Path) -> Path:
    """The checkpoint that ``folder`` means: itself, or the newest of a run. Raises ValueError when there is none."""
    if (folder / STATE_FILE).is_file():
        return folder
    newest = latest(folder / "checkpoints")
    if newest is None:
        raise ValueError(f"{folder} holds no complete training checkpoint")
    return newest


def export(folder: str | Path, out: str | Path, **options: Any) -> Path:
    """Write a training run as a checkpoint folder; see `export.export_folder`."""
    from osum_echat.training.export import export_folder

    return export_folder(Path(folder), Path(out), **options)


def read_state(path: Path) -> dict[str, Any]:
    """state.json of one checkpoint."""
    file = path / STATE_FILE
    if not file.is_file():
        raise ValueError(f"{path} is not a complete training checkpoint (no {STATE_FILE})")
    return json.loads(file.read_text(encoding="utf-8"))


def _plain(value: Any) -> Any:
    """Numpy arrays as tensors, so that the file holds nothing that needs unpickling of code."""
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.astype(np.int64) if value.dtype == np.uint32 else value.copy())
    if isinstance(value, Mapping):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(v) for v in value)
    return value


def rng_from_plain(state: dict[str, Any]) -> dict[str, Any]:
    """A random state from `device.rng_state` after `_plain` and a file: NumPy's generator wants its array back."""
    name, keys, *rest = state["numpy"]
    return {**state, "numpy": (name, keys.numpy().astype(np.uint32), *rest)}


def _flush(path: Path) -> None:
    """fsync a file or folder."""
    with contextlib.closing(_Descriptor(path)) as opened:
        os.fsync(opened.number)


class _Descriptor:
    def __init__(self, path: Path):
        self.number = os.open(path, os.O_RDONLY)

    def close(self) -> None:
        os.close(self.number)
