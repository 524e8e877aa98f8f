"""Many images in the memory of a few: drawn and decoded in batches, models that wait on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import accelerate.hooks
import numpy as np
import pytest
import torch
from torch import Tensor

import vistok
from tests.pipelines.families import CONTINUOUS, FAMILIES, draw, is_same, make_pipeline, prompts_of
from tests.pipelines.test_lengths import SamplingTokenizer, from_bytes, from_classes
from vistok.decoding.speculative.drafters import TRAINING_FREE
from vistok.decoding.streams import ImageStreams
from vistok.decoding.watermark import Watermark, WatermarkKey
from vistok.eval.peak_memory import peak_memory
from vistok.pipelines import decoder as decoding
from vistok.pipelines.decoder import ImageDecoder
from vistok.pipelines.speculation import SpeculativeDecoding
from vistok.tokens import Tokens

ALL_FAMILIES = [*FAMILIES, *CONTINUOUS]


class Batched:
    """Remembers how many images each call of a method is about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: Any, method: str) -> None:
        self.sizes: list[int] = []
        original = getattr(owner, method)

        def remember(first: Any, *args: Any, **options: Any) -> Any:
            self.sizes.append(len(first))
            return original(first, *args, **options)

        monkeypatch.setattr(owner, method, remember)


@pytest.mark.parametrize("output_type", ["pt", "np", "pil"])
def test_images_are_decoded_in_batches_and_stay_the_same(
    monkeypatch: pytest.MonkeyPatch, output_type: str
) -> None:
    pipeline = from_classes(SamplingTokenizer)  # whose noise is another one for every image
    options: dict[str, Any] = {"seed": [5, 6, 7, 8, 9], "output_type": output_type}
    whole = pipeline([0, 1, 2, 3, 4], **options).images
    seen: list[int] = []
    original = SamplingTokenizer.decode

    def decode(self: Any, tokens: Tokens, *, strength: float = 1.0, generator: Any = None) -> Tensor:
        seen.append(len(tokens))
        return original(self, tokens, strength=strength, generator=generator)

    monkeypatch.setattr(SamplingTokenizer, "decode", decode)
    parts = pipeline([0, 1, 2, 3, 4], decode_options={"batch_size": 2}, **options).images
    assert seen == [2, 2, 1]
    if output_type == "pil":
        whole, parts = (np.stack([np.asarray(picture) for picture in images]) for images in (whole, parts))
        assert np.abs(whole.astype(int) - parts.astype(int)).max() <= 1  # rounding at another batch size
    else:
        torch.testing.assert_close(torch.as_tensor(parts), torch.as_tensor(whole), atol=1e-5, rtol=0)


def test_by_default_a_batch_has_so_many_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = from_bytes()
    spy = Batched(monkeypatch, pipeline.tokenizer, "decode")
    pipeline("a", num_images_per_prompt=5)
    assert spy.sizes == [5]
    monkeypatch.setattr(decoding, "PIXELS_AT_ONCE", 3 * 16**2)
    pipeline("a", num_images_per_prompt=5)
    assert spy.sizes == [5, 3, 2]
    assert decoding.images_at_once(10_000) == 1


def test_an_image_decoder_shows_progress_over_batches() -> None:
    tokenizer = from_bytes().tokenizer
    tokens = Tokens(indices=torch.zeros(5, 6, dtype=torch.int64), codebook_size=20)
    shown: list[Any] = []

    class Bar:
        def __init__(self, total: int) -> None:
            shown.append(total)

        def update(self) -> None:
            shown.append("batch")

        def close(self) -> None:
            shown.append("end")

    streams = ImageStreams.from_seeds(range(5))
    ImageDecoder(tokenizer, streams, {"batch_size": 2})(tokens, "pil", progress_bar=Bar)
    assert shown == [3, "batch", "batch", "batch", "end"]
    ImageDecoder(tokenizer, streams)(tokens, "pil", progress_bar=Bar)
    assert len(shown) == 5  # nothing to show for one batch


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None])
def test_a_decoding_batch_has_at_least_one_image(batch_size: Any) -> None:
    with pytest.raises(ValueError, match=f"at least 1 image, got {batch_size}"):
        from_bytes()("a", decode_options={"batch_size": batch_size})


def test_noise_that_is_given_goes_with_its_image() -> None:
    class NoisyTokenizer(vistok.ConvTiTok):
        def decode(self, tokens: Tokens, *, noise: Tensor) -> Tensor:
            assert len(noise) == len(tokens)
            return noise

    tokenizer: Any = from_bytes(NoisyTokenizer).tokenizer
    noise = torch.rand(5, 3, 16, 16)
    tokens = Tokens(indices=torch.zeros(5, 6, dtype=torch.int64), codebook_size=20)
    decode = ImageDecoder(tokenizer, ImageStreams.from_seeds(range(5)), {"batch_size": 2, "noise": noise})
    assert torch.equal(decode(tokens), noise)


