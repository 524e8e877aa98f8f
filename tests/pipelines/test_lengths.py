"""Stopping at a length, previews, and next-token generators of classes and of encoded texts, through the pipelines."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

import vistok
from tests.tiny import GENERATOR, TOKENIZER
from vistok.models.generators.text_features import TextFeatures
from vistok.pipelines.base import ImagePipeline
from vistok.tokens import Tokens

SMALL = {"codebook_size": 20, "num_tokens": 6, "dim": 16, "depth": 1, "num_heads": 2, "mlp_dim": 16}


class FixedTokenizer(vistok.ConvTiTok):
    """One that decodes only all of its tokens."""

    variable_length = False


class SamplingTokenizer(vistok.ConvTiTok):
    """One whose decoder starts from noise, as FlexTok's: it adds the noise to the image."""

    def decode(self, tokens: Tokens, *, strength: float = 1.0, generator: Any = None) -> Tensor:
        assert len(generator) == len(tokens)
        noise = torch.stack([torch.rand(3, 1, 1, generator=one) for one in generator])
        return super().decode(tokens) / 2 + strength * noise / 4


def make_text_features(num_texts: int) -> TextFeatures:
    """Features that depend on the row alone."""
    rows = [torch.randn(4, 12, generator=torch.Generator().manual_seed(row)) for row in range(num_texts)]
    return TextFeatures(torch.stack(rows), torch.ones(num_texts, 4, dtype=torch.bool))


def make(pipeline: type, transformer: Any, tokenizer: type = vistok.ConvTiTok, **preset: Any) -> Any:
    made = pipeline(tokenizer(**TOKENIZER).eval(), transformer.eval(), **preset)
    made.set_progress_bar_config(disable=True)
    return made


def from_bytes(tokenizer: type = vistok.ConvTiTok) -> vistok.TextToImagePipeline:
    torch.manual_seed(0)
    return make(vistok.TextToImagePipeline, vistok.TextAR(**GENERATOR), tokenizer, guidance_scale=2.0)


def from_features() -> vistok.TextToImagePipeline:
    torch.manual_seed(0)
    transformer = vistok.FlexARText(text_dim=12, **SMALL)
    with torch.no_grad():
        transformer.text_proj.fc1.weight.mul_(30)
        transformer.text_proj.fc2.weight.mul_(30)
        transformer.head.weight.mul_(20)
    return make(vistok.TextToImagePipeline, transformer)


def from_classes(tokenizer: type = vistok.ConvTiTok, **preset: Any) -> vistok.ClassToImagePipeline:
    torch.manual_seed(0)
    transformer = vistok.FlexARClass(num_classes=5, **SMALL)
    with torch.no_grad():
        transformer.class_embed.weight.mul_(30)
        transformer.head.weight.mul_(20)
    return make(vistok.ClassToImagePipeline, transformer, tokenizer, **preset)


def from_masks() -> vistok.ClassToImagePipeline:
    torch.manual_seed(0)
    transformer = vistok.MaskGITBert(num_classes=5, **SMALL)
    return make(vistok.ClassToImagePipeline, transformer, num_inference_steps=2)


def tokens(pipeline: ImagePipeline, *args: Any, **options: Any) -> Tokens:
    return pipeline(*args, output_type="tokens", **options).images


CASES = {"bytes": (from_bytes, ["a", "b"]), "classes": (from_classes, [3, 1]), "masks": (from_masks, [3, 1])}


