"""Does it fit? A step of the largest batch that the data config allows is run before the first one, with its update.

Running out of memory after a night because two long samples met is avoidable: the batch's size is bounded by the
config, so the worst case can be built from nothing but that.
"""

from __future__ import annotations

import numpy as np
import torch

from osum_echat import device as devices
from osum_echat.data.batch import Batch, Example, SampleInfo, collate
from osum_echat.data.config import DataConfig
from osum_echat.dialogue.layout import IGNORE, Row, audio_positions
from osum_echat.dialogue.vocabulary import Vocabulary
from osum_echat.training.config import ConfigError, TrainConfig
from osum_echat.training.engines import Engine
from osum_echat.training.objective import Objective
from osum_echat.training.optimizer import Group

GB = 2**30


def largest_batch(data: DataConfig, vocabulary: Vocabulary, mels: int) -> Batch:
    """Every row full, recordings as long as the limits allow, every position behind them a target over text and speech.

    The worst of both kinds of cost: ``batch.rows`` rows of ``batch.row_positions`` positions, and ``batch.max_frames``
    frames in all.
    """
    limits, rows = data.limits, data.batch
    recordings = max(1, min(rows.max_frames // max(1, limits.max_frames), rows.rows))
    frames = min(limits.max_frames, rows.max_frames // recordings, 8 * max(1, rows.row_positions // 2))
    examples = []
    for number in range(rows.rows):
        length = rows.row_positions
        audio = audio_positions(frames) if number < recordings else 0
        ids_T = np.full(length, vocabulary.text_size, dtype=np.int64)  # speech codes: the larger softmax
        targets_T = ids_T.copy()
        ids_T[: audio + 2] = 0
        targets_T[: audio + 2] = IGNORE
        if audio:
            ids_T[0], ids_T[audio + 1] = vocabulary.audio_begin, vocabulary.audio_end
        row = Row(ids_T, np.arange(length), np.ones(length, dtype=np.bool_), targets_T, False, [(0, 1, audio)] if audio else [])
        feats = [torch.zeros(frames, mels)] if audio else []
        examples.append(Example(SampleInfo(f"largest-{number}", "largest"), row, feats))
    return collate(examples, mels)


def rehearse(engine: Engine, objective: Objective, config: TrainConfig, device: torch.device) -> str:
    """Run a step of the largest batch, with its update, that changes nothing; a line about memory.

    Raises:
        ConfigError: when it does not fit, naming the settings to change.
    """
    batch = largest_batch(config.data, objective.model.vocabulary, objective.model.config.encoder.mels)
    shape = tuple(batch.rows.ids_BT.shape)
    what = f"largest batch {shape[0]} x {shape[1]} positions, {tuple(batch.feats_NTF.shape)[:2]} frames"
    rng = devices.rng_state(device)
    held = devices.PeakMemory(device, held=engine.tensors())
    try:
        with held:
            rehearse_step(engine, objective, batch, config.accumulation, device)
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "memory" not in str(error):
            raise
        raise ConfigError(f"out of memory: {what} does not fit; {advice(config)}") from error
    finally:
        devices.set_rng_state(rng, device)
    total = devices.total_memory(device)
    devices.empty_cache(device)
    line = f"{what}: peak {held.bytes / GB:.2f} GB of tensors in a step with its update, of {total / GB:.1f} GB"
    if max(held.bytes, devices.peak_memory(device)) > total:
        raise ConfigError(f"{line}; {advice(config)}")
    return line


def rehearse_step(engine: Engine, objective: Objective, batch: Batch, accumulation: int, device: torch.device) -> None:
    """All micro-batches of a step are on the device, and those of the next one; from the second on, a backward pass has
    gradients beside it."""
    micros = [objective.prepare(batch, device) for _ in range(2 * accumulation)]
    engine.rehearse(micros[: min(2, accumulation)], dict(micros[0].counts))


def advice(config: TrainConfig) -> str:
    """The settings that lower memory, the most harmless first."""
    batch = config.data.batch
    steps = []
    if not config.checkpoint_activations:
        steps.append("set checkpoint_activations: true")
    if batch.rows > 1:
        steps.append(f"lower data.batch.rows (now {batch.rows})")
    steps.append(
        f"lower data.batch.row_positions (now {batch.row_positions}) and data.limits.max_positions ({config.data.limits.max_positions})"
    )
    steps.append(f"lower data.batch.max_frames (now {batch.max_frames})")
    if config.precision == "fp32":
        steps.append("set precision: bf16")
    if config.engine.name not in ("fsdp", "deepspeed"):
        steps.append("use engine.name: fsdp on several devices, or train LoRA or the adapter only")
    return "; ".join(steps)


def before_activations(
    groups: list[Group], frozen: int, config: TrainConfig, world_size: int, shards_weights: bool
) -> dict[str, float]:
    """Bytes on each device before activations, by what takes them.

    A trained parameter: bfloat16 weight 2 and gradient 2, float32 master 4, Adam 8; or float32 4 + 4 + 8. fsdp's shards
    are their own masters.
    """
    trained = sum(group.size for group in groups)
    low = config.precision == "bf16"
    share = world_size if shards_weights else 1
    own = sum(p.numel() * p.element_size() for group in groups for _, p in group.named)
    masters = sum(4 * p.numel() for group in groups for _, p in group.named if low and p.dtype != torch.float32)
    return {
        "trained weights": own / share,
        "gradients": own / share,
        "masters and Adam": (masters + 8 * trained) / share,
        "frozen weights": (2 if low else 4) * frozen / share,
    }


def estimate(groups: list[Group], frozen: int, config: TrainConfig, world_size: int, shards_weights: bool) -> str:
    """`before_activations` as a line. What an update takes beside it for a moment is bounded by
    `optimizer.UPDATED_TOGETHER`."""
    parts = before_activations(groups, frozen, config, world_size, shards_weights)
    text = ", ".join(f"{name} {value / GB:.2f} GB" for name, value in parts.items())
    return f"memory per device before activations: {text}; together {sum(parts.values()) / GB:.2f} GB"
