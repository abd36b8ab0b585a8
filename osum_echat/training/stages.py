"""The three stages as data: which parts train, and what that means for a model's parameters.

From the authors' system figure: understanding trains encoder and adapter under a frozen LLM; generation and empathy
train everything. A config's ``lr`` overrides the table part by part.
"""

from __future__ import annotations

from torch import nn

from osum_echat.model.parts import PARTS, has_lora, part_of
from osum_echat.training.config import ConfigError, TrainConfig
from osum_echat.training.optimizer import Group

STAGES: dict[str, frozenset[str]] = {
    "understanding": frozenset({"encoder", "adapter", "heads", "lora"}),
    "generation": frozenset({"encoder", "adapter", "heads", "llm", "lora", "speech"}),
    "empathy": frozenset({"encoder", "adapter", "heads", "llm", "lora", "speech"}),
}


def rates(config: TrainConfig, lora: bool) -> dict[str, float]:
    """Learning rate of each part, 0 for frozen. With LoRA the LLM below it is frozen unless the config gives it a
    rate."""
    out = {}
    for part in PARTS:
        rate = getattr(config.lr, part, 0.0)  # the turn head is trained by itself, without these stages
        if rate is None:
            trains = part in STAGES[config.stage] and not (part == "llm" and lora)
            rate = config.optim.lr if trains else 0.0
        out[part] = rate
    return out


def assign(model: nn.Module, config: TrainConfig) -> list[Group]:
    """Freeze and unfreeze ``model`` as the stage says; the optimiser's groups.

    A frozen encoder is put into eval mode (nothing trains below it, so its dropout would be noise); the frozen LLM
    stays in train mode, which switches activation checkpointing on for the gradients that flow through it. Parameter
    names get the prefix ``model.``, their place in `Objective`.

    Raises:
        ConfigError: when nothing is left to train.
    """
    part_rates = rates(config, has_lora([name for name, _ in model.named_parameters()]))
    groups = {part: Group(part, rate, []) for part, rate in part_rates.items() if rate > 0}
    for name, param in model.named_parameters():
        part = part_of(name)
        param.requires_grad_(part in groups)
        if part in groups:
            groups[part].named.append((f"model.{name}", param))
    set_modes(model, config)
    out = [group for group in groups.values() if group.named]
    if not out:
        raise ConfigError("nothing to train: every part of this model is frozen; give lr.<part> a learning rate")
    return out


def set_modes(model: nn.Module, config: TrainConfig) -> None:
    """Train mode for all but a frozen encoder."""
    model.train()
    if rates(config, lora=False)["encoder"] == 0:
        model.get_submodule("encoder").eval()


def table(model: nn.Module, groups: list[Group]) -> str:
    """Parameters of each part: how many there are, how many train, at which rate."""
    total = dict.fromkeys(PARTS, 0)
    trained = dict.fromkeys(PARTS, 0)
    for name, param in model.named_parameters():
        total[part_of(name)] += param.numel()
        trained[part_of(name)] += param.numel() if param.requires_grad else 0
    lr = {group.part: group.lr for group in groups}
    lines = [f"{'part':<10}{'parameters':>16}{'trained':>16}  learning rate"]
    for part in PARTS:
        if total[part]:
            rate = f"{lr[part]:g}" if trained[part] else "frozen"
            lines.append(f"{part:<10}{total[part]:>16,}{trained[part]:>16,}  {rate}")
    lines.append(f"{'all':<10}{sum(total.values()):>16,}{sum(trained.values()):>16,}")
    return "\n".join(lines)


def blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers of encoder, adapter and LLM: elements of a ModuleList that hold modules of their own."""
    found: list[nn.Module] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            found += [child for child in module if next(child.children(), None) is not None]
    return found
