"""Where a program would wait for an accelerator: the counter itself, and bounds on what decoding and synthesis do."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from osum_echat.device.waits import Cost, Waits, a_step
from osum_echat.generation.config import GenerationConfig, Guards
from osum_echat.generation.decoder_step import build_step
from osum_echat.generation.events import Done
from osum_echat.generation.generator import Generator
from osum_echat.generation.static_rows import Sizes
from tests.generation_case import request, tiny
from tests.token2wav_case import recorded_speaker, recorded_tokens, tiny_model


def test_the_counter_sees_every_kind_of_wait_and_nothing_else() -> None:
    x, device = torch.arange(6.0), torch.device("cpu")
    with Waits() as waits:
        x.add_(1).view(2, 3).softmax(-1)
        torch.zeros(3, device=device)
        torch.tensor([1, 2])  # stays on the host
    assert waits.total == 0
    with Waits() as waits:
        torch.tensor([1, 2], device=device)
        x.tolist()
        x[0].item()
        bool(x.any())
        float(x.sum())
        x.nonzero()
        x[x > 2]
        x.cpu()
        x.numpy()
    assert waits.total == 9, str(waits)


def test_kernels_are_operators_that_compute_or_copy() -> None:
    x = torch.ones(2, 3)
    with Waits() as waits:
        y = x.view(3, 2).T[None].expand(4, -1, -1)  # views
        torch.empty(5)
        y = y.contiguous()  # clone
        y.add_(1)
        (y @ y.mT).sum().item()  # bmm, sum
    assert dict(waits.kernels) == {"clone": 1, "add_": 1, "bmm": 1, "sum": 1}
    assert waits.total == 1


def test_backward_is_counted_with_forward() -> None:
    weight = torch.ones(4, 4, requires_grad=True)
    with Waits() as waits:
        torch.mm(torch.ones(2, 4), weight).sum().backward()
    assert waits.kernels["mm"] == 2 and waits.kernels["sum"] == 1


def test_the_cost_of_a_step_leaves_start_and_end_out() -> None:
    x = torch.ones(3)

    def run(steps: int) -> None:
        x.exp()
        for _ in range(steps):
            x.sin().cos()
            x.tolist()
        x.tolist()

    assert a_step(run, 2, 5) == (2, 1)


def cost_of_a_token(kind: str, guards: bool, sizes: Sizes | None) -> Cost:
    """In steady state; ``sizes``: of the static step, None: the usual way."""
    model, tokenizer, _ = tiny()
    made = Generator(model, tokenizer, GenerationConfig() if guards else GenerationConfig(guards=Guards.off()))
    if sizes is not None:
        made.use_static_step(sizes)

    def decode(new: int) -> None:
        done = [e for _, e in made.generate([request(kind, recordings=[1], max_new=new)]) if isinstance(e, Done)]
        assert len(done[0].generated) == new

    return a_step(decode, 10, 20)


@pytest.mark.parametrize("sizes", [None, Sizes.of(torch.device("cpu")), Sizes(exact=False, late=True, record=False)])
def test_a_token_waits_once(sizes: Sizes | None) -> None:
    """The ids come back."""
    for kind in ("s2t_chat", "speech2text_token_think"):
        for guards in (False, True):
            assert cost_of_a_token(kind, guards, sizes).waits <= 1, (kind, guards)


def test_a_token_of_the_static_step_takes_few_kernels() -> None:
    """900 for the 36 layers of the released model: at most 20 for each layer and 180 beside them, all guards and a penalty included."""
    layers = tiny()[0].lm.llm.config.num_hidden_layers
    sizes = Sizes(exact=False, late=True, record=False)
    for kind in ("s2t_chat", "speech2text_token_think"):
        assert cost_of_a_token(kind, True, sizes).kernels <= 20 * layers + 180, kind


def test_a_layer_of_the_static_step_is_sixteen_kernels() -> None:
    step = build_step(tiny()[0])
    cache, cos_sin, device = step.cache(2, 64), step.cos_sin(64), step.device
    counts = []
    with torch.inference_mode():
        for layers in (1, len(step.layers)):
            few = copy.copy(step)
            few._call_layer = step._call_layer[:layers]
            few_cache = copy.copy(cache)
            few_cache.keys, few_cache.values = cache.keys[:layers], cache.values[:layers]
            with Waits() as waits:
                at = few.at(torch.tensor([3, 5]), 1, 64, 64, masked=True)
                few(torch.zeros(2, 1, tiny()[0].lm.width, device=device), at, few_cache, cos_sin)
            counts.append(waits.kernels.total())
    assert (counts[1] - counts[0]) / (len(step.layers) - 1) <= 16, counts


def test_a_chunk_of_sound_waits_once(tmp_path: Path) -> None:
    """Of two more windows of 40 codes: the samples come back."""
    model = tiny_model(tmp_path)
    counts = []
    for codes in (150, 230):
        with Waits() as waits:
            chunks = list(model.stream(recorded_tokens(codes), recorded_speaker(), steps=2))
        counts.append((waits, len(chunks)))
    (short, few), (long, many) = counts
    assert many > few
    assert (long.total - short.total) / (many - few) <= 1, str(long)