@pytest.mark.parametrize("case", CASES)
def test_a_prefix_is_drawn_and_decoded(case: str) -> None:
    make_pipeline, prompts = CASES[case]
    pipeline = make_pipeline()
    whole = tokens(pipeline, prompts, seed=3)
    assert whole.lengths.tolist() == [6, 6]
    short = tokens(pipeline, prompts, seed=3, num_tokens=2)
    assert torch.equal(short.data, whole.data[:, :2])
    images = pipeline(prompts, seed=3, num_tokens=[2, 5], output_type="pt").images
    expected = pipeline.tokenizer.decode(whole.keep([2, 5]))
    torch.testing.assert_close(images, expected)
    assert not torch.allclose(images, pipeline(prompts, seed=3, output_type="pt").images)
    alone = pipeline(prompts[1], seed=3, num_tokens=5, output_type="pt").images
    torch.testing.assert_close(alone[0], images[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("num_tokens", "message"),
    [(0, r"in 1\.\.6, got 0"), (7, r"in 1\.\.6, got 7"), ([2], "one integer or 2 of them")],
)
def test_wrong_lengths_are_refused(num_tokens, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_classes()([3, 1], num_tokens=num_tokens)


def test_a_tokenizer_of_fixed_length_gets_no_prefix_and_no_previews() -> None:
    pipeline = from_classes(FixedTokenizer)
    assert tokens(pipeline, 1, num_tokens=6).data.shape == (1, 6)
    with pytest.raises(ValueError, match="FixedTokenizer decodes exactly 6 tokens.*variable-length"):
        pipeline(1, num_tokens=5)
    with pytest.raises(ValueError, match="variable-length tokenizer: there are no previews"):
        pipeline(1, preview_callback=print)


@pytest.mark.parametrize("case", ["bytes", "classes"])
def test_previews_are_the_tokens_so_far(case: str) -> None:
    make_pipeline, prompts = CASES[case]
    pipeline = make_pipeline()
    seen: dict[int, Tensor] = {}
    result = pipeline(prompts, num_tokens=[6, 3], output_type="pt", preview_callback=seen.__setitem__).images
    assert list(seen) == [1, 2, 4]
    drawn = tokens(pipeline, prompts, num_tokens=[6, 3])
    for num_tokens, images in seen.items():
        torch.testing.assert_close(images, pipeline.tokenizer.decode(drawn.keep(num_tokens)))
    assert torch.equal(seen[4][1], result[1])  # this one had stopped by then


def test_previews_come_when_asked_and_as_the_result_does() -> None:
    pipeline, seen = from_classes(), []
    steps = []
    pipeline(
        1,
        preview_at=(6, 3),
        preview_callback=lambda num_tokens, images: seen.append((num_tokens, len(steps), images)),
        callback_on_step_end=lambda *state: steps.append(state),
    )
    assert [(num_tokens, step) for num_tokens, step, _ in seen] == [(3, 3), (6, 6)]
    assert all(isinstance(images[0], Image.Image) for *_, images in seen)
    pipeline(1, preview_at=[6], output_type="tokens", preview_callback=lambda _, images: seen.append(images))
    assert seen[-1].shape == (1, 3, 16, 16)
    with pytest.raises(ValueError, match=r"preview_at must lie in 1\.\.4.*got \[0, 5\]"):
        pipeline(1, num_tokens=4, preview_at=(0, 2, 5), preview_callback=print)
    with pytest.raises(ValueError, match="MaskGITBert decides its tokens in no fixed order"):
        from_masks()(1, preview_callback=print)


def test_a_decoder_that_samples_gets_the_noise_of_each_image() -> None:
    pipeline = from_classes(SamplingTokenizer, decode_options={"strength": 2.0})
    seen: list[Tensor] = []
    batch = pipeline(
        [3, 1, 1],
        seed=[7, 8, 9],
        output_type="pt",
        preview_at=[6],
        preview_callback=lambda _, images: seen.append(images),
    ).images
    torch.testing.assert_close(pipeline(1, seed=8, output_type="pt").images[0], batch[1])
    assert torch.equal(seen[0], batch)  # a preview has the noise of its image
    weaker = pipeline([3, 1, 1], seed=[7, 8, 9], output_type="pt", decode_options={"strength": 1.0}).images
    noise = (batch - weaker).mean(dim=(2, 3))  # [b 3]
    assert (noise > 0).all() and not torch.allclose(noise[0], noise[1])
    with pytest.raises(ValueError, match="num_steps is not a decoding option of a SamplingTokenizer"):
        pipeline(1, decode_options={"num_steps": 3})


def test_null_class_repeats_what_the_published_code_does() -> None:
    pipeline = from_classes()
    with_null = tokens(pipeline, [3, 1], guidance_scale=4.0, top_k=1).data
    overwritten = tokens(pipeline, [3, 1], guidance_scale=4.0, top_k=1, null_class=0).data
    assert torch.equal(with_null[:, 0], overwritten[:, 0]) and not torch.equal(with_null, overwritten)
    with pytest.raises(ValueError, match="class 5 is out of range"):
        pipeline(1, null_class=5, guidance_scale=2.0)
    with pytest.raises(ValueError, match="null_class is not a setting of a MaskGITBert"):
        from_masks()(1, null_class=0, guidance_scale=2.0)
    with pytest.raises(ValueError, match="null_class needs guidance"):
        pipeline(1, null_class=0, guidance_scale=1.0)


def test_settings_are_those_of_the_kind_of_generator(tmp_path) -> None:
    preset = {"guidance_scale": 1.5, "guidance_tokens": 3, "temperature": 0.9}
    preset |= {"top_k": 7, "top_p": 0.8, "typical_p": 0.7}
    pipeline = from_classes(**preset)
    pipeline.save_pretrained(tmp_path)
    loaded = vistok.load(tmp_path)
    assert loaded.sampling_settings() == preset
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(tokens(loaded, [1, 2]).data, tokens(pipeline, [1, 2]).data)
    with pytest.raises(
        ValueError, match="choice_temperature is not a setting of a FlexARClass; it has guidance"
    ):
        pipeline(1, choice_temperature=1.0)
    with pytest.raises(ValueError, match="top_k is not a setting of a MaskGITBert"):
        from_masks()(1, top_k=3)
    with pytest.raises(ValueError, match="top_p must be in"):
        from_classes(top_p=0.0)


def test_texts_are_given_as_features() -> None:
    pipeline, features = from_features(), make_text_features(2)
    null = make_text_features(3)
    null = TextFeatures(null.features[2:, :1], null.keep[2:, :1])
    options = {"null_features": null, "guidance_scale": 2.0, "num_images_per_prompt": 2}
    batch = tokens(pipeline, prompt_features=features, seed=5, **options).data
    second = TextFeatures(features.features[1:], features.keep[1:])
    alone = tokens(pipeline, prompt_features=second, seed=5, **options).data
    assert torch.equal(alone, batch[2:]) and not torch.equal(batch[:2], batch[2:])
    plain = tokens(pipeline, prompt_features=features, seed=5, num_images_per_prompt=2).data
    assert not torch.equal(plain, batch)
    with pytest.raises(
        ValueError, match="guidance of a FlexARText needs the features of the text '', one row"
    ):
        pipeline(prompt_features=features, guidance_scale=2.0)
    with pytest.raises(ValueError, match="either prompt or prompt_features"):
        pipeline("a", prompt_features=features)
    with pytest.raises(ValueError, match="TextAR reads texts itself"):
        from_bytes()(prompt_features=features)


def test_texts_are_encoded_when_an_encoder_is_there(monkeypatch) -> None:
    pipeline, asked = from_features(), []

    def encode(texts: list[str]) -> TextFeatures:
        asked.append(list(texts))
        return make_text_features(len(texts))

    monkeypatch.setattr("vistok.pipelines.text_to_image.load_t5", lambda name, **options: encode)
    drawn = tokens(pipeline, ["a cat", "a dog"], guidance_scale=2.0).data
    assert asked == [["a cat", "a dog"], [""]]
    null = make_text_features(1)
    expected = tokens(pipeline, prompt_features=make_text_features(2), null_features=null, guidance_scale=2.0)
    assert torch.equal(drawn, expected.data)
    with pytest.raises(ValueError, match="prompt is empty"):
        pipeline(["a cat", " "])


def test_without_an_encoder_the_error_says_what_is_missing(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="google/flan-t5-xl needs transformers"):
        from_features()("a cat")


def test_an_error_leaves_the_progress_bar_as_it_is(capsys) -> None:
    pipeline = from_classes()
    pipeline.set_progress_bar_config(disable=False, mininterval=0)

    def interrupt(_: object, step: int, *state: object) -> None:
        if step == 2:
            sys.stderr.write("interrupted")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(1, callback_on_step_end=interrupt)
    gc.collect()
    before, after = capsys.readouterr().err.split("interrupted")
    assert "3/6" in before and after == "\n"  # what is said about it begins a line
