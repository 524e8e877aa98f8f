from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from vistok.decoding.context_reuse import ContextReuse
from vistok.models import upstream
from vistok.models.generators.maskgit import MaskGITBert
from vistok.models.tokenizers.conv_titok import ConvTiTok
from vistok.models.upstream.releases import RELEASES
from vistok.pipelines import drawing
from vistok.pipelines.class_to_image import ClassToImagePipeline

PRESET = {
    "num_inference_steps": 3,
    "guidance_scale": 3.0,
    "guidance_schedule": "linear",
    "guidance_power": 3.0,
    "choice_temperature": 2.0,
    "softmax_annealing": True,
    "reuse_period": 2,
    "reuse_warm_up": 1,
}


def make_pipeline(num_classes: int = 1000) -> ClassToImagePipeline:
    torch.manual_seed(0)
    tokenizer = ConvTiTok(
        image_size=16, num_tokens=4, levels=(4, 4), dim=16, num_heads=2, conv_dim=8, conv_depth=1
    )
    generator = MaskGITBert(
        codebook_size=16, num_classes=num_classes, num_tokens=4, dim=16, depth=2, num_heads=2, mlp_dim=32
    )
    with torch.no_grad():
        generator.token_embed.weight.mul_(20)
        generator.head.weight.mul_(20)
    pipeline = ClassToImagePipeline(tokenizer.eval(), generator.eval(), **PRESET)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> ClassToImagePipeline:
    return make_pipeline()


def indices(pipeline: ClassToImagePipeline, *args, **options) -> torch.Tensor:
    return pipeline(*args, output_type="tokens", **options).images.indices


def test_output_types(pipeline: ClassToImagePipeline) -> None:
    pictures = pipeline([1, 2]).images
    assert [picture.size for picture in pictures] == [(16, 16)] * 2
    arrays = pipeline(1, output_type="np").images
    assert arrays.shape == (1, 16, 16, 3)
    assert 0 <= np.min(arrays) <= np.max(arrays) <= 1
    (tensor,) = pipeline(1, output_type="pt", return_dict=False)
    assert tensor.shape == (1, 3, 16, 16)
    assert indices(pipeline, 1).shape == (1, 4)
    with pytest.raises(ValueError, match="output_type 'jpeg'"):
        pipeline(1, output_type="jpeg")


def test_seeds_decide_and_the_batch_does_not(pipeline: ClassToImagePipeline) -> None:
    many = indices(pipeline, [3, 7], num_images_per_prompt=2, seed=10)  # class by class, seeds 10, 11
    assert torch.equal(indices(pipeline, 7, seed=11)[0], many[3])
    assert torch.equal(indices(pipeline, [7, 3], seed=[11, 10])[0], many[3])
    assert not torch.equal(many[0], many[1])


def test_names_and_indices_are_the_same_classes(pipeline: ClassToImagePipeline) -> None:
    assert pipeline.class_indices(["golden retriever", "207", 207]).tolist() == [207] * 3


def test_the_preset_survives_saving_and_loading(pipeline: ClassToImagePipeline, tmp_path) -> None:
    pipeline.save_pretrained(tmp_path)
    loaded = ClassToImagePipeline.from_pretrained(tmp_path)
    assert loaded.sampling_settings() == PRESET
    assert torch.equal(indices(loaded, [1, 2], seed=4), indices(pipeline, [1, 2], seed=4))


def test_arguments_override_the_preset(pipeline: ClassToImagePipeline) -> None:
    steps = []
    pipeline(
        1, num_inference_steps=5, callback_on_step_end=lambda pipe, step, total, state: steps.append(total)
    )
    assert steps == [5] * 5
    assert pipeline.sampling_settings(guidance_scale=1.0) == PRESET | {"guidance_scale": 1.0}
    calm = indices(pipeline, [1] * 8, choice_temperature=0.0, guidance_scale=1.0, seed=list(range(8)))
    assert (calm == calm[0]).all()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (1000, "class 1000 is out of range"),
        (-1, "class -1 is out of range"),
        ([], "no class given"),
        ("crane", "several ImageNet classes"),
    ],
)
def test_wrong_classes_are_named(pipeline: ClassToImagePipeline, labels, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipeline(labels)


def test_names_need_imagenet_classes() -> None:
    with pytest.raises(ValueError, match="has 10 classes of its own"):
        make_pipeline(num_classes=10)("cat")


def test_a_generator_of_another_tokenizer_is_refused(pipeline: ClassToImagePipeline) -> None:
    other = MaskGITBert(
        codebook_size=8, num_classes=3, num_tokens=4, dim=16, depth=1, num_heads=2, mlp_dim=16
    )
    with pytest.raises(ValueError, match="its codebook_size is 8 and not 16"):
        ClassToImagePipeline(pipeline.tokenizer, other)


def test_a_release_brings_its_sampling_settings(pipeline: ClassToImagePipeline) -> None:
    parts = (pipeline.tokenizer, pipeline.transformer)
    release = RELEASES["maskgit-titok-l-32"]
    preset = upstream.sampling_settings(release.system, release.sampling)
    assert ClassToImagePipeline(*parts, **preset).sampling_settings() == {
        "num_inference_steps": 8,
        "guidance_scale": 5.5,  # the release counts this schedule from 0
        "guidance_schedule": "linear",
        "guidance_power": 3.0,
        "choice_temperature": 9.5,
        "softmax_annealing": True,
        "reuse_period": 1,
        "reuse_warm_up": 0,
    }


def test_context_reuse_reaches_the_loop(
    pipeline: ClassToImagePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[ContextReuse] = []
    loop = drawing.generate_masked

    def spy(*arguments: Any, reuse: ContextReuse, **options: Any) -> Tensor:
        seen.append(reuse)
        return loop(*arguments, reuse=reuse, **options)

    monkeypatch.setattr(drawing, "generate_masked", spy)
    pipeline(1)
    pipeline(1, reuse_period=1)
    assert seen == [ContextReuse(2, warm_up=1), ContextReuse(1, warm_up=1)]


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ({"reuse_period": 0}, "period counts evaluations and must be at least 1"),
        ({"reuse_warm_up": -1}, "warm_up counts evaluations and must be at least 0"),
    ],
)
def test_reuse_that_cannot_be_is_refused(pipeline: ClassToImagePipeline, preset: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ClassToImagePipeline(pipeline.tokenizer, pipeline.transformer, **preset)
