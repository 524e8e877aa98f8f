"""Whether images follow their model: the exact law of all tokens of a tiny generator, and a chi-square test against it."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from vistok.decoding.guidance import apply_guidance
from vistok.decoding.sampling import SamplingParams, token_probabilities
from vistok.models.generators.llamagen import LlamaGenClass

NUM_CODES, NUM_TOKENS = 4, 4  # 256 different images on a grid of 2 x 2


def tiny_target(seed: int = 0, *, depth: int = 2) -> LlamaGenClass:
    """A generator whose next token clearly depends on all tokens before it."""
    torch.manual_seed(seed)
    model = LlamaGenClass(
        codebook_size=NUM_CODES,
        num_tokens=NUM_TOKENS,
        num_classes=3,
        dim=16,
        depth=depth,
        num_heads=2,
        mlp_dim=24,
    )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.4)
        model.token_embed.weight.mul_(3)
    return model.eval()


class BatchStream:
    """One stream for all images, which is quick where they are many."""

    def __init__(self, batch_size: int, seed: int) -> None:
        self.batch_size = batch_size
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(self.batch_size, *shape, generator=self.generator)


@torch.no_grad()
def exact_law(
    model: LlamaGenClass, label: int, sampling: SamplingParams, guidance_scale: float = 1.0
) -> Tensor:
    """The probability of every image, `[v ** n]` float64, those whose first tokens are small in front."""
    images = torch.tensor(list(itertools.product(range(model.codebook_size), repeat=model.num_tokens)))
    labels = torch.full((len(images),), label)
    cond, uncond = (model(given, images) for given in (labels, model.null_condition(len(images))))
    probs = token_probabilities(apply_guidance(cond, uncond, guidance_scale), sampling).double()
    return probs.gather(2, images[..., None])[..., 0].prod(dim=1)


def p_value(images: Tensor, law: Tensor, codebook_size: int = NUM_CODES) -> float:
    """How often images that follow `law` are at least as far from it as `images [b n]`, by Pearson's chi-square.

    Images that are expected fewer than 8 times count as one; an impossible image gives 0.
    """
    places = codebook_size ** torch.arange(images.shape[1] - 1, -1, -1)
    counts = (images * places).sum(dim=1).bincount(minlength=len(law)).double()
    if bool((counts[law == 0] > 0).any()):
        return 0.0
    expected = law * len(images)
    rare = expected < 8
    counts, expected = (torch.cat([x[~rare], x[rare].sum()[None]]) for x in (counts, expected))
    possible = expected > 0
    distance = ((counts - expected)[possible].square() / expected[possible]).sum()
    freedom = torch.tensor(float(possible.sum()) - 1, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom / 2, distance / 2))