def test_the_memory_of_decoding_does_not_grow_with_the_images() -> None:
    tokenizer = vistok.VQGAN(
        image_size=64, codebook_size=20, codebook_dim=4, latent_dim=8, dim=32, dim_mults=(1, 1, 1), depth=1
    ).eval()
    peaks = []
    for count in (8, 80):
        grid = torch.zeros(count, tokenizer.num_tokens, dtype=torch.int64)
        tokens = Tokens(indices=grid, codebook_size=20, layout=tokenizer.layout)
        decode = ImageDecoder(tokenizer, ImageStreams.from_seeds(range(count)), {"batch_size": 4})
        decode(tokens[:4], "pil")  # what a first call costs once
        peaks.append(
            peak_memory(lambda decode=decode, tokens=tokens: decode(tokens, "pil"), tokenizer.device)
        )
    if None in peaks:
        pytest.skip("this system does not tell the peak")
    assert peaks[1] < peaks[0] + 8, (
        peaks
    )  # MiB; the pictures are 1, a batch in one go would be 10 times peaks[0]


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_images_drawn_in_batches_are_the_same(family: str) -> None:
    pipeline = make_pipeline(family, guidance_scale=1.5)
    prompts = prompts_of(family, 5)
    steps: list[int] = []
    whole = draw(pipeline, prompts, seed=[1, 2, 3, 4, 5])
    parts = draw(
        pipeline,
        prompts,
        seed=[1, 2, 3, 4, 5],
        batch_size=2,
        callback_on_step_end=lambda _, step, total, state: steps.append((step, total)),
    )
    assert is_same(parts, whole)
    total = steps[0][1]
    assert [step for step, _ in steps] == list(range(total)) and total % 3 == 0


def test_a_batch_is_what_the_generator_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_pipeline("llamagen-class", guidance_scale=2.0)
    spy = Batched(monkeypatch, pipeline.transformer, "prefill")
    draw(pipeline, [0, 1, 2], batch_size=2)
    assert spy.sizes == [4, 2]  # both branches
    for batch_size in (3, 100, None):
        spy.sizes.clear()
        draw(pipeline, [0, 1, 2], batch_size=batch_size)
        assert spy.sizes == [6]
    with pytest.raises(ValueError, match="batch_size must be at least 1 image, got 0"):
        pipeline([0], batch_size=0)


