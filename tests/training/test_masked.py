from __future__ import annotations

import pytest
import torch

from vistok.training.masked import drop_labels, mask_tokens, masked_loss

MASK = 99


def test_the_number_of_hidden_tokens_follows_the_arccos_schedule() -> None:
    indices = torch.arange(24).reshape(3, 8)
    rand = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    masked, is_masked = mask_tokens(indices, torch.tensor([0.0, 0.5, 1.0]), rand, MASK)
    assert is_masked.sum(dim=-1).tolist() == [8, 5, 1]  # all, round(2/3 of 8), at least one
    assert (masked[is_masked] == MASK).all()
    assert torch.equal(masked[~is_masked], indices[~is_masked])


def test_each_image_gets_positions_of_its_own() -> None:
    rand = torch.rand(64, 8, generator=torch.Generator().manual_seed(0))
    _, is_masked = mask_tokens(torch.zeros(64, 8, dtype=torch.int64), torch.full((64,), 0.9), rand, MASK)
    assert (is_masked.float().mean(dim=0) > 0).all()


def test_labels_are_dropped_below_the_rate() -> None:
    dropped = drop_labels(torch.tensor([3, 4, 5]), torch.tensor([0.05, 0.1, 0.95]), null_label=7, rate=0.1)
    assert dropped.tolist() == [7, 4, 5]


def test_the_loss_weighs_visible_tokens_little() -> None:
    indices = torch.zeros(1, 2, dtype=torch.int64)
    logits = torch.zeros(1, 2, 4)
    logits[0, 0, 0] = 20.0  # right where hidden, undecided where visible
    is_masked = torch.tensor([[True, False]])
    result = masked_loss(logits, indices, is_masked, label_smoothing=0.0)
    assert float(result.loss) == pytest.approx(0.1 * torch.tensor(4.0).log().item() / 1.1, rel=1e-4)
    assert float(result.accuracy) == 1.0


def test_accuracy_is_averaged_over_images() -> None:
    indices = torch.zeros(2, 4, dtype=torch.int64)
    logits = torch.zeros(2, 4, 3)
    logits[0, :, 0], logits[1, :, 1] = 1.0, 1.0  # the first image right everywhere, the second nowhere
    is_masked = torch.tensor([[True, False, False, False], [True, True, True, True]])
    assert float(masked_loss(logits, indices, is_masked).accuracy) == 0.5
