"""The keys and values of one layer of a transformer, allocated once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vistok.kernels.attention import AttentionMask, TreeMask, attention
from vistok.kernels.decode_attention import decode_attention
from vistok.models.layers.rope import Rotation, rotate


class RowLengths:
    """How far the rows of a cache have come, where they advance separately; its layers share it.

    Attributes:
        lengths: `[b]` int64, positions that are committed. They stay on their device.
        most: what the longest row has at most, as far as the host knows.
        can_grow: whether there is more storage where nodes find no room.
    """

    def __init__(self, lengths: Tensor, most: int, can_grow: bool) -> None:
        self.lengths = lengths
        self.most = most
        self.can_grow = can_grow

    def places(self, first: int, count: int) -> Tensor:
        """The positions `[b count]` from the `first` on behind what is committed."""
        return self.lengths[:, None] + torch.arange(first, first + count, device=self.lengths.device)


class LayerCache:
    """Keys and values of one layer, `[b h max_length d]`, filled up to `length`.

    With `rows`, each row is filled up to its own length, and `length` counts the positions behind it that have not been
    committed.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.length = 0
        self.rows: RowLengths | None = None

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: AttentionMask | None, rotation: Rotation | None = None
    ) -> Tensor:
        """Store new keys and values, and let new queries attend to everything stored.

        Args:
            q: `[b h n d]`, not rotated yet.
            k, v: `[b hk n d]`.
            mask: who sees whom; for rows that advance separately a `TreeMask`.
            rotation: turns the queries and the new keys.

        Returns:
            `[b h n d]`.
        """
        if self.rows is not None and self.length == 0 and isinstance(mask, TreeMask):
            return self._attend_rows(q, k, v, mask, self.rows, rotation)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        return attention(q, *self.append(k, v), mask)

    def _attend_rows(
        self, q: Tensor, k: Tensor, v: Tensor, mask: TreeMask, rows: RowLengths, rotation: Rotation | None
    ) -> Tensor:
        """One operator for all of it, which leaves the lengths on the device."""
        self._check_rows(k)
        self._make_room(k.shape[2], rows)
        self.length = k.shape[2]
        keep = mask.keep
        if keep is not None and keep.shape[1] < self.keys.shape[2]:
            keep = F.pad(keep, (0, self.keys.shape[2] - keep.shape[1]), value=True)
        return decode_attention(
            q,
            k,
            v,
            self.keys,
            self.values,
            rows.lengths,
            ancestors=mask.ancestors,
            rotation=rotation,
            keep=keep,
        )

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block `[b h n d]` and return views of everything stored, `[b h length d]`.

        Rows that advance separately get it behind their own positions; the views are then of the whole storage, which
        holds arbitrary values behind what a row has.

        Raises:
            ValueError: the block does not fit, or has another number of rows.
        """
        self._check_rows(keys)
        if self.rows is not None:
            self._make_room(self.length + keys.shape[2], self.rows)
            self._put(self.rows.places(self.length, keys.shape[2]), keys, values)
            self.length += keys.shape[2]
            return self.keys, self.values
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} positions, {end} were asked for")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _check_rows(self, keys: Tensor) -> None:
        if len(keys) != len(self.keys):
            raise ValueError(f"the cache has {len(self.keys)} rows, {len(keys)} came")

    def _make_room(self, num_nodes: int, rows: RowLengths) -> None:
        """Nodes come on top of what an image needs; how many, the first tree says."""
        if not rows.can_grow:
            return
        missing = rows.most + num_nodes - self.keys.shape[2]
        if missing > 0:
            self.keys, self.values = (F.pad(x, (0, 0, 0, missing)) for x in (self.keys, self.values))

    def _put(self, places: Tensor, keys: Tensor, values: Tensor) -> None:
        """Write `[b h n d]` to positions `[b n]` of its row."""
        index = places[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
        self.keys.scatter_(2, index, keys)
        self.values.scatter_(2, index, values)

    def keep(self, path: Tensor, rows: RowLengths) -> None:
        """Move the nodes `path [b m]`, of those behind the committed positions of each row, to the front of them."""
        source = (rows.lengths[:, None] + path)[:, None, :, None]
        source = source.expand(-1, self.keys.shape[1], -1, self.keys.shape[3])
        kept = self.keys.gather(2, source), self.values.gather(2, source)
        self._put(rows.places(0, path.shape[1]), *kept)
        self.length = 0

    def put_rows(self, slots: Tensor, source: LayerCache, rows: Tensor) -> None:
        """See `KVCache.put_rows`."""
        self.keys[slots, :, : source.length] = source.keys[rows, :, : source.length]
        self.values[slots, :, : source.length] = source.values[rows, :, : source.length]

    def narrow(self, batch_size: int) -> LayerCache:
        """The first rows, which share their storage; what either appends later does not count for the other."""
        view = LayerCache(self.keys[:batch_size], self.values[:batch_size])
        view.length = self.length
        return view
