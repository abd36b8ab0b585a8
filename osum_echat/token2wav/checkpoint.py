"""Weights of a token2wav directory: ``flow`` and ``hift`` as ``.pt`` (read as data) or ``.safetensors``, every key and
shape checked.

Weight norm comes under three spellings: ``weight_g``/``weight_v`` (old), ``parametrizations.weight.original0/1`` (new),
or already folded. It is folded here, once, so that the network holds plain weights.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

_NORM_PAIRS = (
    (".parametrizations.weight.original0", ".parametrizations.weight.original1"),
    (".weight_g", ".weight_v"),
)


def read_weights(directory: Path, stem: str) -> tuple[dict[str, Tensor], Path]:
    """The state dict of ``stem`` and the file it came from: ``stem.safetensors`` if there, else ``stem.pt``.

    Raises ValueError when neither is there, or the file is broken or holds more than tensors.
    """
    tensors, pickled = directory / f"{stem}.safetensors", directory / f"{stem}.pt"
    if tensors.is_file():
        try:
            return load_file(tensors), tensors
        except SafetensorError as error:
            raise ValueError(f"{tensors}: not a readable safetensors file ({error}); download or export it again") from error
    if not pickled.is_file():
        raise ValueError(f"{directory}: neither {tensors.name} nor {pickled.name} is there; is this a token2wav directory?")
    try:
        state = torch.load(pickled, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(f"{pickled}: cannot be read as plain weights ({error})") from error
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{pickled}: expected a flat mapping of names to tensors; export the state dict alone")
    return dict(state), pickled


def fold_weight_norm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``state`` with every weight-norm pair replaced by v * g / ||v||, the norm over all dimensions but the first."""
    folded = dict(state)
    for scale_suffix, direction_suffix in _NORM_PAIRS:
        for key in [k for k in folded if k.endswith(scale_suffix)]:
            stem = key.removesuffix(scale_suffix)
            if stem + direction_suffix not in folded:
                continue  # reported as unexpected by `load_into`
            scale, direction = folded.pop(key), folded.pop(stem + direction_suffix)
            folded[f"{stem}.weight"] = torch._weight_norm(direction.float(), scale.float(), 0)
    return folded


def vocoder_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A vocoder's state dict as `Vocoder` names it: the GAN trainer's ``generator.`` removed, weight norm folded."""
    return fold_weight_norm({key.replace("generator.", ""): value for key, value in state.items()})


def load_into(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Load ``state`` (any float type, kept as float32) into ``module``; ValueError naming every missing, unexpected or
    misshapen key."""
    wanted = module.state_dict()
    complaints = [f"missing {key} {list(wanted[key].shape)}" for key in wanted if key not in state]
    complaints += [f"unexpected {key} {list(state[key].shape)}" for key in state if key not in wanted]
    complaints += [
        f"{key} has shape {list(state[key].shape)}, the configuration says {list(wanted[key].shape)}"
        for key in wanted
        if key in state and wanted[key].shape != state[key].shape
    ]
    if complaints:
        listing = "\n  ".join(complaints)
        raise ValueError(f"{where}: the weights do not fit the configuration ({len(complaints)} differences):\n  {listing}")
    module.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
