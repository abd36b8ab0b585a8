"""What the tests of decoding share: the tiny model of tests/data/osum with its recordings, and requests of every kind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from osum_echat.dialogue.dialect import Dialect
from osum_echat.dialogue.tasks import PastTurn
from osum_echat.generation.config import GenerationConfig
from osum_echat.generation.events import Done, Event
from osum_echat.generation.generator import Generator
from osum_echat.generation.request import Request, build_request, listen
from osum_echat.model.checkpoint import load_model
from osum_echat.model.echat import AudioFeatures, EChatModel

DATA = Path(__file__).parent / "data" / "osum"


@lru_cache(maxsize=1)
def tiny() -> tuple[EChatModel, Any, list[AudioFeatures]]:
    """Model, tokenizer, and the four recordings as the LLM hears them."""
    model, tokenizer = load_model(DATA / "tiny.safetensors", DATA / "tiny_config.yaml", dtype=torch.float32)
    with np.load(DATA / "cases.npz") as arrays:
        feats = [torch.from_numpy(arrays[f"feat{i}"]) for i in range(4)]
    return model, tokenizer, listen(model, feats)


def generator(config: GenerationConfig | None = None, dialect: Dialect | None = None) -> Generator:
    model, tokenizer, _ = tiny()
    return Generator(model, tokenizer, config, dialect)


def request(
    output_type: str,
    config: GenerationConfig | None = None,
    *,
    recordings: Sequence[int] = (),
    max_new: int = 24,
    greedy: bool = True,
    seed: int = 0,
    plan: dict[int, int] | None = None,
    history: Sequence[PastTurn] = (),
    dialect: Dialect | None = None,
    **texts: str,
) -> Request:
    model, tokenizer, heard = tiny()
    built = build_request(
        output_type,
        config or GenerationConfig(),
        tokenizer,
        model.vocabulary,
        heard=[heard[i] for i in recordings],
        history=history,
        dialect=dialect,
        greedy=greedy,
        seed=seed,
        **texts,
    )
    built.mode = replace(built.mode, max_new=max_new)
    built.plan = plan or {}
    return built


def every_kind(greedy: bool, config: GenerationConfig | None = None, seeds: Sequence[int] = range(9)) -> list[Request]:
    """Rows of different tasks, prompt lengths and phases: random weights never end a text, so a plan does, at another step for each."""
    eos = tiny()[0].vocabulary.eos_id
    kinds: list[tuple[str, dict[str, Any], int | None]] = [
        ("text", {"recordings": [0], "prompt_text": "写下来"}, 3),
        ("s2t_chat", {"recordings": [1]}, 9),
        ("text2token", {"say": "你好 && 啊"}, None),
        ("speech2text_token", {"recordings": [2]}, 5),
        ("speech2text_token_think", {"recordings": [3]}, 7),
        ("text2text", {"prompt_text": "周末做什么"}, None),
        ("speech2text_token_streaming", {"recordings": [0]}, 28),
        ("text2token_streaming", {"say": "你好啊，今天天气很好，我们出去走走吧"}, None),
        ("speech2text_token", {"recordings": [1]}, 1),
    ]
    return [
        request(name, config, greedy=greedy, seed=seeds[i], max_new=20 + 3 * i, plan={} if end is None else {end: eos}, **options)
        for i, (name, options, end) in enumerate(kinds)
    ]


def run(
    requests: Sequence[Request], config: GenerationConfig | None = None, dialect: Dialect | None = None, **options: Any
) -> list[list[Event]]:
    """All events of each row."""
    events: list[list[Event]] = [[] for _ in requests]
    for row, event in generator(config, dialect).generate(requests, **options):
        assert not (events[row] and isinstance(events[row][-1], Done)), "nothing comes after Done"
        events[row].append(event)
    return events


def done(events: Sequence[Event]) -> Done:
    assert isinstance(events[-1], Done)
    return events[-1]
