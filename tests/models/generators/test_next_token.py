"""Trees: every next-token generator reads nodes as it would read the path to each of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from vistok import FlexARClass, FlexARText, LlamaGenClass, LlamaGenText, TextAR
from vistok.kernels.attention import TreeMask
from vistok.models.generators.base import Condition, NextTokenGenerator, Reading
from vistok.models.generators.llamagen import CaptionPadding
from vistok.models.generators.text_features import TextFeatures

SMALL = {"codebook_size": 20, "num_tokens": 9, "dim": 32, "depth": 2, "num_heads": 2, "mlp_dim": 48}
PARENTS = (-1, 0, 0, 1, 1, 2, 5)


def make_features() -> TextFeatures:
    generator = torch.Generator().manual_seed(1)
    keep = torch.arange(5) < torch.tensor([3, 5])[:, None]
    return TextFeatures(torch.randn(2, 5, 12, generator=generator), keep)


def make_case(family: str) -> tuple[NextTokenGenerator, Condition]:
    """A model whose outputs depend on everything, and conditions of two images."""
    torch.manual_seed(0)
    if family == "text-ar":
        model = TextAR(text_length=16, **SMALL)
        condition: Condition = model.encode_text(["a dog", "猫"])
    elif family in ("llamagen-class", "flex-ar-class"):
        model = {"llamagen-class": LlamaGenClass, "flex-ar-class": FlexARClass}[family](
            num_classes=5, **SMALL
        )
        condition = torch.tensor([3, 1])
    elif family == "llamagen-text":
        model, condition = (
            LlamaGenText(text_dim=12, max_text_length=6, num_kv_heads=1, **SMALL),
            make_features(),
        )
    else:
        model, condition = FlexARText(text_dim=12, **SMALL), make_features()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    return model.eval(), condition


@pytest.fixture(
    params=["text-ar", "llamagen-class", "llamagen-text", "flex-ar-class", "flex-ar-text"],
)
def case(request) -> tuple[NextTokenGenerator, Condition]:
    return make_case(request.param)


def row_of(condition: Condition, row: int) -> Condition:
    if isinstance(condition, Tensor):
        return condition[row : row + 1]
    return TextFeatures(condition.features[row : row + 1], condition.keep[row : row + 1])


def plain_logits(model: NextTokenGenerator, condition: Condition, row: int, tokens: list[int]) -> Tensor:
    """What follows the last of `tokens` of one row, step by step, `[v]`."""
    cache = model.new_cache(1)
    logits = model.prefill(row_of(condition, row), cache)
    for token in tokens:
        logits = model.step(torch.tensor([[token]]), cache)
    return logits[0, -1]


def make_ancestors() -> Tensor:
    ancestors = torch.eye(len(PARENTS), dtype=torch.bool)
    for node, parent in enumerate(PARENTS[1:], start=1):
        ancestors[node] |= ancestors[parent]
    return ancestors


def feed(model: NextTokenGenerator, tokens: Tensor, cache) -> Reading:
    ancestors = make_ancestors().expand(2, -1, -1)
    depths = ancestors.sum(dim=2) - 1
    return model.read_nodes(tokens, depths, TreeMask(cache.lengths, ancestors), cache)


def path_to(node: int) -> list[int]:
    return ([] if PARENTS[node] < 0 else path_to(PARENTS[node])) + [node]


def draw_tokens(seed: int) -> Tensor:
    return torch.randint(20, (2, len(PARENTS)), generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def test_the_prefix_is_read_as_by_prefill(case) -> None:
    model, condition = case
    cache = model.new_cache(2)
    reading = model.read_prefix(condition, cache)
    assert reading.features.shape == (2, cache.length, 32)
    assert torch.equal(reading.logits, model.prefill(condition, model.new_cache(2)))
    last = model.features_to_logits(reading.features)[:, -1:]
    torch.testing.assert_close(last, reading.logits, atol=1e-5, rtol=0)
    assert model.embed_tokens(torch.tensor([[3, 4]])).shape == (1, 2, 32)


@torch.inference_mode()
def test_every_node_is_read_as_the_end_of_its_path(case) -> None:
    model, condition = case
    cache = model.new_cache(2)
    model.prefill(condition, cache)
    cache.split_rows()
    committed: list[list[int]] = [[], []]
    # Three trees; the rows keep different numbers of nodes, so that the later ones hang at different positions.
    for seed, ends in enumerate([(3, 0), (2, 6), (4, 1)]):
        tokens = draw_tokens(seed)
        reading = feed(model, tokens, cache)
        assert torch.allclose(model.features_to_logits(reading.features), reading.logits, atol=1e-5)
        for row in range(2):
            for node in range(len(PARENTS)):
                read = committed[row] + tokens[row, path_to(node)].tolist()
                if len(read) < model.num_tokens:  # what follows the last token is nobody's business
                    expected = plain_logits(model, condition, row, read)
                    torch.testing.assert_close(reading.logits[row, node], expected, atol=1e-4, rtol=1e-5)
        paths = [path_to(end) for end in ends]
        longest = max(map(len, paths))
        path = torch.tensor([nodes + [-1] * (longest - len(nodes)) for nodes in paths])
        cache.commit(path, torch.tensor([len(nodes) for nodes in paths]))
        for row, nodes in enumerate(paths):
            committed[row] += tokens[row, nodes].tolist()
    assert [len(tokens) for tokens in committed] == [8, 7]


@torch.inference_mode()
def test_nodes_beyond_the_last_position_do_no_harm(case) -> None:
    model, condition = case
    cache = model.new_cache(2)
    model.prefill(condition, cache)
    cache.split_rows()
    for seed in range(3):  # at most 4 + 4 + 4 of 9 tokens
        reading = feed(model, draw_tokens(seed), cache)
        cache.commit(torch.tensor([path_to(6), path_to(6)]), torch.tensor([4, 4]))
    assert reading.logits.isfinite().all()


def test_padding_of_a_caption_sees_what_it_does_in_the_release() -> None:
    keep = torch.tensor([[False, False, True, True]])
    wide = CaptionPadding(keep, sees_text=True).dense(4, 4, keep.device)[0, 0]
    assert wide.int().tolist() == [[1, 0, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 0]]
    narrow = CaptionPadding(keep, sees_text=False).dense(4, 4, keep.device)[0, 0]
    assert narrow.int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    with pytest.raises(ValueError, match="covers 4 positions, the attention has 2 queries"):
        CaptionPadding(keep, sees_text=True).dense(2, 4, keep.device)
