"""What bfloat16 and int8 weights change in tokens and images: `python -m vistok.eval.precision -o FOLDER`.

Everything is compared with float32. The generator reads the tokens that float32 draws, so that the distributions of the
next token are those of equal pasts, and draws images of its own from the same seeds. The tokenizer decodes equal tokens,
and encodes equal pictures. Writes precision.json, precision.png and report.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

import vistok
from vistok.data.images import to_pil
from vistok.decoding.sampling import draw
from vistok.decoding.streams import ImageStreams
from vistok.eval.machine import describe_machine
from vistok.eval.peak_memory import MIB
from vistok.eval.pictures import grid
from vistok.eval.reconstruction import psnr
from vistok.eval.sources import to_float, to_uint8
from vistok.eval.token_laws import token_laws
from vistok.files import atomic_path
from vistok.models.generators.base import repeat_each
from vistok.models.quantize import quantize_weights, stored_bytes
from vistok.pipelines.settings import OrderedSettings
from vistok.tokens import Tokens

PRECISIONS: dict[str, tuple[torch.dtype, str | None]] = {
    "float32": (torch.float32, None),
    "bfloat16": (torch.bfloat16, None),
    "int8, float32": (torch.float32, "int8"),
    "int8, bfloat16": (torch.bfloat16, "int8"),
}
REFERENCE = "float32"
PROMPTS = (
    "red apple",
    "sunflower",
    "rocket",
    "blue heart",
    "pizza",
    "dog face",
    "crescent moon",
    "soccer ball",
    "hamburger",
    "smiling face",
    "tropical fish",
    "guitar",
)
NUM_SHOWN = 6  # prompts in the picture
BATCH_SIZE = 16
JSON_FILE, PICTURE_FILE = "precision.json", "precision.png"


@dataclass(frozen=True)
class GeneratorEffect:
    """How a generator differs from itself in float32.

    Args:
        divergence: of the distribution of the next token from that in float32, mean over all tokens in nats; without
            guidance and truncation, both given the tokens that float32 drew.
        same_top: share of these tokens at which the same code is the most probable.
        changed_draws: share of tokens that come out differently from the same seed although all before them are equal;
            with the settings of the sampling.
        changed_tokens: share that differs in images drawn from the same seeds; behind a token that differs, others follow.
        same_images: share of these images of which no token differs.
        weights_mib: of its weights.
    """

    divergence: float
    same_top: float
    changed_draws: float
    changed_tokens: float
    same_images: float
    weights_mib: float


@dataclass(frozen=True)
class TokenizerEffect:
    """How a tokenizer differs from itself in float32.

    Args:
        psnr: dB between 8-bit pictures of equal tokens, of the mean squared error over all; `None` where all are equal.
        largest: difference of two values of a pixel, of 255.
        kept_tokens: share of tokens that stay when equal pictures are encoded.
        weights_mib: of its weights.
    """

    psnr: float | None
    largest: int
    kept_tokens: float
    weights_mib: float


@dataclass(frozen=True)
class PrecisionReport:
    """Everything measured, with its protocol."""

    model: str
    generator: dict[str, GeneratorEffect]  # by precision
    tokenizer: dict[str, TokenizerEffect]
    prompts: list[str]
    num_images_per_prompt: int
    num_tokens: int
    sampling: dict[str, Any]
    device: str
    torchao: str
    machine: str
    vistok: str


class Pictures:
    """Images of some prompts, drawn and read in batches of `BATCH_SIZE`.

    Args:
        pipeline: of a next-token generator that reads texts itself.
        prompts: the texts.
        num_images: of each; image j uses the seed j.
    """

    def __init__(self, pipeline: Any, prompts: Sequence[str], num_images: int) -> None:
        self.pipeline = pipeline
        self.prompts = list(prompts)
        self.num_images = num_images
        self.seeds = list(range(num_images)) * len(self.prompts)

    def draw(self) -> Tokens:
        """Tokens of all images, prompt by prompt, on the CPU."""
        output = self.pipeline(
            self.prompts,
            num_images_per_prompt=self.num_images,
            seed=self.seeds,
            batch_size=BATCH_SIZE,
            output_type="tokens",
        )
        return output.images.to("cpu")

    def laws(self, tokens: Tokens, settings: OrderedSettings) -> Iterator[Tensor]:
        """The distributions `[b n v]` of the tokens of every batch, each given the tokens before it; on the CPU."""
        model = self.pipeline.transformer
        condition: Any = repeat_each(model.encode_text(self.prompts), self.num_images)
        for part in parts(len(self.seeds)):
            yield token_laws(model, condition[part], tokens.data[part], settings).float().cpu()

    def uniforms(self, num_tokens: int) -> Tensor:
        """What the pipeline draws each token with, `[b n]`."""
        streams = ImageStreams.from_seeds(self.seeds)
        return torch.cat([streams.uniform(1) for _ in range(num_tokens)], dim=1)

    @torch.inference_mode()
    def decode(self, tokens: Tokens) -> Tensor:
        """Pictures uint8 `[b 3 H W]`."""
        tokenizer = self.pipeline.tokenizer
        batches = [tokenizer.decode(tokens[part].to(tokenizer.device)) for part in parts(len(tokens))]
        return to_uint8(torch.cat(batches))

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Tokens `[b n]` of pictures uint8 `[b 3 H W]`."""
        tokenizer = self.pipeline.tokenizer
        batches = [
            tokenizer.encode(to_float(images[part]).to(tokenizer.device)) for part in parts(len(images))
        ]
        return torch.cat([batch.data.cpu() for batch in batches])


