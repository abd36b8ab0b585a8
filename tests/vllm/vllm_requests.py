"""A hundred requests of mixed tasks, tags and interleaving, on the tiny model and on mini, and where two replies first differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from osum_echat.generation.events import Done, Event
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request
from osum_echat.pipeline import Ask, EChat
from tests.vllm_case import wide_requests

ROOT = Path(__file__).resolve().parents[2]
DEMO = sorted((ROOT / "assets" / "demo").glob("*.ogg"))
CLOSE = 1e-3
"""Two logits that are nearer than this may change places between two kernels."""
TEXTS = ("I passed my exam.", "The train is late again.", "My friend is ill.", "We won the game today.", "It is cold outside.")


def tiny_requests(greedy: bool, rounds: int = 6) -> list[Request]:
    """Each kind of sequence ``rounds`` times, with other lengths and seeds each time."""
    requests = []
    for n in range(rounds):
        for request in wide_requests(greedy, seeds=range(9 * n, 9 * n + 9)):
            request.mode = replace(request.mode, max_new=request.mode.max_new + 4 * n)
            requests.append(request)
    return requests


def mini_asks(echat: EChat, count: int, **options: Any) -> list[Ask]:
    """Everything that the checkpoint has learnt, over the demo recordings and some texts."""
    kinds: list[dict[str, Any]] = [{"kind": "understand", "task": task} for task in echat.dialect.instructions]
    kinds += [{"speak": speak, "think": think} for speak in (True, False) for think in (None, "tag", "language")]
    kinds += [{"text": text, "kind": "speak"} for text in TEXTS[:3]] + [{"text": text} for text in TEXTS]
    asks = [
        Ask(**({} if "text" in kind else {"wav": str(DEMO[(n + k) % len(DEMO)])}), **kind, seed=n, **options)
        for n in range(-(-count // 8))
        for k, kind in enumerate(kinds)
    ]
    learnt = [ask for ask in asks if echat.refusal(ask) is None]
    # Every so many, so that no kind is left out.
    return [learnt[n * len(learnt) // count] for n in range(count)]


def mini_requests(echat: EChat, count: int, **options: Any) -> list[Request]:
    requests = []
    for ask in mini_asks(echat, count, **options):
        [part, *_] = echat.parts(ask)
        requests.append(echat.request(part, echat.hear([part.wav]) if part.wav is not None else []))
    return requests


def decode(generator: Generator, requests: Sequence[Request]) -> list[list[Event]]:
    """All events of each request."""
    rows: list[list[Event]] = [[] for _ in requests]
    for row, event in generator.generate(requests):
        rows[row].append(event)
    return rows


def end(row: Sequence[Event]) -> Done:
    assert isinstance(row[-1], Done)
    return row[-1]


@dataclass(frozen=True)
class Difference:
    """Where two replies part: the step, the ids there, and how far apart their logits are in our own engine."""

    row: int
    kind: str
    step: int
    ours: int
    theirs: int
    gap: float

    def __str__(self) -> str:
        return f"row {self.row} ({self.kind}), step {self.step}: {self.ours} or {self.theirs}, gap of logits {self.gap:.2e}"


def differences(
    generator: Generator, requests: Sequence[Request], ours: Sequence[Sequence[Event]], theirs: Sequence[Sequence[Event]]
) -> list[Difference]:
    found = []
    for row, (request, mine, other) in enumerate(zip(requests, ours, theirs, strict=True)):
        a, b = end(mine).generated, end(other).generated
        if a == b:
            continue
        step = next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        assert step < min(len(a), len(b)), f"row {row} has {len(a)} and {len(b)} ids, one the beginning of the other"
        logits_V, offset = _logits_at(generator, request, a, step)
        gap = float(logits_V[a[step] - offset] - logits_V[b[step] - offset])
        found.append(Difference(row, request.output_type, step, a[step], b[step], abs(gap)))
    return found


def _logits_at(generator: Generator, request: Request, generated: Sequence[int], step: int) -> tuple[Tensor, int]:
    """Our engine's logits for an id that was chosen, and the first id of that head."""
    seen: list[Tensor] = []
    again = replace(request, past=None, keep_cache=False)
    for _ in generator.generate([again], on_logits=lambda row, logits_V: seen.append(logits_V.clone())):
        pass
    state = request.state(generator.config, generator.tokenizer, generator.vocab, generator.dialect)
    chosen = []
    while len(state.generated) <= step:
        chosen.append(len(state.generated))
        in_speech = state.in_speech
        state.accept(generated[len(state.generated)])
    assert chosen[-1] == step, f"the id at {step} was given, not chosen"
    return seen[len(chosen) - 1], generator.vocab.text_size if in_speech else 0


def tell(what: str, ours: Sequence[Sequence[Event]], theirs: Sequence[Sequence[Event]], found: Sequence[Difference]) -> None:
    """A line for the report (`make test-vllm` shows it)."""
    counts = [sum((Counter(end(row).guards) for row in rows), Counter[str]()) for rows in (ours, theirs)]
    ids = sum(len(end(row).generated) for row in ours)
    print(
        f"\n{len(ours)} greedy requests of {what}, {ids} ids: {len(ours) - len(found)} replies equal; guards {dict(counts[0])}, {dict(counts[1])}"
    )


def check_greedy(found: Sequence[Difference], total: int) -> None:
    """Few differ, and each only where two logits are as good as equal."""
    for difference in found:
        print(f"\n{difference}")
    assert all(difference.gap < CLOSE for difference in found), [str(d) for d in found if d.gap >= CLOSE]
    assert len(found) <= total // 20, f"{len(found)} of {total} replies differ"


def one_thread() -> None:
    torch.set_num_threads(1)
