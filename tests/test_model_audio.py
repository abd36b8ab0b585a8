"""Encoder and adapter: a recording is heard the same whatever it is batched with."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osum_echat.dialogue.layout import audio_positions
from tests.model_case import CONFIG, OPTIONS, make_feats, make_model

MODELS = {"plain": make_model(), "options": make_model(OPTIONS)}


@pytest.mark.parametrize("name", MODELS)
@given(frames=st.lists(st.integers(1, 150), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_a_recording_is_encoded_alone_as_in_a_padded_batch(name: str, frames: list[int], seed: int) -> None:
    model, feats = MODELS[name], make_feats(frames, seed)
    # Padding of any content: what stands after a recording's end has no effect.
    padded = torch.nn.utils.rnn.pad_sequence(feats, batch_first=True, padding_value=3.0)
    together = model.encode_audio(padded, torch.tensor(frames))
    assert together.lengths_N.tolist() == [audio_positions(n) for n in frames]
    for n, (feat, part) in enumerate(zip(feats, together.embeds_PD.split(together.lengths_N.tolist()), strict=True)):
        alone = model.encode_audio(feat[None], torch.tensor([len(feat)]))
        torch.testing.assert_close(part, alone.embeds_PD, atol=1e-5, rtol=0)
        if together.tag_embeds_ND is not None and alone.tag_embeds_ND is not None:
            torch.testing.assert_close(together.tag_embeds_ND[n], alone.tag_embeds_ND[0], atol=1e-5, rtol=0)


@torch.no_grad()
def test_chosen_layers_are_block_outputs_and_the_last_is_normed() -> None:
    encoder = MODELS["plain"].encoder
    feats, lengths = make_feats([40])[0][None], torch.tensor([40])
    (first, second, last), _ = encoder(feats, lengths, layers=(1, 2, 3))
    torch.testing.assert_close(encoder.blocks[1](first, None), second)
    torch.testing.assert_close(encoder.norm(encoder.blocks[2](second, None)), last)
    torch.testing.assert_close(encoder(feats, lengths)[0][0], last)


def test_a_recording_beyond_the_position_table_is_refused_with_the_limit() -> None:
    with pytest.raises(ValueError, match=r"4\.1 s is longer than the encoder's 4\.0 s"):
        MODELS["plain"].encode_audio(torch.zeros(1, 410, CONFIG.encoder.mels), torch.tensor([410]))


def test_an_empty_recording_and_other_mel_bins_are_refused() -> None:
    with pytest.raises(ValueError, match="without a single frame"):
        MODELS["plain"].encode_audio(torch.zeros(2, 10, CONFIG.encoder.mels), torch.tensor([10, 0]))
    with pytest.raises(ValueError, match="80 mel bins, this checkpoint takes 8"):
        MODELS["plain"].encode_audio(torch.zeros(1, 10, 80), torch.tensor([10]))


def test_recomputed_activations_give_the_same_gradients() -> None:
    grads = []
    for recompute in (False, True):
        model = make_model().train()
        model.encoder.recompute = model.adapter.recompute = recompute
        model.encode_audio(make_feats([50])[0][None], torch.tensor([50])).embeds_PD.square().sum().backward()
        grads.append([p.grad for p in model.encoder.parameters()])
    for kept, again in zip(*grads, strict=True):
        torch.testing.assert_close(kept, again)
