"""One-D-Piece: TiTok whose tokens are ordered by importance (Miwa et al. 2025, "One-D-Piece: Image Tokenizer Meets
Quality-Controllable Compression").

The network is the two-stage TiTok with 256 tokens. In training, the tail of the tokens is dropped at random, so the
first tokens learn to carry the most, and any prefix can be decoded.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vistok.models.quantizers.base import QuantizerOutput
from vistok.models.tokenizers.titok import TWO_STAGE, TiTok, transformer_sizes
from vistok.tokens import Tokens


class OneDPiece(TiTok):
    """A TiTok that decodes any prefix of its tokens; see `TiTok` for the arguments.

    Encoding always makes all tokens: the encoder mixes values of several latents into each, so fewer latents would give
    other tokens, not fewer of the same.
    """

    variable_length = True

    def decode(self, tokens: Tokens) -> Tensor:
        """See `ImageTokenizer.decode`; images are clamped to [-1, 1]. Each image is decoded at its own length."""
        self.check_tokens(tokens)
        codes = self.quantizer.indices_to_codes(tokens.data.to(self.device))
        return self.decode_codes(codes, tokens.token_counts.tolist()).clamp(-1, 1)

    def decode_codes(self, codes: Tensor, lengths: list[int] | None = None) -> Tensor:
        """`codes [b n codebook_dim]` -> images `[b 3 H W]` around [-1, 1], not clamped.

        Args:
            codes: any number of tokens from the first one on.
            lengths: how many of them each image has; all when not given. What follows is never read.
        """
        return self.pixel_decoder(self.decode_logits(codes, lengths)) * 2 - 1

    def decode_logits(self, codes: Tensor, lengths: list[int] | None = None) -> Tensor:
        """As `decode_codes`, before the pixel decoder: `[b v g g]` logits, or an image around [0, 1] without one."""
        codes = codes.to(self.dtype)
        if lengths is None or len(set(lengths)) <= 1:  # equal lengths need no packing
            return self.decoder(codes if not lengths else codes[:, : lengths[0]])
        return self.decoder(codes, lengths)

    def forward(
        self, images: Tensor, *, generator: torch.Generator | None = None, tail_token_drop: bool = True
    ) -> tuple[Tensor, QuantizerOutput]:
        """Training pass: `images [b 3 H W]` -> (reconstruction `[b 3 H W]`, not clamped, codes and their losses).

        Args:
            images: `[b 3 H W]` in [-1, 1].
            generator: a CPU generator that the number of kept tokens is drawn from.
            tail_token_drop: in training mode, keep one number of tokens, uniform in `1..num_tokens`, of all images
                (section 3.2 of the paper). The losses of the quantiser are those of all tokens.
        """
        quantized = self.quantizer.quantize(self.encode_latents(images))
        codes = quantized.codes
        if self.training and tail_token_drop:
            codes = codes[:, : int(torch.randint(1, self.num_tokens + 1, (), generator=generator))]
        return self.decode_codes(codes), quantized


# the released variants: class and constructor arguments
PRESETS: dict[str, tuple[type[OneDPiece], dict[str, Any]]] = {
    f"one-d-piece-{size[0]}-256": (
        OneDPiece,
        {"num_tokens": 256, **transformer_sizes(size, size), **TWO_STAGE},
    )
    for size in ("small", "base", "large")
}
