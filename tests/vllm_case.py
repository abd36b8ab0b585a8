"""A decoder like vLLM without vLLM: the exported folder in transformers, a batch whose rows come, go, move, are read in pieces and put back, and our
rules as its logits processor. It computes in what the folder was exported in; in float64 its ids are those of our own engine, to the last one.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, DynamicCache, Qwen2ForCausalLM

from osum_echat.dialogue import think
from osum_echat.dialogue.tokens import encode_fixed
from osum_echat.generation.config import GenerationConfig, Guards, RepetitionGuard, SilenceGuard, ThinkGuard
from osum_echat.generation.events import Event
from osum_echat.generation.request import Request, listen
from osum_echat.generation.vllm.client import Step
from osum_echat.generation.vllm.export import read_settings
from osum_echat.generation.vllm.rules import RowPlan, rules_of
from osum_echat.model.checkpoint import load_model
from osum_echat.model.config import LlmConfig, load_config
from osum_echat.model.echat import AudioFeatures, EChatModel
from tests.generation_case import DATA, done, every_kind, tiny

TIGHT = GenerationConfig(
    guards=Guards(
        repetition=RepetitionGuard(run=2, window=4, count=2, frequent_codes=()),
        silence=SilenceGuard(codes=(1, 2, 3), longest=1),
        think=ThinkGuard(longest=3),
    )
)
"""Guards that act on the random weights of the tiny model."""


def plain_tiny(dtype: torch.dtype) -> tuple[EChatModel, Any]:
    """The tiny model with rotary tables that are not rounded, which vLLM rounds in bfloat16 only."""
    model, tokenizer = load_model(DATA / "tiny.safetensors", DATA / "tiny_config.yaml", dtype=dtype)
    model.config = replace(model.config, llm=replace(model.config.llm, rotary_dtype="float32"))
    for module in model.lm.llm.modules():
        module._forward_hooks.clear()
    return model, tokenizer


@lru_cache(maxsize=1)
def wide_tiny() -> tuple[EChatModel, Any, list[AudioFeatures]]:
    """A random model like the tiny one with heads of 32, the narrowest that vLLM has kernels for on a CPU, and what it hears of the recordings."""
    config = load_config(DATA / "tiny_config.yaml")
    shape = config.llm.transformers_config()
    shape |= {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 256}
    shape |= {"head_dim": 32, "initializer_range": 0.1}
    torch.manual_seed(0)
    model = EChatModel(replace(config, llm=LlmConfig(config=shape))).eval()
    with np.load(DATA / "cases.npz") as arrays:
        feats = [torch.from_numpy(arrays[f"feat{i}"]) for i in range(4)]
    return model, tiny()[1], listen(model, feats)


def wide_requests(greedy: bool, seeds: Sequence[int] = range(9)) -> list[Request]:
    """`every_kind_for` with what the wide model hears."""
    model, _, heard = wide_tiny()
    place = {len(recording.embeds_PD): number for number, recording in enumerate(tiny()[2])}
    requests = every_kind_for(model, greedy, seeds)
    for request in requests:
        request.heard = tuple(heard[place[len(recording.embeds_PD)]] for recording in request.heard)
    return requests


def every_kind_for(model: EChatModel, greedy: bool, seeds: Sequence[int] = range(9)) -> list[Request]:
    """`every_kind`, with recordings in the model's own type, and with ids that make the guards of `TIGHT` act: a code that is said again and again, a
    think that is opened."""
    requests = every_kind(greedy, seeds=seeds)
    opening = encode_fixed(tiny()[1], think.OPEN)
    code = model.vocabulary.speech_id(1)
    for request in requests:
        request.heard = tuple(replace(h, embeds_PD=h.embeds_PD.to(model.dtype)) for h in request.heard)
        if request.output_type == "text2token":
            request.plan = dict.fromkeys(range(2, 8), code)
        elif request.output_type == "speech2text_token_think":
            request.plan = dict(enumerate(opening)) | {step + 10: token for step, token in request.plan.items()}
    return requests


def same(mine: Sequence[Sequence[Event]], theirs: Sequence[Sequence[Event]]) -> None:
    """Events, ids, guards and ends are equal; only times may differ."""
    for number, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        assert a[:-1] == b[:-1], f"row {number}"
        first, second = done(a), done(b)
        assert first.generated == second.generated, f"row {number}"
        assert (first.reason, first.text_ids, dict(first.guards)) == (second.reason, second.text_ids, dict(second.guards)), number
        assert first.timings.think_tokens == second.timings.think_tokens


class _Row:
    def __init__(self, name: str, prompt_TD: Tensor, plan: RowPlan, max_tokens: int) -> None:
        self.name, self.prompt_TD, self.plan, self.max_tokens = name, prompt_TD, plan, max_tokens
        self.output: list[int] = []
        self.forget()

    def forget(self) -> None:
        """Its cache is gone."""
        self.cache = DynamicCache()
        self.fed = 0


class StandIn:
    """`client.Decoder` over transformers. ``unrest``: how often a row is moved, thrown out and put back, or asked before its prompt is read."""

    def __init__(self, folder: Path, rows: int = 16, settings: Any = None, seed: int = 0, unrest: float = 0.0) -> None:
        self.model = Qwen2ForCausalLM.from_pretrained(folder, dtype="auto").eval()
        self.rules = rules_of(read_settings(folder), AutoTokenizer.from_pretrained(folder / "tokenizer"), settings)
        self.max_positions = self.model.config.max_position_embeddings
        self.places: list[_Row | None] = [None] * rows
        self.waiting: list[_Row] = []
        self.random, self.unrest = random.Random(seed), unrest
        self.steps = self.aborted = self.thrown_away = self.put_back = 0
        self.largest_batch = 0
        self.closed = False

    # ---- Decoder ------------------------------------------------------------------------------------------------------------------

    def add(self, name: str, embeds_TD: Tensor, plan: RowPlan, max_tokens: int) -> None:
        if len(embeds_TD) >= self.max_positions:
            raise ValueError("the prompt is too long")
        plan = RowPlan.from_plain(json.loads(json.dumps(plan.to_plain())), self.rules.vocab)  # as it travels
        self.waiting.append(_Row(name, embeds_TD, plan, max_tokens))

    def abort(self, name: str) -> None:
        self.aborted += 1
        self.waiting = [row for row in self.waiting if row.name != name]
        for place, row in enumerate(self.places):
            if row is not None and row.name == name:
                self._leave(place)

    def close(self) -> None:
        self.closed = True

    @torch.inference_mode()
    def step(self) -> list[Step]:
        self.steps += 1
        self._disturb()
        for place, row in enumerate(self.places):
            if row is None and self.waiting:
                self._enter(place, self.waiting.pop(0))
        used = [place for place, row in enumerate(self.places) if row is not None]
        self._close_gaps(used)
        rows = [row for row in self.places if row is not None]
        self.largest_batch = max(self.largest_batch, len(rows))
        if not rows:
            return []
        logits_NX = torch.stack([self._logits(row) for row in rows])
        kept = [
            self.random.random() >= self.unrest / 4 or bool(row.output) for row in rows
        ]  # a prompt that is not read to its end
        out_NX = self.rules.apply(logits_NX.clone())
        left_N = torch.isfinite(out_NX).sum(1)
        assert left_N.tolist() == [1] * len(rows), f"each row has one id left, found {left_N.tolist()}"
        for row in (row for row, keep in zip(rows, kept, strict=True) if not keep):
            self.thrown_away += 1
            row.forget()
        return [self._take(row, out_NX[n]) for n, row in enumerate(rows) if kept[n]]

    # ---- inside -------------------------------------------------------------------------------------------------------------------

    def _take(self, row: _Row, out_X: Tensor) -> Step:
        token = int(out_X.argmax())
        row.output.append(token)
        ended = None
        if token == self.rules.end:
            ended = "stop"
        elif len(row.output) >= row.max_tokens or len(row.prompt_TD) + len(row.output) >= self.max_positions:
            ended = "length"
        if ended:
            self._leave(self.places.index(row))
        return Step(row.name, (token,), (float(out_X[token]),), ended)

    def _logits(self, row: _Row) -> Tensor:
        if row.fed == 0:
            embeds = row.prompt_TD[None]
            if row.output:
                embeds = torch.cat([embeds, self.model.model.embed_tokens(torch.tensor([row.output]))], 1)
        else:
            embeds = self.model.model.embed_tokens(torch.tensor([row.output[row.fed - 1 :]]))
        row.fed = len(row.output) + 1
        return self.model(inputs_embeds=embeds, past_key_values=row.cache, logits_to_keep=1).logits[0, -1]

    def _enter(self, place: int, row: _Row) -> None:
        self.places[place] = row
        self.rules.add(place, row.plan, row.output)

    def _leave(self, place: int) -> _Row:
        row = self.places[place]
        assert row is not None
        self.places[place] = None
        self.rules.remove(place)
        return row

    def _close_gaps(self, used: list[int]) -> None:
        for target, source in enumerate(used):
            if target != source:
                self.places[target], self.places[source] = self.places[source], None
                self.rules.move(source, target, swap=False)

    def _disturb(self) -> None:
        rows = [place for place, row in enumerate(self.places) if row is not None]
        if len(rows) > 1 and self.random.random() < self.unrest:
            a, b = self.random.sample(rows, 2)
            self.places[a], self.places[b] = self.places[b], self.places[a]
            self.rules.move(a, b, swap=True)
        if rows and self.random.random() < self.unrest:
            row = self._leave(self.random.choice(rows))
            row.forget()
            self.waiting.append(row)
            self.put_back += 1
