"""Engines: how one model is trained by one or many processes. One file for each technique."""

from __future__ import annotations

from osum_echat.training.config import ConfigError, TrainConfig
from osum_echat.training.engines.base import Engine, StepResult

__all__ = ["Engine", "StepResult", "create", "resolve_name"]


def resolve_name(config: TrainConfig, launched_by_torchrun: bool) -> str:
    """The engine's name with ``auto`` decided: ddp under torchrun, else single."""
    name = config.engine.name
    if name == "auto":
        return "ddp" if launched_by_torchrun else "single"
    if name == "single" and launched_by_torchrun:
        raise ConfigError("engine.name=single cannot use several processes; start without torchrun or use ddp, fsdp or deepspeed")
    return name


def create(name: str) -> type[Engine]:
    """The engine class for a name; its module (and deepspeed) is imported only now."""
    if name == "single":
        from osum_echat.training.engines.single import SingleEngine

        return SingleEngine
    if name == "ddp":
        from osum_echat.training.engines.ddp import DdpEngine

        return DdpEngine
    if name == "fsdp":
        from osum_echat.training.engines.fsdp import FsdpEngine

        return FsdpEngine
    assert name == "deepspeed", name
    from osum_echat.training.engines.deepspeed import DeepSpeedEngine

    return DeepSpeedEngine
