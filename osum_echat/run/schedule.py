"""Learning-rate schedules as pure functions of the step, so that a resumed run needs nothing but its step number."""

from __future__ import annotations

import math

from osum_echat.run.config import OptimConfig


def factor(optim: OptimConfig, step: int, total_steps: int | None) -> float:
    """What the learning rate is multiplied with at optimiser step ``step`` (the first is 1).

    ``warmuplr`` (Transformer schedule, scaled so that its peak is the stated rate): sqrt(w) * min(n^-1/2, n * w^-3/2).
    All others warm up linearly. ``constant`` stays at 1. ``linear`` and ``cosine`` fall to ``final_factor`` at
    ``total_steps``. ``plateau`` stays at 1 and falls linearly over the last ``decay_steps`` steps; until the fall
    begins a run can be prolonged without any difference. Without a total nothing falls.
    """
    assert step >= 1, step
    warmup = optim.warmup_steps
    if optim.schedule == "warmuplr":
        return math.sqrt(warmup) * min(step**-0.5, step * warmup**-1.5) if warmup else step**-0.5
    if optim.schedule == "plateau":
        rising = min(1.0, step / max(1, warmup))
        left = math.inf if total_steps is None else total_steps - step + 1
        if left > optim.decay_steps:
            return rising
        return rising * (optim.final_factor + (1 - optim.final_factor) * left / optim.decay_steps)
    if step <= warmup:
        return step / warmup
    if optim.schedule == "constant" or total_steps is None:
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    falling = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optim.final_factor + (1 - optim.final_factor) * falling
