#!/usr/bin/env python3
"""What rounding the weights to 8 and 4 bits costs: teacher-forced loss over that of the float32 weights, and how often the most likely id is the same.

mini: replies (thought, text and speech codes) to the recordings of assets/demo are sampled from the float32 weights and given to the rounded ones
id by id. On such ids the float32 weights have the smallest loss that there is, so nothing is flattered. A transformers causal LM: rows of text from
docs/, its linear layers rounded by the same rule.

    python benchmarks/rounding.py                        # mini
    python benchmarks/rounding.py --llm FOLDER --json    # a transformers folder of Llama or Qwen2 shape, such as SmolLM2-135M

Limits: int8 at most +0.5 %, int4 +3 %. Exit code 1 when one is passed.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import missing_package  # noqa: F401 - first: it says what is missing
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.cpu_linear import QuantizedLinear, quantize
from osum_echat.generation.events import Done
from osum_echat.generation.request import Request
from osum_echat.model import quantized
from osum_echat.pipeline import EChat
from osum_echat.pipeline.ask import Ask

ROOT = Path(__file__).resolve().parent.parent
LIMITS = {"int8": 0.5, "int4": 3.0}
ROWS, LENGTH = 12, 256


@dataclass
class Score:
    """Sums over ids that a model was given."""

    nll: float = 0.0
    count: int = 0
    likeliest: list[Tensor] = field(default_factory=list)

    def add(self, logits_NV: Tensor, ids_N: Tensor) -> None:
        self.nll += float(F.cross_entropy(logits_NV.float(), ids_N, reduction="sum"))
        self.count += len(ids_N)
        self.likeliest.append(logits_NV.argmax(-1))

    @property
    def loss(self) -> float:
        return self.nll / self.count

    def beside(self, exact: Score) -> dict[str, float]:
        same = torch.cat(self.likeliest) == torch.cat(exact.likeliest)
        return {
            "loss_percent": round(100 * (self.loss / exact.loss - 1), 3),
            "same_likeliest_percent": round(100 * float(same.float().mean()), 2),
        }


class Given(dict[int, int]):
    """A request's plan that remembers which ids it has given."""

    def __init__(self, ids: Sequence[int]) -> None:
        super().__init__(enumerate(ids))
        self.taken: list[int] = []

    def get(self, step: int, default: Any = None) -> Any:
        self.taken.append(self[step])
        return self[step]


def samples(echat: EChat, seeds: int) -> list[tuple[Ask, tuple[int, ...]]]:
    """What the float32 model says to every recording, with every seed."""
    found = []
    for wav in sorted((ROOT / "assets" / "demo").glob("*.ogg")):
        for seed in range(seeds):
            ask = Ask(wav, think="tag", speak=True, seed=seed)
            done = [e for _, e in echat.generator.generate([request_of(echat, ask)]) if isinstance(e, Done)]
            found.append((ask, done[0].generated))
    return found


def request_of(echat: EChat, ask: Ask) -> Request:
    assert ask.wav is not None
    return echat.request(ask, echat.hear([ask.wav]))


def score_replies(echat: EChat, given: Sequence[tuple[Ask, tuple[int, ...]]]) -> Score:
    """Loss of the ids that a model chooses itself; those that its state machine gives (begin marks, spelled words) are left out."""
    score, text_size = Score(), echat.model.vocabulary.text_size
    for ask, ids in given:
        plan, logits = Given(ids), list[Tensor]()
        request = replace(request_of(echat, ask), plan=plan)
        list(echat.generator.generate([request], on_logits=lambda _, logits_V, logits=logits: logits.append(logits_V.clone())))
        assert len(plan.taken) == len(logits), (len(plan.taken), len(logits))
        for token, logits_V in zip(plan.taken, logits, strict=True):
            offset = text_size if token >= text_size else 0
            score.add(logits_V[None], torch.tensor([token - offset]))
    return score


def mini(checkpoint: Path, seeds: int) -> dict[str, Any]:
    exact = EChat.load(checkpoint, device="cpu", weights="float32")
    given = samples(exact, seeds)
    base = score_replies(exact, given)
    result: dict[str, Any] = {"model": checkpoint.name, "ids": base.count, "loss": round(base.loss, 4)}
    for kind in LIMITS:
        result[kind] = score_replies(EChat.load(checkpoint, device="cpu", weights=kind), given).beside(base)
    return result


@torch.inference_mode()
def score_text(llm: Any, ids_RT: Tensor) -> Score:
    score = Score()
    for row_T in ids_RT:
        score.add(llm(row_T[None]).logits[0, :-1], row_T[1:])
    return score


def round_llm(llm: Any, kind: quantized.Kind) -> Any:
    """A copy with its linear layers rounded, as the LLM of a checkpoint."""
    other = copy.deepcopy(llm)
    for prefix, parent in list(other.named_modules()):
        for name, child in list(parent.named_children()):
            full = f"lm.llm.{prefix}.{name}.weight" if prefix else f"lm.llm.{name}.weight"
            if type(child) is nn.Linear and (bits := quantized.bits_of(full, tuple(child.weight.shape), kind)):
                setattr(parent, name, QuantizedLinear(quantize(child.weight, bits), child.bias))
    return other


def text_llm(folder: Path) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs").glob("*.md")))
    ids = AutoTokenizer.from_pretrained(folder)(text).input_ids
    step = len(ids) // ROWS
    ids_RT = torch.tensor([ids[n * step : n * step + LENGTH] for n in range(ROWS)])
    base = score_text(llm, ids_RT)
    result: dict[str, Any] = {"model": folder.name, "ids": base.count, "loss": round(base.loss, 4)}
    for kind in ("int8", "int4"):
        result[kind] = score_text(round_llm(llm, kind), ids_RT).beside(base)  # type: ignore[arg-type]
    return result


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=ROOT / "checkpoints" / "mini")
    parser.add_argument("--llm", type=Path, help="a transformers folder, instead of the checkpoint")
    parser.add_argument("--seeds", type=int, default=3, help="replies to each recording")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    args = parser.parse_args(argv)
    result = text_llm(args.llm) if args.llm is not None else mini(args.checkpoint, args.seeds)
    print(json.dumps(result) if args.json else "\n".join(f"{name:<8}{value}" for name, value in result.items()))
    return int(any(result[kind]["loss_percent"] > limit for kind, limit in LIMITS.items()))


if __name__ == "__main__":
    raise SystemExit(main())
