"""CTC head, soft tokens, compression, tag heads: options that leave layouts as they are."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from osum_echat.dialogue.layout import IGNORE, audio_positions
from osum_echat.dialogue.packing import pack
from osum_echat.model.config import CtcConfig
from osum_echat.model.ctc import segment_mean, segments
from tests.model_case import CONFIG, OPTIONS, VOCABULARY, ctc_mean, make_feats, make_model, make_row, run, tag_mean

BLANK = 3


def log_probs(best: list[list[int]]) -> Tensor:
    longest = max(len(b) for b in best)
    padded = torch.tensor([b + [0] * (longest - len(b)) for b in best])
    return (F.one_hot(padded, BLANK + 1) * 5.0).log_softmax(2)


def test_a_segment_begins_at_a_new_label_and_takes_the_blanks_after_it() -> None:
    best = [[BLANK, 1, 1, BLANK, 1, 2, BLANK, BLANK]]
    keep, segment = segments(log_probs(best), torch.tensor([8]), BLANK)
    assert keep[0].nonzero()[:, 0].tolist() == [1, 4, 5]
    assert segment[0].tolist() == [0, 0, 0, 0, 1, 2, 2, 2]


@given(st.lists(st.lists(st.integers(0, BLANK), min_size=1, max_size=12), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_segments_are_ctcs_labels_for_any_path(best: list[list[int]]) -> None:
    lengths = torch.tensor([len(b) for b in best])
    keep, segment = segments(log_probs(best), lengths, BLANK, at_least_one=False)
    values = torch.rand(len(best), int(lengths.max()), 2)
    valid = torch.arange(int(lengths.max()))[None] < lengths[:, None]
    mean = segment_mean(values, segment, valid)
    for n, path in enumerate(best):
        labels = [a for i, a in enumerate(path) if a != BLANK and (i == 0 or path[i - 1] != a)]
        assert torch.tensor(path)[keep[n, : len(path)]].tolist() == labels
        assert not keep[n, len(path) :].any(), "padding begins nothing"
        for number in range(int(segment[n, : len(path)].max()) + 1):
            mine = (segment[n] == number) & valid[n]
            torch.testing.assert_close(mean[n][mine], values[n][mine].mean(0).expand(int(mine.sum()), 2))


def test_a_recording_without_any_label_keeps_one_frame() -> None:
    keep, _ = segments(log_probs([[BLANK, BLANK], [BLANK, 1]]), torch.tensor([2, 2]), BLANK)
    assert keep.tolist() == [[True, False], [False, True]]


@torch.no_grad()
def test_compression_hides_positions_and_counts_only_visible_ones_but_keeps_the_length() -> None:
    model, row = make_model(OPTIONS), make_row([90])
    packed = pack([row])
    audio = model.encode_audio(make_feats([90])[0][None], torch.tensor([90]))
    assert len(audio.embeds_PD) == audio_positions(90)
    assert 0 < int(audio.visible_P.sum()) < len(audio.visible_P)
    inputs = model.inputs(packed, audio)
    assert inputs.embeds_BTD.shape[1] == len(row)
    assert inputs.positions_BT[0, -1] == len(row) - 1 - int((~audio.visible_P).sum())
    # What is hidden has no influence: other numbers there, the same loss.
    before = model(packed, audio=audio).nll_M
    audio.embeds_PD[~audio.visible_P] = 9.0
    assert torch.equal(model(packed, audio=audio).nll_M, before)


@torch.no_grad()
def test_soft_tokens_are_the_posteriors_mix_of_the_llms_own_embeddings() -> None:
    only_soft = dataclasses.replace(CONFIG, adapter=dataclasses.replace(CONFIG.adapter, ctc=CtcConfig(compress=False, gate=0.0)))
    model = make_model(only_soft)
    assert model.ctc is not None
    model.ctc.gate.zero_()
    audio = model.encode_audio(make_feats([40])[0][None], torch.tensor([40]))
    assert audio.ctc_log_probs_NPC is not None
    posterior = audio.ctc_log_probs_NPC[0].exp()[:, : VOCABULARY.text_size]
    torch.testing.assert_close(audio.embeds_PD, posterior @ model.lm.llm.get_input_embeddings().weight)


def test_ctc_loss_is_torchs_and_unknown_transcripts_cost_nothing() -> None:
    model = make_model(OPTIONS)
    rows, feats = [make_row([80], 0), make_row([60], 1)], make_feats([80, 60])
    words = [torch.tensor([9, 9, 12]), torch.tensor([], dtype=torch.long)]
    parts = run(model, rows, feats, transcripts=words)
    assert parts.ctc_labels_N.tolist() == [3, 0] and parts.ctc_nll_N[1] == 0
    alone = run(model, rows[:1], feats[:1], transcripts=words[:1])
    torch.testing.assert_close(parts.ctc_nll_N[:1], alone.ctc_nll_N, atol=1e-4, rtol=0)
    audio = model.encode_audio(feats[0][None], torch.tensor([80]))
    assert audio.ctc_log_probs_NPC is not None
    wanted = F.ctc_loss(audio.ctc_log_probs_NPC[0], words[0], torch.tensor(10), torch.tensor(3), blank=60, reduction="sum")
    torch.testing.assert_close(alone.ctc_nll_N[0], wanted)
    ctc_mean(parts).backward()
    assert model.encoder.conv1.weight.grad is not None and model.encoder.conv1.weight.grad.abs().sum() > 0


def test_a_few_steps_of_ctc_learn_to_transcribe() -> None:
    model = make_model(OPTIONS).train()
    rows, feats = [make_row([64], 0), make_row([72], 1)], make_feats([64, 72])
    words = [torch.tensor([11, 30]), torch.tensor([40, 12, 12])]
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    for _ in range(80):
        optimizer.zero_grad()
        ctc_mean(run(model, rows, feats, transcripts=words)).backward()
        optimizer.step()
    padded = torch.nn.utils.rnn.pad_sequence(feats, batch_first=True)
    audio = model.eval().encode_audio(padded, torch.tensor([64, 72]))
    assert model.ctc is not None and audio.ctc_log_probs_NPC is not None
    assert model.ctc.transcribe(audio.ctc_log_probs_NPC, audio.lengths_N) == [w.tolist() for w in words]


@torch.no_grad()
def test_tag_vectors_stand_at_the_two_markers_of_their_recording() -> None:
    model = make_model(OPTIONS)
    rows, feats = [make_row([40], 0), make_row([], 1), make_row([24, 56], 2)], make_feats([40, 24, 56])
    packed = pack(rows, [[2, 1], [0]])
    audio = model.encode_audio(torch.nn.utils.rnn.pad_sequence(feats, batch_first=True), torch.tensor([40, 24, 56]))
    added = (
        model.inputs(packed, audio).embeds_BTD - model.inputs(packed, dataclasses.replace(audio, tag_embeds_ND=None)).embeds_BTD
    )
    assert audio.tag_embeds_ND is not None
    expected = torch.zeros_like(added)
    v = VOCABULARY
    for b, order in enumerate([[1, 2], [0]]):
        for marker in (v.audio_begin, v.audio_end):
            for place, recording in zip((packed.ids_BT[b] == marker).nonzero()[:, 0], order, strict=True):
                expected[b, place] = audio.tag_embeds_ND[recording]
    torch.testing.assert_close(added, expected, atol=1e-6, rtol=0)


def test_tag_loss_is_cross_entropy_where_the_label_is_known() -> None:
    model = make_model(OPTIONS)
    rows, feats = [make_row([40], 0), make_row([24], 1)], make_feats([40, 24])
    parts = run(model, rows, feats, tags={"gender": torch.tensor([1, IGNORE]), "age": torch.tensor([IGNORE, IGNORE])})
    assert parts.tag_known_N["gender"].tolist() == [True, False]
    assert parts.tag_nll_N["gender"][1] == 0 and parts.tag_nll_N["age"].sum() == 0
    audio = model.encode_audio(feats[0][None], torch.tensor([40]))
    wanted = F.cross_entropy(audio.tag_logits["gender"], torch.tensor([1]))
    torch.testing.assert_close(parts.tag_nll_N["gender"][0], wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(tag_mean(parts), parts.tag_nll_N["gender"][0])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_options_run_in_bfloat16(attention: str) -> None:
    config = dataclasses.replace(OPTIONS, llm=dataclasses.replace(OPTIONS.llm, attention=attention))
    model = make_model(config).to(torch.bfloat16)
    parts = run(model, [make_row([40])], make_feats([40]), transcripts=[torch.tensor([9])], tags={"gender": torch.tensor([0])})
    (parts.mean() + ctc_mean(parts) + tag_mean(parts)).backward()
    assert torch.isfinite(parts.nll_M).all() and parts.nll_M.dtype == torch.float32
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
