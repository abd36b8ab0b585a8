"""Attention of packed rows: which back end takes which form of "who may attend to whom".

Packed rows are run document after document without padding. A mask over a whole row of T positions would cost T x T
however short the documents are, so attention gets where documents end (`Documents`):

    sdpa    one kernel for all documents where the device has one (`device.varlen_attention`), else a call a document
    flash   the kernel gets the lengths; where positions are hidden, which lengths cannot say, the same function as for sdpa
    eager   a mask over all positions (the only form it knows; small models and short rows)

Everything is decided per call from what is handed over; nothing of the LLM is switched. Encoder and adapter, whose
recordings stand end to end in the same way, use the same `attend`.

B batch rows, T positions, D width of the LLM, L positions of a document, P positions of all documents, H heads, d width
of a head.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from osum_echat import device as devices
from osum_echat.dialogue.packing import PAD_DOCUMENT

BY_DOCUMENT = "sdpa_by_document"
"""Name under which transformers finds the attention of ``attention: sdpa``."""
Attend = Callable[..., tuple[Tensor, Any]]
_TAKE_LENGTHS: set[str] = set()  # kernels that take where documents end


@dataclass
class Documents:
    """Sequences that stand end to end; each attends to itself alone.

    Attributes:
        lengths, longest: positions of each, on the host.
        ends: where each begins and the last ends: int32 [D + 1].
        visible_P: False where nothing may attend to a position; None: everything is visible.
        masks: who may attend to whom in each document that has hidden positions, [1, 1, L, L] (None: causal); made from
            ``visible_P`` once.
    """

    lengths: list[int]
    longest: int
    ends: Tensor
    visible_P: Tensor | None = None
    hidden: tuple[bool, ...] = ()
    masks: list[Tensor | None] | None = None

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> Documents:
        ends = np.cumsum([0, *lengths])
        return cls(list(lengths), max(lengths, default=0), torch.from_numpy(ends.astype(np.int32)))

    @classmethod
    def of(cls, documents: npt.NDArray[np.int64], visible: npt.NDArray[np.bool_]) -> Documents:
        """Of documents' numbers and visibility at each position, without padding."""
        first = np.flatnonzero(np.diff(documents, prepend=PAD_DOCUMENT - 1))
        bounds = [*first.tolist(), len(documents)]
        out = cls.of_lengths(np.diff(bounds).tolist())
        if visible.all():
            return out
        hidden = tuple(bool(not visible[start:end].all()) for start, end in itertools.pairwise(bounds))
        return replace(out, visible_P=torch.from_numpy(visible), hidden=hidden)

    def to(self, device: torch.device) -> Documents:
        """The same with its tensors on ``device``, and with masks where some are needed."""
        sent = replace(self, ends=devices.send(self.ends, device))
        if self.visible_P is None:
            return sent
        sent.visible_P = devices.send(self.visible_P, device)
        pieces = zip(sent.visible_P.split(self.lengths), self.hidden, strict=True)
        sent.masks = [_causal_mask(visible_L) if hidden else None for visible_L, hidden in pieces]
        return sent


