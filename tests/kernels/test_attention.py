import pytest
import torch
import torch.nn.functional as F

from vistok.kernels.attention import (
    CausalMask,
    KeyMask,
    LastKeyRepeats,
    OrderMask,
    SelfMask,
    TreeMask,
    attention,
    attention_backend,
)
from vistok.kernels.attention.backends import BACKENDS, make_block_mask

CPU = torch.device("cpu")


def inputs(num_queries: int, num_keys: int, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(num_keys)
    shapes = [(2, 3, num_queries, 8), (2, 3, num_keys, 8), (2, 3, num_keys, 8)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def masks(num_keys: int):
    keep = torch.ones(2, num_keys, dtype=torch.bool)
    keep[1, -1] = num_keys == 1
    return [None, CausalMask(), KeyMask(keep), CausalMask() & KeyMask(torch.ones_like(keep))]


def order_masks(num_queries: int, num_keys: int) -> list[OrderMask]:
    """The queries are the last keys: one order for all rows, one for each with private keys, and mixed."""
    generator = torch.Generator().manual_seed(num_keys)
    keys = torch.randint(0, num_keys, (2, num_keys), generator=generator)
    is_private = torch.rand(num_keys, generator=generator) < 0.5
    queries = keys[:, num_keys - num_queries :]
    return [
        OrderMask(queries[0], keys[0]),
        OrderMask(queries, keys, is_private),
        OrderMask(queries[0], keys.sort().values),
        OrderMask(queries[:, :1].expand(-1, num_queries), keys[0]),
    ]


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 9), (7, 7), (3, 17)])
def test_sdpa_computes_the_reference(num_queries, num_keys):
    for mask in masks(num_keys) + order_masks(num_queries, num_keys)[:2]:
        q, k, v = (x.requires_grad_() for x in inputs(num_queries, num_keys))
        expected, actual = (attention(q, k, v, mask, backend=name) for name in ("reference", "sdpa"))
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)
        gradients = [torch.autograd.grad(out.square().sum(), (q, k, v)) for out in (expected, actual)]
        for left, right in zip(*gradients, strict=True):
            torch.testing.assert_close(right, left, atol=1e-4, rtol=0)


def test_sdpa_stays_within_twice_the_error_of_plain_bf16():
    q, k, v = inputs(31, 31, torch.bfloat16)
    exact = attention(q.float(), k.float(), v.float(), CausalMask(), backend="reference")
    budget = (attention(q, k, v, CausalMask(), backend="reference") - exact).abs().max()
    assert (attention(q, k, v, CausalMask(), backend="sdpa") - exact).abs().max() <= 2 * budget + 1e-5


def test_causal_queries_do_not_see_later_keys():
    q, k, v = inputs(5, 5)
    before = attention(q, k, v, CausalMask())
    k[:, :, 3:] += 1
    assert torch.equal(attention(q, k, v, CausalMask())[:, :, :3], before[:, :, :3])


def test_a_named_backend_runs_or_says_why_not():
    q, k, v = inputs(2, 2)
    with pytest.raises(ValueError, match="needs CUDA tensors"):
        attention(q, k, v, backend="xformers")
    with pytest.raises(ValueError, match="available: auto, sdpa"):
        attention(q, k, v, backend="fast")
    with attention_backend("xformers"), pytest.raises(ValueError, match="needs CUDA tensors"):
        attention(q, k, v)
    attention(q, k, v)  # the choice ended with its block


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_repeated_key_counts_as_often_as_it_stands_for(backend, dtype):
    q, k, v = inputs(4, 6, dtype)
    written_out = [torch.cat([x, x[:, :, -1:].expand(-1, -1, 99, -1)], dim=2) for x in (k, v)]
    exact = attention(q.float(), *(x.float() for x in written_out), backend="reference")
    repeated = attention(q, k, v, LastKeyRepeats(100), backend=backend)
    budget = 1e-5 if dtype == torch.float32 else 0.02  # bf16 keeps 8 bits
    assert repeated.dtype == dtype and (repeated - exact).abs().max() <= budget
    assert (attention(q, k, v, backend=backend) - exact).abs().max() > 0.1


def test_key_mask_of_another_length_is_refused():
    q, k, v = inputs(2, 3)
    with pytest.raises(ValueError, match="covers 2 keys"):
        attention(q, k, v, KeyMask(torch.ones(2, 2, dtype=torch.bool)))


