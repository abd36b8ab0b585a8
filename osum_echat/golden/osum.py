"""Family ``osum``: a folder of the published model's recorded numbers at tiny size, against this implementation.

Everything in the folder is looked at: files by name, arrays and cases one by one. What nobody has a rule for fails.
Files of the data pipeline belong to family ``data`` and are left to it.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from osum_echat.audio.features import LogMel
from osum_echat.dialogue.prompts import PROFILES
from osum_echat.dialogue.tokens import encode
from osum_echat.golden import forward
from osum_echat.golden.report import CaseResult, not_understood
from osum_echat.model.checkpoint import build_meta, load_model
from osum_echat.model.config import LoraConfig, ModelConfig, load_config
from osum_echat.model.echat import EChatModel
from osum_echat.model.released import ModelSpec, spec_of, to_released

FEATURE_LIMIT = 1e-5
ENCODER_LIMIT = 1e-5
LN_SPEECH = 2  # tensors of the published files that no forward pass uses

# Read by other rules, by family `data`, or by people.
_PASSIVE = {"README.md", "tiny.safetensors", "tiny_config.yaml", "tiny_llm", "data_cases.json", "sampling_cases.json"}
_DECODING = {"gen_cases.json", "gen_cases.npz", "functions.json"}


@dataclass
class Setting:
    """What the rules share: the tiny model, its tokenizer, the recordings' features and the arrays of the folder."""

    directory: Path
    model: EChatModel
    tokenizer: Any
    arrays: dict[str, Any]
    feats: dict[int, Tensor]