def parts(total: int) -> list[slice]:
    """Batches of `BATCH_SIZE`."""
    return [slice(start, start + BATCH_SIZE) for start in range(0, total, BATCH_SIZE)]


def load_in(model: str, precision: str, device: str) -> Any:
    """A pipeline of which generator and tokenizer are in one of PRECISIONS."""
    dtype, quantization = PRECISIONS[precision]
    pipeline = vistok.load(model, device=device, dtype=dtype, quantization=quantization)
    if quantization is not None:
        quantize_weights(pipeline.tokenizer, quantization)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def compare_generators(reference: Pictures, other: Pictures, tokens: Tokens) -> GeneratorEffect:
    """How `other` differs from `reference`, which drew `tokens`."""
    plain, preset = OrderedSettings(), OrderedSettings(**reference.pipeline.sampling_settings())
    divergences, tops = [], []
    for exact, law in zip(reference.laws(tokens, plain), other.laws(tokens, plain), strict=True):
        divergences.append(divergence(exact, law))
        tops.append(exact.argmax(dim=-1) == law.argmax(dim=-1))
    uniforms = reference.uniforms(tokens.data.shape[1])
    redrawn = torch.cat(
        [
            draw(law, uniforms[part])
            for part, law in zip(parts(len(tokens)), other.laws(tokens, preset), strict=True)
        ]
    )
    is_same = other.draw().data == tokens.data
    return GeneratorEffect(
        divergence=torch.cat(divergences).mean().item(),
        same_top=torch.cat(tops).double().mean().item(),
        changed_draws=(redrawn != tokens.data).double().mean().item(),
        changed_tokens=1 - is_same.double().mean().item(),
        same_images=is_same.all(dim=1).double().mean().item(),
        weights_mib=stored_bytes(other.pipeline.transformer) / MIB,
    )


def divergence(exact: Tensor, other: Tensor) -> Tensor:
    """Kullback-Leibler divergence in nats of distributions `[... v]` from `exact`, `[...]` float64."""
    exact, other = exact.double(), other.double()
    smallest = torch.finfo(torch.float32).tiny  # what float32 rounds to 0 is not impossible
    return (exact * (exact.clamp_min(smallest).log() - other.clamp_min(smallest).log())).sum(dim=-1)


