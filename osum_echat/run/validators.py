"""Measurements that packages of higher layers hand to a training by name, so that training need not import them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from osum_echat.config import ConfigError

Validator = Callable[[Any], Mapping[str, float]]
"""Gets the trainer, gives numbers."""
HELP = "measure real tasks at each validation; the function gets the Trainer and returns numbers (repeatable)"


def find_validator(name: str) -> Validator:
    """``package.module:function``. Raises ConfigError when there is none."""
    module, _, function = name.partition(":")
    try:
        found: Validator = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"--validators {name}: {error}; expected package.module:function") from error
    return found


def find_validators(names: Sequence[str]) -> dict[str, Validator]:
    """Several, by the name of their function, which stands in front of their numbers."""
    return {name.partition(":")[2]: find_validator(name) for name in names}
