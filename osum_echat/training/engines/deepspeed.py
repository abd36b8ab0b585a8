"""DeepSpeed ZeRO 1-3, from a JSON in DeepSpeed's own form.

The JSON and the training YAML state some numbers twice (accumulation, clipping, precision); they must agree, or the
JSON says ``"auto"``. Optimiser, learning rate and the number of micro-batches of a step come from the loop, which is
why a step need not have the stated number.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from osum_echat import device as devices
from osum_echat.training.config import ConfigError, TrainConfig
from osum_echat.training.distributed import World
from osum_echat.training.engines.base import Engine, StepResult
from osum_echat.training.folder import DEEPSPEED as TAG
from osum_echat.training.objective import MicroBatch, Objective, Outcome
from osum_echat.training.optimizer import Group


def stated_twice(config: TrainConfig) -> dict[str, Any]:
    """What the JSON may state besides the YAML, by dotted name."""
    return {
        "train_micro_batch_size_per_gpu": 1,  # a batch of the loader is one micro-batch
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.optim.clip,
        "bf16.enabled": config.precision == "bf16",
        "fp16.enabled": config.precision == "fp16",
        "torch_autocast.enabled": config.precision == "autocast",
    }


def merged_config(config: TrainConfig) -> dict[str, Any]:
    """The JSON with every ``"auto"`` and missing number filled in.

    Raises:
        ConfigError: without a JSON, for one that names an optimiser or schedule, or that disagrees with the YAML.
    """
    if config.engine.deepspeed_config is None:
        raise ConfigError("engine deepspeed needs engine.deepspeed_config, for example conf/ds_stage2.json")
    path = Path(config.engine.deepspeed_config)
    if not path.is_file():
        raise ConfigError(f"engine.deepspeed_config: {path} not found")
    data = json.loads(path.read_text(encoding="utf-8"))
    for key in ("optimizer", "scheduler", "train_batch_size"):
        if key in data:
            raise ConfigError(f"{path}: remove {key!r}; optimiser, schedule and batch come from the training config")
    problems = []
    for name, ours in stated_twice(config).items():
        *parents, leaf = name.split(".")
        section = data
        for parent in parents:
            section = section.setdefault(parent, {}) if ours else section.get(parent, {})
        theirs = section.get(leaf, "auto")
        if theirs == "auto":
            if ours or leaf in section:
                section[leaf] = ours
        elif theirs != ours:
            problems.append(f"{name} is {theirs!r} there and {ours!r} here")
    if problems:
        raise ConfigError(
            f'{path} and the training config disagree: {"; ".join(problems)}. Make them equal, or write "auto" in the JSON'
        )
    if config.precision == "autocast":
        data["torch_autocast"].setdefault("dtype", "bfloat16")
    return data


class DeepSpeedEngine(Engine):
    """ZeRO 1-3."""

    family = "deepspeed"

    def __init__(
        self,
        module: Objective,
        groups: list[Group],
        blocks: Sequence[nn.Module],
        config: TrainConfig,
        world: World,
        device: torch.device,
    ):
        super().__init__(module, groups, blocks, config, world, device)
        os.environ.setdefault("DS_ACCELERATOR", devices.deepspeed_accelerator(device))
        try:
            import deepspeed
        except ImportError as error:
            raise ConfigError("engine deepspeed needs the package: pip install 'osum-echat[deepspeed]'") from error
        settings = merged_config(config)
        # On CPU DeepSpeed would compile a shared-memory collective, for minutes; gloo does the same.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        zero = settings.get("zero_optimization", {})
        self.shards_weights = zero.get("stage", 0) == 3
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=module, optimizer=self._optimizer(zero), config=settings, dist_init_required=False
        )
        if self.shards_weights:
            # They are to be gathered with the objective, for the whole of forward and backward.
            for param in module.weights_read_directly():
                deepspeed.zero.register_external_parameter(module, param)

    def _optimizer(self, zero: dict[str, Any]) -> torch.optim.Optimizer:
        optim = self.config.optim
        groups = [{"params": [p for _, p in g.named], "lr": g.lr, "base_lr": g.lr} for g in self.groups]
        options: dict[str, Any] = {"lr": optim.lr, "betas": optim.betas, "eps": optim.eps, "weight_decay": optim.weight_decay}
        if zero.get("offload_optimizer", {}).get("device", "none") != "none":
            from deepspeed.ops.adam import DeepSpeedCPUAdam

            return DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        return torch.optim.AdamW(groups, **options)

    def forward(self, micro: MicroBatch, totals: dict[str, float]) -> Outcome:
        return Outcome(*self.engine(micro, totals))

    def backward(self, loss: Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self, lr_factor: float) -> StepResult:
        for group in self.engine.optimizer.param_groups:
            group["lr"] = group["base_lr"] * lr_factor
        self.engine.set_gradient_accumulation_boundary(True)
        self.engine.step()
        skipped = bool(getattr(self.engine.optimizer, "overflow", False))
        norm = self.engine.get_global_grad_norm()
        return StepResult(torch.tensor(math.nan if skipped or norm is None else float(norm)))

    def rehearse(self, micros: Sequence[MicroBatch], totals: dict[str, float]) -> None:
        """ZeRO keeps reduced gradients in places of its own; its way out for non-finite ones clears them all and
        updates nothing, so the memory of the update itself is not seen."""
        for micro in micros:
            self.backward(self.forward(micro, totals).loss * math.nan, last=micro is micros[-1])
        self.step(0.0)

    def save(self, folder: Path) -> None:
        self.engine.save_checkpoint(
            str(folder), tag=TAG, save_latest=False, exclude_frozen_parameters=not self.config.save_frozen
        )

    def load(self, folder: Path) -> None:
        """On another number of ranks the checkpoint goes through DeepSpeed's universal form, which rank 0 makes beside
        it."""
        tag, universal = TAG, folder.parent / f".tmp-universal-{folder.name}"
        written_by = len(list((folder / TAG).glob("*_optim_states.pt")))
        resharding = written_by != self.world.size
        if resharding:
            problem = _make_universal(folder / TAG, universal / TAG, self.device) if self.world.is_main else ""
            if problem := self.world.broadcast(problem):
                raise ValueError(
                    f"{folder} was written by {written_by} ranks and cannot be re-shared over {self.world.size}: {problem}"
                )
        self.engine._config.load_universal_checkpoint = resharding
        path, _ = self.engine.load_checkpoint(
            str(universal if resharding else folder), tag=tag, load_module_strict=False, load_lr_scheduler_states=False
        )
        self.engine._config.load_universal_checkpoint = False
        if path is None:
            raise ValueError(f"{folder}: DeepSpeed found no checkpoint there")
        self.world.barrier()
        if self.world.is_main:
            shutil.rmtree(universal, ignore_errors=True)


def _make_universal(source: Path, target: Path, device: torch.device) -> str:
    """DeepSpeed's own converter, in a process of its own; what went wrong, or ""."""
    command = [
        sys.executable,
        "-m",
        "deepspeed.checkpoint.ds_to_universal",
        "--input_folder",
        str(source),
        "--output_folder",
        str(target),
    ]
    command += ["--num_extract_workers", "1", "--num_merge_workers", "1", "--inject_missing_state"]
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    done = subprocess.run(
        command,
        env={**kept, "DS_ACCELERATOR": devices.deepspeed_accelerator(device)},
        capture_output=True,
        text=True,
        check=False,
    )
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["unknown reason"])[-1]
