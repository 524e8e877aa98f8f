"""MAR: who sees what, encoder and decoder by pieces, the training loss, saving, bad input."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vistok import MAR
from vistok.models.generators.mar import hide_tokens, mask_ratio, masked_diffusion_loss, take

SMALL = {
    "latent_dim": 3,
    "latent_scale": 0.5,
    "num_tokens": 9,
    "layout": "3x3",
    "num_classes": 5,
    "num_buffer_tokens": 2,
    "dim": 16,
    "encoder_depth": 1,
    "decoder_depth": 2,
    "num_heads": 2,
    "mlp_dim": 24,
    "denoiser_dim": 12,
    "denoiser_depth": 2,
}
LABELS = torch.tensor([3, 5])  # the second is none


def make(**changes) -> MAR:
    """A model whose every layer says something."""
    torch.manual_seed(0)
    model = MAR(**SMALL | changes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="module")
def model() -> MAR:
    return make()


@pytest.fixture
def latents() -> Tensor:
    return torch.randn(2, 9, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def is_hidden() -> Tensor:
    orders = torch.stack(
        [torch.randperm(9, generator=torch.Generator().manual_seed(seed)) for seed in (2, 3)]
    )
    return hide_tokens(orders, 5 / 9)


@torch.inference_mode()
def test_conditions_depend_on_all_visible_tokens_and_on_no_hidden_one(model, latents, is_hidden) -> None:
    conditions = model(latents, LABELS, is_hidden)
    for position in range(9):
        changed = latents.clone()
        changed[:, position] += 1
        differs = (model(changed, LABELS, is_hidden) != conditions).any(dim=-1)  # [b n]
        assert torch.equal(differs, ~is_hidden[:, position, None].expand(-1, 9))


@torch.inference_mode()
def test_the_training_pass_is_encoder_and_decoder_in_any_sequence(model, latents, is_hidden) -> None:
    expected = model(latents, LABELS, is_hidden)
    decided, hidden = ((is_hidden == value).nonzero()[:, 1].reshape(2, -1).flip(1) for value in (False, True))
    features = model.encode(take(latents, decided), decided, LABELS)
    assert features.shape == (2, 2 + 4, 16)
    features = model.decode(features, decided, hidden)
    assert features.shape == (2, 2 + 9, 16)
    conditions = model.add_condition_positions(features[:, -5:], hidden)
    torch.testing.assert_close(conditions, take(expected, hidden), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
@pytest.mark.parametrize("hide", [True, False])
def test_all_or_no_tokens_may_be_hidden(model, latents, hide: bool) -> None:
    assert model(latents, LABELS, torch.full((2, 9), hide)).shape == (2, 9, 16)


@torch.inference_mode()
def test_classes_and_no_class_make_a_difference(model, latents, is_hidden) -> None:
    conditions = [
        model(latents, torch.tensor([label, 0]), is_hidden)[0] for label in (0, 3, model.null_label)
    ]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert not torch.allclose(conditions[first], conditions[second], atol=1e-3)


def test_share_of_hidden_tokens_is_a_cut_normal_distribution() -> None:
    ratios = torch.tensor([mask_ratio(uniform) for uniform in torch.linspace(0, 0.9999, 400).tolist()])
    assert (ratios.diff() >= 0).all()
    assert ratios[0] == pytest.approx(0.7, abs=1e-6) and 0.999 < ratios[-1] <= 1
    draws = 1 - (0.25 * torch.randn(200_000, generator=torch.Generator().manual_seed(0))).abs()
    expected = draws[draws >= 0.7]
    assert float(ratios.mean()) == pytest.approx(float(expected.mean()), abs=2e-3)
    assert mask_ratio(0.0, least=0.2) == pytest.approx(0.2)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\), got 1.0"):
        mask_ratio(0.5, least=1.0)


def test_the_first_positions_of_an_order_are_hidden() -> None:
    orders = torch.tensor([[3, 0, 2, 1], [0, 1, 2, 3]])
    assert hide_tokens(orders, 0.3).tolist() == [[True, False, False, True], [True, True, False, False]]
    assert hide_tokens(orders, 1.0).all()


def noises(repeats: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randint(1000, (repeats, 2, 9), generator=generator), torch.randn(
        repeats, 2, 9, 3, generator=generator
    )


def test_the_loss_is_over_hidden_tokens_and_scaled_latents(model, latents, is_hidden) -> None:
    timesteps, noise = noises()
    loss = masked_diffusion_loss(model, latents, LABELS, is_hidden, timesteps, noise)
    clean = latents * model.latent_scale
    conditions = model(clean, LABELS, is_hidden)
    total = []
    for times, draw in zip(timesteps, noise, strict=True):  # every repetition and token by itself
        prediction = model.denoiser(model.head.noised(clean, draw, times), times, conditions)
        total.append(model.head.loss(prediction, clean, draw, times)[is_hidden])
    torch.testing.assert_close(loss, torch.cat(total).mean(), rtol=1e-4, atol=0)


def test_every_parameter_gets_a_gradient(latents, is_hidden) -> None:
    model = make().train()
    masked_diffusion_loss(model, latents, LABELS, is_hidden, *noises()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_fresh_head_predicts_nothing(latents, is_hidden) -> None:
    model = MAR(**SMALL)
    timesteps, noise = noises(1)
    said = model.denoiser(noise, timesteps, model(latents, LABELS, is_hidden))
    assert not said.any()


def test_dropout_is_for_training_only(latents, is_hidden) -> None:
    model = make(dropout=0.5)
    assert torch.equal(model(latents, LABELS, is_hidden), model(latents, LABELS, is_hidden))
    model.train()
    assert not torch.equal(model(latents, LABELS, is_hidden), model(latents, LABELS, is_hidden))


def test_save_and_load_are_bit_exact(model, latents, is_hidden, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    loaded = MAR.from_pretrained(tmp_path, low_cpu_mem_usage=False).eval()
    timesteps, noise = noises()
    with torch.inference_mode():
        losses = [
            masked_diffusion_loss(one, latents, LABELS, is_hidden, timesteps, noise)
            for one in (model, loaded)
        ]
    assert torch.equal(*losses)


def test_wrong_latents_labels_and_masks_are_refused(model, latents, is_hidden) -> None:
    with pytest.raises(ValueError, match=r"MAR takes latents \[b 9 3\], got \[2, 9, 4\]"):
        model(torch.zeros(2, 9, 4), LABELS, is_hidden)
    with pytest.raises(ValueError, match=r"class labels must be in 0..4, or 5 for none; got \[3, 6\]"):
        model(latents, LABELS + torch.tensor([0, 1]), is_hidden)
    unequal = is_hidden.clone()
    unequal[0] = True
    with pytest.raises(ValueError, match=r"equally many tokens hidden in each image.*with \[9, 5\]"):
        model(latents, LABELS, unequal)
    with pytest.raises(ValueError, match="is_hidden must be"):
        model(latents, LABELS, is_hidden[:, :8])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_tokens": 8}, "a layout 3x3 has 9 positions, not 8"),
        ({"latent_scale": 0.0}, "latent_scale must be above 0, got 0.0"),
        ({"num_buffer_tokens": 0}, "the class needs at least 1 buffer token, got 0"),
        ({"num_heads": 3}, "dim 16 is not a multiple of num_heads 3"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAR(**SMALL | changes)
