"""Attention of packed rows: which back end takes which form of "who may attend to whom".

Packed rows are run document after document without padding. A mask over a whole row of T positions would cost T x T however short the documents
are, so each layer's attention takes one document at a time:

    sdpa    our function under `BY_DOCUMENT`: a kernel launch a document and layer
    flash   the kernel gets the lengths; where positions are hidden, which lengths cannot say, the same function as for sdpa
    eager   a mask over the row (the only form it knows; small models and short rows)

A row that is one document with nothing hidden needs none of it: plain causal attention. Everything is decided per call from what is handed over;
nothing of the LLM is switched.

B batch rows, T positions, D width of the LLM, L positions of a document, P positions of all documents.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat.dialogue.packing import PAD_DOCUMENT

BY_DOCUMENT = "sdpa_by_document"
"""Name under which transformers finds the attention of ``attention: sdpa``."""
Attend = Callable[..., tuple[Tensor, Any]]
_TAKE_LENGTHS: set[str] = set()  # kernels that are told where documents end


def prepare(name: str) -> str:
    """The name of transformers' attention for ``attention: name`` of a config, registered."""
    if name.startswith("flash"):
        register_kernel(name)
        return name
    if name != "sdpa":
        return name
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(BY_DOCUMENT, _by_document(_sdpa))
    AttentionMaskInterface.register(BY_DOCUMENT, sdpa_mask)  # for calls without documents
    return BY_DOCUMENT


def register_kernel(name: str) -> None:
    """Let a kernel of transformers' flash interface attend document by document where it is told documents instead of their lengths."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in _TAKE_LENGTHS:
        AttentionInterface.register(name, _by_document(ALL_ATTENTION_FUNCTIONS[name]))
        _TAKE_LENGTHS.add(name)


def _by_document(attend: Attend) -> Attend:
    """``attend``, or with ``documents`` (length, and mask [1, 1, L, L] where some positions are hidden) SDPA on one after another."""

    def by_document(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        documents: list[tuple[int, Tensor | None]] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if documents is None:
            return attend(module, query, key, value, attention_mask, **kwargs)
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        lengths = [length for length, _ in documents]
        kwargs["is_causal"] = None  # SDPA decides by the mask
        parts = zip(*(tensor.split(lengths, dim=2) for tensor in (query, key, value)), documents, strict=True)
        pieces = [sdpa_attention_forward(module, q, k, v, mask, **kwargs)[0] for q, k, v, (_, mask) in parts]
        return torch.cat(pieces, dim=1), None

    return by_document


def _sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' SDPA attention, with a shorter way for a decoding step of grouped heads."""
    if query.shape[2] == 1 and query.shape[1] > key.shape[1] and not kwargs.get("dropout"):
        return _attend_one(query, key, value, attention_mask, kwargs.get("scaling")), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _attend_one(query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float | None) -> Tensor:
    """Attention of one new position, [B, 1, heads, d]. The heads that share a key head are given as positions of it, so that its keys are
    read once and not once a head: a step's attention takes a fifth of the time on a CPU. ``attention_mask``: [B or 1, 1, 1, K] or None."""
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    out = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[3])


def is_plain(documents_BT: Tensor, visible_BT: Tensor) -> bool:
    """Whether each row is one document, all visible, padded at the right only: plain causal attention is then right without a mask."""
    padding_BT = documents_BT == PAD_DOCUMENT
    one_document = (documents_BT == documents_BT[:, :1]) | padding_BT
    right_padded = padding_BT[:, 1:] | ~padding_BT[:, :-1]
    return bool((one_document & (visible_BT | padding_BT)).all() & right_padded.all())


