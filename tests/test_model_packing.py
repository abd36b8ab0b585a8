"""A sample's loss is the same alone, in any batch and packed."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.dialogue.layout import IGNORE, MASKED_POSITION
from osum_echat.dialogue.packing import pack
from osum_echat.model.attention import packed_mask, register_kernel
from osum_echat.model.echat import renumber
from tests.model_case import CONFIG, OPTIONS, by_sample, ctc_mean, make_feats, make_model, make_row, run

EAGER = dataclasses.replace(CONFIG, llm=dataclasses.replace(CONFIG.llm, attention="eager"))
MODELS = {"sdpa": make_model(), "eager": make_model(EAGER), "options": make_model(OPTIONS)}

samples = st.lists(st.tuples(st.lists(st.integers(1, 60), max_size=2), st.booleans(), st.booleans()), min_size=1, max_size=5)


@pytest.mark.parametrize("name", MODELS)
@given(samples=samples, data=st.data())
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_loss_does_not_depend_on_batch_mates(name: str, samples: list, data: st.DataObject) -> None:
    model = MODELS[name]
    rows = [make_row(frames, i, speech, unknown) for i, (frames, speech, unknown) in enumerate(samples)]
    feats = [make_feats(frames, i) for i, (frames, _, _) in enumerate(samples)]
    alone = [run(model, [row], feat).nll_M for row, feat in zip(rows, feats, strict=True)]
    order = data.draw(st.permutations(range(len(rows))))
    cut = data.draw(st.integers(0, len(rows)))
    everything = [f for feat in feats for f in feat]
    plan = [group for group in (order[:cut], order[cut:]) if group]
    for arranged in (None, plan):
        for found, wanted in zip(by_sample(run(model, rows, everything, arranged), len(rows)), alone, strict=True):
            torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)


@torch.no_grad()
def test_eager_attention_and_sdpa_agree_on_packed_rows() -> None:
    rows, feats = [make_row([30], 1), make_row([17], 2, unknown=True)], make_feats([30, 17])
    sdpa, eager = (run(MODELS[name], rows, feats, [[1, 0]]).nll_M for name in ("sdpa", "eager"))
    torch.testing.assert_close(sdpa, eager, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_the_path_without_a_mask_equals_the_one_with(count: int) -> None:
    model, rows = MODELS["sdpa"], [make_row([], 1), make_row([], 2, speech=False)][:count]
    inputs = model.inputs(pack(rows))
    plain = model.hidden(inputs.embeds_BTD, inputs.positions_BT, inputs.documents_BT, inputs.visible_BT)
    masked = model.hidden(
        inputs.embeds_BTD, inputs.positions_BT, attention_mask=packed_mask(inputs.documents_BT, inputs.visible_BT)
    )
    real = inputs.documents_BT >= 0
    torch.testing.assert_close(plain[real], masked[real], atol=1e-5, rtol=0)


@torch.no_grad()
def test_kernels_that_take_document_lengths_give_the_same_hidden_states() -> None:
    """With a kernel of transformers' flash interface, written out here; the real ones need an accelerator."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import flash_attention_mask

    seen = []

    def by_document(module, query, key, value, attention_mask, cu_seq_lens_q=None, **kwargs):
        assert attention_mask is None
        seen.append(cu_seq_lens_q.tolist())
        groups = query.shape[1] // key.shape[1]
        pieces = []
        for start, end in itertools.pairwise(cu_seq_lens_q.tolist()):
            q, k, v = query[:, :, start:end], *(x[:, :, start:end].repeat_interleave(groups, 1) for x in (key, value))
            pieces.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
        return torch.cat(pieces, 2).transpose(1, 2), None

    AttentionInterface.register("documents_in_python", by_document)
    AttentionMaskInterface.register("documents_in_python", flash_attention_mask)
    model, wanted = make_model(), MODELS["sdpa"]
    register_kernel("documents_in_python")
    model.lm.llm.set_attn_implementation("documents_in_python")
    rows, feats = [make_row([30], 1), make_row([], 2), make_row([17], 3)], make_feats([30, 17])
    for plan in (None, [[2, 0], [1]]):
        torch.testing.assert_close(run(model, rows, feats, plan).nll_M, run(wanted, rows, feats, plan).nll_M, atol=2e-5, rtol=0)
    lengths = [len(row) for row in rows]
    assert seen[0] == [0, lengths[0], sum(lengths[:2]), sum(lengths)]
    count, masked = len(seen), [make_row([30], 1, unknown=True)]
    torch.testing.assert_close(run(model, masked, feats[:1]).nll_M, run(wanted, masked, feats[:1]).nll_M, atol=2e-5, rtol=0)
    assert len(seen) == count, "a masked position goes through the mask"


