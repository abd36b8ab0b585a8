"""The chunked cross-entropy equals the plain one, forward and backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.model import loss
from osum_echat.model.loss import linear_nll


def case(seed: int = 0, bias: bool = True) -> tuple[Tensor, Tensor, list[nn.Linear]]:
    torch.manual_seed(seed)
    heads = [nn.Linear(12, 50, bias=bias), nn.Linear(12, 9)]
    return torch.randn(23, 12, requires_grad=True), torch.randint(0, 59, (23,)), heads


def plain_nll(hidden: Tensor, targets: Tensor, heads: list[nn.Linear]) -> Tensor:
    return F.cross_entropy(torch.cat([head(hidden).float() for head in heads], dim=1), targets, reduction="none")


@pytest.mark.parametrize("chunk", [1, 5, 23, 100])
@pytest.mark.parametrize("heads_train", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_equals_plain(chunk: int, heads_train: bool, bias: bool) -> None:
    weights = torch.rand(23)
    found = []
    for function in (plain_nll, lambda *a: linear_nll(*a, chunk=chunk)):
        hidden, targets, heads = case(bias=bias)
        for head in heads:
            head.requires_grad_(heads_train)
        nll = function(hidden, targets, heads)
        (nll * weights).sum().backward()
        found.append([nll, hidden.grad, *(p.grad for head in heads for p in head.parameters())])
    for wanted, mine in zip(*found, strict=True):
        assert (wanted is None) == (mine is None)
        if wanted is not None:
            torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=1e-5)


def test_text_softmax_uses_the_first_head_alone() -> None:
    hidden, targets, heads = case()
    torch.testing.assert_close(linear_nll(hidden, targets % 50, heads[:1]), plain_nll(hidden, targets % 50, heads[:1]))


def test_autocast_gives_float32_losses_and_gradients_for_float32_weights() -> None:
    hidden, targets, heads = case()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        nll = linear_nll(hidden, targets, heads, chunk=6)
    nll.sum().backward()
    assert nll.dtype == torch.float32 and heads[0].weight.grad is not None and heads[0].weight.grad.dtype == torch.float32
    torch.testing.assert_close(nll, plain_nll(hidden, targets, heads), atol=0.05, rtol=0.05)


def test_no_targets_give_no_loss_and_zero_gradients() -> None:
    hidden, targets, heads = case()
    linear_nll(hidden[:0], targets[:0], heads).sum().backward()
    assert heads[1].weight.grad is not None and not heads[1].weight.grad.any()


def test_chunks_keep_logits_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGIT_BUDGET", 59 * 4)
    largest = []
    original = loss._logits
    monkeypatch.setattr(loss, "_logits", lambda *a: (out := original(*a), largest.append(out.numel()))[0])
    hidden, targets, heads = case()
    linear_nll(hidden, targets, heads).sum().backward()
    assert max(largest) <= 59 * 4 and len(largest) == 6  # 23 positions in fours; none is computed twice


@pytest.mark.parametrize("number_of_heads", [1, 2])
def test_ligers_fused_loss_gives_the_same_numbers(number_of_heads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # before triton is imported
    for package in ("triton", "liger_kernel"):
        pytest.importorskip(package, reason="needs `pip install liger-kernel triton` (runs on a CPU too, interpreted)")
    fused = loss._liger()
    assert fused is not None
    weights, found = torch.rand(23), []
    for function in (plain_nll, lambda *a: loss._liger_nll(fused, *a, 0)):
        hidden, targets, heads = case()
        nll = function(hidden, targets % 50, heads[:number_of_heads])
        (nll * weights).sum().backward()
        found.append([nll, hidden.grad, *(p.grad for head in heads[:number_of_heads] for p in head.parameters())])
    for wanted, mine in zip(*found, strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("known", [True, False])
def test_weights_and_mixed_heads_in_one_call_equal_plain_losses(known: bool) -> None:
    """Gradients are exact whether the weights from above were known before or not, and again in a second backward pass."""
    weights, first_only = torch.rand(23), 11
    hidden, targets, heads = case()
    targets = torch.where(torch.arange(23) < first_only, targets % 50, targets)
    both, first = plain_nll(hidden, targets, heads), plain_nll(hidden, targets % 50, heads[:1])
    wanted = torch.where(torch.arange(23) < first_only, first, both)
    parameters = [hidden, *(p for head in heads for p in head.parameters())]
    gradients = torch.autograd.grad((3 * wanted * weights).sum(), parameters)
    found = linear_nll(hidden, targets, heads, first_only, weights if known else None, chunk=5)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    for _ in range(2):
        again = torch.autograd.grad((3 * found * weights).sum(), parameters, retain_graph=True)
        torch.testing.assert_close(again, gradients, atol=1e-5, rtol=1e-5)


def test_weights_that_are_not_those_announced_give_no_silent_gradient() -> None:
    hidden, targets, heads = case()
    (linear_nll(hidden, targets, heads, 0, torch.rand(23)) * torch.rand(23)).sum().backward()
    assert heads[0].weight.grad is not None and heads[0].weight.grad.isnan().all()


def test_targets_of_weight_zero_give_no_gradient() -> None:
    hidden, targets, heads = case()
    (linear_nll(hidden, targets, heads, 0, torch.zeros(23)) * torch.zeros(23)).sum().backward()
    assert heads[0].weight.grad is not None and not heads[0].weight.grad.any()


def test_gradients_of_heads_in_bfloat16_are_summed_in_float32() -> None:
    """Many small chunks: each adds less than bfloat16 would still notice beside the sum."""
    torch.manual_seed(0)
    head = nn.Linear(4, 16, bias=False).bfloat16()
    hidden = torch.rand(4000, 4).bfloat16()
    linear_nll(hidden, torch.zeros(4000, dtype=torch.long), [head], 0, torch.ones(4000), chunk=4).sum().backward()
    exact = nn.Linear(4, 16, bias=False)
    exact.weight.data = head.weight.data.float()
    plain_nll(hidden.float(), torch.zeros(4000, dtype=torch.long), [exact]).sum().backward()
    assert head.weight.grad is not None and exact.weight.grad is not None
    error = (head.weight.grad.float() - exact.weight.grad).abs().max() / exact.weight.grad.abs().max()
    assert error < 0.01, f"relative error {error:.3f}"
