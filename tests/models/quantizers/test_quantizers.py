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
