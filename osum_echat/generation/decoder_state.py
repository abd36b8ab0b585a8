"""The LLM side of a batch: read the prompts once, feed ids, forget rows that are done.

Rows are aligned at the right: prompts end in the same column, whatever their lengths, so a step appends the same
columns for all. What is padding or masked is hidden by an additive mask, which is left out altogether when there is
nothing to hide.

B rows, T new prompt positions, n positions of a step, K cache columns, D width.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from typing_extensions import Self

from osum_echat.device import send
from osum_echat.dialogue.layout import IGNORE, Row
from osum_echat.dialogue.packing import pack
from osum_echat.generation.cache import BatchCache, KeptCache
from osum_echat.generation.request import Request, join_audio
from osum_echat.model.echat import AudioFeatures, EChatModel


class Slots(Protocol):
    """What `rows.UsualRows` needs of the rows that are decoded together.

    ``hidden_BD`` is the hidden state of the last position of each row; rows are numbered in the order they joined, and
    `select` closes gaps.
    """

    hidden_BD: Tensor

    @property
    def unread(self) -> int: ...

    def read(self, columns: int) -> None: ...

    def join(self, other: Self) -> None: ...

    def take(self, rows: Sequence[int]) -> Self: ...

    def feed(self, ids: Sequence[Sequence[int]]) -> None: ...

    def select(self, rows: Sequence[int]) -> None: ...

    def keep(self, b: int) -> KeptCache: ...


@dataclass
class _Row:
    """What is known of one row beside its tensors of the batch.

    Attributes:
        visible_T: which positions of its prompt may be attended.
        reused: positions of the prompt whose cache was there already.
        columns: the cache column of each prompt position, counted from the first column that there ever was.
        fed: ids that were fed behind the prompt.
    """

    request: Request
    visible_T: Tensor
    reused: int
    columns: Tensor
    fed: list[int] = field(default_factory=list)

    @property
    def positions(self) -> int:
        return len(self.visible_T)


class DecoderState:
    """Rows that are decoded together.

    Attributes:
        hidden_BD: hidden state of the last position of each row.
        rows: the requests and what was read and fed of them, in the order of the batch.
    """

    def __init__(
        self,
        model: EChatModel,
        requests: Sequence[Request],
        spare: int,
        read: bool = True,
        audio: AudioFeatures | None = None,
    ) -> None:
        """``spare``: columns to come that the cache makes place for. ``read=False`` leaves the prompts to `read`.
        ``audio``: the recordings of all requests, joined; None: each request has its own in `Request.heard`."""
        self.model = model
        packed = pack([request.prompt for request in requests]).to(model.device)
        if audio is None:
            audio = join_audio([recording for request in requests for recording in request.heard])
        inputs = model.inputs(packed, audio)
        lengths = [len(request.prompt) for request in requests]
        # At least one position is read anew: the first id is chosen from its hidden state.
        past = [0 if r.past is None else min(r.past.common(r.prompt, r.heard), len(r.prompt) - 1) for r in requests]
        columns = _prompt_columns(lengths, past)
        self.rows = [_Row(request, inputs.visible_BT[b, : lengths[b]], past[b], columns[b]) for b, request in enumerate(requests)]
        self._next_B = torch.stack([row.visible_T.sum() for row in self.rows])
        self._dropped = 0

        width = max(length - p for length, p in zip(lengths, past, strict=True))
        shape = (len(requests), width)
        embeds_BTD = inputs.embeds_BTD.new_zeros(*shape, inputs.embeds_BTD.shape[2])
        positions_BT = torch.zeros(shape, dtype=torch.long, device=model.device)
        visible_BT = torch.zeros(shape, dtype=torch.bool, device=model.device)
        for b, (length, start) in enumerate(zip(lengths, past, strict=True)):
            first = width - (length - start)
            embeds_BTD[b, first:] = inputs.embeds_BTD[b, start:length]
            positions_BT[b, first:] = inputs.positions_BT[b, start:length]
            visible_BT[b, first:] = inputs.visible_BT[b, start:length]

        layers = model.lm.llm.config.get_text_config().num_hidden_layers
        self._cache = BatchCache(layers, capacity=max(past) + width + spare)
        self._cache.load([r.past for r in requests], past)
        self._plain = False
        self._bias_B11C = embeds_BTD.new_zeros(len(requests), 1, 1, 0)
        self.hidden_BD: Tensor = embeds_BTD[:, -1]
        self._unread = (embeds_BTD, positions_BT, visible_BT)
        if read:
            self.read(width)

    # ---- steps -------------------------------------------------------------------------------------------------------

    @property
    def unread(self) -> int:
        """Columns of the prompts that `read` has not come to."""
        return self._unread[0].shape[1]

    def read(self, columns: int) -> None:
        """Read at most so many further columns of the prompts."""
        head = [part[:, :columns] for part in self._unread]
        embeds_BTD, positions_BT, visible_BT = self._unread
        self._unread = (embeds_BTD[:, columns:], positions_BT[:, columns:], visible_BT[:, columns:])
        self._advance(head[0], head[1], head[2])

    def join(self, other: DecoderState) -> None:
        """Add the rows of another batch, which is not to be used any more. Both have read their prompts."""
        assert not self.unread and not other.unread, f"{self.unread} and {other.unread} columns of the prompts are unread"
        width = max(self._cache.length, other._cache.length)
        for part in (self, other):
            shift = width - part._cache.length - part._dropped
            for row in part.rows:
                row.columns = row.columns + shift
        self._dropped = 0
        self._cache.join(other._cache)
        self.hidden_BD = torch.cat([self.hidden_BD, other.hidden_BD])
        self._next_B = torch.cat([self._next_B, other._next_B])
        self.rows = self.rows + other.rows
        self._refresh_bias()

    def take(self, rows: Sequence[int]) -> DecoderState:
        """These rows in a batch of their own; they stay in this one until `select` leaves them out."""
        taken = copy.copy(self)
        taken._cache = self._cache.take(rows)
        taken._pick(rows, self._cache.length)
        return taken

    def feed(self, ids: Sequence[Sequence[int]]) -> None:
        """Feed every row the same number of ids."""
        for row, new in zip(self.rows, ids, strict=True):
            row.fed.extend(new)
        ids_Bn = send(ids, self.model.device)
        count = ids_Bn.shape[1]
        positions_Bn = self._next_B[:, None] + torch.arange(count, device=ids_Bn.device)
        self._next_B = self._next_B + count
        self._advance(self.model.embed(ids_Bn), positions_Bn, torch.ones_like(ids_Bn, dtype=torch.bool))

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows."""
        before = self._cache.length
        self._cache.select(rows)
        self._pick(rows, before)

    def _pick(self, rows: Sequence[int], before: int) -> None:
        """What is not in the cache, after the cache was cut to ``rows``; it had ``before`` columns."""
        self._dropped += before - self._cache.length
        index = send(rows, self.hidden_BD.device)
        self.hidden_BD, self._next_B = self.hidden_BD[index], self._next_B[index]
        self.rows = [self.rows[b] for b in rows]
        self._refresh_bias()

    def keep(self, b: int) -> KeptCache:
        """The cache of row b with what was fed so far."""
        row, fed, heard = self.rows[b], self.rows[b].fed, self.rows[b].request.heard
        end = self._dropped + self._cache.length
        columns = torch.cat([row.columns, torch.arange(end - len(fed), end)]) - self._dropped
        visible_T = torch.cat([row.visible_T, row.visible_T.new_ones(len(fed))])
        flat = extended(row.request.prompt, fed, int(self._next_B[b]) - len(fed))
        return self._cache.keep(b, columns.to(self.hidden_BD.device), flat, heard, visible_T)

    def copy_row(self, b: int, keys: Sequence[Tensor], values: Sequence[Tensor], slot: int) -> int:
        """Copy what row b may attend to into a slot of other caches (per layer [slots, columns, H, d]), from their
        first column on. Returns how many columns that is."""
        row = self.rows[b]
        assert not row.fed and not self.unread, f"{len(row.fed)} ids were fed, {self.unread} columns of the prompts are unread"
        columns_T = (row.columns[row.visible_T.cpu()] - self._dropped).to(self.hidden_BD.device)
        for layer, key, value in zip(self._cache.layers, keys, values, strict=True):
            assert layer.keys is not None and layer.values is not None
            key[slot, : len(columns_T)] = layer.keys[b].index_select(1, columns_T).transpose(0, 1)
            value[slot, : len(columns_T)] = layer.values[b].index_select(1, columns_T).transpose(0, 1)
        return len(columns_T)

    # ---- inside ------------------------------------------------------------------------------------------------------

    def _advance(self, embeds_BnD: Tensor, positions_Bn: Tensor, visible_Bn: Tensor) -> None:
        before, count = self._cache.length, embeds_BnD.shape[1]
        self._cache.append(visible_Bn)
        if before == 0 or count > 1:
            self._refresh_bias()
            mask = self._block_mask(before, visible_Bn)
        else:
            mask = self._step_mask()
        hidden_BnD = self.model.hidden(embeds_BnD, positions_Bn, cache=self._cache.cache, attention_mask=mask)
        self.hidden_BD = hidden_BnD[:, -1]

    def _block_mask(self, before: int, visible_Bn: Tensor) -> Tensor | None:
        """Mask [B, 1, n, K] of several new positions: visible columns up to their own. None: plain causal attention
        from the start."""
        if before == 0 and self._plain:
            return None
        count = visible_Bn.shape[1]
        index_n = torch.arange(count, device=visible_Bn.device)
        causal_nn = index_n[:, None] >= index_n[None]
        new_Bnn = causal_nn & visible_Bn[:, None]
        old_BnK = self._cache.visible_BK[:, None, :before].expand(-1, count, -1)
        return self._bias(torch.cat([old_BnK, new_Bnn], dim=2))[:, None]

    def _step_mask(self) -> Tensor | None:
        """Mask [B, 1, 1, K] of one new position; None when nothing is hidden."""
        if self._plain:
            return None
        if self._cache.length > self._bias_B11C.shape[3]:
            self._refresh_bias()
        return self._bias_B11C[..., : self._cache.length]

    def _refresh_bias(self) -> None:
        """Everything that is appended later is visible, so the mask of steps is made for columns to come as well."""
        visible_BK = self._cache.visible_BK
        self._plain = bool(visible_BK.all())
        if not self._plain:
            later = visible_BK.new_ones(visible_BK.shape[0], max(64, visible_BK.shape[1] // 2))
            self._bias_B11C = self._bias(torch.cat([visible_BK, later], dim=1))[:, None, None]

    def _bias(self, allowed: Tensor) -> Tensor:
        dtype = self.model.dtype
        return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, torch.finfo(dtype).min)


def _prompt_columns(lengths: Sequence[int], past: Sequence[int]) -> list[Tensor]:
    """The cache column of each prompt position: reused ones end at the widest past, new ones at the widest new part."""
    border = max(past)
    end = border + max(length - p for length, p in zip(lengths, past, strict=True))
    return [
        torch.cat([torch.arange(border - p, border), torch.arange(end - (length - p), end)])
        for length, p in zip(lengths, past, strict=True)
    ]


def extended(row: Row, ids: Sequence[int], first_position: int) -> Row:
    """``row`` with ids behind it."""
    count = len(ids)
    return Row(
        np.concatenate([row.ids_T, np.asarray(ids, dtype=np.int64)]),
        np.concatenate([row.positions_T, first_position + np.arange(count)]),
        np.concatenate([row.visible_T, np.ones(count, dtype=np.bool_)]),
        np.full(len(row) + count, IGNORE, dtype=np.int64),
        row.text_softmax,
        list(row.audio),
    )
