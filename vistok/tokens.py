"""Tokens: the currency between tokenizers and generators."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How the tokens of one image lie: in a 1D sequence, row-major on a grid, or on several grids, coarse to fine.

    Args:
        grid: (h, w) or (t, h, w); `None` for a sequence or a pyramid.
        scales: the grids (h, w) of a pyramid, one after another; `None` for a sequence or a grid.

    Raises:
        ValueError: both, a size below 1, or no axis.
    """

    grid: tuple[int, ...] | None = None
    scales: tuple[tuple[int, int], ...] | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and self.scales is not None:
            raise ValueError("a layout is a grid or a pyramid of scales, and not both")
        if self.scales is not None and len(self.scales) < 2:
            raise ValueError(f"a pyramid has at least two scales, got {list(self.scales)}; one is a grid")
        sizes = self.grid if self.scales is None else [size for scale in self.scales for size in scale]
        if sizes is not None and (not len(sizes) or min(sizes) < 1):
            raise ValueError(f"the sizes of a layout are at least 1, got {self.grid or self.scales}")

    def __str__(self) -> str:
        if self.scales is not None:
            return "+".join("x".join(map(str, scale)) for scale in self.scales)
        return "sequence" if self.grid is None else "x".join(map(str, self.grid))

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Inverse of `str(layout)`.

        Raises:
            ValueError: the text is none.
        """
        if text == "sequence":
            return cls()
        if not re.fullmatch(r"\d+(x\d+)*|\d+x\d+(\+\d+x\d+)+", text):
            raise ValueError(f"a layout reads 'sequence', '16x16', '4x8x8' or '1x1+2x2+4x4', got {text!r}")
        grids = [tuple(int(size) for size in part.split("x")) for part in text.split("+")]
        return cls(grids[0]) if len(grids) == 1 else cls(scales=tuple((h, w) for h, w in grids))

    @property
    def num_axes(self) -> int:
        """Coordinates of a token: its place in a sequence; one per axis of a grid; scale, row, column of a pyramid."""
        if self.scales is not None:
            return 3
        return 1 if self.grid is None else len(self.grid)

    def coordinates(self, num_tokens: int) -> Tensor:
        """Where each of `num_tokens` tokens lies, `[n axes]`, int64; in a pyramid float32, in units of the finest grid.

        Raises:
            ValueError: the layout has another number of positions.
        """
        if self.scales is not None:
            h, w = self.scales[-1]
            places = torch.cat([_pyramid_places(i, scale, (h, w)) for i, scale in enumerate(self.scales)])
        else:
            sizes = (num_tokens,) if self.grid is None else self.grid
            places = torch.cartesian_prod(*(torch.arange(size) for size in sizes)).reshape(-1, len(sizes))
        if len(places) != num_tokens:
            raise ValueError(f"a layout {self} has {len(places)} positions, not {num_tokens}")
        return places


def _pyramid_places(level: int, scale: tuple[int, int], finest: tuple[int, int]) -> Tensor:
    """Level, row and column of one scale's tokens, `[h*w 3]`: the centres of what they cover on the finest grid."""
    rows, columns = (
        (torch.arange(size) + 0.5) * fine / size - 0.5 for size, fine in zip(scale, finest, strict=True)
    )
    places = torch.cartesian_prod(rows, columns)
    return torch.cat([torch.full((len(places), 1), float(level)), places], dim=1)


