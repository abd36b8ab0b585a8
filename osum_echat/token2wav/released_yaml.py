"""``cosyvoice.yaml`` read as data: ``!new:``, ``!name:``, ``!apply:`` and ``!ref`` never construct or call anything.

A tagged mapping becomes a plain dict, ``!ref <a.b>`` the value it points at. From that come the sizes of
`Token2WavConfig`; what the file leaves out has the value of CosyVoice-300M-25Hz, and what it asks for that this
implementation does not have is an error.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from osum_echat import config as typed
from osum_echat.token2wav.config import MEL_HOP, SAMPLE_RATE, Token2WavConfig

_REFERENCE = re.compile(r"^<([\w.]+)>$")


class _Reference(str):
    """The target of a ``!ref``, replaced once the whole file is read."""


class _Loader(yaml.SafeLoader):
    """SafeLoader in which every local tag is plain data."""


def _construct(loader: _Loader, suffix: str, node: yaml.Node) -> Any:
    if isinstance(node, yaml.MappingNode):
        return loader.construct_mapping(node, deep=True)
    if isinstance(node, yaml.SequenceNode):
        return loader.construct_sequence(node, deep=True)
    assert isinstance(node, yaml.ScalarNode)
    text = loader.construct_scalar(node)
    match = _REFERENCE.match(str(text).strip()) if suffix in ("ref", "copy") else None
    return _Reference(match.group(1)) if match else text


_Loader.add_multi_constructor("!", _construct)


def read(path: Path) -> dict[str, Any]:
    """The file as plain nested data. Raises ValueError for a missing file, broken YAML, or a reference to nothing or to
    itself."""
    if not path.is_file():
        raise ValueError(f"{path} is not there; a token2wav directory needs its cosyvoice.yaml")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path}: expected a mapping at top level, found {type(data).__name__}")
    resolved = _resolve(data, data, str(path), ())
    assert isinstance(resolved, dict)
    return resolved


def _resolve(value: Any, root: dict[str, Any], where: str, trail: tuple[str, ...]) -> Any:
    if isinstance(value, _Reference):
        if value in trail:
            raise ValueError(f"{where}: !ref <{value}> refers to itself")
        target: Any = root
        for part in value.split("."):
            if not isinstance(target, dict) or part not in target:
                raise ValueError(f"{where}: !ref <{value}> points at nothing")
            target = target[part]
        return _resolve(target, root, where, (*trail, str(value)))
    if isinstance(value, dict):
        return {key: _resolve(item, root, where, trail) for key, item in value.items()}
    if isinstance(value, list):
        return [_resolve(item, root, where, trail) for item in value]
    return value


# Our field -> where the file says it, section by section.
_FLOW = {
    "vocab_size": "flow.vocab_size",
    "input_size": "flow.input_size",
    "output_size": "flow.output_size",
    "spk_embed_dim": "flow.spk_embed_dim",
    "input_frame_rate": "flow.input_frame_rate",
    "regulator_groups": "flow.length_regulator.groups",
}
_ENCODER = {name: f"flow.encoder.{name}" for name in ("output_size", "attention_heads", "linear_units", "num_blocks")}
_ESTIMATOR = {
    name: f"flow.decoder.estimator.{name}"
    for name in ("channels", "attention_head_dim", "num_heads", "n_blocks", "num_mid_blocks")
}
_SOLVER = {
    name: f"flow.decoder.cfm_params.content.{name}"
    for name in ("sigma_min", "t_scheduler", "training_cfg_rate", "inference_cfg_rate", "temperature", "steps", "distilled")
}
_VOCODER = {
    **{
        name: f"hift.{name}"
        for name in (
            "in_channels",
            "base_channels",
            "nb_harmonics",
            "nsf_alpha",
            "nsf_sigma",
            "nsf_voiced_threshold",
            "upsample_rates",
            "upsample_kernel_sizes",
            "resblock_kernel_sizes",
            "resblock_dilation_sizes",
            "source_resblock_kernel_sizes",
            "source_resblock_dilation_sizes",
            "lrelu_slope",
            "audio_limit",
            "nsf_aligned",
            "head",
        )
    },
    "sample_rate": "hift.sampling_rate",
    "istft_n_fft": "hift.istft_params.n_fft",
    "istft_hop": "hift.istft_params.hop_len",
    "f0_channels": "hift.f0_predictor.cond_channels",
}

# What is built in: a file that says otherwise describes another network.
_BUILT_IN: dict[str, Any] = {
    "sample_rate": SAMPLE_RATE,
    "flow.encoder.input_layer": "linear",
    "flow.encoder.normalize_before": True,
    "flow.encoder.pos_enc_layer_type": "rel_pos_espnet",
    "flow.encoder.selfattention_layer_type": "rel_selfattn",
    "flow.encoder.use_cnn_module": False,
    "flow.encoder.macaron_style": False,
    "flow.decoder.cfm_params.content.solver": "euler",
    "flow.decoder.estimator.act_fn": "gelu",
    "hift.sampling_rate": SAMPLE_RATE,
    "feat_extractor.n_fft": 1024,
    "feat_extractor.num_mels": 80,
    "feat_extractor.sampling_rate": SAMPLE_RATE,
    "feat_extractor.hop_size": MEL_HOP,
    "feat_extractor.win_size": 1024,
    "feat_extractor.fmin": 0,
    "feat_extractor.fmax": 8000,
    "feat_extractor.center": False,
}


def load_config(path: Path) -> Token2WavConfig:
    """The sizes of the directory's networks. Raises ValueError with the key that is wrong."""
    data = read(path)
    for key, wanted in _BUILT_IN.items():
        found = _at(data, key)
        if found is not None and found != wanted:
            raise ValueError(f"{path}: {key} is {found!r}; only {wanted!r} is implemented")
    flow = _pick(data, _FLOW)
    ratios = _at(data, "flow.length_regulator.sampling_ratios")
    if ratios is not None:
        if not isinstance(ratios, list) or not ratios:
            raise ValueError(f"{path}: flow.length_regulator.sampling_ratios must be a list, found {ratios!r}")
        flow["regulator_blocks"] = len(ratios)  # inference uses only how many there are
    flow |= {"encoder": _pick(data, _ENCODER), "estimator": _pick(data, _ESTIMATOR), "solver": _pick(data, _SOLVER)}
    return typed.from_dict(Token2WavConfig, {"flow": flow, "vocoder": _pick(data, _VOCODER)}, where=str(path))


