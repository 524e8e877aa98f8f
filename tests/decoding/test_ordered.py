from __future__ import annotations

import pytest
import torch

from vistok import FlexARClass
from vistok.decoding.guidance import ConstantGuidance
from vistok.decoding.ordered import check_num_tokens, generate_ordered
from vistok.decoding.sampling import SamplingParams
from vistok.decoding.streams import ImageStreams


@pytest.fixture(scope="module")
def model() -> FlexARClass:
    torch.manual_seed(0)
    model = FlexARClass(
        codebook_size=20, num_tokens=6, num_classes=5, dim=32, depth=2, num_heads=2, mlp_dim=48
    )
    with torch.no_grad():
        for table in (model.class_embed, model.token_embed, model.head):
            table.weight.mul_(10)
    return model.eval()


LABELS = torch.tensor([3, 1, 4])
GUIDED = ConstantGuidance(2.5)


def draw(model: FlexARClass, rows: slice = slice(None), **options):
    streams = ImageStreams.from_seeds(range(10, 13)[rows])
    return generate_ordered(model, LABELS[rows], streams=streams, **options)


@pytest.mark.parametrize("guidance", [ConstantGuidance(), GUIDED])
def test_stopping_early_gives_the_prefix_of_the_whole(model, guidance) -> None:
    whole = draw(model, guidance=guidance)
    assert whole.data.shape == (3, 6) and whole.lengths.tolist() == [6, 6, 6]
    assert (whole.codebook_size, whole.layout) == (20, model.layout)
    steps = []
    short = draw(model, guidance=guidance, num_tokens=2, on_step=lambda step, indices: steps.append(step))
    assert steps == [0, 1]
    assert torch.equal(short.data, whole.data[:, :2])


def test_every_image_stops_at_its_own_length(model) -> None:
    whole = draw(model, guidance=GUIDED).data
    tokens = draw(model, guidance=GUIDED, num_tokens=[1, 4, 3])
    assert tokens.lengths.tolist() == [1, 4, 3]
    for row, length in enumerate((1, 4, 3)):
        assert torch.equal(tokens.data[row, :length], whole[row, :length])
        assert (tokens.data[row, length:] == 0).all()
    alone = draw(model, slice(1, 2), guidance=GUIDED, num_tokens=4)
    assert torch.equal(alone.data[0], tokens.data[1])


@pytest.mark.parametrize(
    ("num_tokens", "message"),
    [
        (0, r"must be in 1\.\.6, got 0"),
        (7, r"must be in 1\.\.6, got 7"),
        ([1, 2], "one integer or 3 of them"),
        ([1, 2, 0], r"must be in 1\.\.6, got \[1, 2, 0\]"),
        (2.0, "one integer or 3 of them"),
    ],
)
def test_wrong_lengths_are_refused(model, num_tokens, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw(model, num_tokens=num_tokens)


def test_lengths_are_one_per_image() -> None:
    assert check_num_tokens(None, 2, 6).tolist() == [6, 6]
    assert check_num_tokens(3, 2, 6).tolist() == [3, 3]
    assert check_num_tokens(torch.tensor([3, 4]), 2, 6).tolist() == [3, 4]


@torch.inference_mode()
def test_a_later_null_condition_replaces_the_first_from_the_second_token_on(model) -> None:
    """Against the plain way: the whole sequence again at every step, without a cache."""
    later = torch.zeros_like(LABELS)
    tokens = draw(model, sampling=SamplingParams(top_k=1), guidance=GUIDED, later_null_condition=later).data
    indices = torch.zeros(3, 0, dtype=torch.int64)
    for step in range(6):
        seen = torch.cat([indices, torch.zeros(3, 1, dtype=torch.int64)], dim=1)
        null = model.null_condition(3) if step == 0 else later
        cond, uncond = (model(labels, seen)[:, -1] for labels in (LABELS, null))
        chosen = (uncond + 2.5 * (cond - uncond)).argmax(dim=-1)
        indices = torch.cat([indices, chosen[:, None]], dim=1)
    assert torch.equal(tokens, indices)
    assert not torch.equal(tokens, draw(model, sampling=SamplingParams(top_k=1), guidance=GUIDED).data)


def test_callbacks_get_tokens_that_later_steps_do_not_change(model) -> None:
    seen = []
    tokens = draw(model, on_step=lambda step, indices: seen.append(indices))
    assert torch.equal(seen[-1], tokens.data)
    assert (seen[0][:, 1:] == 0).all() and torch.equal(seen[0][:, 0], tokens.data[:, 0])


def test_a_null_condition_can_be_given(model, monkeypatch) -> None:
    expected = draw(model, guidance=GUIDED)
    null = model.null_condition(3)
    monkeypatch.setattr(model, "null_condition", lambda batch_size: pytest.fail("the model was asked"))
    assert torch.equal(draw(model, guidance=GUIDED, null_condition=null).data, expected.data)


def test_seeds_drawn_from_streams_are_those_of_each_image() -> None:
    together = ImageStreams.from_seeds([1, 2, 3]).seeds()
    assert ImageStreams.from_seeds([2]).seeds() == [together[1]]
    assert len(set(together)) == 3