@pytest.mark.parametrize(("num_queries", "num_keys"), [(1, 1), (1, 9), (7, 7), (3, 17)])
def test_an_order_allows_what_its_ranks_say(num_queries, num_keys):
    for mask in order_masks(num_queries, num_keys):
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


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("num_queries", "num_keys"), [(3, 17), (150, 300)])
def test_flex_attention_follows_an_order(num_queries, num_keys):
    from torch.nn.attention.flex_attention import create_mask

    for mask in order_masks(num_queries, num_keys):
        block_mask = make_block_mask(mask, num_queries, num_keys, CPU)
        dense = mask.dense(num_queries, num_keys, CPU)
        assert torch.equal(
            create_mask(block_mask.mask_mod, len(dense), None, num_queries, num_keys, "cpu"), dense
        )
        # Blocks are of 128 x 128 pairs, and one is computed where any of its pairs may attend.
        is_needed = F.max_pool2d(dense.float(), 128, ceil_mode=True)
        assert torch.equal(block_mask.to_dense(), is_needed.to(torch.int32))
        q, k, v = inputs(num_queries, num_keys)
        sees_something = dense.any(dim=-1, keepdim=True)
        actual = torch.where(sees_something, BACKENDS["flex"](q, k, v, mask, None), 0.0)
        expected = torch.where(sees_something, attention(q, k, v, mask, backend="reference"), 0.0)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_blocks_that_an_order_does_not_allow_are_skipped():
    ranks = torch.arange(512)
    blocks = make_block_mask(OrderMask(ranks, ranks), 512, 512, CPU).to_dense()[0, 0]
    assert torch.equal(blocks, torch.ones(4, 4, dtype=blocks.dtype).tril())


def test_all_layers_share_one_form_of_an_order():
    ranks = torch.arange(6)
    mask = OrderMask(ranks, ranks)
    assert mask.dense(6, 6, CPU) is mask.dense(6, 6, CPU)
    assert make_block_mask(mask, 6, 6, CPU) is make_block_mask(mask, 6, 6, CPU)
    assert OrderMask(ranks, ranks).dense(6, 6, CPU) is not mask.dense(6, 6, CPU)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_an_order_of_another_length_is_refused(backend):
    q, k, v = inputs(2, 3)
    with pytest.raises(ValueError, match="covers 3 queries and 3 keys, the attention has 2 and 3"):
        attention(q, k, v, OrderMask(torch.arange(3), torch.arange(3)), backend=backend)
    with pytest.raises(ValueError, match="covers 2 queries and 4 keys"):
        BACKENDS["flex"](q, k, v, OrderMask(torch.arange(2), torch.arange(4)), None)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_padding_sees_itself_and_nobody_else_sees_it(backend):
    keep = torch.tensor([[True] * 5, [False, False, True, True, True]])
    q, k, v = inputs(5, 5)
    mask = CausalMask() & KeyMask(keep) | SelfMask()
    seen = attention(q, k, v, mask, backend=backend)
    torch.testing.assert_close(seen[1, :, :2], v[1, :, :2])
    without = attention(q[1:, :, 2:], k[1:, :, 2:], v[1:, :, 2:], CausalMask(), backend=backend)
    torch.testing.assert_close(seen[1:, :, 2:], without)
    torch.testing.assert_close(seen[:1], attention(q[:1], k[:1], v[:1], CausalMask(), backend=backend))


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
    assert dense[1, 0, 3].int().tolist() == [
        1,
        1,
        1,
        1,
        0,
        1,
        0,
        0,
    ]  # the longest row decides how many keys there are
    assert dense[1, 0, 2].int().tolist() == [1, 1, 1, 0, 1, 0, 0, 0]
    later = TreeMask(
        torch.tensor([4, 2]), make_tree_mask().ancestors[:, 2:]
    )  # the first two nodes were fed before
    assert torch.equal(later.dense(2, 8, CPU), dense[:, :, 2:])
    with pytest.raises(ValueError, match="covers 4 queries and 8 keys, the attention has 4 and 7"):
        make_tree_mask().dense(4, 7, CPU)


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_a_chain_of_nodes_is_causal(backend):
    q, k, v = inputs(3, 9)
    chain = TreeMask(torch.tensor([6, 6]), torch.ones(2, 3, 3).tril().bool())
    expected = attention(q, k, v, CausalMask(), backend="reference")
    torch.testing.assert_close(attention(q, k, v, chain, backend=backend), expected)


def test_backends_that_take_no_trees_say_so():
    q, _, _ = inputs(4, 8)
    for name in ("xformers", "flex"):
        assert any("TreeMask" in reason for reason in BACKENDS[name].objections(q, make_tree_mask()))


def test_either_mask_allows_the_pairs_of_both():
    ranks = torch.tensor([3, 1, 2])
    order, causal = OrderMask(ranks, ranks), CausalMask()
    both = (order | causal).dense(3, 3, CPU)
    assert torch.equal(both, order.dense(3, 3, CPU) | causal.dense(3, 3, CPU))
    assert both.sum() == 8 and causal.dense(3, 3, CPU).sum() == 6


RANKS = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)).argsort()
MASKS = {
    "none": None,
    "causal": CausalMask(),
    "order": OrderMask(RANKS[0], RANKS[0]),
    "orders": OrderMask(RANKS, RANKS, RANKS[0] > 32),
}


@pytest.mark.gpu
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", [name for name in BACKENDS if name != "reference"])
def test_gpu_backends_compute_the_reference(name, mask):
    q, k, v = (x.cuda() for x in inputs(64, 64, torch.bfloat16))
    if reasons := BACKENDS[name].objections(q, MASKS[mask]):
        pytest.skip(f"{name}: {reasons}")
    exact = attention(q.float(), k.float(), v.float(), MASKS[mask], backend="reference")
    budget = (attention(q, k, v, MASKS[mask], backend="reference") - exact).abs().max()
    assert (attention(q, k, v, MASKS[mask], backend=name) - exact).abs().max() <= 2 * budget + 1e-5