def packed_mask(documents_BT: Tensor, visible_BT: Tensor) -> Tensor:
    """Who may attend to whom, [B, 1, T, T] bool: earlier or same position, same document, visible key.

    A masked position attends to the visible ones before it, not to itself. Padding attends to itself, so that no query is without a key.
    """
    length = documents_BT.shape[1]
    index_T = torch.arange(length, device=documents_BT.device)
    causal_TT = index_T[:, None] >= index_T[None, :]
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    padding_BT = documents_BT == PAD_DOCUMENT
    self_BTT = torch.diag_embed(padding_BT)
    return ((same_BTT & causal_TT & visible_BT[:, None, :] & ~padding_BT[:, None, :]) | self_BTT)[:, None]


def packed_hidden(decoder: Any, inputs_BTD: Tensor, positions_BT: Tensor, documents_BT: Tensor, visible_BT: Tensor) -> Tensor:
    """Hidden states [B, T, D] of packed rows by a transformers decoder; attention is causal inside each document."""
    backend = decoder.config._attn_implementation
    if backend in _TAKE_LENGTHS:
        return _end_to_end(decoder, inputs_BTD, positions_BT, documents_BT, visible_BT, take_lengths=True)
    if is_plain(documents_BT, visible_BT):
        # Padding is at the right end, where causal attention does not look. Consecutive numbers also keep transformers from taking a
        # jump in the position numbers for the border of a packed sequence.
        positions_BT, mask = torch.arange(inputs_BTD.shape[1], device=inputs_BTD.device)[None], None
    elif backend == BY_DOCUMENT:
        return _end_to_end(decoder, inputs_BTD, positions_BT, documents_BT, visible_BT, take_lengths=False)
    else:
        mask = packed_mask(documents_BT, visible_BT)
        mask = _additive(mask, inputs_BTD) if backend == "eager" else mask
    out = decoder(inputs_embeds=inputs_BTD, position_ids=positions_BT, attention_mask=mask, use_cache=False)
    return out.last_hidden_state


def _end_to_end(
    decoder: Any,
    inputs_BTD: Tensor,
    positions_BT: Tensor,
    documents_BT: Tensor,
    visible_BT: Tensor,
    take_lengths: bool,
) -> Tensor:
    """All documents end to end without padding; attention is told where they end."""
    where_P = torch.nonzero(documents_BT.flatten() != PAD_DOCUMENT)[:, 0]
    documents_P, visible_P = documents_BT.flatten()[where_P], visible_BT.flatten()[where_P]
    _, lengths_D = torch.unique_consecutive(documents_P, return_counts=True)
    mask, told = None, dict[str, Any]()
    if take_lengths and bool(visible_P.all()):
        ends = F.pad(lengths_D.cumsum(0), (1, 0)).to(torch.int32)
        longest = int(lengths_D.max())
        told = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    else:
        lengths = lengths_D.tolist()
        masks = [
            None if bool(visible_L.all()) else packed_mask(document_L[None], visible_L[None])
            for document_L, visible_L in zip(documents_P.split(lengths), visible_P.split(lengths), strict=True)
        ]
        told = {"documents": list(zip(lengths, masks, strict=True))}
        # Nobody reads it: transformers takes a 4D mask as ready and builds none of [positions x positions].
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs_BTD.device)
    flat_ND = inputs_BTD.flatten(0, 1)
    out = decoder(
        inputs_embeds=flat_ND.index_select(0, where_P)[None],
        position_ids=positions_BT.flatten()[where_P][None],
        attention_mask=mask,
        use_cache=False,
        **told,
    )
    hidden_PD = out.last_hidden_state[0].to(inputs_BTD.dtype)
    return torch.zeros_like(flat_ND).index_copy(0, where_P, hidden_PD).view_as(inputs_BTD)


def _additive(allowed_B1TT: Tensor, inputs_BTD: Tensor) -> Tensor:
    """The mask as numbers to add, which eager attention takes."""
    device = inputs_BTD.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs_BTD.dtype
    bias = torch.zeros(allowed_B1TT.shape, dtype=dtype, device=inputs_BTD.device)
    return bias.masked_fill_(~allowed_B1TT, torch.finfo(dtype).min)
