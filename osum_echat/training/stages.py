"""The three stages as data: which rooms train, and what that means for a model's parameters.

From the authors' system figure: understanding trains encoder and adapter under a frozen LLM; generation and empathy train everything.
A config's ``rooms`` override the table room by room.
"""

from __future__ import annotations

from torch import nn

from osum_echat.training.config import ConfigError, RoomRates, TrainConfig
from osum_echat.training.optimizer import Group

ROOMS = ("encoder", "adapter", "heads", "llm", "lora", "speech")

STAGES: dict[str, frozenset[str]] = {
    "understanding": frozenset({"encoder", "adapter", "heads", "lora"}),
    "generation": frozenset({"encoder", "adapter", "heads", "llm", "lora", "speech"}),
    "empathy": frozenset({"encoder", "adapter", "heads", "llm", "lora", "speech"}),
}

_PREFIXES = {
    "encoder.": "encoder",
    "adapter.": "adapter",
    "projection.": "adapter",
    "ctc.": "heads",
    "tags.": "heads",
    "lm.speech_": "speech",
    "lm.llm.": "llm",
}


def room_of(parameter: str) -> str:
    """The room of a parameter by its name in `EChatModel`."""
    if ".lora_" in parameter:
        return "lora"
    for prefix, room in _PREFIXES.items():
        if parameter.startswith(prefix):
            return room
    raise AssertionError(f"parameter {parameter} belongs to no room; extend stages._PREFIXES")


def rates(config: TrainConfig, has_lora: bool) -> dict[str, float]:
    """Learning rate of each room, 0 for frozen. With LoRA the LLM below it is frozen unless the config gives it a rate."""
    stated: RoomRates = config.rooms
    out = {}
    for room in ROOMS:
        rate = getattr(stated, room)
        if rate is None:
            trains = room in STAGES[config.stage] and not (room == "llm" and has_lora)
            rate = config.optim.lr if trains else 0.0
        out[room] = rate
    return out


def assign(model: nn.Module, config: TrainConfig) -> list[Group]:
    """Freeze and unfreeze ``model`` as the stage says; the optimiser's groups.

    A frozen encoder is put into eval mode (nothing trains below it, so its dropout would be noise); the frozen LLM stays in train mode,
    which switches activation checkpointing on for the gradients that flow through it. Parameter names get the prefix ``model.``, their
    place in `Objective`.

    Raises:
        ConfigError: when nothing is left to train.
    """
    names = [name for name, _ in model.named_parameters()]
    room_rates = rates(config, has_lora=any(".lora_" in name for name in names))
    groups = {room: Group(room, rate, []) for room, rate in room_rates.items() if rate > 0}
    for name, param in model.named_parameters():
        room = room_of(name)
        param.requires_grad_(room in groups)
        if room in groups:
            groups[room].named.append((f"model.{name}", param))
    set_modes(model, room_rates)
    out = [group for group in groups.values() if group.named]
    if not out:
        raise ConfigError("nothing to train: every room of this model is frozen; give rooms.<room> a learning rate")
    return out


def set_modes(model: nn.Module, room_rates: dict[str, float]) -> None:
    """Train mode for all but a frozen encoder."""
    model.train()
    if room_rates["encoder"] == 0:
        model.get_submodule("encoder").eval()


def table(model: nn.Module, groups: list[Group]) -> str:
    """Parameters of each room: how many there are, how many train, at which rate."""
    total = dict.fromkeys(ROOMS, 0)
    trained = dict.fromkeys(ROOMS, 0)
    for name, param in model.named_parameters():
        total[room_of(name)] += param.numel()
        trained[room_of(name)] += param.numel() if param.requires_grad else 0
    lr = {group.room: group.lr for group in groups}
    lines = [f"{'room':<10}{'parameters':>16}{'trained':>16}  learning rate"]
    for room in ROOMS:
        if total[room]:
            rate = f"{lr[room]:g}" if trained[room] else "frozen"
            lines.append(f"{room:<10}{total[room]:>16,}{trained[room]:>16,}  {rate}")
    lines.append(f"{'all':<10}{sum(total.values()):>16,}{sum(trained.values()):>16,}")
    return "\n".join(lines)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of encoder, adapter and LLM: elements of a ModuleList that hold modules of their own."""
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            found += [child for child in module if next(child.children(), None) is not None]
    return found
