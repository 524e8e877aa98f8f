"""A key-value cache that appends blocks and rolls back; its rows advance together, or each at its own pace."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from vistok.models.layers.layer_cache import LayerCache, RowLengths


class KVCache:
    """One `LayerCache` per layer of a transformer, allocated once.

    Args:
        depth: number of layers.
        batch_size, num_heads, max_length, head_dim: shape of each layer's keys and values.
        dtype, device: of the storage.
    """

    def __init__(
        self,
        *,
        depth: int,
        batch_size: int,
        num_heads: int,
        max_length: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (batch_size, num_heads, max_length, head_dim)
        self.layers = [
            LayerCache(
                torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
            )
            for _ in range(depth)
        ]
        self.max_length = max_length
        self.rows: RowLengths | None = None

    @property
    def length(self) -> int:
        """Positions stored so far.

        Raises:
            ValueError: the rows have lengths of their own.
        """
        if self.rows is not None:
            raise ValueError("the rows of this cache advance separately: ask for its lengths")
        return self.layers[0].length

    @property
    def lengths(self) -> Tensor:
        """Positions committed in every row, `[b]` int64; all the same unless the rows advance separately."""
        if self.rows is not None:
            return self.rows.lengths
        return torch.full((self.batch_size,), self.length, device=self.layers[0].keys.device)

    def node_places(self, depths: Tensor) -> Tensor:
        """Which positions nodes would have if their path was committed: `[b t]` depths -> `[b t]`.

        Raises:
            ValueError: the rows are not split.
        """
        return self._own_rows().lengths[:, None] + depths

    @property
    def batch_size(self) -> int:
        """Rows."""
        return len(self.layers[0].keys)

    def tensors(self) -> list[Tensor]:
        """All that it holds, one row per row of the batch each; those of one kind of cache come in one order."""
        stored = [x for layer in self.layers for x in (layer.keys, layer.values)]
        return stored if self.rows is None else [self.rows.lengths, *stored]

    def narrow(self, batch_size: int) -> KVCache:
        """The first rows as a cache that shares their storage, with a length of its own unless the rows are split.

        Raises:
            ValueError: the rows are split and their storage can grow, and so would be shared no longer.
        """
        view = copy.copy(self)
        view.layers = [layer.narrow(batch_size) for layer in self.layers]
        if self.rows is None:
            return view
        if self.rows.can_grow:
            raise ValueError("a cache whose rows advance separately cannot be narrowed while it can grow")
        view.rows = RowLengths(self.rows.lengths[:batch_size], self.rows.most, can_grow=False)
        for layer in view.layers:
            layer.rows = view.rows
        return view

    def rollback(self, length: int) -> None:
        """Forget every position from `length` on; of split rows, `rollback_rows`.

        Raises:
            ValueError: `length` is negative or beyond what is stored.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"cannot roll back to {length}: {self.length} positions are stored")
        for layer in self.layers:
            layer.length = length

    def split_rows(self, *, can_grow: bool = True) -> None:
        """From now on the rows advance separately: `append` adds nodes, `commit` decides which of them stay.

        Nothing that happens to the rows then is waited for by the host.

        Args:
            can_grow: whether there is more storage where nodes find no room beside what an image needs. If not, it
                stays where it is, and what finds no room is dropped.
        """
        rows = RowLengths(self.lengths, self.length, can_grow)
        self.rows = rows
        for layer in self.layers:
            layer.rows, layer.length = rows, 0

    def advance(self, count: int) -> None:
        """Commit the `count` nodes appended last, in all rows, without moving any.

        Raises:
            ValueError: the rows are not split, or it is more than the cache was made for.
        """
        rows = self._own_rows()
        if rows.most + count > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} positions, {rows.most + count} were asked for"
            )
        self.forget_nodes()
        rows.lengths += count  # in place: a CUDA graph reads them
        rows.most += count

    def forget_nodes(self) -> None:
        """Forget the nodes that are not committed."""
        self._own_rows()
        for layer in self.layers:
            layer.length = 0

    def commit(self, path: Tensor, counts: Tensor) -> None:
        """Keep some of the nodes appended since the last `commit`, one behind the other, and forget the others.

        Args:
            path: `[b m]` int64, which of these nodes, by rising number; filled up with -1.
            counts: `[b]` int64, how many of the path stay.

        Raises:
            ValueError: the rows are not split, or their storage cannot grow, or the paths are longer than there are nodes.
        """
        rows, num_nodes = self._growing_rows(), self.layers[0].length
        if path.shape[1] > num_nodes:
            raise ValueError(f"a path of {path.shape[1]} nodes was chosen among {num_nodes}")
        for layer in self.layers:
            layer.keep(path.clamp_min(0), rows)
        rows.lengths = rows.lengths + counts
        # The last token of an image can be committed as well, which plain decoding does not read.
        rows.most = min(rows.most + path.shape[1], self.max_length + 1)

    def rollback_rows(self, lengths: Tensor) -> None:
        """Forget of every row what lies from `lengths [b]` on, and all nodes that are not committed.

        Raises:
            ValueError: the rows are not split, or their storage cannot grow.
        """
        rows = self._growing_rows()
        self.forget_nodes()
        rows.lengths = torch.minimum(lengths, rows.lengths)

    def advance_rows(self, counts: Tensor) -> None:
        """Commit of each row the first `counts [b]` of the nodes appended last, without moving any.

        Raises:
            ValueError: the rows are not split.
        """
        rows = self._own_rows()
        self.forget_nodes()
        rows.lengths += counts  # in place, as in `advance`
        rows.most = self.max_length  # the host does not look

    def clear_rows(self) -> None:
        """Forget everything of all rows, which stay split; the storage stays."""
        rows = self._own_rows()
        self.forget_nodes()
        rows.lengths.zero_()
        rows.most = 0

    def put_rows(self, slots: Tensor, source: KVCache, rows: Tensor) -> None:
        """Begin some rows anew, with what rows of another cache hold; the others stay as they are.

        Args:
            slots: `[m]` int64, which rows of this cache; none twice.
            source: of the same model; its rows advance together.
            rows: `[m]` int64, the row of the source for each of them.

        Raises:
            ValueError: the rows of this cache are not split, or the source holds more than fits.
        """
        own = self._own_rows()
        if source.length > self.max_length:
            raise ValueError(
                f"the cache holds {self.max_length} positions, {source.length} were to be put there"
            )
        for layer, other in zip(self.layers, source.layers, strict=True):
            layer.put_rows(slots, other, rows)
        own.lengths.index_fill_(0, slots, source.length)
        own.most = max(own.most, source.length)

    def _own_rows(self) -> RowLengths:
        if self.rows is None:
            raise ValueError("the rows of this cache advance together: split_rows goes first")
        return self.rows

    def _growing_rows(self) -> RowLengths:
        """For what replaces the lengths, which a CUDA graph over storage that stays would not see."""
        rows = self._own_rows()
        if not rows.can_grow:
            raise ValueError("the rows of a cache that cannot grow advance, and do not choose among nodes")
        return rows
