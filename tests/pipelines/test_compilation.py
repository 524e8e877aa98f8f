"""`pipeline.compile()` changes how long images take, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import vistok
from tests.tiny import GENERATOR, TOKENIZER
from vistok.decoding.speculative.drafters.jacobi import JacobiDrafter
from vistok.pipelines.speculation import SpeculativeDecoding


@pytest.fixture
def pipeline() -> vistok.TextToImagePipeline:
    torch.manual_seed(0)
    pipeline = vistok.TextToImagePipeline(
        vistok.ConvTiTok(**TOKENIZER), vistok.TextAR(**GENERATOR), top_p=0.9
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_compiled_pipelines_draw_the_same_images(pipeline):
    options = {"num_images_per_prompt": 2, "guidance_scale": 2.0, "output_type": "np"}
    expected = pipeline(["red apple", "dog"], **options).images
    with torch.compiler.set_stance("force_eager"):
        pipeline.compile()
        assert np.array_equal(pipeline(["red apple", "dog"], **options).images, expected)
        one = pipeline(["dog"], num_tokens=3, **options).images
    assert one.shape == (2, 16, 16, 3)


def test_what_is_not_compiled_still_works(pipeline):
    drafter = JacobiDrafter(2)
    expected = pipeline(["dog"], speculation=SpeculativeDecoding(drafter), output_type="tokens").images
    pipeline.compile()
    drawn = pipeline(["dog"], speculation=SpeculativeDecoding(drafter), output_type="tokens").images
    assert torch.equal(drawn.indices, expected.indices)


def test_offloaded_generators_are_not_compiled(pipeline, monkeypatch):
    monkeypatch.setattr(type(pipeline), "is_offloading", True)
    with pytest.raises(ValueError, match="offloaded cannot be compiled"):
        pipeline.compile()