def load_setting(directory: Path) -> Setting:
    """Load the tiny model and the recordings. Raises FileNotFoundError when they are not there."""
    for name in ("tiny.safetensors", "tiny_config.yaml", "cases.npz"):
        if not (directory / name).exists():
            raise FileNotFoundError(f"{directory} has no {name}; the cases cannot be run without it")
    model, tokenizer = load_model(directory / "tiny.safetensors", directory / "tiny_config.yaml", dtype=torch.float32)
    with np.load(directory / "cases.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    feats = {int(name[4:]): torch.from_numpy(array) for name, array in arrays.items() if re.fullmatch(r"feat\d+", name)}
    return Setting(directory, model, tokenizer, arrays, feats)


def run(directory: Path) -> list[CaseResult]:
    """All results of a folder."""
    setting = load_setting(directory)
    with torch.no_grad():
        results = features(setting) + encoder_cases(setting)
        for file in sorted(directory.iterdir()):
            results += file_results(setting, file)
    return results


def file_results(setting: Setting, file: Path) -> list[CaseResult]:
    """Results of one file of the folder."""
    rules: dict[str, Callable[[Setting, Path], list[CaseResult]]] = {
        "forward_cases.json": lambda s, f: forward.run(f, s.model, s.tokenizer, s.feats, s.arrays),
        "padding_effect.json": lambda s, f: forward.padding_effect(f, s.model, s.tokenizer, s.feats),
        "manifest_full.json": full_manifest,
        "manifest_full_lora.json": lora_manifest,
        "tiny_manifest.json": tiny_manifest,
        "prompts.json": prompts,
    }
    if file.name in _PASSIVE or file.name == "cases.npz":
        return []
    if file.name in _DECODING:
        return decoding(setting) if file.name == min(f.name for f in setting.directory.iterdir() if f.name in _DECODING) else []
    if file.name not in rules:
        return [not_understood(file.name, "no rule for this file")]
    return rules[file.name](setting, file)


# ---- audio -----------------------------------------------------------------------------------------------------------


def features(setting: Setting) -> list[CaseResult]:
    """Log-mel of each recording."""
    log_mel = LogMel(setting.model.config.encoder.mels)
    out = []
    for name, array in setting.arrays.items():
        if match := re.fullmatch(r"wav(\d+)_int16", name):
            wanted = setting.feats[int(match[1])]
            found = log_mel(array.astype(np.float32) / 32768)
            same = found.shape == wanted.shape
            out.append(
                CaseResult(f"features.{match[1]}", largest(found, wanted) if same else float("inf"), FEATURE_LIMIT, "log-mel")
            )
    return out


_ENCODER_PARTS = ("enc", "enc_mask", "down", "down_mask", "proj", "proj_mask")


def encoder_cases(setting: Setting) -> list[CaseResult]:
    """Encoder, down-sampler and projected adapter output, alone and in padded batches; also what no rule knows in the
    archive."""
    cases: dict[str, dict[str, Tensor]] = {}
    out: list[CaseResult] = []
    for name, array in setting.arrays.items():
        group, _, part = name.partition(".")
        if group.startswith("E_") and part in _ENCODER_PARTS:
            cases.setdefault(group, {})[part] = torch.from_numpy(array)
        elif not (re.fullmatch(r"wav\d+_int16|feat\d+", name) or re.fullmatch(r"F\..+\.(inputs_embeds|hidden_last)", name)):
            out.append(not_understood(f"cases.npz:{name}", "no rule for this array"))
    for group, parts in cases.items():
        recordings = _recordings(group)
        if recordings is None or not set(recordings) <= set(setting.feats):
            out.append(not_understood(group, "which recordings it holds"))
        else:
            out += _encoder_case(setting, group, recordings, parts)
    return out


def _recordings(group: str) -> list[int] | None:
    known = {"E_both": [1, 0], "E_odd_alone": [2], "E_odd_both": [1, 2]}
    if group in known:
        return known[group]
    return [int(match[1])] if (match := re.fullmatch(r"E_(\d+)(?:_alone)?", group)) else None


def audio_parts(model: EChatModel, feats: list[Tensor]) -> list[dict[str, Tensor]]:
    """Encoder, down-sampler and projected output of each recording of a batch, cut to its valid length."""
    lengths_N = torch.tensor([len(f) for f in feats])
    layers, enc_N = model.encode(torch.nn.utils.rnn.pad_sequence(feats, batch_first=True), lengths_N)
    adapted_NPA, down_NPA, pos_N = model.adapter(layers, enc_N)
    proj_NPD = model.projection(adapted_NPA)
    return [
        {"enc": layers[0][n, : enc_N[n]], "down": down_NPA[n, : pos_N[n]], "proj": proj_NPD[n, : pos_N[n]]}
        for n in range(len(feats))
    ]


def _encoder_case(setting: Setting, group: str, recordings: list[int], parts: dict[str, Tensor]) -> Iterator[CaseResult]:
    feats = [setting.feats[r] for r in recordings]
    longest = max(len(f) for f in feats)
    found = audio_parts(setting.model, feats)
    for n, recording in enumerate(recordings):
        # The published batch mask drops a frame of odd recordings in a longer batch, and lets activations leak into the
        # last one.
        deliberate = len(feats[n]) % 2 == 1 and len(feats[n]) < longest
        alone = audio_parts(setting.model, [feats[n]])[0]
        for part in ("enc", "down", "proj"):
            if part not in parts:
                continue
            name = f"{group}[{recording}].{part}"
            mask = parts.get(f"{part}_mask")
            valid = mask[n].reshape(-1) if mask is not None else torch.ones(parts[part].shape[1], dtype=torch.bool)
            wanted = parts[part][n][valid]
            mine = found[n][part]
            if deliberate:
                rows = min(len(mine), len(wanted))
                note = (
                    f"deliberate: odd frames in a longer batch; compared with the recording alone "
                    f"(recorded: {len(wanted)} of {len(mine)} frames, differs by {largest(mine[:rows], wanted[:rows]):.3g})"
                )
                yield CaseResult(name, largest(mine, alone[part]), ENCODER_LIMIT, note)
            elif mine.shape != wanted.shape:
                yield CaseResult(name, float("inf"), ENCODER_LIMIT, f"{list(mine.shape)} instead of {list(wanted.shape)}")
            else:
                yield CaseResult(name, largest(mine, wanted), ENCODER_LIMIT)


def largest(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if a.numel() else 0.0


# ---- names and shapes ------------------------------------------------------------------------------------------------


def _published(spec: ModelSpec) -> dict[str, list[int]]:
    state = {name: torch.empty(shape, device="meta") for name, shape in spec.shapes.items()}
    return {key: list(tensor.shape) for key, tensor in to_released(state, spec).items()}


def _mismatches(found: dict[str, list[int]], wanted: dict[str, list[int]]) -> int:
    return sum(found.get(key) != list(shape) for key, shape in wanted.items())


def _counted(name: str, model: EChatModel, data: dict[str, Any]) -> CaseResult:
    """Parameters; the file counts ``ln_speech`` too, which this model does not have."""
    ours = sum(p.numel() for p in model.parameters()) + LN_SPEECH * model.config.encoder.dim
    return CaseResult(f"{name}.parameters", abs(ours - data["total_unique_params"]), 0, f"{ours:,} with ln_speech")


def full_manifest(setting: Setting, file: Path) -> list[CaseResult]:
    data = json.loads(file.read_text(encoding="utf-8"))
    model = build_meta(ModelConfig())
    found = _published(spec_of(model))
    wrong = _mismatches(found, data["state_dict"]) + len(set(found) - set(data["state_dict"]))
    return [CaseResult("manifest_full", wrong, 0, f"{len(found)} keys and shapes"), _counted("manifest_full", model, data)]


def lora_manifest(setting: Setting, file: Path) -> list[CaseResult]:
    data = json.loads(file.read_text(encoding="utf-8"))
    model = build_meta(ModelConfig(lora=LoraConfig()))
    found = _published(spec_of(model))
    wrong = _mismatches(found, data["state_dict"]) + abs(len(found) - data["n_keys"])
    return [CaseResult("manifest_full_lora", wrong, 0, f"{len(found)} keys"), _counted("manifest_full_lora", model, data)]


def tiny_manifest(setting: Setting, file: Path) -> list[CaseResult]:
    data = json.loads(file.read_text(encoding="utf-8"))
    found = _published(spec_of(build_meta(load_config(setting.directory / "tiny_config.yaml"))))
    wanted = {key: shape for key, (shape, _) in data["state_dict"].items()}
    wrong = _mismatches(found, wanted) + len(set(found) - set(wanted) - set(data["aliases_not_stored"]))
    return [CaseResult("tiny_manifest", wrong, 0, f"{len(found)} keys and shapes")]


# ---- prompts ---------------------------------------------------------------------------------------------------------


# Inference functions of the published code -> (output type, profile) here.
_FUNCTIONS = {
    "generate": "text",
    "generate4chat": "s2t_chat",
    "generate4chat_think": "s2t_chat_think",
    "generate_tts": "text2token",
    "generate_text2text": "text2text",
    "generate_s2s": "speech2text_token",
    "generate_s2s_no_stream": "speech2text_token",
    "generate_s2s_no_stream_with_repetition_penalty": "speech2text_token",
    "generate_s2s_no_stream_think": "speech2text_token_think",
    "generate_s2s_no_stream_think_with_repetition_penalty": "speech2text_token_think",
}


def prompts(setting: Setting, file: Path) -> list[CaseResult]:
    """System prompts of both profiles, to the byte, and the ids of all that are recorded with ids."""
    data = json.loads(file.read_text(encoding="utf-8"))
    out = []
    for output_type, text in data["training_system_prompt_by_output_type"].items():
        out.append(_prompt(f"prompts.train.{output_type}", _start("as_trained", output_type), text))
    for function, text in data["inference_system_prompt_by_function"].items():
        if function in _FUNCTIONS:
            out.append(_prompt(f"prompts.infer.{function}", _start("as_released", _FUNCTIONS[function]), text))
    for name, ids in data.get("token_ids", {}).items():
        kind, _, key = name.partition(".")
        table = data["training_system_prompt_by_output_type"] if kind == "train" else data["inference_system_prompt_by_function"]
        if key in table:
            found = list(encode(setting.tokenizer, table[key]))
            out.append(CaseResult(f"prompts.ids.{name}", float(found != ids), 0, f"{len(ids)} ids"))
    return out


def _start(profile_name: str, output_type: str) -> str | None:
    profile = PROFILES[profile_name]
    if output_type not in profile.system:
        return None
    return profile.system[output_type] + ("" if output_type in profile.headerless else profile.user_header)


def _prompt(name: str, found: str | None, wanted: str) -> CaseResult:
    return CaseResult(name, float(found != wanted), 0, "" if found == wanted else f"found {found!r}")


# ---- decoding --------------------------------------------------------------------------------------------------------


def decoding(setting: Setting) -> list[CaseResult]:
    """Decodes, interleaving, guards: rules in `osum_echat.golden.decoding`."""
    if importlib.util.find_spec("osum_echat.golden.decoding") is None:
        return [not_understood("decoding", "osum_echat/golden/decoding.py is missing")]
    module = importlib.import_module("osum_echat.golden.decoding")
    feats = [setting.feats[number] for number in sorted(setting.feats)]
    return list(module.run(setting.directory, setting.model, setting.tokenizer, feats))
