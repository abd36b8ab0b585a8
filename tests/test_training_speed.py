"""What keeps an accelerator busy in training, shown on a CPU: waits and collectives counted, memory measured, kernels replaced by stand-ins."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat import config as config_io
from osum_echat import device as devices
from osum_echat.device import varlen
from osum_echat.device.waits import Waits
from osum_echat.model import attention
from osum_echat.training import memory, report, stages
from osum_echat.training.build import compile_blocks
from osum_echat.training.config import TrainConfig
from osum_echat.training.distributed import World
from osum_echat.training.engines.single import SingleEngine
from osum_echat.training.objective import Objective
from osum_echat.training.optimizer import FloatSums, Group, Optimizer
from tests import training_case as tc

CPU = torch.device("cpu")


def engine(folder: Path, heads: bool = False, recompute: Any = False, **changes: Any) -> SingleEngine:
    plain = tc.base_config(folder / "run", **config_io.merge({"loss": {"ctc": 0.3, "tags": 0.1}}, changes))
    config = config_io.from_dict(TrainConfig, plain)
    model = tc.tiny_model(heads=heads, recompute=recompute)
    groups = stages.assign(model, config)
    if config.precision == "bf16":
        model.bfloat16()
    return SingleEngine(Objective(model, config.loss), groups, stages.blocks(model), config, World(), CPU)


# ---- waits and collectives -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("compressed", "expected"), [(False, 1), (True, 3)])
def test_a_step_of_micro_batches_waits_once_for_the_device(compressed: bool, expected: int, tmp_path: Path) -> None:
    """CTC compression hides positions that only the model knows: a further wait a micro-batch."""
    one = engine(tmp_path, heads=compressed)
    micros = [one.module.prepare(tc.make_batch(numbers), CPU) for numbers in ([0, 1, 2, 3], [4])]
    totals = {name: sum(micro.counts[name] for micro in micros) for name in one.module.names}
    with Waits() as waits:
        outcomes = [one.forward(micro, totals) for micro in micros]
        for outcome in outcomes:
            one.backward(outcome.loss, last=outcome is outcomes[-1])
        norm, read = report.read(one.step(1.0).norm, outcomes)
    assert waits.total == expected, str(waits)
    assert norm > 0 and all(torch.equal(a.nll_D, b.nll_D) for a, b in zip(read, outcomes, strict=True))


def test_a_step_has_one_collective(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    for name in ("table", "gather", "broadcast", "barrier"):
        original = getattr(World, name)
        monkeypatch.setattr(World, name, lambda self, *a, f=original, n=name: calls.append(n) or f(self, *a))
    config = tc.base_config(tmp_path / "run", max_steps=6, accumulation=2, log_every=100)
    marks: list[int] = []
    case = {"config": config, "batches": [[[n] for n in range(12)]]}
    monkeypatch.setattr(
        tc, "interruption", lambda case, rank: lambda step, phase: marks.append(len(calls)) if phase == "update" else None
    )
    tc.run(case)
    assert [b - a for a, b in itertools.pairwise(marks)] == [1] * 5
    assert set(calls[marks[0] : marks[-1]]) == {"table"}


def test_the_next_step_is_fetched_before_the_numbers_of_this_one_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = report.read
    monkeypatch.setattr(report, "read", lambda *a: seen.append("read") or original(*a))
    monkeypatch.setattr(
        tc, "interruption", lambda case, rank: lambda step, phase: seen.append(phase) if phase in ("data", "update") else None
    )
    tc.run({"config": tc.base_config(tmp_path / "run", max_steps=3, accumulation=1), "batches": [[[0], [1], [2]]]})
    assert seen == ["data", "update", "data", "read", "update", "data", "read", "update", "read"]


# ---- attention in one kernel -----------------------------------------------------------------------------------------------------------


def stand_in(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, same: Tensor, longest: int, longest_key: int, *, window_size: tuple[int, int], scale: float | None = None, enable_gqa: bool = False) -> Tensor:  # fmt: skip
    """`torch.nn.attention.varlen.varlen_attn` of torch 2.13, written with SDPA."""
    assert ends.dtype == torch.int32 and longest % 128 == 0 and longest >= int(ends.diff().max())
    pieces = []
    for start, end in itertools.pairwise(ends.tolist()):
        q, k, v = (x[start:end].transpose(0, 1) for x in (query, key, value))
        causal = window_size == (-1, 0)
        pieces.append(
            F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=enable_gqa).transpose(0, 1)
        )
    return torch.cat(pieces)


def older(query: Tensor, key: Tensor, value: Tensor, ends: Tensor, same: Tensor, longest: int, longest_key: int, is_causal: bool = False) -> Tensor:  # fmt: skip
    """The signature of torch 2.10."""
    assert query.shape[1] == key.shape[1], "it knows no grouped heads"
    return stand_in(query, key, value, ends, same, longest, longest_key, window_size=(-1, 0 if is_causal else -1))


@pytest.mark.parametrize("function", [stand_in, older])
def test_one_kernel_for_all_documents_gives_the_loss_of_one_by_one(function: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = tc.tiny_model(), tc.make_batch([0, 1, 2, 3, 4, 5])
    wanted = model(batch.rows, batch.feats_NTF, batch.feats_lengths_N).nll_M
    kernel, calls = varlen.adapt(function), []
    assert kernel is not None
    monkeypatch.setattr(devices, "varlen_attention", lambda query: lambda *a: calls.append(a[5]) or kernel(*a))
    monkeypatch.setattr(attention, "_one_by_one", lambda *a: pytest.fail("no document is attended by itself"))
    found = model(batch.rows, batch.feats_NTF, batch.feats_lengths_N).nll_M
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert calls == [False] * 3 + [True] * 2  # two encoder blocks, an adapter block, two layers of the LLM


def test_the_kernel_of_this_torch_is_understood_and_not_asked_on_a_cpu() -> None:
    assert varlen.varlen_attention(torch.zeros(1, 2, 3, 64)) is None
    assert varlen._takes("cuda", torch.bfloat16, 128) and not varlen._takes("cuda", torch.float32, 128)
    assert varlen.adapt(lambda query, key: query) is None


# ---- compiled layers -----------------------------------------------------------------------------------------------------------------


def test_compiled_layers_give_the_same_loss_and_are_not_compiled_anew_for_every_batch() -> None:
    """With the tracer alone: making code needs a compiler, and minutes."""
    from torch._dynamo.testing import CompileCounter

    model, counter = tc.tiny_model(), CompileCounter()
    batches = [tc.make_batch(numbers) for numbers in ([0, 1, 2, 3], [4, 5, 6], [8, 9, 10, 11], [12, 13], [0, 2, 4, 6])]
    wanted = [model(b.rows, b.feats_NTF, b.feats_lengths_N).nll_M.sum() for b in batches]
    compile_blocks([layer for layer in stages.blocks(model) if "Decoder" in type(layer).__name__], backend=counter)  # type: ignore[arg-type]
    counts = []
    for batch, loss in zip(batches, wanted, strict=True):
        torch.testing.assert_close(model(batch.rows, batch.feats_NTF, batch.feats_lengths_N).nll_M.sum(), loss)
        counts.append(counter.frame_count)
    assert 0 < counts[1] == counts[-1], counts


# ---- memory --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_rehearsed_peak_is_that_of_real_steps(precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    """Bytes of tensors, weights and optimiser among them; within 10 %."""
    monkeypatch.setenv("OSUM_ECHAT_CPU", "bfloat16")
    data = {"batch": {"rows": 2, "row_positions": 96, "max_frames": 400}, "limits": {"max_frames": 300, "max_positions": 96}}
    one = engine(tmp_path, precision=precision, data=data)
    batch = memory.largest_batch(one.config.data, tc.VOCABULARY, tc.MELS)
    before = [p.detach().clone() for p in one.module.parameters()]
    with devices.PeakMemory(CPU, one.tensors()) as rehearsed:
        memory.rehearse_step(one, one.module, batch, one.config.accumulation, CPU)
    assert all(torch.equal(a, b) for a, b in zip(before, one.module.parameters(), strict=True)), "it changes no weight"
    assert all(not t.any() for name, t in one.optimizer.tensors() if not name.startswith("master"))
    del before
    with devices.PeakMemory(CPU, one.tensors()) as real:
        following = [one.module.prepare(batch, CPU) for _ in range(2)]
        for _ in range(2):
            micros, following = following, [one.module.prepare(batch, CPU) for _ in range(2)]
            for micro in micros:
                one.backward(one.forward(micro, {"lm": 2 * micro.counts["lm"]}).loss, last=micro is micros[-1])
            one.step(1.0)
    assert 0.9 < rehearsed.bytes / real.bytes < 1.1, (rehearsed.bytes, real.bytes)
    parts = memory.before_activations(one.groups, 0, one.config, 1, False)
    held = devices.bytes_of(one.tensors()) - devices.bytes_of(one.module.buffers())
    assert sum(parts.values()) - parts["gradients"] == pytest.approx(held, rel=0.1)


def test_selective_checkpointing_gives_the_same_gradients_and_keeps_less_than_everything(tmp_path: Path) -> None:
    gradients, peaks = {}, {}
    for recompute in (False, "selective", True):
        one = engine(tmp_path, recompute=recompute)
        micro = one.module.prepare(tc.make_batch(list(range(12))), CPU)
        with devices.PeakMemory(CPU) as peak:
            one.backward(one.forward(micro, dict(micro.counts)).loss, last=True)
        gradients[recompute], peaks[recompute] = [p.grad for p in one.module.parameters()], peak.bytes
    for other in ("selective", True):
        for a, b in zip(gradients[False], gradients[other], strict=True):
            torch.testing.assert_close(a, b)
    assert peaks[True] < peaks["selective"] < peaks[False], peaks


def test_gradients_of_many_micro_batches_are_summed_in_float32() -> None:
    param = nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    sums = FloatSums([param])
    for number in range(300):
        sums.last = number == 299
        (param * 1.0).sum().backward()
    assert param.grad is not None and param.grad.tolist() == [300.0] * 4  # bfloat16 alone stops at 256
    param.grad, sums.last = None, False
    (param * 3.0).sum().backward()
    sums.finish()
    assert param.grad is not None and param.grad.tolist() == [3.0] * 4


# ---- update --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_an_update_is_that_of_torchs_adamw_after_clipping(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "fuses_optimizer", lambda device: fused)
    torch.manual_seed(0)
    config = config_io.from_dict(TrainConfig, {"optim": {"lr": 1e-2, "clip": 0.5}}).optim
    ours, theirs = nn.Linear(5, 7), nn.Linear(5, 7)
    theirs.load_state_dict(ours.state_dict())
    optimizer = Optimizer([Group("llm", 1e-2, list(ours.named_parameters()))], config)
    reference = torch.optim.AdamW(
        theirs.parameters(), lr=1e-2, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay
    )
    for number in range(4):
        x = torch.randn(3, 5)
        for model in (ours, theirs):
            (model(x).square().sum() * (torch.nan if number == 2 else 3.0)).backward()
        norm = optimizer.update(1.0, config.clip)
        wanted = nn.utils.clip_grad_norm_(theirs.parameters(), config.clip)
        torch.testing.assert_close(norm, wanted, equal_nan=True)
        if number != 2:  # neither weights nor states move at a gradient that is not finite
            reference.step()
        reference.zero_grad()
        torch.testing.assert_close(ours.weight, theirs.weight, atol=1e-6, rtol=1e-5)
        assert ours.weight.grad is None
