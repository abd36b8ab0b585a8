"""One process, one device, no process group."""

from __future__ import annotations

from osum_echat.training.engines.base import TorchEngine


class SingleEngine(TorchEngine):
    """Plain training of a module that fits on one device."""

    needs_group = False
