"""From a config to a `Trainer`: model, engine, loaders, and a print of what was decided."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import nn

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.data.config import DataConfig
from osum_echat.data.loader import build_loader
from osum_echat.model.echat import EChatModel
from osum_echat.model.encoder_cache import EncoderCache
from osum_echat.training import distributed, engines, folder, memory, preflight, stages
from osum_echat.training.checkpoint import code_version, fingerprint
from osum_echat.training.config import ConfigError, Precision, TrainConfig
from osum_echat.training.distributed import World
from osum_echat.training.loop import Loader, Run, Trainer, Validator
from osum_echat.training.objective import Objective
from osum_echat.training.watchdog import Watchdog, shared_store
from osum_echat.training.weights import load_start

log = logging.getLogger(__name__)
_WORDS: dict[bool | str, str] = {True: "on", False: "off", "selective": "selective"}


def trainer(config: TrainConfig, validators: Mapping[str, Validator] | None = None, bar: bool = True) -> Trainer:
    """Everything that a run needs, from its config: weights, tokenizer, lists, engine.

    Raises:
        ValueError: for anything in the config that cannot be used, with what to do.
    """
    preflight.check(config)
    if config.threads:
        torch.set_num_threads(config.threads)
    world = join(config)
    model, tokenizer = load_start(config)
    pin = devices.resolve(config.device).type != "cpu"
    shared = (tokenizer, model.vocabulary, model.config.dialect, model.config.encoder.mels, world.rank, world.size)
    loader = build_loader(_with_stable_features(config, config.data), *shared, pin_memory=pin)
    validation = None
    if config.validation is not None:
        validation = build_loader(_with_stable_features(config, config.validation), *shared, train=False)
    if world.is_main:
        log.info("%s", loader.describe())
        tokenizer.save_pretrained(config.out / folder.TOKENIZER)
    return make_trainer(config, model, tokenizer, loader, validation, validators, bar, world)


def make_trainer(
    config: TrainConfig,
    model: EChatModel,
    tokenizer: Any,
    loader: Loader,
    validation: Loader | None = None,
    validators: Mapping[str, Validator] | None = None,
    bar: bool = True,
    world: World | None = None,
    on_phase: Callable[[int, str], None] | None = None,
) -> Trainer:
    """A trainer for a model and loaders that exist already.

    Joins the process group when there is one to join, freezes parts, spreads the model over the ranks, and tries the
    largest batch.
    """
    device = devices.resolve(config.device)
    if config.threads:
        torch.set_num_threads(config.threads)
    name = engines.resolve_name(config, distributed.launched_by_torchrun())
    config = _with_fast_precision(config, name, device)
    engine_class = engines.create(name)
    world = world or join(config)
    groups = stages.assign(model, config)
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if world.is_main:
        log.info("%s", describe(config, name, world, device, model))
        log.info("%s", stages.table(model, groups))
    facts = {"frozen": fingerprint(model), "model": config_io.to_dict(model.config)}
    _set_dtypes(model, config, name)
    model.to(device)
    _add_encoder_cache(model, config)
    model.encoder_masks = config.encoder_masks
    if config.engine.compile:
        compile_blocks(stages.blocks(model))
    objective = Objective(model, config.loss, run_all_parts=world.size > 1)
    engine = engine_class(objective, groups, stages.blocks(model), config, world, device)
    if world.is_main:
        log.info("%s", memory.estimate(groups, frozen, config, world.size, engine.shards_weights))
    devices.seed_all(config.seed + 7919 * world.rank)
    if config.safety.try_largest_batch:
        line = memory.rehearse(engine, objective, config, device)
        if world.is_main:
            log.info("%s", line)
    watchdog = Watchdog(world, shared_store(world), config.safety.watchdog_seconds, config.safety.watchdog_abort)
    return Trainer(
        Run(
            config,
            world,
            device,
            engine,
            objective,
            loader,
            validation,
            validators=validators or {},
            tokenizer=tokenizer,
            expected_steps=config.expected_steps or config.max_steps,
            watchdog=watchdog,
            facts=facts,
            bar=bar,
            on_phase=on_phase,
        )
    )


def compile_blocks(blocks: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Let each repeated layer be compiled when it is first called; all layers of one kind share the code. Shapes may
    change."""
    for block in blocks:
        block.compile(backend=backend, dynamic=True)