@dataclass(frozen=True)
class Tokens:
    """A batch of tokenized images, discrete (`indices`) or continuous (`latents`), padded to one length.

    Args:
        indices: `[b n]` int64 in `[0, codebook_size)`; `None` for a continuous tokenizer.
        latents: `[b n c]` floating point; `None` for a discrete tokenizer.
        lengths: `[b]` int64, tokens that count per image; all `n` when not given. What follows is padding.
        codebook_size: number of codes, needed with `indices`.
        layout: how the tokens of one image are arranged.

    Raises:
        ValueError: neither or both of `indices` and `latents`, a wrong shape or dtype, ids out of range,
            or lengths outside `1..n`.
    """

    indices: Tensor | None = None
    latents: Tensor | None = None
    lengths: Tensor | None = None
    codebook_size: int | None = None
    layout: Layout = Layout()

    def __post_init__(self) -> None:
        if (self.indices is None) == (self.latents is None):
            raise ValueError("Tokens take either indices [b n] or latents [b n c], and not both")
        if self.indices is not None:
            self._check_indices(self.indices)
        elif self.latents is not None and (self.latents.ndim != 3 or not self.latents.is_floating_point()):
            raise ValueError(
                f"latents must be floating point [b n c], got {self.latents.dtype} {list(self.latents.shape)}"
            )
        if self.lengths is None:
            full = torch.full(
                (len(self.data),), self.data.shape[1], dtype=torch.int64, device=self.data.device
            )
            object.__setattr__(self, "lengths", full)
        self._check_lengths()

    def _check_indices(self, indices: Tensor) -> None:
        if indices.ndim != 2 or indices.dtype != torch.int64:
            raise ValueError(f"indices must be int64 [b n], got {indices.dtype} {list(indices.shape)}")
        if self.codebook_size is None:
            raise ValueError("indices need the codebook_size they point into")
        if indices.numel() == 0:
            return
        low, high = int(indices.min()), int(indices.max())
        if low < 0 or high >= self.codebook_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"token id {wrong} is out of range: the codebook has ids 0 to {self.codebook_size - 1}"
            )

    def _check_lengths(self) -> None:
        lengths = self.token_counts
        if lengths.shape != (len(self.data),) or lengths.dtype != torch.int64:
            raise ValueError(
                f"lengths must be int64 [{len(self.data)}], got {lengths.dtype} {list(lengths.shape)}"
            )
        if lengths.numel() and self.data.shape[1] == 0:
            raise ValueError("an image needs at least one token, these have none")
        if lengths.numel() and (int(lengths.min()) < 1 or int(lengths.max()) > self.data.shape[1]):
            raise ValueError(f"lengths must lie in 1..{self.data.shape[1]}, got {lengths.tolist()}")

    @property
    def data(self) -> Tensor:
        """`indices` or `latents`, whichever this batch holds."""
        data = self.indices if self.indices is not None else self.latents
        assert data is not None
        return data

    @property
    def token_counts(self) -> Tensor:
        """`lengths`, which is never `None` after construction."""
        assert self.lengths is not None
        return self.lengths

    @property
    def is_discrete(self) -> bool:
        """Whether the tokens are codebook indices."""
        return self.indices is not None

    def __len__(self) -> int:
        return len(self.data)

    @property
    def is_token(self) -> Tensor:
        """`[b n]` boolean: `True` where a token counts, `False` in the padding."""
        positions = torch.arange(self.data.shape[1], device=self.token_counts.device)
        return positions < self.token_counts[:, None]

    def __getitem__(self, images: int | slice | Sequence[int] | Sequence[bool] | Tensor) -> Tokens:
        """Some of the images, as a batch: one by number, a slice, several by number, or those where a mask is `True`."""
        if isinstance(images, slice):
            return self._with_data(self.data[images], self.token_counts[images])
        chosen = torch.as_tensor([images] if isinstance(images, int) else images).to(self.data.device)
        if chosen.numel() == 0 and chosen.dtype != torch.bool:
            chosen = chosen.long()
        return self._with_data(self.data[chosen], self.token_counts[chosen.to(self.token_counts.device)])

    def keep(self, num_tokens: int | Sequence[int] | Tensor) -> Tokens:
        """A prefix of every image; images that are shorter already stay as they are.

        Args:
            num_tokens: how many tokens to keep, one number for all images or one per image `[b]` (int64).

        Returns:
            Tokens padded to the longest prefix; what was cut off is zero.

        Raises:
            ValueError: a number outside `1..n`, not an integer, or not one per image.
        """
        wanted = torch.as_tensor(num_tokens)
        if wanted.dtype != torch.int64 or wanted.shape not in ((), (len(self),)):
            raise ValueError(
                f"num_tokens must be one integer or {len(self)} of them, one per image; "
                f"got {wanted.dtype} {list(wanted.shape)}"
            )
        if wanted.numel() and not 1 <= int(wanted.min()) <= int(wanted.max()) <= self.data.shape[1]:
            raise ValueError(f"num_tokens must be in 1..{self.data.shape[1]}, got {wanted.tolist()}")
        lengths = torch.minimum(self.token_counts, wanted.to(self.token_counts.device))
        longest = int(lengths.max()) if len(self) else self.data.shape[1]
        kept = self._with_data(self.data[:, :longest], lengths)
        outside = ~kept.is_token.to(self.data.device)
        padding = outside if self.is_discrete else outside[..., None]
        return self._with_data(kept.data.masked_fill(padding, 0), lengths)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Tokens:
        """As `Tensor.to`; the dtype applies to latents only, indices and lengths stay int64."""
        data = self.data.to(device=device, dtype=None if self.is_discrete else dtype)
        return self._with_data(data, self.token_counts.to(device=device))

    def _with_data(self, data: Tensor, lengths: Tensor) -> Tokens:
        if self.is_discrete:
            return replace(self, indices=data, lengths=lengths)
        return replace(self, latents=data, lengths=lengths)


def growing_prefixes(most: int) -> list[int]:
    """Numbers of tokens that show an image coarse to fine: 1, 2, 4, ... and `most` itself."""
    return [2**i for i in range(most.bit_length()) if 2**i < most] + [most]


def concatenate(batches: list[Tokens]) -> Tokens:
    """One batch out of several of the same tokenizer, padded to the longest.

    Raises:
        ValueError: the list is empty, or the batches differ in kind, codebook size or layout.
    """
    if not batches:
        raise ValueError("concatenate needs at least one batch of tokens")
    first = batches[0]
    for other in batches[1:]:
        if (other.is_discrete, other.codebook_size, other.layout) != (
            first.is_discrete,
            first.codebook_size,
            first.layout,
        ):
            raise ValueError("tokens of different kinds, codebook sizes or layouts cannot be concatenated")
    longest = max(batch.data.shape[1] for batch in batches)
    data = torch.cat([_pad(batch.data, longest) for batch in batches])
    return first._with_data(data, torch.cat([batch.token_counts for batch in batches]))


def _pad(data: Tensor, length: int) -> Tensor:
    padded = data.new_zeros(data.shape[0], length, *data.shape[2:])
    padded[:, : data.shape[1]] = data
    return padded
