"""Processes of one run: who am I, and small messages between us.

torchrun's environment variables say rank and world; without them there is one process and every function here is
trivial. Control messages (counts, flags, texts) go over a gloo group of their own on the CPU, so they never wait for an
accelerator's queue.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from osum_echat import device as devices


@dataclass
class World:
    """This process among all. ``control`` is None in a run of one process without a process group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    control: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        """``value`` of every rank, on every rank."""
        if self.control is None:
            return [value]
        out: list[Any] = [None] * self.size
        dist.all_gather_object(out, value, group=self.control)
        return out

    def table(self, values: list[float]) -> torch.Tensor:
        """One row of numbers from each rank: float64 [size, len(values)]."""
        row = torch.tensor(values, dtype=torch.float64)
        if self.control is None:
            return row[None]
        rows = [torch.empty_like(row) for _ in range(self.size)]
        dist.all_gather(rows, row, group=self.control)
        return torch.stack(rows)

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true on any rank."""
        return bool(self.table([float(flag)]).max() > 0)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's ``value``, on every rank."""
        if self.control is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def barrier(self) -> None:
        if self.control is not None:
            dist.barrier(group=self.control)


def launched_by_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def start(device: torch.device, needs_group: bool, timeout_minutes: float = 30.0) -> World:
    """Join the process group. ``needs_group``: the engine works through collectives, even alone."""
    if not launched_by_torchrun() and not needs_group:
        return World()
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ.setdefault(name, value)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    if not dist.is_initialized():
        options: dict[str, Any] = {"backend": devices.collectives_backend(device), "timeout": timeout}
        if "MASTER_PORT" not in os.environ:  # alone: a store in this process, no port that another run may hold
            options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        dist.init_process_group(**options)
    control = dist.new_group(backend="gloo", timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), control)


def stop() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