def to_released(config: Token2WavConfig) -> dict[str, Any]:
    """``config`` as the nested mapping that `load_config` reads back, for writing the ``cosyvoice.yaml`` of a trained
    directory."""
    plain = typed.to_dict(config)
    flow, vocoder = plain["flow"], plain["vocoder"]
    out: dict[str, Any] = {"sample_rate": SAMPLE_RATE}
    sections = (
        (_FLOW, flow),
        (_ENCODER, flow["encoder"]),
        (_ESTIMATOR, flow["estimator"]),
        (_SOLVER, flow["solver"]),
        (_VOCODER, vocoder),
    )
    for table, values in sections:
        for name, key in table.items():
            _put(out, key, values[name])
    _put(out, "flow.length_regulator.sampling_ratios", [1] * flow["regulator_blocks"])
    _put(out, "flow.length_regulator.channels", flow["output_size"])
    return out


def write(path: Path, config: Token2WavConfig) -> None:
    """Write ``config`` as a ``cosyvoice.yaml``."""
    path.write_text(yaml.safe_dump(to_released(config), sort_keys=False), encoding="utf-8")


def _at(data: Any, key: str) -> Any:
    """The value at a dotted key, or None."""
    for part in key.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def _put(data: dict[str, Any], key: str, value: Any) -> None:
    *parts, last = key.split(".")
    for part in parts:
        data = data.setdefault(part, {})
    data[last] = value


def _pick(data: dict[str, Any], table: dict[str, str]) -> dict[str, Any]:
    """The values that the file gives for our fields; 1e-06 without a dot is text to YAML 1.1 and read as the number it
    is."""
    found = {name: _at(data, key) for name, key in table.items()}
    return {name: _number(value) for name, value in found.items() if value is not None}


def _number(value: Any) -> Any:
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value
