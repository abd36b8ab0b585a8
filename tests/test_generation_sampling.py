"""Sampling: the order and the arithmetic of transformers' own processors, and draws that depend on a row's seed alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from osum_echat.generation.config import Sampling
from osum_echat.generation.sampling import Dice, choose, most_likely, penalise, sampling_rows

CPU = torch.device("cpu")
SETTINGS = st.builds(
    Sampling,
    temperature=st.floats(0.2, 2.0),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.1, 1.0),
    repetition_penalty=st.floats(1.0, 1.5),
)


def expected_probs(logits_V: torch.Tensor, s: Sampling) -> torch.Tensor:
    ids = torch.zeros(1, 0, dtype=torch.long)
    scores = TemperatureLogitsWarper(s.temperature)(ids, logits_V[None])
    if s.top_k:
        scores = TopKLogitsWarper(s.top_k)(ids, scores)
    if s.top_p < 1:
        scores = TopPLogitsWarper(s.top_p)(ids, scores)
    return scores.softmax(1)[0]


@settings(deadline=None, max_examples=40)
@given(st.lists(SETTINGS, min_size=1, max_size=4), st.integers(0, 2**31))
def test_ids_are_drawn_from_the_distribution_of_transformers(rows: list[Sampling], seed: int) -> None:
    logits_RV = torch.randn(len(rows), 30, generator=torch.Generator().manual_seed(seed)) * 3
    stacked = sampling_rows(tuple(rows), CPU)
    draws = 400
    counts_RV = torch.zeros_like(logits_RV)
    for i in range(draws):  # an even grid of points instead of random ones
        uniform_R = torch.full((len(rows),), (i + 0.5) / draws, dtype=torch.float64)
        counts_RV[torch.arange(len(rows)), choose(logits_RV, stacked, uniform_R)] += 1
    for row, counts_V, logits_V in zip(rows, counts_RV, logits_RV, strict=True):
        assert (counts_V / draws - expected_probs(logits_V, row)).abs().max() < 0.01


def test_the_largest_uniform_number_never_picks_an_excluded_id() -> None:
    logits = torch.tensor([[5.0, 1.0, 0.0, -2.0]])
    for s in (Sampling(top_k=2), Sampling(top_p=0.5), Sampling(top_k=3, top_p=0.999)):
        chosen = choose(logits, sampling_rows((s,), CPU), torch.tensor([1.0 - 1e-16], dtype=torch.float64))
        assert expected_probs(logits[0], s)[chosen] > 0


def test_banned_ids_are_never_drawn() -> None:
    logits = torch.zeros(1, 8).index_fill(1, torch.tensor([1, 3, 5, 7]), float("-inf"))
    rows = sampling_rows((Sampling(),), CPU)
    found = {int(choose(logits, rows, torch.tensor([u / 50]))) for u in range(50)}
    assert found == {0, 2, 4, 6}


def test_greedy_rows_beside_sampled_ones_take_the_most_likely_id() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    rows = sampling_rows((Sampling(greedy=True), Sampling(top_k=5), Sampling(greedy=True, top_k=3)), CPU)
    chosen = choose(logits, rows, torch.tensor([0.99, 0.99, 0.99]))
    assert chosen[0] == logits[0].argmax() and chosen[2] == logits[2].argmax()
    assert chosen[1] in logits[1].topk(5).indices


@settings(deadline=None, max_examples=40)
@given(st.lists(st.lists(st.integers(0, 19), max_size=8), min_size=1, max_size=3), st.floats(1.0, 2.0))
def test_penalty_is_that_of_transformers_however_rows_are_padded(generated: list[list[int]], penalty: float) -> None:
    logits = torch.randn(len(generated), 20, generator=torch.Generator().manual_seed(1))
    longest = max(map(len, generated))
    ids = torch.tensor([g + [-1] * (longest - len(g)) for g in generated], dtype=torch.long).view(len(generated), longest)
    found = penalise(logits, ids, ids >= 0, torch.full((len(generated),), penalty))
    for row, g in enumerate(generated):
        expected = logits[row : row + 1]
        if g:
            expected = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([g]), expected.clone())
        assert torch.allclose(found[row : row + 1], expected)


def test_dice_repeat_by_seed_and_differ_between_seeds() -> None:
    first, same, other = Dice(7), Dice(7), Dice(8)
    rolls = [first.roll() for _ in range(600)]
    assert rolls == [same.roll() for _ in range(600)]
    assert rolls != [other.roll() for _ in range(600)]
    assert all(0 <= r < 1 for r in rolls) and len(set(rolls)) == 600


@pytest.mark.parametrize("wrong", [{"temperature": 0}, {"top_k": -1}, {"top_p": 0}, {"top_p": 1.1}, {"repetition_penalty": 0.9}])
def test_impossible_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("classes", [64, 96, 4097])
def test_the_most_likely_id_is_the_first_of_equals(classes: int) -> None:
    logits = torch.randint(0, 5, (40, classes)).float()
    logits[0] = float("-inf")
    logits[1, :-1] = float("-inf")
    first = [row.index(max(row)) for row in logits.tolist()]
    assert most_likely(logits).tolist() == first
