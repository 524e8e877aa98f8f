import math

import pytest
import torch

from vistok.models.quantizers.fsq import FSQ
from vistok.models.quantizers.vq import VQ

QUANTIZERS = [
    lambda: FSQ([8, 8, 8, 8]),
    lambda: FSQ([8, 5, 5]),
    lambda: FSQ([2, 3]),
    lambda: VQ(32, 6),
    lambda: VQ(32, 6, use_l2_norm=True),
]


@pytest.mark.parametrize("make", QUANTIZERS)
def test_every_index_survives_the_round_trip(make):
    quantizer = make()
    indices = torch.arange(quantizer.codebook_size)[None]
    assert torch.equal(quantizer.codes_to_indices(quantizer.indices_to_codes(indices)), indices)
    assert quantizer.codebook.shape == (quantizer.codebook_size, quantizer.codebook_dim)


@pytest.mark.parametrize("make", QUANTIZERS)
def test_quantize_agrees_with_its_own_indices_and_passes_gradients(make):
    torch.manual_seed(0)
    quantizer = make()
    latents = torch.randn(3, 5, quantizer.codebook_dim, requires_grad=True)
    out = quantizer.quantize(latents)
    torch.testing.assert_close(out.codes, quantizer.indices_to_codes(out.indices), atol=1e-5, rtol=0)
    out.codes.sum().backward()
    assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("make", QUANTIZERS)
def test_autocast_does_not_change_the_indices(make):
    torch.manual_seed(0)
    quantizer = make()
    latents = torch.randn(4, 64, quantizer.codebook_dim)
    with torch.autocast("cpu", torch.bfloat16):
        indices = quantizer.quantize(latents).indices
    assert torch.equal(indices, quantizer.quantize(latents).indices)


@pytest.mark.parametrize("levels", [[8, 8], [5, 3], [2, 7]])
def test_fsq_reaches_every_level_and_stays_in_range(levels):
    quantizer = FSQ(levels)
    latents = torch.linspace(-6, 6, 2001)[None, :, None].expand(1, -1, len(levels))
    out = quantizer.quantize(latents)
    assert out.codes.abs().max() <= 1
    for channel, level in enumerate(levels):
        assert len(out.codes[0, :, channel].unique()) == level


def test_vq_takes_the_nearest_row_the_first_on_ties_and_reports_losses():
    quantizer = VQ(3, 2, commitment_cost=0.25)
    quantizer.embedding.weight.data = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    out = quantizer.quantize(torch.tensor([[[0.9, 0.1], [0.0, 3.0]]]))
    assert out.indices.tolist() == [[0, 2]]
    mse = (0.01 + 0.01 + 1.0) / 4
    torch.testing.assert_close(out.codebook_loss.item(), mse, atol=1e-6, rtol=0)
    torch.testing.assert_close(out.loss.item(), 1.25 * mse, atol=1e-6, rtol=0)


def test_fsq_refuses_levels_it_cannot_round_to():
    with pytest.raises(ValueError, match=">= 2"):
        FSQ([8, 1])


def test_vq_rows_start_at_unit_length_where_they_are_normalised():
    torch.testing.assert_close(VQ(32, 6, use_l2_norm=True).embedding.weight.norm(dim=1), torch.ones(32))
    assert VQ(32, 6).embedding.weight.abs().max() <= 1 / 32


def test_entropy_loss_is_low_where_codes_are_sure_and_all_in_use():
    quantizer = VQ(8, 8, use_l2_norm=True)
    quantizer.embedding.weight.data = torch.eye(8)
    everything, one_code = torch.eye(8)[None], torch.eye(8)[:1].expand(1, 8, 8)
    unsure = torch.ones(1, 8, 8)  # equally far from all codes
    assert quantizer.entropy_loss(everything).item() == pytest.approx(-math.log(8), abs=1e-3)
    assert quantizer.entropy_loss(one_code).item() == pytest.approx(0, abs=1e-3)
    assert quantizer.entropy_loss(unsure).item() == pytest.approx(0, abs=1e-3)


def test_entropy_loss_counts_with_its_weight():
    plain, weighted = VQ(16, 4, use_l2_norm=True), VQ(16, 4, use_l2_norm=True, entropy_cost=0.5)
    weighted.load_state_dict(plain.state_dict())
    latents = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(0))
    difference = weighted.quantize(latents).loss - plain.quantize(latents).loss
    torch.testing.assert_close(difference, 0.5 * plain.entropy_loss(latents))


def test_entropy_loss_moves_latents_to_a_code_that_few_use():
    quantizer = VQ(2, 2, use_l2_norm=True)
    quantizer.embedding.weight.data = torch.eye(2)
    noise = 0.05 * torch.randn(1, 100, 2, generator=torch.Generator().manual_seed(0))
    latents = (torch.tensor([1.0, 0.95]) + noise).requires_grad_()  # most are nearer to the first code
    before = quantizer.codes_to_indices(latents).float().mean().item()
    optimizer = torch.optim.Adam([latents], lr=0.01)
    for _ in range(50):
        optimizer.zero_grad()
        quantizer.entropy_loss(latents).backward()
        optimizer.step()
    assert quantizer.codes_to_indices(latents).float().mean().item() > before + 0.05


def test_indices_are_the_same_under_autocast():
    torch.manual_seed(0)
    quantizer, latents = VQ(512, 8, use_l2_norm=True), torch.randn(1, 500, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(quantizer.codes_to_indices(latents), quantizer.quantize(latents).indices)