def _causal_mask(visible_L: Tensor) -> Tensor:
    """Earlier or same position, visible: [1, 1, L, L]."""
    length = len(visible_L)
    return (torch.ones(length, length, dtype=torch.bool, device=visible_L.device).tril() & visible_L)[None, None]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    documents: Documents,
    causal: bool = False,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention inside each document, [1, H, P, d] (keys and values may have fewer heads) to [1, P, H, d]."""
    kernel = devices.varlen_attention(query) if documents.masks is None and not dropout else None
    if kernel is None:
        return _one_by_one(query, key, value, documents, causal, scale, dropout)
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    return kernel(q, k, v, documents.ends, documents.longest, causal, scale)[None]


@torch.compiler.disable  # the lengths of a batch are no constants
def _one_by_one(
    query: Tensor, key: Tensor, value: Tensor, documents: Documents, causal: bool, scale: float | None, dropout: float
) -> Tensor:
    masks = documents.masks or [None] * len(documents.lengths)
    groups = query.shape[1] // key.shape[1]
    pieces = []
    for q, k, v, mask in zip(*(x.split(documents.lengths, dim=2) for x in (query, key, value)), masks, strict=True):
        if groups > 1 and mask is not None:  # kernels that know grouped heads take no mask
            k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
        options: dict[str, Any] = {"is_causal": causal and mask is None, "enable_gqa": groups > 1 and mask is None}
        pieces.append(F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale, **options))
    return torch.cat(pieces, dim=2).transpose(1, 2)


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
    """Let a kernel of transformers' flash interface attend document by document where it is given documents instead of
    their lengths."""
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if name not in _TAKE_LENGTHS:
        AttentionInterface.register(name, _by_document(ALL_ATTENTION_FUNCTIONS[name]))
        _TAKE_LENGTHS.add(name)


def _by_document(other: Attend) -> Attend:
    """`attend` for a call that brings ``documents``, ``other`` for the rest."""

    def by_document(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        documents: Documents | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Any]:
        if documents is None:
            return other(module, query, key, value, attention_mask, **kwargs)
        return attend(query, key, value, documents, True, kwargs.get("scaling"), kwargs.get("dropout") or 0.0), None

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
    """Attention of one new position, [B, 1, heads, d]. The heads that share a key head are given as positions of it, so
    that its keys are read once and not once a head: a step's attention takes a fifth of the time on a CPU.
    ``attention_mask``: [B or 1, 1, 1, K] or None."""
    batch, heads, _, width = query.shape
    grouped = query.reshape(batch, key.shape[1], -1, width)
    out = F.scaled_dot_product_attention(grouped, key, value, attention_mask, scale=scaling)
    return out.reshape(batch, 1, heads, value.shape[3])


def packed_mask(documents_BT: Tensor, visible_BT: Tensor) -> Tensor:
    """Who may attend to whom, [B, 1, T, T] bool: earlier or same position, same document, visible key.

    A masked position attends to the visible ones before it, not to itself. Padding attends to itself, so that no query
    is without a key.
    """
    length = documents_BT.shape[1]
    index_T = torch.arange(length, device=documents_BT.device)
    causal_TT = index_T[:, None] >= index_T[None, :]
    same_BTT = documents_BT[:, :, None] == documents_BT[:, None, :]
    padding_BT = documents_BT == PAD_DOCUMENT
    self_BTT = torch.diag_embed(padding_BT)
    return ((same_BTT & causal_TT & visible_BT[:, None, :] & ~padding_BT[:, None, :]) | self_BTT)[:, None]


def packed_hidden(decoder: Any, inputs_PD: Tensor, positions_P: Tensor, documents: Documents) -> Tensor:
    """Hidden states [P, D] of documents end to end by a transformers decoder; attention is causal inside each
    document."""
    backend, given = decoder.config._attn_implementation, dict[str, Any]()
    mask: Tensor | None = None
    if backend in _TAKE_LENGTHS and documents.masks is None:
        given = {"cu_seq_lens_q": documents.ends, "cu_seq_lens_k": documents.ends}
        given |= {"max_length_q": documents.longest, "max_length_k": documents.longest}
    elif backend in (BY_DOCUMENT, *_TAKE_LENGTHS):
        given = {"documents": documents}
        # Nobody reads it: transformers takes a 4D mask as ready, builds none of [positions x positions] and looks for
        # no borders itself.
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=inputs_PD.device)
    elif documents.masks is not None or len(documents.lengths) > 1:
        mask = _whole_mask(documents, inputs_PD)
    out = decoder(inputs_embeds=inputs_PD[None], position_ids=positions_P[None], attention_mask=mask, use_cache=False, **given)
    return out.last_hidden_state[0].to(inputs_PD.dtype)


def _whole_mask(documents: Documents, inputs_PD: Tensor) -> Tensor:
    """Who may attend to whom among all positions, as numbers to add: [1, 1, P, P]."""
    device = inputs_PD.device
    number_P = torch.repeat_interleave(
        torch.arange(len(documents.lengths), device=device), documents.ends.diff(), output_size=len(inputs_PD)
    )
    visible_P = torch.ones_like(number_P, dtype=torch.bool) if documents.visible_P is None else documents.visible_P
    return _additive(packed_mask(number_P[None], visible_P[None]), inputs_PD)


def _additive(allowed_B1TT: Tensor, inputs: Tensor) -> Tensor:
    """The mask as numbers to add, which eager attention takes."""
    device = inputs.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else inputs.dtype
    bias = torch.zeros(allowed_B1TT.shape, dtype=dtype, device=inputs.device)
    return bias.masked_fill_(~allowed_B1TT, torch.finfo(dtype).min)