def compare_tokenizers(other: Pictures, tokens: Tokens, images: Tensor, encoded: Tensor) -> TokenizerEffect:
    """How the tokenizer of `other` differs from that in float32.

    Args:
        other: with the tokenizer.
        tokens: of all images.
        images: uint8 `[b 3 H W]`, as decoded in float32.
        encoded: `[b n]`, what float32 makes of them.
    """
    decoded = other.decode(tokens)
    differences = (decoded.int() - images.int()).abs()
    return TokenizerEffect(
        psnr=_psnr_over_all(decoded, images) if bool(differences.any()) else None,
        largest=int(differences.max()),
        kept_tokens=(other.encode(images) == encoded).double().mean().item(),
        weights_mib=stored_bytes(other.pipeline.tokenizer) / MIB,
    )


def _psnr_over_all(images: Tensor, originals: Tensor) -> float:
    """Of the mean squared error over all pictures, which are put one above the other."""
    one, other = (x.transpose(0, 1).flatten(1, 2)[None] for x in (images, originals))  # [1 3 b*H W]
    return psnr(one, other).item()


def measure_precisions(
    model: str, prompts: Sequence[str] = PROMPTS, *, num_images: int, device: str = "cpu"
) -> tuple[PrecisionReport, Image.Image]:
    """Compare all precisions of a pipeline; also a picture of what each draws from the same seeds.

    Args:
        model: what `vistok.load` takes: a text-to-image pipeline of a next-token generator that reads texts itself.
        prompts: what is drawn.
        num_images: of each prompt.
        device: where.

    Raises:
        ValueError: a model of another kind.
    """
    reference = Pictures(load_in(model, REFERENCE, device), prompts, num_images)
    if not hasattr(reference.pipeline.transformer, "encode_text"):
        raise ValueError(
            f"{model} does not draw texts that it reads itself; precision is measured with pipelines of a TextAR"
        )
    tokens = reference.draw()
    images = reference.decode(tokens)
    encoded = reference.encode(images)
    generators, tokenizers, drawn = {}, {}, []
    for precision in PRECISIONS:
        other = Pictures(load_in(model, precision, device), prompts, num_images)
        generators[precision] = compare_generators(reference, other, tokens)
        tokenizers[precision] = compare_tokenizers(other, tokens, images, encoded)
        drawn.append(other.decode(other.draw())[::num_images][:NUM_SHOWN])
        sys.stderr.write(f"{precision}: {generators[precision]}, {tokenizers[precision]}\n")
    report = PrecisionReport(
        model=Path(model).name,
        generator=generators,
        tokenizer=tokenizers,
        prompts=list(prompts),
        num_images_per_prompt=num_images,
        num_tokens=tokens.data.shape[1],
        sampling=reference.pipeline.sampling_settings(),
        device=device,
        torchao=_torchao_version(),
        machine=str(describe_machine()),
        vistok=vistok.__version__,
    )
    return report, _picture(drawn, prompts)


def _picture(drawn: list[Tensor], prompts: Sequence[str]) -> Image.Image:
    """A row for every precision, a column for every prompt."""
    pictures = [picture for images in drawn for picture in to_pil(to_float(images))]
    shown = prompts[: len(drawn[0])]
    labels = [f"{precision}\n{prompt}" for precision in PRECISIONS for prompt in shown]
    return grid(pictures, labels, columns=len(shown))


def _torchao_version() -> str:
    from importlib.metadata import version

    return version("torchao")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; see the module."""
    from vistok.eval.precision_report import page

    parser = argparse.ArgumentParser(prog="python -m vistok.eval.precision", description=__doc__)
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the report")
    parser.add_argument("--model", default="emoji-64", help="name or folder of a text-to-image pipeline")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="TEXT")
    parser.add_argument("--num-images", type=int, default=4, help="of each prompt")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    report, picture = measure_precisions(
        options.model, options.prompts, num_images=options.num_images, device=options.device
    )
    with atomic_path(options.out / PICTURE_FILE) as file:
        picture.save(file)
    with atomic_path(options.out / JSON_FILE) as file:
        file.write_text(json.dumps(asdict(report), indent=2, allow_nan=False) + "\n", encoding="utf-8")
    with atomic_path(options.out / "report.md") as file:
        file.write_text(page(report, PICTURE_FILE), encoding="utf-8")
    sys.stdout.write(json.dumps(asdict(report), allow_nan=False) + "\n")


if __name__ == "__main__":
    main()
