"""The shipped models: complete, of a size that may ship, and able to draw."""

from __future__ import annotations

import pytest
import torch

import vistok
from vistok.hub import load_drafter
from vistok.pipelines.base import DRAFTER_FOLDER
from vistok.pipelines.speculation import SpeculativeDecoding
from vistok.zoo import shipped


@pytest.fixture(scope="module", params=[name for name in shipped() if "/" not in name])
def pipeline(request):
    loaded = vistok.load(request.param)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_a_shipped_pipeline_draws_and_more_tokens_refine(pipeline):
    assert pipeline.tokenizer.variable_length
    coarse, fine = (
        pipeline("red apple", seed=0, num_tokens=count, output_type="pt").images for count in (4, 64)
    )
    size = pipeline.tokenizer.image_size
    assert coarse.shape == fine.shape == (1, 3, size, size)
    assert fine.std() > 0.1 and not coarse.equal(fine)


def test_the_tokenizer_gives_a_shipped_picture_back(pipeline):
    # A disc on white is an easy picture; weights that do not fit the code would not give it back.
    size = pipeline.tokenizer.image_size
    rows, columns = torch.meshgrid(torch.linspace(-1, 1, size), torch.linspace(-1, 1, size), indexing="ij")
    disc = (rows.square() + columns.square() < 0.5)[None].expand(3, -1, -1)
    colour = torch.tensor([0.8, -0.6, -0.6])[:, None, None]
    images = torch.where(disc, colour, torch.ones(3, size, size))[None]
    tokenizer = pipeline.tokenizer
    error = (tokenizer.decode(tokenizer.encode(images)).float() - images).square().mean()
    assert 10 * torch.log10(4 / error) > 20


def test_a_shipped_drafter_drafts(pipeline):
    """With it the tokens come in fewer passes than without, and greedy ones are those of plain decoding."""
    drafter = load_drafter(f"{pipeline.config['_name_or_path']}/{DRAFTER_FOLDER}", pipeline.transformer)
    options = {"seed": 0, "output_type": "tokens"}
    drafted = pipeline("red apple", speculation=SpeculativeDecoding(drafter), **options)
    assert drafted.statistics.target_passes < 0.8 * pipeline.transformer.num_tokens
    greedy = pipeline("red apple", top_k=1, speculation=SpeculativeDecoding(drafter), **options)
    assert torch.equal(greedy.images.data, pipeline("red apple", top_k=1, **options).images.data)
