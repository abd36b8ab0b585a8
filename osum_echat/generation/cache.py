"""Keys and values of a batch, in transformers' public cache interface, that can grow.

transformers' own dynamic cache copies everything at every step. Here a layer owns a buffer with spare columns: a step
writes its columns in place and returns a view, and the buffer grows by half when it is full. Rows of different lengths
end at the same column (the padding is on the left), so a step writes one column for all rows.

B rows, H key-value heads, C columns of the buffer, K columns in use, d head width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from osum_echat.dialogue.layout import Row
from osum_echat.model.echat import AudioFeatures

_MIN_ROOM = 64


class GrowingLayer(CacheLayerMixin):
    """One layer's keys and values; ``length`` columns are in use."""

    is_sliding = False
    is_croppable = True

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = (self._buffer(states, self.capacity) for states in (key_states, value_states))
        self.dtype, self.device = key_states.dtype, key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Append [B, H, n, d]; returns views of everything so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[2]:
            self._grow(end)
        self.keys[:, :, self.length : end] = key_states
        self.values[:, :, self.length : end] = value_states
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def reserve(self, count: int) -> tuple[Tensor, Tensor]:
        """Buffers [B, H, C, d] with room for so many columns behind those in use; whoever fills them says so
        (`wrote`)."""
        assert self.keys is not None and self.values is not None
        if self.length + count > self.keys.shape[2]:
            self._grow(self.length + count)
        return self.keys, self.values

    def wrote(self, count: int) -> None:
        """So many further columns are in use."""
        self.length += count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in earlier releases of transformers

    def select(self, rows_B: Tensor, first: int) -> None:
        """Keep some rows, and drop the columns before ``first``."""
        assert self.keys is not None and self.values is not None
        kept = []
        for old in (self.keys, self.values):
            new = self._buffer(old, old.shape[2] - first, rows=len(rows_B))
            new[:, :, : self.length - first] = old[rows_B, :, first : self.length]
            kept.append(new)
        self.keys, self.values = kept
        self.length -= first

    def join(self, other: GrowingLayer) -> None:
        """Put the rows of ``other`` below these; both end at the same column, and the shorter is filled up at its
        left."""
        assert self.keys is not None and self.values is not None and other.keys is not None and other.values is not None
        length = max(self.length, other.length)
        rows, joined = self.keys.shape[0], []
        for mine, theirs in ((self.keys, other.keys), (self.values, other.values)):
            new = self._buffer(mine, max(length + _MIN_ROOM, self.keys.shape[2]), rows=rows + theirs.shape[0])
            new[:rows, :, length - self.length : length] = mine[:, :, : self.length]
            new[rows:, :, length - other.length : length] = theirs[:, :, : other.length]
            joined.append(new)
        self.keys, self.values = joined
        self.length = length

    def copy(self) -> GrowingLayer:
        """Another layer on the same buffers; `select` on either leaves the other alone."""
        new = GrowingLayer(self.capacity)
        assert self.keys is not None and self.values is not None
        new.keys, new.values, new.length = self.keys, self.values, self.length
        new.dtype, new.device, new.is_initialized = self.dtype, self.device, True
        return new

    def _grow(self, needed: int) -> None:
        assert self.keys is not None and self.values is not None
        grown = []
        for old in (self.keys, self.values):
            new = self._buffer(old, max(needed + _MIN_ROOM, old.shape[2] * 3 // 2))
            new[:, :, : self.length] = old[:, :, : self.length]
            grown.append(new)
        self.keys, self.values = grown

    @staticmethod
    def _buffer(like: Tensor, columns: int, rows: int | None = None) -> Tensor:
        # Zeros, not empty: a masked column is multiplied by weight 0, and 0 times a stray NaN would be NaN.
        b, h, _, d = like.shape
        return like.new_zeros(b if rows is None else rows, h, columns, d)


@dataclass(frozen=True)
class KeptCache:
    """Keys and values of one row after it is done, to continue from.

    Attributes:
        row: the sequence they belong to: prompt and what was fed of the reply; ``heard`` are its recordings.
        visible_T: which of its positions may be attended (after CTC compression).
        keys, values: per layer [H, T, d]; masked positions have a column too.
    """

    row: Row
    heard: tuple[AudioFeatures, ...]
    visible_T: Tensor
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    def __len__(self) -> int:
        return len(self.row)

    def common(self, row: Row, heard: Sequence[AudioFeatures]) -> int:
        """How many leading positions of ``row`` are the same as here: same ids, visibility and recordings."""
        size = min(len(row), len(self.row))
        same = (row.ids_T[:size] == self.row.ids_T[:size]) & (row.visible_T[:size] == self.row.visible_T[:size])
        differs = (~same).nonzero()[0]
        length = int(differs[0]) if len(differs) else size
        for mine, theirs in zip(self.row.audio, row.audio, strict=False):
            if mine[1:] != theirs[1:] or self.heard[mine[0]] is not heard[theirs[0]]:
                return min(length, mine[1], theirs[1])
        # A recording that only one of them has begins where the other has ids.
        for extra in (self.row.audio[len(row.audio) :], row.audio[len(self.row.audio) :]):
            if extra:
                length = min(length, extra[0][1])
        return length


class BatchCache:
    """The cache of a batch and which of its columns each row may attend.

    Attributes:
        cache: what the LLM is given.
        visible_BK: columns that hold something a row may attend.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.layers = [GrowingLayer(capacity) for _ in range(layers)]
        self.cache = Cache(layers=list(self.layers))
        self.visible_BK = torch.zeros(0, 0, dtype=torch.bool)

    @property
    def length(self) -> int:
        return self.visible_BK.shape[1]

    def load(self, past: Sequence[KeptCache | None], lengths: Sequence[int]) -> None:
        """Start from kept caches: the first ``lengths[b]`` positions of ``past[b]``, aligned at the right."""
        width = max(lengths)
        example = next((p for p in past if p is not None), None)
        if width == 0 or example is None:
            return
        visible = torch.zeros(len(past), width, dtype=torch.bool, device=example.keys[0].device)
        for b, (kept, length) in enumerate(zip(past, lengths, strict=True)):
            if kept is not None and length:
                visible[b, width - length :] = kept.visible_T[:length]
        self.visible_BK = visible
        for n, layer in enumerate(self.layers):
            h, _, d = example.keys[n].shape
            states = [example.keys[n].new_zeros(len(past), h, width, d) for _ in range(2)]
            for b, (kept, length) in enumerate(zip(past, lengths, strict=True)):
                if kept is not None and length:
                    states[0][b, :, width - length :] = kept.keys[n][:, :length]
                    states[1][b, :, width - length :] = kept.values[n][:, :length]
            layer.update(states[0], states[1])

    def append(self, visible_BT: Tensor) -> None:
        """Say which of the columns that come next may be attended."""
        self.visible_BK = torch.cat([self.visible_BK.to(visible_BT.device), visible_BT], dim=1) if self.length else visible_BT

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, and no more columns than they need."""
        rows_B = torch.tensor(rows, device=self.visible_BK.device)
        visible_BK = self.visible_BK[rows_B]
        first = int(visible_BK.any(0).long().argmax())
        for layer in self.layers:
            layer.select(rows_B, first)
        self.visible_BK = visible_BK[:, first:]

    def join(self, other: BatchCache) -> None:
        """Add the rows of ``other``; both end at the same column."""
        width = max(self.length, other.length)
        self.visible_BK = torch.cat(
            [torch.nn.functional.pad(cache.visible_BK, (width - cache.length, 0)) for cache in (self, other)]
        )
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            mine.join(theirs)

    def take(self, rows: Sequence[int]) -> BatchCache:
        """These rows in a cache of their own."""
        new = BatchCache(0, 0)
        new.layers = [layer.copy() for layer in self.layers]
        new.cache = Cache(layers=list(new.layers))
        new.visible_BK = self.visible_BK
        new.select(rows)
        return new

    def keep(self, b: int, columns: Tensor, row: Row, heard: tuple[AudioFeatures, ...], visible_T: Tensor) -> KeptCache:
        """Copy one row out. ``columns``: the column of each of its positions."""
        keys, values = [], []
        for layer in self.layers:
            assert layer.keys is not None and layer.values is not None
            keys.append(layer.keys[b][:, columns])
            values.append(layer.values[b][:, columns])
        return KeptCache(row, heard, visible_T, tuple(keys), tuple(values))