def test_a_masked_position_is_seen_by_nobody_but_itself_asks() -> None:
    row = make_row([], 3, unknown=True)
    packed = pack([row, row], [[0, 1]])
    allowed = packed_mask(packed.documents_BT, packed.visible_BT)[0, 0]
    (masked,) = torch.nonzero(~packed.visible_BT[0, : len(row)])[:, 0].tolist()
    assert not allowed[:, masked].any()
    assert allowed[masked].nonzero()[:, 0].tolist() == list(range(masked))
    assert not allowed[len(row) :, : len(row)].any(), "documents do not see each other"


@given(samples=samples)
@settings(max_examples=30, deadline=None)
def test_renumbering_gives_the_positions_that_layouts_have(samples: list) -> None:
    rows = [make_row(frames, i, speech, unknown) for i, (frames, speech, unknown) in enumerate(samples)]
    packed = pack(rows, [list(range(len(rows)))], multiple_of=8)
    assert torch.equal(renumber(packed.documents_BT, packed.visible_BT), packed.positions_BT)
    hidden = packed.visible_BT & (torch.arange(packed.ids_BT.shape[1]) % 3 != 0)
    numbers = renumber(packed.documents_BT, hidden)
    for n in range(len(rows)):
        mine = packed.documents_BT == n
        assert numbers[mine & hidden].tolist() == list(range(int((mine & hidden).sum())))
        assert (numbers[mine & ~hidden] == MASKED_POSITION).all()


def test_logits_are_made_at_supervised_positions_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    model = MODELS["sdpa"]
    from osum_echat.model import echat

    original = echat.linear_nll
    monkeypatch.setattr(echat, "linear_nll", lambda hidden, *rest: seen.append(len(hidden)) or original(hidden, *rest))
    rows = [make_row([20], 0), make_row([], 1, speech=False)]
    parts = run(model, rows, make_feats([20]))
    assert sum(seen) == parts.num_targets == sum(int((row.targets_T != IGNORE).sum()) for row in rows)


def test_rows_that_do_not_fit_their_recordings_are_refused() -> None:
    with pytest.raises(ValueError, match="3 audio positions, the recordings 4"):
        run(MODELS["sdpa"], [make_row([20])], make_feats([30]))


def test_every_part_of_the_model_learns_from_a_spoken_turn() -> None:
    for model, kwargs in ((make_model(), {}), (make_model(OPTIONS), {"transcripts": [torch.tensor([9, 10])], "tags": {}})):
        parts = run(model, [make_row([40])], make_feats([40]), **kwargs)
        (parts.mean() + ctc_mean(parts)).backward()
        without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
        assert without == []


def test_every_part_runs_on_a_batch_without_audio_and_changes_nothing() -> None:
    model = make_model(OPTIONS)
    rows = [make_row([], 1, speech=False)]
    plain, touched = run(model, rows, []), run(model, rows, [], run_all_parts=True)
    assert torch.equal(plain.nll_M, touched.nll_M)
    touched.mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    assert not any(p.grad.any() for p in model.encoder.parameters() if p.grad is not None)
