"""Given tokens stay and the order fills the rest, for every family; masks that do not fit are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import vistok
from tests.pipelines.families import (
    FAMILIES,
    MASKED,
    draw,
    grid_tokenizer,
    make_pipeline,
    prompts_of,
)
from vistok.pipelines.inpainting import SIDES, region_mask
from vistok.tokens import Layout, Tokens

GRID, SEQUENCE = Layout((4, 4)), Layout()
RANDOM = "any-order-random-sequence"


def picture(layout: Layout = GRID, seed: int = 0, count: int = 1) -> Tokens:
    """Tokens of `count` pictures."""
    generator = torch.Generator().manual_seed(seed)
    return Tokens(
        indices=torch.randint(20, (count, 16), generator=generator), codebook_size=20, layout=layout
    )


def mask(*positions: int) -> Tensor:
    """`[16]`, `True` at the positions."""
    keep = torch.zeros(16, dtype=torch.bool)
    keep[list(positions)] = True
    return keep


@pytest.fixture(scope="module")
def pipelines() -> dict[str, Any]:
    return {family: make_pipeline(family, guidance_scale=2.0) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_given_tokens_stay_and_the_others_are_drawn(pipelines: dict[str, Any], family: str) -> None:
    pipeline, prompts = pipelines[family], prompts_of(family, 3)
    layout, keep = pipeline.tokenizer.layout, mask(0, 1, 2, 3, 9, 14)
    given = picture(layout)
    free = draw(pipeline, prompts, seed=4)
    drawn = draw(pipeline, prompts, seed=4, tokens=given, keep=keep)
    assert (drawn[:, keep] == given.data[0, keep]).all()
    assert not torch.equal(drawn[:, ~keep], free[:, ~keep])
    rows = draw(pipeline, prompts, seed=4, tokens=given, keep=keep.expand(3, -1))
    assert torch.equal(rows, drawn)
    everything = draw(pipeline, prompts, tokens=given, keep=mask(*range(16)))
    assert torch.equal(everything, given.data.expand(3, -1))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != RANDOM])
def test_several_pictures_with_their_own_masks_are_what_they_are_alone(
    pipelines: dict[str, Any], family: str
) -> None:
    pipeline, prompts = pipelines[family], prompts_of(family, 3)
    several = picture(pipeline.tokenizer.layout, 1, count=3)
    masks = torch.stack([mask(0, 5), mask(3), mask()])
    batch = draw(pipeline, prompts, seed=[7, 8, 9], tokens=several, keep=masks)
    assert (batch[masks] == several.data[masks]).all()
    alone = draw(pipeline, prompts[0], seed=7, tokens=several[0], keep=masks[:1])
    assert torch.equal(alone[0], batch[0])


def test_a_model_of_random_orders_takes_one_mask_for_all(pipelines: dict[str, Any]) -> None:
    given, masks = picture(SEQUENCE), torch.stack([mask(0), mask(1)])
    with pytest.raises(ValueError, match="decides first what is given: keep must be the same for all images"):
        pipelines[RANDOM]([1, 2], tokens=given, keep=masks)


def sees(pipeline: Any, kept: int, position: int, family: str) -> bool:
    """Whether what is drawn at `position` can depend on the given token at `kept`."""
    results = set()
    for token in range(0, 20, 3):
        given = picture(pipeline.tokenizer.layout)
        given.data[0, kept] = token
        drawn = draw(pipeline, prompts_of(family, 1)[0], seed=list(range(1)), tokens=given, keep=mask(kept))
        results.add(int(drawn[0, position]))
    return len(results) > 1


@pytest.mark.parametrize("family", [*MASKED, RANDOM])
def test_all_see_what_is_given_where_the_order_is_free(pipelines: dict[str, Any], family: str) -> None:
    assert sees(pipelines[family], kept=15, position=0, family=family)


@pytest.mark.parametrize("family", ["llamagen-class", "nar-class", "any-order-raster", "any-order-cells"])
def test_a_fixed_order_sees_only_what_it_decides_before(pipelines: dict[str, Any], family: str) -> None:
    assert not any(sees(pipelines[family], kept=15, position=p, family=family) for p in (0, 7, 14))
    assert any(sees(pipelines[family], kept=0, position=p, family=family) for p in (15, 14, 13, 11, 10))


def test_a_grid_takes_a_mask_of_rows_and_columns(pipelines: dict[str, Any]) -> None:
    pipeline, given = pipelines["nar-class"], picture()
    keep = torch.zeros(4, 4, dtype=torch.bool)
    keep[:2] = True
    drawn = draw(pipeline, 1, tokens=given, keep=keep)
    assert torch.equal(drawn[0, :8], given.data[0, :8])
    assert torch.equal(drawn, draw(pipeline, 1, tokens=given, keep=mask(*range(8))))


def test_a_prefix_of_a_variable_length_is_continued(pipelines: dict[str, Any]) -> None:
    pipeline, given = pipelines["flex-ar-class"], picture(SEQUENCE)
    drawn = draw(pipeline, 1, tokens=given.keep(5), keep=mask(*range(5)), num_tokens=9)
    assert drawn.shape == (1, 9) and torch.equal(drawn[0, :5], given.data[0, :5])
    whole = draw(pipeline, 1, tokens=given, keep=mask(*range(5)))
    assert torch.equal(whole[:, :9], drawn)
    with pytest.raises(ValueError, match="keep marks token 5 of image 0, of which only 5 tokens are given"):
        pipeline(1, tokens=given.keep(5), keep=mask(0, 5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": mask(1)}, "tokens and keep go together"),
        ({"tokens": picture()}, "tokens and keep go together"),
        (
            {"tokens": picture(), "keep": mask(1)[:9]},
            r"of shape \[16\], \[4, 4\] or \[2 16\]; got torch.bool \[9\]",
        ),
        ({"tokens": picture(), "keep": mask(1).float()}, r"keep must be boolean.*got torch.float32 \[16\]"),
        ({"tokens": picture(), "keep": mask(1).expand(3, -1)}, r"got torch.bool \[3, 16\]"),
        ({"tokens": picture(), "keep": torch.ones(2, 8, dtype=torch.bool)}, r"got torch.bool \[2, 8\]"),
        ({"tokens": picture(count=3), "keep": mask(1)}, "tokens of 3 images for 2"),
        ({"tokens": picture(SEQUENCE), "keep": mask(1)}, "laid out as sequence, VQGAN uses 4x4"),
        (
            {
                "tokens": Tokens(indices=torch.zeros(1, 16).long(), codebook_size=30, layout=GRID),
                "keep": mask(1),
            },
            "come from another tokenizer",
        ),
    ],
)
def test_what_does_not_fit_is_refused(pipelines: dict[str, Any], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipelines["llamagen-class"]([1, 2], **options)


def test_a_picture_s_own_tokens_are_kept() -> None:
    tokenizer = grid_tokenizer().eval()
    pipeline = vistok.ClassToImagePipeline(tokenizer, make_pipeline("nar-class").transformer)
    pipeline.set_progress_bar_config(disable=True)
    with torch.inference_mode():
        tokens = tokenizer.encode(torch.rand(1, 3, 16, 16) * 2 - 1)
    assert torch.equal(draw(pipeline, 1, tokens=tokens, keep=mask(4, 5))[0, 4:6], tokens.data[0, 4:6])


def test_regions_of_a_grid() -> None:
    top = region_mask(GRID, *SIDES["top"])
    assert top[:2].all() and not top[2:].any()
    assert torch.equal(region_mask(GRID, *SIDES["bottom"]), ~top)
    left = region_mask(Layout((2, 6)), *SIDES["left"])
    assert left[:, :3].all() and not left[:, 3:].any()
    assert torch.equal(region_mask(Layout((2, 6)), *SIDES["right"]), ~left)
    middle = region_mask(GRID, 0.25, 0.5, 0.75, 1.0)
    assert middle.nonzero().tolist() == [[2, 1], [2, 2], [3, 1], [3, 2]]
    for wrong in ((0.5, 0, 0.5, 1), (0, 0.6, 1, 0.5), (-0.1, 0, 1, 1), (0, 0, 1, 1.5)):
        with pytest.raises(ValueError, match="a region is left, top, right, bottom"):
            region_mask(GRID, *wrong)
    with pytest.raises(ValueError, match="smaller than one of the 4x4 tokens"):
        region_mask(GRID, 0, 0, 0.1, 0.1)
    with pytest.raises(
        ValueError, match="needs tokens on a grid of rows and columns, and these are a sequence"
    ):
        region_mask(SEQUENCE, *SIDES["top"])


def test_what_stays_lies_within_the_tokens_that_are_asked_for(pipelines: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="keep marks token 4 of image 0, of which 4 are asked for"):
        pipelines["flex-ar-class"](1, tokens=picture(SEQUENCE), keep=mask(0, 4), num_tokens=4)
