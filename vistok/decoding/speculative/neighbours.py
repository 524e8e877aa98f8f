"""The nearest codes of every code in a codebook, which LANTERN takes for interchangeable."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vistok.files import atomic_path, home_folder

logger = logging.getLogger(__name__)

CHUNK_ELEMENTS = 2**24  # distances held at once


@dataclass(frozen=True)
class NeighbourTable:
    """The nearest other codes of every code.

    Args:
        indices: `[v k]` int32; row i holds codes other than i, by increasing distance from it.

    Raises:
        ValueError: another shape or type, or more neighbours than there are other codes.
    """

    indices: Tensor

    def __post_init__(self) -> None:
        shape = tuple(self.indices.shape)
        if len(shape) != 2 or self.indices.dtype != torch.int32:
            raise ValueError(f"a table is int32 [v k], got {self.indices.dtype} of shape {shape}")
        if shape[1] >= shape[0]:
            raise ValueError(f"{shape[0]} codes have {shape[0] - 1} neighbours each, not {shape[1]}")

    @property
    def codebook_size(self) -> int:
        """Number of codes."""
        return self.indices.shape[0]

    @property
    def num_neighbours(self) -> int:
        """Number of neighbours per code."""
        return self.indices.shape[1]

    def nearest(self, tokens: Tensor, k: int) -> Tensor:
        """The k nearest codes of `tokens [b]`, `[b k]` int64, on the device of `tokens`."""
        rows = self.indices[:, :k].index_select(0, tokens.to(self.indices.device))
        return rows.to(tokens.device, torch.int64)

    def to(self, device: torch.device | str) -> NeighbourTable:
        """The same table elsewhere; where the model is, look-ups need no copies."""
        return NeighbourTable(self.indices.to(device))

    @classmethod
    def build(cls, codebook: Tensor, num_neighbours: int) -> NeighbourTable:
        """From the codes as they are, by Euclidean distance in float32; codes at equal distance by rising index.

        The released tables are of the raw rows of the embedding, also where the quantizer normalises them.

        Args:
            codebook: `[v c]`, in index order, such as `tokenizer.codebook`.
            num_neighbours: per code, from 0 to v - 1. LANTERN with k needs k, its `mode="official"` k + 1.

        Raises:
            ValueError: the codebook is not `[v c]` or not finite, or `num_neighbours` is out of range.
        """
        codes = _checked(codebook, num_neighbours)
        size = len(codes)
        table = torch.empty(size, num_neighbours, dtype=torch.int32)
        for rows in torch.arange(size).split(max(1, CHUNK_ELEMENTS // size)):
            # Not by the product of matrices, which cannot tell near codes apart in float32.
            distances = torch.cdist(codes[rows], codes, compute_mode="donot_use_mm_for_euclid_dist")
            distances[torch.arange(len(rows)), rows] = torch.inf
            nearest = distances.topk(num_neighbours, dim=1, largest=False).indices.sort(dim=1).values
            order = distances.gather(1, nearest).argsort(dim=1, stable=True)
            table[rows] = nearest.gather(1, order).int()
        return cls(table)

    @classmethod
    def of(cls, codebook: Tensor, num_neighbours: int, folder: Path | None = None) -> NeighbourTable:
        """As `build`, but from a file if the same table was built before.

        Args:
            codebook, num_neighbours: see `build`.
            folder: where the files are; by default `neighbours` in `$VISTOK_HOME`, or in `~/.cache/vistok`.

        Raises:
            ValueError: see `build`.
        """
        codes = _checked(codebook, num_neighbours)
        folder = folder or home_folder() / "neighbours"
        path = folder / f"{codebook_hash(codes)}-{num_neighbours}.safetensors"
        table = _read(path, (len(codes), num_neighbours))
        if table is None:
            table = cls.build(codes, num_neighbours)
            _write(path, table)
        return table


def codebook_hash(codebook: Tensor) -> str:
    """16 hexadecimal digits that tell codebooks `[v c]` apart, by their float32 values."""
    codes = codebook.detach().cpu().float().contiguous()
    digest = hashlib.sha256(repr(tuple(codes.shape)).encode())
    digest.update(codes.numpy().tobytes())
    return digest.hexdigest()[:16]


def _checked(codebook: Tensor, num_neighbours: int) -> Tensor:
    """The codes in float32 on the CPU."""
    if codebook.ndim != 2 or not codebook.isfinite().all():
        raise ValueError(f"a codebook is [v c] with finite values, got shape {tuple(codebook.shape)}")
    if not 0 <= num_neighbours < len(codebook):
        raise ValueError(
            f"num_neighbours must be from 0 to {len(codebook) - 1}, the other codes of the codebook, "
            f"got {num_neighbours}"
        )
    return codebook.detach().cpu().float()


def _read(path: Path, shape: tuple[int, int]) -> NeighbourTable | None:
    """The table at `path`; `None` if there is none, or a damaged one."""
    try:
        indices = load_file(path)["indices"]
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError) as error:
        logger.warning("building %s anew, which cannot be read: %s", path, error)
        return None
    is_whole = indices.shape == shape and indices.dtype == torch.int32
    return NeighbourTable(indices) if is_whole else None


def _write(path: Path, table: NeighbourTable) -> None:
    """A table that cannot be kept is built again next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as partial:
            save_file({"indices": table.indices}, partial)
    except (OSError, SafetensorError) as error:
        logger.warning("could not keep the neighbour table at %s: %s", path, error)
