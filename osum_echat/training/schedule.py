"""Learning-rate schedules as pure functions of the step, so that a resumed run needs nothing but its step number."""

from __future__ import annotations

import math

from osum_echat.training.config import OptimConfig


def factor(optim: OptimConfig, step: int, total_steps: int | None) -> float:
    """What the learning rate is multiplied with at optimiser step ``step`` (the first is 1).

    ``warmuplr`` (Transformer schedule, scaled so that its peak is the stated rate): sqrt(w) * min(n^-1/2, n * w^-3/2).
    ``linear`` and ``cosine`` warm up linearly, then fall to ``final_factor`` at ``total_steps``; without a total they stay at 1.
    """
    assert step >= 1, step
    warmup = optim.warmup_steps
    if optim.schedule == "warmuplr":
        return math.sqrt(warmup) * min(step**-0.5, step * warmup**-1.5) if warmup else step**-0.5
    if step <= warmup:
        return step / warmup
    if optim.schedule == "constant" or total_steps is None:
        return 1.0
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    falling = 1 - progress if optim.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return optim.final_factor + (1 - optim.final_factor) * falling