def _with_fast_precision(config: TrainConfig, engine: str, device: torch.device) -> TrainConfig:
    """The config with a precision that this device does well."""
    if engine == "deepspeed":  # its JSON states the precision a second time
        return config
    precision = devices.training_precision(config.precision, device)
    return dataclasses.replace(config, precision=cast(Precision, precision))


def _with_stable_features(config: TrainConfig, data: DataConfig) -> DataConfig:
    """An encoder cache finds its entries by the features: they must not depend on what is installed."""
    if config.encoder_cache is None or data.features != "auto":
        return data
    return dataclasses.replace(data, features="torch")


def _add_encoder_cache(model: EChatModel, config: TrainConfig) -> None:
    if config.encoder_cache is None:
        return
    if any(parameter.requires_grad for parameter in model.encoder.parameters()):
        raise ConfigError("encoder_cache is for a frozen encoder; set lr.encoder: 0.0, or leave encoder_cache out")
    for section, data in (("data", config.data), ("validation", config.validation)):
        if data is not None and data.features == "device":
            raise ConfigError(
                f"encoder_cache finds its entries by features that workers compute; set {section}.features: auto, "
                "or leave encoder_cache out"
            )
    model.encoder_cache = EncoderCache(config.encoder_cache, model.encoder, model.config.encoder_layers)


def join(config: TrainConfig) -> World:
    """Join the process group that the config's engine needs."""
    device = devices.resolve(config.device)
    devices.activate(device)
    name = engines.resolve_name(config, distributed.launched_by_torchrun())
    return distributed.start(device, engines.create(name).needs_group, config.engine.timeout_minutes)


def _set_dtypes(model: EChatModel, config: TrainConfig, engine: str) -> None:
    """Precision ``bf16``: weights in bfloat16. FSDP keeps trained shards in float32 instead, as their own masters."""
    if config.precision != "bf16":
        model.float()
        return
    for param in model.parameters():
        if engine != "fsdp" or not param.requires_grad:
            param.data = param.data.to(torch.bfloat16)
        else:
            param.data = param.data.float()


def describe(config: TrainConfig, engine: str, world: World, device: torch.device, model: EChatModel) -> str:
    """What this run decided, a line each."""
    llm = model.config.llm
    mix = {name: stream.weight if stream.weight is not None else "by lines" for name, stream in config.data.streams.items()}
    lines = {
        "stage": config.stage,
        "code": code_version(),
        "device": f"{device}, {world.size} process(es), engine {engine}, {torch.get_num_threads()} threads",
        "precision": f"{config.precision}, activation checkpointing {_WORDS[model.config.activation_checkpointing]}, layers {'compiled' if config.engine.compile else 'not compiled'}",
        "attention": llm.attention,
        "batch": f"{config.accumulation} micro-batches x {world.size} rank(s) of up to {config.data.batch.rows} x {config.data.batch.row_positions} positions",
        "data mix": ", ".join(f"{k}: {v}" for k, v in mix.items()) or "given by the caller",
        "expected steps": config.expected_steps
        or config.max_steps
        or f"unknown (until max_epochs={config.max_epochs}, max_minutes={config.max_minutes})",
        "optimiser": f"AdamW {config.optim.betas} eps {config.optim.eps:g} wd {config.optim.weight_decay:g}, {config.optim.schedule}, "
        f"warm-up {config.optim.warmup_steps}, clip {config.optim.clip:g}",
        "output": config.out,
    }
    return "\n".join(f"{key:<16}{value}" for key, value in lines.items())
