"""A key-value cache that appends blocks and rolls back; its rows advance together, or each at its own pace."""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor


class RowLengths:
    """How far the rows of a cache have come, where they advance separately; its layers share it.

    Attributes:
        lengths: `[b]` int64, positions that are committed.
        longest: the largest of them.
    """

    def __init__(self, lengths: Tensor) -> None:
        self.set(lengths)

    def set(self, lengths: Tensor) -> None:
        """Other lengths for all rows."""
        self.lengths = lengths
        self.longest = int(lengths.max()) if len(lengths) else 0

    def places(self, first: int, count: int) -> Tensor:
        """The positions `[b count]` from the `first` on behind what is committed."""
        return self.lengths[:, None] + torch.arange(first, first + count, device=self.lengths.device)


class LayerCache:
    """Keys and values of one layer, `[b h max_length d]`, filled up to `length`.

    With `rows`, each row is filled up to its own length, and `length` counts the positions behind it that `commit` has
    not decided about.
    """

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys = keys
        self.values = values
        self.length = 0
        self.rows: RowLengths | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a block `[b h n d]` and return views of everything stored, `[b h length d]`.

        Rows that advance separately get it behind their own positions; the views then end with those of the longest,
        and hold arbitrary values behind the others.

        Raises:
            ValueError: the block does not fit, or has another number of rows.
        """
        if len(keys) != len(self.keys):
            raise ValueError(f"the cache has {len(self.keys)} rows, {len(keys)} came")
        if self.rows is not None:
            return self._append_to_rows(keys, values, self.rows)
        end = self.length + keys.shape[2]
        if end > self.keys.shape[2]:
            raise ValueError(f"the cache holds {self.keys.shape[2]} positions, {end} were asked for")
        self.keys[:, :, self.length : end] = keys
        self.values[:, :, self.length : end] = values
        self.length = end
        return self.keys[:, :, :end], self.values[:, :, :end]

    def _append_to_rows(self, keys: Tensor, values: Tensor, rows: RowLengths) -> tuple[Tensor, Tensor]:
        places = rows.places(self.length, keys.shape[2])
        self.length += keys.shape[2]
        end = rows.longest + self.length
        if (
            end > self.keys.shape[2]
        ):  # nodes come on top of what an image needs; how many, the first tree says
            missing = end - self.keys.shape[2] + self.length
            self.keys, self.values = (F.pad(x, (0, 0, 0, missing)) for x in (self.keys, self.values))
        self._put(places, keys, values)
        return self.keys[:, :, :end], self.values[:, :, :end]

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

    def narrow(self, batch_size: int) -> LayerCache:
        """The first rows, which share their storage; what either appends later does not count for the other."""
        view = LayerCache(self.keys[:batch_size], self.values[:batch_size])
        view.length = self.length
        return view


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

    def narrow(self, batch_size: int) -> KVCache:
        """The first rows as a cache of its own length that shares their storage; not once the rows are split."""
        if self.rows is not None:
            raise ValueError("a cache whose rows advance separately cannot be narrowed")
        view = copy.copy(self)
        view.layers = [layer.narrow(batch_size) for layer in self.layers]
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

    def split_rows(self) -> None:
        """From now on the rows advance separately: `append` adds nodes, `commit` decides which of them stay."""
        rows = RowLengths(self.lengths)
        self.rows = rows
        for layer in self.layers:
            layer.rows, layer.length = rows, 0

    def commit(self, path: Tensor, counts: Tensor) -> None:
        """Keep some of the nodes appended since the last `commit`, one behind the other, and forget the others.

        Args:
            path: `[b m]` int64, which of these nodes, by rising number; filled up with -1.
            counts: `[b]` int64, how many of the path stay.

        Raises:
            ValueError: the rows are not split, or a path does not have so many nodes, or unknown ones.
        """
        rows = self._own_rows()
        num_nodes = self.layers[0].length
        is_kept = torch.arange(path.shape[1], device=path.device) < counts[:, None]
        if int(counts.max()) > path.shape[1] or bool((is_kept & ((path < 0) | (path >= num_nodes))).any()):
            raise ValueError(f"a path has fewer nodes than its count, or others than 0..{num_nodes - 1}")
        for layer in self.layers:
            layer.keep(path.clamp_min(0), rows)
        rows.set(rows.lengths + counts)

    def rollback_rows(self, lengths: Tensor) -> None:
        """Forget of every row what lies from `lengths [b]` on, and all nodes that are not committed.

        Raises:
            ValueError: the rows are not split, or a length is negative or beyond what is committed.
        """
        rows = self._own_rows()
        if bool(((lengths < 0) | (lengths > rows.lengths)).any()):
            raise ValueError(f"cannot roll back to {lengths.tolist()}: {rows.lengths.tolist()} are committed")
        for layer in self.layers:
            layer.length = 0
        rows.set(lengths)

    def _own_rows(self) -> RowLengths:
        if self.rows is None:
            raise ValueError("the rows of this cache advance together: split_rows goes first")
        return self.rows
