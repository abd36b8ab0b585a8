"""A report on a downloaded checkpoint: files, keys and shapes, memory on this machine, token2wav, one utterance.

It is made to be pasted into an issue: no path of the machine is in it, only names of files.
"""

from __future__ import annotations

import argparse
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osum_echat import device as devices
from osum_echat.cli.common import UserError, find_checkpoint, load_echat

if TYPE_CHECKING:
    from osum_echat.model.config import ModelConfig
    from osum_echat.pipeline import EChat

RELEASED = "package:ct_config.yaml"
TOKEN2WAV_BYTES = 0.6e9
"""Flow and vocoder of the published size in float32, and their work space."""
_SENTENCE = "你好，很高兴见到你。"


@dataclass
class Report:
    """Findings in order; `failed` counts those that stop the checkpoint from working here."""

    lines: list[str] = field(default_factory=list)
    failed: int = 0

    def say(self, mark: str, what: str, found: str) -> None:
        self.lines.append(f"{mark:<5}{what:<14}{found}")
        self.failed += mark == "FAIL"

    def check(self, what: str, test: Callable[[], str]) -> bool:
        """Run a test, whose return value is the finding; what it raises is a failure with its reason."""
        try:
            self.say("ok", what, test())
        except (ValueError, OSError, UserError) as error:
            self.say("FAIL", what, " ".join(str(error).split()))
        except Exception as error:  # noqa: BLE001  whoever runs this must get a whole report, whatever is wrong
            place = traceback.extract_tb(error.__traceback__)[-1]
            self.say("FAIL", what, f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})")
        else:
            return True
        return False


def write_report(args: argparse.Namespace, wav: str | None) -> Report:
    """Everything that can be found out, one thing after the other; what depends on a failed one is left out.

    Args:
        args: with what `add_model_arguments` adds. wav: a recording to answer; None: only a text is said or answered.

    Raises:
        UserError: there is no such checkpoint.
    """
    report, path = Report(), find_checkpoint(args.checkpoint)
    target = devices.resolve(args.device)
    config: ModelConfig | None = None

    def files() -> str:
        parts = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        size = sum(p.stat().st_size for p in parts)
        return f"{path.name}: {len(parts)} file(s), {size / 1e9:.2f} GB"

    def keys() -> str:
        from osum_echat.model.checkpoint import CONFIG_FILE
        from osum_echat.model.config import load_config
        from osum_echat.model.inspect import check

        nonlocal config
        own = path / CONFIG_FILE if path.is_dir() else None
        config = load_config(args.config or (own if own is not None and own.is_file() else RELEASED))
        return check(config, path)[0].partition(": ")[2]

    def memory() -> str:
        return _memory(config, path, target, args)  # type: ignore[arg-type]

    report.check("files", files)
    if report.check("keys", keys) and report.check("memory", memory):  # what does not fit is not loaded
        loaded = _loaded(args, report)
        if loaded is not None:
            _answers(loaded, wav, report)
    return report


def _memory(config: ModelConfig, path: Path, target: Any, args: argparse.Namespace) -> str:
    """What is needed beside what is free. Raises ValueError when it does not fit."""
    from osum_echat.model.checkpoint import build_meta
    from osum_echat.model.quantized import stored_kind
    from osum_echat.model.storage import open_source

    weights = sum(p.numel() for p in build_meta(config).parameters())
    bytes_each = devices.model_weights(args.weights, args.dtype, target, weights, stored_kind(open_source(path))).bytes_each
    needed, there = memory(weights, bytes_each, target)
    text = f"{needed / 1e9:.1f} GB needed ({weights:,} weights of {bytes_each:g} bytes, and token2wav), {there / 1e9:.1f} GB available on {target}"
    if needed > there:
        raise ValueError(f"{text}: use another device, --weights bf16, or on a CPU --weights int8 or int4")
    return text


def memory(weights: int, bytes_each: float, target: Any) -> tuple[float, int]:
    """Bytes that so many weights and token2wav need at most while they are loaded (1.11 times the weights on a CPU,
    measured), and bytes that are free."""
    return weights * bytes_each * (1.11 if target.type == "cpu" else 1.0) + TOKEN2WAV_BYTES, _available(target)


def _available(target: Any) -> int:
    if target.type == "cpu":
        import psutil

        return int(psutil.virtual_memory().available)
    return devices.total_memory(target) - devices.memory_allocated(target)


def _loaded(args: argparse.Namespace, report: Report) -> EChat | None:
    found: list[EChat] = []

    def load() -> str:
        began = time.perf_counter()
        found.append(load_echat(args))
        return f"{time.perf_counter() - began:.1f} s, {found[0].model.dtype} on {found[0].model.device}"

    def weights() -> str:
        import torch

        bad = [name for name, p in found[0].model.named_parameters() if not bool(torch.isfinite(p).all())]
        if bad:
            raise ValueError(f"{len(bad)} tensors hold values that are not finite, such as {bad[0]}")
        return "all values are finite"

    def tokenizer() -> str:
        echat = found[0]
        size, rows = len(echat.tokenizer), echat.model.vocabulary.text_size
        if size > rows:
            raise ValueError(
                f"the tokenizer knows {size} tokens, the model has rows for {rows}: it is the tokenizer of another model"
            )
        return f"{size} tokens, {rows} rows"

    if not report.check("load", load):
        return None
    report.check("weights", weights)
    report.check("tokenizer", tokenizer)
    return found[0]


def _answers(echat: EChat, wav: str | None, report: Report) -> None:
    """One utterance of each kind that the checkpoint has learnt."""
    from osum_echat.pipeline import MODES

    dialect, token2wav = echat.dialect, echat.token2wav
    for title, words in dialect.summary().items():
        report.say("--", title, words)
    if token2wav is None:
        report.say("--", "token2wav", "none: replies have speech tokens and no sound (--token2wav FOLDER)")
    elif echat.voice is None:
        report.say("--", "token2wav", "loaded, but no voice (--speaker RECORDING)")
    else:
        report.say("ok", "token2wav", f"loaded, {len(token2wav.speakers)} named voices")
    chinese = dialect.learnt.says is None or "zh" in dialect.learnt.says
    sentence = _SENTENCE if chinese else "Hello, nice to meet you."
    for name in ("asr", "s2s_think", "t2t", "tts"):
        mode = MODES[name]
        if (mode.hears and wav is None) or (mode.speaks and token2wav is not None and echat.voice is None):
            continue
        thinks = [form for form in ("tag", "language") if dialect.refusal(mode.output_type, think=form) is None]
        if dialect.refusal(mode.task or mode.output_type) is not None or (mode.thinks and not thinks):
            continue
        report.check(name, partial(_one, echat, mode, wav, sentence, thinks))


def _one(echat: EChat, mode: Any, wav: str | None, sentence: str, thinks: list[Any]) -> str:
    """Answer once. Raises ValueError for a reply that cannot be right."""
    ask = mode.ask(wav, sentence, think=thinks[0] if mode.thinks else None, seed=0)
    [reply] = echat.batch([ask])
    text = f"{reply.text[:80]!r}, {len(reply.speech_tokens)} speech tokens, {reply.finish_reason}, {reply.timings.total:.1f} s"
    if reply.think is not None:
        text = f"thought {reply.think.raw[:80]!r}; {text}"
    if not reply.text and mode.kind != "speak":
        raise ValueError(f"an empty reply: {text}")
    if mode.speaks and not reply.speech_tokens:
        raise ValueError(f"a reply without speech: {text}")
    if reply.finish_reason != "stop":
        raise ValueError(f"the reply did not end by itself: {text}")
    return text
