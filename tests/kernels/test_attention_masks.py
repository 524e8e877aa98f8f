"""What the typed masks allow, densely and as rules for FlexAttention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.kernels.attention_cases import MASKS, inputs, orders, ragged, tree
from vistok.kernels.attention import (
    CausalMask,
    KeyMask,
    LastKeyRepeats,
    OrderMask,
    PackedMask,
    SelfMask,
    TreeMask,
    attention,
)
from vistok.kernels.attention.flex import make_block_mask

CPU = torch.device("cpu")


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 9), (7, 7), (3, 17)])
def test_an_order_allows_what_its_ranks_say(num_queries, num_keys):
    for mask in orders(num_queries, num_keys):
        dense = mask.dense(num_queries, num_keys, CPU)
        assert dense.shape == (2 if mask.batch_size else 1, 1, num_queries, num_keys)
        queries, keys = mask.query_ranks.expand(2, -1), mask.key_ranks.expand(2, -1)
        for row, query, key in torch.cartesian_prod(*map(torch.arange, (len(dense), num_queries, num_keys))):
            is_private = mask.is_private is not None and bool(mask.is_private[key])
            same = bool(keys[row, key] == queries[row, query])
            earlier = bool(keys[row, key] < queries[row, query])
            assert dense[row, 0, query, key] == (same or (earlier and not is_private))


def test_ranks_in_storage_order_are_causal():
    ranks = torch.arange(-2, 5)
    expected = CausalMask().dense(4, 7, CPU)
    assert torch.equal(OrderMask(ranks[3:], ranks).dense(4, 7, CPU), expected)


@pytest.mark.parametrize("name", [name for name in MASKS if name not in ("none", "a repeated key")])
def test_rules_and_blocks_say_what_dense_masks_say(name):
    num_queries, num_keys, mask = MASKS[name]
    check_rule(mask, num_queries, num_keys)


def test_blocks_of_many_positions():
    for mask in orders(150, 300):
        check_rule(mask, 150, 300)
    keep = torch.arange(300) < torch.tensor([[300], [20]])
    check_rule(KeyMask(keep) & CausalMask(), 150, 300)
    check_rule(KeyMask(keep) & CausalMask() | SelfMask(), 150, 300)


def check_rule(mask, num_queries: int, num_keys: int) -> None:
    """Its pairs, and the blocks of 128 x 128 pairs of which one or more may attend."""
    from torch.nn.attention.flex_attention import create_mask

    dense = mask.dense(num_queries, num_keys, CPU).expand(-1, -1, num_queries, num_keys)
    rule = mask.rule(num_queries, num_keys, CPU)
    assert (rule.batch_size or 1, rule.num_heads or 1) == dense.shape[:2]
    assert torch.equal(create_mask(rule.allows, len(dense), None, num_queries, num_keys, "cpu"), dense)
    blocks = make_block_mask(mask, num_queries, num_keys, CPU).to_dense()
    assert torch.equal(blocks, F.max_pool2d(dense.float(), 128, ceil_mode=True).to(torch.int32))


def test_blocks_that_an_order_does_not_allow_are_skipped():
    ranks = torch.arange(512)
    blocks = make_block_mask(OrderMask(ranks, ranks), 512, 512, CPU).to_dense()[0, 0]
    assert torch.equal(blocks, torch.ones(4, 4, dtype=blocks.dtype).tril())


def test_all_layers_share_one_form_of_a_mask():
    ranks = torch.arange(6)
    mask = OrderMask(ranks, ranks)
    assert mask.dense(6, 6, CPU) is mask.dense(6, 6, CPU)
    assert make_block_mask(mask, 6, 6, CPU) is make_block_mask(mask, 6, 6, CPU)
    assert OrderMask(ranks, ranks).dense(6, 6, CPU) is not mask.dense(6, 6, CPU)
    causal = CausalMask()
    assert make_block_mask(causal, 6, 6, CPU) is make_block_mask(causal, 6, 6, CPU)
    assert make_block_mask(causal, 3, 6, CPU).shape[-2:] == (3, 6)  # another form of the same mask


MISFITS = {
    "covers 2 keys, the attention has 3": KeyMask(torch.ones(2, 2, dtype=torch.bool)),
    "covers 3 queries and 3 keys, the attention has 2 and 3": OrderMask(torch.arange(3), torch.arange(3)),
    "covers 5 queries and at least 5 keys, the attention has 2 and 3": tree(40),
    "PackedMask covers 4 positions, the attention has 2 queries and 3 keys": PackedMask((3, 1)),
}


@pytest.mark.parametrize("backend", ["reference", "sdpa", "flex", "triton"])
@pytest.mark.parametrize("message", MISFITS)
def test_a_mask_of_other_sizes_is_refused(backend, message):
    for mask in (MISFITS[message], CausalMask() & MISFITS[message]):
        with pytest.raises(ValueError, match=message):
            attention(*inputs(2, 3), mask, backend=backend)


def test_queries_after_a_cache_are_the_last_keys():
    assert SelfMask().dense(2, 4, CPU)[0, 0].tolist() == [
        [False, False, True, False],
        [False, False, False, True],
    ]


def make_tree_mask() -> TreeMask:
    """Rows of 4 and 2 committed positions; a root with two children, and a child of the first."""
    ancestors = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 1, 0, 1]]).bool()
    return TreeMask(torch.tensor([4, 2]), ancestors.expand(2, -1, -1))


def test_nodes_see_their_row_and_their_ancestors():
    dense = make_tree_mask().dense(4, 8, CPU)
    assert dense.shape == (2, 1, 4, 8)
    assert dense[0, 0, 3].int().tolist() == [1, 1, 1, 1, 1, 1, 0, 1]
    assert dense[1, 0, 3].int().tolist() == [1, 1, 1, 1, 0, 1, 0, 0]  # nobody sees what lies behind the nodes
    assert dense[1, 0, 2].int().tolist() == [1, 1, 1, 0, 1, 0, 0, 0]
    # The first two nodes were fed before.
    later = TreeMask(torch.tensor([4, 2]), make_tree_mask().ancestors[:, 2:])
    assert torch.equal(later.dense(2, 8, CPU), dense[:, :, 2:])


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_chain_of_nodes_is_causal(backend):
    q, k, v = inputs(3, 9)
    chain = TreeMask(torch.tensor([6, 6]), torch.ones(2, 3, 3).tril().bool())
    expected = attention(q, k, v, CausalMask(), backend="reference")
    torch.testing.assert_close(attention(q, k, v, chain, backend=backend), expected)


def test_either_mask_allows_the_pairs_of_both():
    ranks = torch.tensor([3, 1, 2])
    order, causal = OrderMask(ranks, ranks), CausalMask()
    both = (order | causal).dense(3, 3, CPU)
    assert torch.equal(both, order.dense(3, 3, CPU) | causal.dense(3, 3, CPU))
    assert both.sum() == 8 and causal.dense(3, 3, CPU).sum() == 6


def test_masks_that_add_to_logits_are_not_joined():
    with pytest.raises(ValueError, match="LastKeyRepeats adds to logits"):
        CausalMask() & LastKeyRepeats(3)


def test_a_prefix_keeps_the_first_keys_of_each_row():
    mask = KeyMask.prefix([3, 0], 4)
    assert mask.keep.tolist() == [[True, True, True, False], [False] * 4] and mask.lengths == (3, 0)
    with pytest.raises(ValueError, match="between 0 and the 4 keys"):
        KeyMask.prefix([5], 4)


def test_masks_say_whether_keys_may_be_hidden():
    keys = KeyMask(ragged(9))
    assert keys.hides_keys and tree(9).hides_keys and (CausalMask() & keys).hides_keys
    assert not CausalMask().hides_keys and not (keys | SelfMask()).hides_keys
