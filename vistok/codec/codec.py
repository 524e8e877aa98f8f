"""Pictures <-> `.vtk` files: a tokenizer, an entropy model, the container."""

from __future__ import annotations

from typing import Any

import torch
from PIL import Image

from vistok.codec.container import Container, Prior, check_codebook_size, checksum_of, weights_hash
from vistok.codec.entropy import Predictor, UniformPredictor, decode_indices, encode_indices
from vistok.codec.prior import GeneratorPredictor, reproducible
from vistok.data.images import resize_and_crop, to_pil, to_tensor
from vistok.models.generators.base import Generator, OrderedGenerator
from vistok.models.identity import model_identity
from vistok.models.tokenizers.base import ImageTokenizer
from vistok.order import RasterOrder
from vistok.pipelines.fit import check_fit
from vistok.tokens import Tokens


class ImageCodec:
    """Compresses one picture at a time.

    Args:
        tokenizer: makes and decodes the tokens; with a codebook.
        generator: predicts the tokens of this tokenizer, each from those before it; with one, `compress` uses its
            probabilities without a condition, and files that were coded so can be read. Works on a copy.
        model: a name that `vistok.load` resolves to the tokenizer, recorded in the files for whoever reads them.

    Raises:
        ValueError: the tokenizer is continuous or its codebook too large, or the generator is of another kind or for other tokens.
    """

    def __init__(
        self, tokenizer: ImageTokenizer, generator: Generator | None = None, *, model: str = ""
    ) -> None:
        if tokenizer.codebook_size is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has continuous tokens; the codec needs a tokenizer with a codebook"
            )
        check_codebook_size(tokenizer.codebook_size)
        self.tokenizer = tokenizer
        self.codebook_size = tokenizer.codebook_size
        self.model = model
        self.identity = tokenizer.identity()
        self.generator: OrderedGenerator | None = None
        if generator is not None:
            self.generator_identity = model_identity(generator)
            self.generator = reproducible(_fitting(generator, tokenizer))

    def compress(self, picture: Image.Image, **length: Any) -> bytes:
        """The file of an RGB picture, which is resized and centre-cropped to the tokenizer's size.

        Args:
            picture: see `vistok.data.images.open_rgb`.
            length: how many tokens, as `ImageTokenizer.encode` takes it: `num_tokens` or `target_psnr`, for example.

        Raises:
            ValueError: the picture is smaller than a patch, or the length is not possible.
        """
        tokenizer = self.tokenizer
        image = to_tensor(resize_and_crop(picture, tokenizer.image_size, smallest=tokenizer.patch_size))
        with torch.inference_mode():
            tokens = tokenizer.encode(image[None].to(tokenizer.device), **length)
        return self.pack(tokens, picture.size)

    def decompress(self, data: bytes) -> Image.Image:
        """The picture of a file, at the tokenizer's size.

        Raises:
            ValueError: see `Container.from_bytes` and `unpack`.
        """
        return self.decode(self.unpack(Container.from_bytes(data)))

    @torch.inference_mode()
    def decode(self, tokens: Tokens) -> Image.Image:
        """The picture of the tokens of one image."""
        return to_pil(self.tokenizer.decode(tokens.to(self.tokenizer.device)))[0]

    def pack(self, tokens: Tokens, original_size: tuple[int, int]) -> bytes:
        """The file of the tokens of one image.

        Args:
            tokens: of this tokenizer; what is beyond their length is left out.
            original_size: width and height of the picture.

        Raises:
            ValueError: not one image, or tokens of another tokenizer.
        """
        if len(tokens) != 1:
            raise ValueError(f"a file holds the tokens of one image, got {len(tokens)}")
        self.tokenizer.check_tokens(tokens)
        indices = tokens.data[0, : int(tokens.token_counts[0])].tolist()
        prior = None
        if self.generator is not None:
            prior = Prior(weights_hash(self.generator_identity), checksum_of(indices))
        return Container(
            tokenizer=weights_hash(self.identity),
            original_size=original_size,
            num_tokens=len(indices),
            codebook_size=self.codebook_size,
            payload=encode_indices(indices, self._predictor(prior)),
            model=self.model,
            prior=prior,
        ).to_bytes()

    def unpack(self, container: Container) -> Tokens:
        """The tokens of a file, `indices [1 n]`.

        Raises:
            ValueError: another tokenizer or generator made the file; or the generator predicts otherwise here.
        """
        self._check_maker(container)
        indices = decode_indices(container.payload, container.num_tokens, self._predictor(container.prior))
        if container.prior is not None and checksum_of(indices) != container.prior.tokens_checksum:
            raise ValueError(
                f"{self.generator_identity} does not predict here as it did where the file was made; "
                "decompress it on the machine that made it, or compress without a prior"
            )
        return Tokens(
            indices=torch.tensor([indices]), codebook_size=self.codebook_size, layout=self.tokenizer.layout
        )

    def _check_maker(self, container: Container) -> None:
        if container.tokenizer != weights_hash(self.identity):
            name = f", {container.model}" if container.model else ""
            raise ValueError(
                f"made with the tokenizer ...-{container.tokenizer}{name}, and not with {self.identity}; "
                "decompress it with the model that made it"
            )
        if container.codebook_size != self.codebook_size or container.num_tokens > self.tokenizer.num_tokens:
            raise ValueError(
                "the tokens do not fit the tokenizer that is said to have made them; a forged file"
            )

    def _predictor(self, prior: Prior | None) -> Predictor:
        if prior is None:
            return UniformPredictor(self.codebook_size)
        if self.generator is None:
            raise ValueError(
                f"coded with the probabilities of the generator ...-{prior.generator}; "
                "decompress it with the pipeline that made it, not with its tokenizer alone"
            )
        if prior.generator != weights_hash(self.generator_identity):
            raise ValueError(
                f"coded with the probabilities of the generator ...-{prior.generator}, "
                f"and not of {self.generator_identity}; decompress it with the model that made it"
            )
        return GeneratorPredictor(self.generator)


def _fitting(generator: Generator, tokenizer: ImageTokenizer) -> OrderedGenerator:
    """`generator`, if it can predict the tokens of `tokenizer` one after the other."""
    if not isinstance(generator, OrderedGenerator) or not isinstance(generator.order, RasterOrder):
        raise ValueError(
            f"{type(generator).__name__} does not predict the next token; without a prior, any tokenizer will do"
        )
    check_fit(tokenizer, generator)
    return generator


def resize_to_original(picture: Image.Image, original_size: tuple[int, int]) -> Image.Image:
    """The decoded square at its original scale: as wide and high as the shorter side of the original picture.

    The compressed part is the centre square, so its aspect ratio is right only as a square; what lay outside is gone.
    """
    side = min(original_size)
    return picture.resize((side, side), Image.Resampling.BICUBIC)
