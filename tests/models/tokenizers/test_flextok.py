"""FlexTok: any length in any batch, repeatable noise, guidance, training; and the autoencoder alone."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.host_sync import no_host_sync
from vistok.models.tokenizers import flow
from vistok.models.tokenizers.flextok import FlexTok, Registers, sample_lengths
from vistok.models.tokenizers.kl import KLTokenizer
from vistok.tokens import Tokens, concatenate

VAE = {"latent_channels": 3, "vae_dims": (4, 4, 8), "vae_depth": 1, "vae_num_groups": 2}
SIZES = {
    "image_size": 16,
    "num_tokens": 8,
    "levels": (5, 4, 3),
    "encoder_dim": 16,
    "encoder_depth": 2,
    "decoder_dim": 24,
    "decoder_depth": 2,
    "head_dim": 8,
    "time_dim": 8,
    "max_timestep": 1.0,
    "scaling_factor": 0.7,
    **VAE,
}
QUICK = {"num_inference_steps": 3}


def make(**changes: object) -> FlexTok:
    torch.manual_seed(0)
    model = FlexTok(**{**SIZES, **changes}).eval()
    for (
        name,
        parameter,
    ) in model.named_parameters():  # fresh heads and modulations are zero and would hide mistakes
        if not name.endswith("patches.positions"):
            torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def model() -> FlexTok:
    return make()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture(scope="module")
def tokens(model: FlexTok, images: Tensor) -> Tokens:
    with torch.no_grad():
        return model.encode(images)


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_images_to_tokens_and_back(model: FlexTok, tokens: Tokens) -> None:
    assert tokens.data.shape == (3, 8) and tokens.codebook_size == 60
    assert len(tokens.data.unique()) > 4
    decoded = model.decode(tokens, **QUICK)
    assert decoded.shape == (3, 3, 16, 16)
    assert decoded.abs().max() <= 1
    assert not decoded.requires_grad


@pytest.mark.parametrize("scale", [1.0, 3.0, lambda time: 1 + time])
@pytest.mark.parametrize("mode", ["plain", "normalized"])
def test_lengths_mix_in_a_batch(model: FlexTok, tokens: Tokens, scale, mode: str) -> None:
    options = {**QUICK, "guidance_scale": scale, "guidance_mode": mode}
    mixed = model.decode(tokens.keep([1, 8, 3]), generator=seeded(5, 6, 7), **options)
    for image, (length, seed) in enumerate([(1, 5), (8, 6), (3, 7)]):
        alone = model.decode(tokens[[image]].keep(length), generator=seeded(seed), **options)
        torch.testing.assert_close(mixed[[image]], alone, atol=1e-5, rtol=0)
    assert (model.decode(tokens, generator=seeded(5, 6, 7), **options) - mixed)[0].abs().max() > 1e-3


def test_padding_says_nothing(model: FlexTok, tokens: Tokens) -> None:
    short = tokens[[0]].keep(2)
    padded = concatenate([short, tokens[[1]]])[[0]]
    assert padded.data.shape[1] == 8
    torch.testing.assert_close(model.decode(padded, **QUICK), model.decode(short, **QUICK), atol=1e-5, rtol=0)


@torch.no_grad()
def test_equal_registers_are_computed_once(model: FlexTok, tokens: Tokens) -> None:
    """`kept_registers` and `null_registers` against all registers written out."""
    decoder, lengths = model.decoder, torch.tensor([2, 1, 3])
    latents, modulations = torch.randn(3, 3, 4, 4), decoder.modulations(torch.tensor([0.9, 0.5, 0.1]))
    codes = model.quantizer.indices_to_codes(tokens.data)
    written_out = decoder.velocity(latents, Registers(decoder.embed_codes(codes, lengths)), modulations)
    kept = decoder.kept_registers(codes[:, :3], lengths)
    assert kept.hidden_states.shape[1] == 4 and kept.num_last == 5
    torch.testing.assert_close(
        decoder.velocity(latents, kept, modulations), written_out, atol=1e-5, rtol=1e-4
    )
    null = Registers(decoder.null_vector.expand(3, 8, -1))
    torch.testing.assert_close(
        decoder.velocity(latents, decoder.null_registers(3), modulations),
        decoder.velocity(latents, null, modulations),
        atol=1e-5,
        rtol=1e-4,
    )


@torch.no_grad()
def test_registers_see_only_earlier_ones(model: FlexTok) -> None:
    """A prefix of the registers gives a prefix of the codes, so truncation loses nothing that was kept."""
    latents = torch.randn(2, 3, 4, 4)
    before = model.encoder(latents)
    model.encoder.registers.data[5, ::2] += 1
    after = model.encoder(latents)
    model.encoder.registers.data[5, ::2] -= 1
    torch.testing.assert_close(after[:, :5], before[:, :5], atol=1e-6, rtol=0)
    assert (after[:, 5:] - before[:, 5:]).abs().amin(dim=(0, 2)).min() > 0


def test_noise_is_the_callers(model: FlexTok, tokens: Tokens) -> None:
    def decode(**options) -> Tensor:
        return model.decode(tokens, **QUICK, **options)

    assert torch.equal(decode(), decode())
    assert torch.equal(decode(generator=seeded(1, 2, 3)), decode(generator=seeded(1, 2, 3)))
    assert not torch.equal(decode(generator=seeded(1, 2, 3)), decode(generator=seeded(1, 2, 4)))
    noise = torch.randn(3, 3, 4, 4, generator=seeded(9)[0])
    assert torch.equal(decode(generator=seeded(9)[0]), decode(noise=noise))


@torch.no_grad()
def test_posterior_draws_are_repeatable(model: FlexTok, images: Tensor) -> None:
    mode, drawn = model.encode(images, sample=False).data, model.encode(images, sample=True).data
    assert not torch.equal(mode, drawn)
    assert torch.equal(model.encode(images).data, drawn)  # sample_posterior is on
    assert torch.equal(model.encode(images[1:]).data, drawn[1:])
    assert torch.equal(make(sample_posterior=False).encode(images).data, mode)
    other = model.encode(images, generator=seeded(1, 2, 3)).data
    assert torch.equal(model.encode(images[[2]], generator=seeded(3)).data, other[[2]])


def test_guidance_of_one_skips_the_second_pass(model: FlexTok, tokens: Tokens, monkeypatch) -> None:
    calls = []
    for name in ("velocity", "velocities"):
        original = getattr(model.decoder, name)
        monkeypatch.setattr(
            model.decoder, name, lambda *args, name=name, run=original: calls.append(name) or run(*args)
        )
    off = model.decode(tokens, **QUICK, guidance_scale=1.0)
    assert calls == ["velocity"] * 3
    always_one = model.decode(tokens, **QUICK, guidance_scale=lambda time: 1.0, guidance_mode="plain")
    assert calls[3:] == ["velocities"] * 3
    torch.testing.assert_close(off, always_one, atol=1e-5, rtol=0)


def test_schedules_of_time(model: FlexTok, tokens: Tokens) -> None:
    equal = model.decode(tokens, num_inference_steps=4)
    assert torch.equal(model.decode(tokens, timesteps=[1.0, 0.75, 0.5, 0.25]), equal)
    assert not torch.equal(model.decode(tokens, timesteps=[1.0, 0.9, 0.5, 0.25]), equal)


def test_streams_draw_every_prefix_with_the_same_noise(model: FlexTok, tokens: Tokens) -> None:
    frames = list(model.decode_stream(tokens, generator=seeded(1, 2, 3), **QUICK))
    assert len(frames) == 4  # 1, 2, 4, 8 tokens
    expected = model.decode(tokens.keep(2), generator=seeded(1, 2, 3), **QUICK)
    assert torch.equal(frames[1], expected)


@pytest.mark.parametrize(
    "changes", [{}, {"learned_null": False, "gated_mlp": False, "qk_norm": False, "mlp_bias": True}]
)
def test_saved_models_come_back_exactly(changes: dict, images: Tensor, tmp_path: Path) -> None:
    model = make(**changes)
    model.save_pretrained(tmp_path)
    loaded = FlexTok.from_pretrained(tmp_path)
    state = model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    with torch.no_grad():
        tokens = model.encode(images)
        assert torch.equal(loaded.encode(images).data, tokens.data)
    assert torch.equal(loaded.decode(tokens, **QUICK), model.decode(tokens, **QUICK))


def test_bfloat16_draws_the_same_picture(images: Tensor) -> None:
    model = make()
    with torch.no_grad():
        tokens = model.encode(images)
    expected = model.decode(tokens, **QUICK, guidance_scale=1.0)
    with torch.autocast("cpu", torch.bfloat16):  # the autoencoder stays in float32
        decoded = model.decode(tokens, **QUICK, guidance_scale=1.0)
        assert decoded.dtype == torch.float32
    assert (decoded - expected).abs().mean() < 0.02
    half = model.to(torch.bfloat16)
    assert half.encode(images).data.shape == tokens.data.shape
    decoded = half.decode(tokens, **QUICK, guidance_scale=1.0)
    assert (decoded.float() - expected).abs().mean() < 0.05


def test_training_reaches_everything_but_the_autoencoder(images: Tensor) -> None:
    model = make()
    noise = torch.randn(3, 3, 4, 4, generator=seeded(0)[0])
    prediction = model(
        images,
        lengths=torch.tensor([2, 8, 4]),
        noise_levels=torch.tensor([0.2, 0.9, 0.5]),
        noise=noise,
        is_null=torch.tensor([False, False, True]),
    )
    prediction.loss.backward()
    assert torch.allclose(prediction.loss, (prediction.velocity - prediction.target).square().mean())
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without and all(name.startswith("vae.") or name.endswith("patches.positions") for name in without)
    assert torch.equal(prediction.target, noise - model.encode_latents(images))


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("uniform", {1, 2, 3, 4, 5, 6, 7, 8}), ("pow2", {1, 2, 4, 8}), ("uniform_pow2", {1, 2, 4, 8})],
)
def test_lengths_of_nested_dropout(mode: str, expected: set[int]) -> None:
    lengths = sample_lengths(4000, 8, mode, seeded(0)[0])
    assert lengths.dtype == torch.int64 and set(lengths.tolist()) == expected
    share_of_all = float((lengths == 8).float().mean())
    assert abs(share_of_all - {"uniform": 1 / 8, "pow2": 1 / 4, "uniform_pow2": 1 / 2}[mode]) < 0.03


def test_stratified_draws_fall_into_every_interval() -> None:
    normal = flow.stratified_normal(torch.rand(50, generator=seeded(0)[0]))
    strata = (torch.special.ndtr(normal) * 50).floor()
    assert torch.equal(strata, torch.arange(50.0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be at least 1, got 0"),
        ({"guidance_mode": "apg"}, "unknown guidance_mode 'apg'; choose one of normalized, plain"),
        ({"timesteps": [0.5, 0.7]}, r"must start at 1.0 and fall"),
        ({"timesteps": [1.0, 0.5, 0.0]}, r"must start at 1.0 and fall"),
        ({"generator": [torch.Generator()]}, "1 generators were given for 3 images"),
        ({"noise": torch.zeros(3, 3, 8, 8)}, r"noise must be \[3, 3, 4, 4\], got \[3, 3, 8, 8\]"),
    ],
)
def test_bad_options_of_decode(model: FlexTok, tokens: Tokens, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        model.decode(tokens, **options)


def test_bad_lengths(model: FlexTok, tokens: Tokens, images: Tensor) -> None:
    for length in (0, 9):
        with pytest.raises(ValueError, match=r"in 1\.\.8"):
            model.encode(images, num_tokens=length)
    nine = Tokens(indices=torch.zeros(1, 9, dtype=torch.int64), codebook_size=60)
    with pytest.raises(ValueError, match="decodes 1 to 8 tokens"):
        model.decode(nine)
    with pytest.raises(ValueError, match="come from another tokenizer"):
        model.decode(Tokens(indices=tokens.data, codebook_size=64))
    with pytest.raises(ValueError, match="one of uniform, pow2, uniform_pow2"):
        sample_lengths(1, 8, "linear")
    with pytest.raises(ValueError, match="power of two"):
        sample_lengths(1, 12, "pow2")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 20}, "not a multiple of 8"),
        ({"head_dim": 7}, "dim 16 is not a multiple of head_dim 7"),
        ({"decoder_dim": 18, "head_dim": 2}, "multiple of 4"),
    ],
)
def test_sizes_that_do_not_fit(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlexTok(**{**SIZES, **change})


def test_an_unknown_scaling_factor_is_not_guessed(images: Tensor, tokens: Tokens) -> None:
    model = make(scaling_factor=None)
    with pytest.raises(ValueError, match="has no scaling_factor"):
        model.encode(images)
    with pytest.raises(ValueError, match="has no scaling_factor"):
        model.decode(tokens, **QUICK)


@torch.no_grad()
def test_autoencoder_alone(images: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = KLTokenizer(image_size=16, latent_channels=3, dims=(4, 8), depth=1, num_groups=2).eval()
    tokens = model.encode(images)
    assert tokens.data.shape == (3, 64, 3) and str(tokens.layout) == "8x8"
    assert torch.equal(model.encode(images, sample=True).data, model.encode(images, sample=True).data)
    assert not torch.equal(model.encode(images, sample=True).data, tokens.data)
    latents = model.encode_latents(images)
    assert torch.equal(tokens.data[:, 9], latents[:, :, 1, 1])  # row by row
    torch.testing.assert_close(model.decode(tokens), model.decode_latents(latents).clamp(-1, 1))
    model.save_pretrained(tmp_path)
    assert torch.equal(KLTokenizer.from_pretrained(tmp_path).encode(images).data, tokens.data)
    with pytest.raises(ValueError, match="not a multiple of 2"):
        KLTokenizer(image_size=15, dims=(4, 8))


@torch.no_grad()
@pytest.mark.parametrize("lengths", [[8, 8, 8], [3, 1, 2]])
def test_both_passes_in_one_sequence_are_the_two_passes(
    model: FlexTok, tokens: Tokens, lengths: list[int]
) -> None:
    decoder, modulations = model.decoder, model.decoder.modulations(torch.tensor([0.9, 0.5, 0.1]))
    latents, cut = torch.randn(3, 3, 4, 4), tokens.keep(lengths)
    kept = decoder.kept_registers(model.quantizer.indices_to_codes(cut.data), cut.token_counts)
    null = decoder.null_registers(3)
    cond, uncond = decoder.velocities(latents, kept, null, modulations)
    for found, registers in ((cond, kept), (uncond, null)):
        expected = decoder.velocity(latents, registers, modulations)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert (cond - uncond).abs().max() > 1e-2


def test_the_autoencoder_stays_in_float32() -> None:
    model = make()
    weights = {name: weight.clone() for name, weight in model.vae.state_dict().items()}
    assert model.to(torch.bfloat16) is model
    assert model.dtype == model.decoder.mask_vector.dtype == model.encoder.registers.dtype == torch.bfloat16
    assert all(torch.equal(weight, weights[name]) for name, weight in model.vae.state_dict().items())
    assert model.to("meta").decoder.mask_vector.device.type == "meta"
    assert model.vae.device.type == "meta"


@torch.no_grad()
def test_nothing_waits_for_the_device_between_the_steps(model: FlexTok, tokens: Tokens, monkeypatch) -> None:
    velocities, calls = model.decoder.velocities, []
    with contextlib.ExitStack() as steps:

        def watched(*args) -> tuple[Tensor, Tensor]:
            calls.append(1)
            if len(calls) == 1:
                steps.enter_context(no_host_sync())
            found = velocities(*args)
            if len(calls) == 3:
                steps.close()
            return found

        monkeypatch.setattr(model.decoder, "velocities", watched)
        model.decode(tokens.keep([2, 8, 3]), **QUICK)
    assert len(calls) == 3


def test_a_velocity_that_is_not_finite_names_its_step_and_image(model: FlexTok, tokens: Tokens) -> None:
    noise = torch.randn(3, 3, 4, 4)
    noise[1, 0, 0, 0] = float("nan")
    with pytest.raises(
        ValueError, match="decoder of FlexTok gave NaN or infinity at step 0 of 3, .* for image 1:"
    ):
        model.decode(tokens, noise=noise, **QUICK)
