"""Attention of a decoding step: grouped heads read their keys once, and come to what every head by itself comes to."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from osum_echat.model.attention import _sdpa


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_a_step_of_grouped_heads_is_attention_of_each_head(groups: int, masked: bool) -> None:
    query = torch.randn(3, 6, 1, 8)
    key, value = torch.randn(3, groups, 20, 8)[:, :, :13], torch.randn(3, groups, 20, 8)[:, :, :13]
    mask = None
    if masked:
        hidden = torch.arange(13)[None] < torch.tensor([0, 4, 9])[:, None]
        mask = torch.zeros(3, 1, 1, 13).masked_fill_(hidden[:, None, None], torch.finfo(torch.float32).min)
    found, _ = _sdpa(nn.Module(), query, key, value, mask, scaling=0.3)
    heads = [tensor.repeat_interleave(6 // groups, dim=1) for tensor in (key, value)]
    expected = F.scaled_dot_product_attention(query, *heads, mask, scale=0.3).transpose(1, 2)
    assert torch.allclose(found, expected, atol=1e-6)
