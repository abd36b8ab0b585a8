"""Writing training checkpoints: everything a run needs to go on as if it had never stopped (`folder` describes the
layout).

A checkpoint is written into a hidden folder, flushed to disk and renamed; ``latest`` moves after that. A process killed
at any moment leaves the previous checkpoint as it was; a full disk costs this checkpoint, not the run and not the one
before.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import osum_echat
from osum_echat.run.files import flush
from osum_echat.training.distributed import World
from osum_echat.training.engines.base import Engine
from osum_echat.training.folder import LATEST, STATE_FILE, read_state, step_name

log = logging.getLogger(__name__)


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
    """The commit checked out by the repository folder ``git``, read from its files, because git need not be installed;
    "" without one."""
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
    """The checkpoints of one run in ``folder``. All ranks hold one and call its methods together.

    ``on_phase`` gets the step and a name on rank 0: ``rename`` before a complete checkpoint appears under its name,
    ``renamed`` after.
    """

    def __init__(self, folder: Path, world: World, keep: int = 3, on_phase: Callable[[int, str], None] | None = None):
        self.folder, self.world, self.keep = folder, world, keep
        self._on_phase = on_phase or (lambda step, name: None)
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob(".tmp-*"):  # of a killed process
                shutil.rmtree(leftover)
        world.barrier()

    def save(self, engine: Engine, state: TrainState, rank_state: Mapping[str, Any], facts: Mapping[str, Any]) -> bool:
        """Write one checkpoint; False (with an error in the log) when it could not be written. Call on all ranks.

        ``rank_state``: this rank's random states and data position; ``facts``: what else state.json shall say (config,
        fingerprint).
        """
        name = step_name(state.step)
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
            flush(temporary / f"rank_{self.world.rank:05d}.pt")
        except (OSError, RuntimeError, torch.distributed.checkpoint.CheckpointException) as problem:
            error = f"rank {self.world.rank}: {type(problem).__name__}: {problem}"
        errors = [e for e in self.world.gather(error) if e]
        if not errors and self.world.is_main:
            try:
                self._on_phase(state.step, "rename")
                self._finish(temporary, name, {**vars(state), **self._origin(engine), **facts})
                self._on_phase(state.step, "renamed")
            except OSError as problem:
                errors = [f"{type(problem).__name__}: {problem}"]
        errors = self.world.broadcast(errors)
        if errors:
            if self.world.is_main:
                shutil.rmtree(temporary, ignore_errors=True)
            free = shutil.disk_usage(self.folder).free / 2**30
            log.error("checkpoint %s was not written (%.1f GB free): %s", name, free, "; ".join(errors))
        return not errors

    def _origin(self, engine: Engine) -> dict[str, Any]:
        return {"engine_family": engine.family, "world_size": self.world.size, "code": code_version()}

    def _finish(self, temporary: Path, name: str, content: Mapping[str, Any]) -> None:
        (temporary / STATE_FILE).write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")
        for path in sorted(temporary.rglob("*")):
            flush(path)
        final = self.folder / name
        if final.exists():  # the same step again, after a resume from an older one
            old = self.folder / f".tmp-old-{name}"
            shutil.rmtree(old, ignore_errors=True)
            final.rename(old)
        temporary.rename(final)
        flush(self.folder)
        pointer = self.folder / f".{LATEST}"
        pointer.write_text(name + "\n", encoding="utf-8")
        flush(pointer)
        pointer.replace(self.folder / LATEST)
        flush(self.folder)
        for leftover in self.folder.glob(".tmp-old-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for stale in sorted(self.folder.glob("step_*"))[: -self.keep]:
            if stale.name != name:
                shutil.rmtree(stale)

    def load(self, path: Path, engine: Engine) -> tuple[TrainState, list[dict[str, Any]]]:
        """Read weights and optimiser into ``engine``.

        Returns:
            The run's state, and the per-rank states of *all* ranks that wrote it.
        """
        content = read_state(path)
        engine.load(path)
        state = TrainState(**{k: content[k] for k in vars(TrainState()) if k in content})
        engine.load_extra_state(state.engine)
        ranks = [
            torch.load(path / f"rank_{rank:05d}.pt", map_location="cpu", weights_only=True)
            for rank in range(content["world_size"])
        ]
        return state, ranks


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