def test_what_belongs_to_an_image_goes_with_it() -> None:
    pipeline = make_pipeline("any-order-raster", guidance_scale=1.5)
    labels, seeds = [0, 1, 2], [4, 5, 6]
    key = WatermarkKey("secret", 20, 3)
    tokens = Tokens(
        indices=torch.arange(48).view(3, 16) % 20, codebook_size=20, layout=pipeline.tokenizer.layout
    )
    keep = torch.rand(3, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    options: dict[str, Any] = {
        "seed": seeds,
        "negative_class": [1, 2, 3],
        "tokens": tokens,
        "keep": keep,
    }

    def mark() -> Watermark:
        return Watermark(key, [0, 1, 2], strength=3.0)

    whole = draw(pipeline, labels, logits_processor=mark(), **options)
    parts = draw(pipeline, labels, logits_processor=mark(), batch_size=2, **options)
    assert torch.equal(parts, whole) and not torch.equal(whole, draw(pipeline, labels, **options))


def test_lengths_go_with_their_images() -> None:
    pipeline = from_bytes()
    options: dict[str, Any] = {"num_tokens": [2, 5, 3], "seed": [1, 2, 3], "output_type": "tokens"}
    whole = pipeline(["a", "b", "c"], **options).images
    parts = pipeline(["a", "b", "c"], batch_size=1, **options).images
    assert torch.equal(whole.data, parts.data) and parts.lengths.tolist() == [2, 5, 3]


def test_speculation_in_batches_says_what_it_took() -> None:
    pipeline = make_pipeline("llamagen-class")
    options: dict[str, Any] = {"seed": [1, 2, 3], "output_type": "tokens"}

    def speculate(labels: list[int], seeds: list[int], **more: Any) -> Any:
        speculation = SpeculativeDecoding(TRAINING_FREE["jacobi"]())
        return pipeline(labels, seed=seeds, output_type="tokens", speculation=speculation, **more)

    parts = speculate([0, 1, 2], options["seed"], batch_size=2)
    first, second = speculate([0, 1], [1, 2]), speculate([2], [3])
    assert torch.equal(parts.images.data, torch.cat([first.images.data, second.images.data]))
    assert parts.statistics.target_passes == first.statistics.target_passes + second.statistics.target_passes
    assert len(parts.statistics.row_passes) == 3


def test_previews_are_of_all_images() -> None:
    with pytest.raises(ValueError, match="previews show all images"):
        from_bytes()(["a", "b"], batch_size=1, preview_callback=lambda *_: None)
    from_bytes()(["a", "b"], batch_size=2, preview_callback=lambda *_: None)


class Accelerator:
    """Stands in for one: knows which models are there, and that only they are used."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.models: list[Any] = []
        monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", self._bring())
        monkeypatch.setattr(accelerate.hooks.CpuOffload, "init_hook", self._take_back())

    def _bring(self) -> Any:
        def pre_forward(hook: Any, model: Any, *args: Any, **options: Any) -> tuple:
            previous = hook.prev_module_hook
            self.models = [one for one in self.models if previous is None or one is not previous.model]
            if model not in self.models:
                self.models.append(model)
            return args, options

        return pre_forward

    def _take_back(self) -> Any:
        def init_hook(_: Any, model: Any) -> Any:
            self.models = [one for one in self.models if one is not model]
            return model

        return init_hook

    def watch(self, monkeypatch: pytest.MonkeyPatch, model: Any, *methods: str) -> None:
        """From now on these methods fail where the model is not there."""
        for method in methods:
            original = getattr(model, method)

            def checked(*args: Any, original: Any = original, **options: Any) -> Any:
                assert model in self.models, "used on the CPU"
                return original(*args, **options)

            monkeypatch.setattr(model, method, checked)


@pytest.fixture
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[Accelerator]:
    yield Accelerator(monkeypatch)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_offloaded_models_are_there_when_they_are_used(
    monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator, family: str
) -> None:
    pipeline = make_pipeline(family)
    prompts = prompts_of(family, 2)
    expected = pipeline(prompts, output_type="pt").images
    accelerator.watch(monkeypatch, pipeline.transformer, "forward")
    if hasattr(pipeline.transformer, "prefill"):
        accelerator.watch(monkeypatch, pipeline.transformer, "prefill", "step", "new_cache")
    accelerator.watch(monkeypatch, pipeline.tokenizer, "decode")
    pipeline.enable_model_cpu_offload(device="cpu")
    assert pipeline.is_offloading and accelerator.models == []
    for _ in range(2):
        torch.testing.assert_close(pipeline(prompts, output_type="pt").images, expected)
        assert accelerator.models == []  # back again


def test_a_preview_takes_the_place_of_the_generator_for_a_while(
    monkeypatch: pytest.MonkeyPatch, accelerator: Accelerator
) -> None:
    pipeline = from_bytes()
    accelerator.watch(monkeypatch, pipeline.transformer, "prefill", "step")
    accelerator.watch(monkeypatch, pipeline.tokenizer, "decode")
    pipeline.enable_model_cpu_offload(device="cpu")
    seen: list[int] = []
    pipeline("a", preview_callback=lambda count, _: seen.append(count))
    assert seen == [1, 2, 4] and accelerator.models == []


def test_a_text_encoder_visits_the_accelerator(accelerator: Accelerator) -> None:
    pipeline = make_pipeline("llamagen-text")
    encode, places = pipeline.text_encoder, []

    class Encoder:
        def to(self, device: Any) -> None:
            places.append(str(device))

        def __call__(self, texts: list[str]) -> Any:
            places.append("encode")
            return encode(texts)

    pipeline.text_encoder = Encoder()
    pipeline(["a cat"])
    assert places == ["encode"]  # stays where it is
    places.clear()
    pipeline.enable_model_cpu_offload(device="cpu")
    pipeline(["a cat"])
    assert places == ["cpu:0", "encode", "cpu"]


def test_what_offloading_cannot_do(accelerator: Accelerator) -> None:
    pipeline = from_classes()
    with pytest.raises(ValueError, match="layer by layer.*enable_model_cpu_offload"):
        pipeline.enable_sequential_cpu_offload()
    compiled = make_pipeline("llamagen-class")
    compiled.compile()
    with pytest.raises(ValueError, match="compiled generator cannot be offloaded"):
        compiled.enable_model_cpu_offload(device="cpu")
    pipeline.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="is offloaded"):
        pipeline.compile()
    with pytest.raises(ValueError, match="does not support models that are offloaded"):
        pipeline(0, speculation=SpeculativeDecoding(TRAINING_FREE["jacobi"]()))


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["llamagen-class", "mar", "text-ar"])
def test_offloading_leaves_the_gpu_empty(family: str) -> None:
    pipeline = make_pipeline(family)
    prompts = prompts_of(family, 3)
    expected = draw(pipeline, prompts)
    pipeline.enable_model_cpu_offload()
    devices: list[Any] = []
    drawn = draw(
        pipeline, prompts, callback_on_step_end=lambda one, *_: devices.append(one.transformer.device.type)
    )
    pipeline(prompts, batch_size=2)
    assert set(devices) == {"cuda"} and is_same(drawn.cpu(), expected)
    assert pipeline.transformer.device.type == pipeline.tokenizer.device.type == "cpu"
