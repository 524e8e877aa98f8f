import pytest
import torch

from vistok.order import ConfidenceOrder, RasterOrder


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 64])
def test_raster_decides_every_position_once_and_sees_only_the_past(num_tokens):
    order = RasterOrder(num_tokens)
    decided = torch.cat(order.plan())
    assert len(order.plan()) == order.num_steps
    assert sorted(decided.tolist()) == list(range(num_tokens))
    assert torch.equal(order.prediction_mask(), torch.ones(num_tokens, num_tokens).tril(-1).bool())


@pytest.mark.parametrize("num_tokens", [1, 5, 32, 128, 256])
@pytest.mark.parametrize("steps", [1, 2, 8, 64])
def test_confidence_order_ends_with_nothing_masked_and_decides_something_at_each_step(num_tokens, steps):
    order = ConfidenceOrder(num_tokens, steps)
    masked = num_tokens
    for step in range(steps):
        left = order.num_masked_after(step, masked)
        assert left < masked or masked == 1  # the last masked position waits for the last step
        masked = left
    assert masked == 0


@pytest.mark.parametrize("make", [lambda: RasterOrder(0), lambda: ConfidenceOrder(4, 0)])
def test_empty_orders_are_refused(make):
    with pytest.raises(ValueError, match="at least one"):
        make()
