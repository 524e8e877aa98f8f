import pytest
import torch

from vistok.models.layers.kv_cache import KVCache
from vistok.models.layers.layer_cache import LayerCache


def make(length: int = 4) -> KVCache:
    return KVCache(
        depth=2,
        batch_size=1,
        num_heads=1,
        max_length=length,
        head_dim=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def block(value: float, length: int) -> torch.Tensor:
    return torch.full((1, 1, length, 2), value)


def test_append_returns_everything_so_far():
    layer = make().layers[0]
    layer.append(block(1, 2), block(-1, 2))
    keys, values = layer.append(block(2, 1), block(-2, 1))
    assert keys[0, 0, :, 0].tolist() == [1, 1, 2]
    assert values[0, 0, :, 0].tolist() == [-1, -1, -2]


def test_rollback_forgets_and_new_blocks_overwrite():
    cache = make()
    for layer in cache.layers:
        layer.append(block(1, 3), block(1, 3))
    cache.rollback(1)
    keys, _ = cache.layers[1].append(block(5, 1), block(5, 1))
    assert keys[0, 0, :, 0].tolist() == [1, 5]
    with pytest.raises(ValueError, match="cannot roll back to 9"):
        cache.rollback(9)


def test_overflow_is_an_error():
    with pytest.raises(ValueError, match="holds 4 positions, 5"):
        make().layers[0].append(block(1, 5), block(1, 5))


def test_blocks_of_another_number_of_rows_are_refused():
    cache = LayerCache(torch.zeros(4, 1, 3, 2), torch.zeros(4, 1, 3, 2))
    with pytest.raises(ValueError, match="the cache has 4 rows, 1 came"):
        cache.append(torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))


def make_split(num_nodes: int = 3) -> KVCache:
    """Two rows that hold position 0 and then nodes 10, 11, ... and 20, 21, ..."""
    cache = KVCache(
        depth=2,
        batch_size=2,
        num_heads=1,
        max_length=4,
        head_dim=2,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for layer in cache.layers:
        layer.append(torch.zeros(2, 1, 1, 2), torch.zeros(2, 1, 1, 2))
    cache.split_rows()
    append_nodes(cache, num_nodes)
    return cache


def append_nodes(cache: KVCache, num_nodes: int) -> torch.Tensor:
    """Returns all keys `[b n]`."""
    values = torch.tensor([10.0, 20.0])[:, None] + torch.arange(num_nodes)
    nodes = values[:, None, :, None].expand(-1, 1, -1, 2)
    for layer in cache.layers:
        keys, stored = layer.append(nodes, -nodes)
        assert torch.equal(keys, -stored)
    return keys[:, 0, :, 0]


def test_rows_keep_the_nodes_of_their_own_paths():
    cache = make_split()
    cache.commit(torch.tensor([[0, 2], [0, -1]]), torch.tensor([2, 1]))
    assert cache.lengths.tolist() == [3, 2]
    keys = append_nodes(cache, 2)
    assert keys[0, :5].tolist() == [0, 10, 12, 10, 11] and keys[1, :4].tolist() == [0, 20, 20, 21]
    cache.commit(torch.tensor([[-1], [1]]), torch.tensor([0, 1]))  # nothing of the first row stays
    assert cache.lengths.tolist() == [3, 3]
    keys = append_nodes(cache, 1)
    assert keys[:, :4].tolist() == [[0, 10, 12, 10], [0, 20, 21, 20]]


def test_nodes_can_come_level_by_level():
    cache = make_split(1)
    keys = append_nodes(cache, 2)
    assert keys.tolist() == [[0, 10, 10, 11], [0, 20, 20, 21]]
    cache.commit(torch.tensor([[0, 2], [1, -1]]), torch.tensor([2, 1]))
    assert append_nodes(cache, 1)[0].tolist() == [0, 10, 11, 10]


def test_a_tree_larger_than_the_rest_of_the_cache_finds_room():
    cache = make_split(9)
    cache.commit(torch.tensor([[0, 7, 8], [8, -1, -1]]), torch.tensor([3, 1]))
    assert append_nodes(cache, 9)[0].tolist() == [0, 10, 17, 18, *range(10, 19)]


def test_rows_roll_back_separately():
    cache = make_split()
    cache.commit(torch.tensor([[0, 1], [0, 1]]), torch.tensor([2, 2]))
    append_nodes(cache, 1)
    cache.rollback_rows(torch.tensor([1, 2]))
    keys = append_nodes(cache, 1)
    assert keys[0, :2].tolist() == [0, 10] and keys[1, :3].tolist() == [0, 20, 20]
    cache.rollback_rows(torch.tensor([2, 2]))  # of the first row only one is committed
    assert cache.lengths.tolist() == [1, 2]


def test_split_and_common_rows_are_not_confused():
    with pytest.raises(ValueError, match="split_rows goes first"):
        make().commit(torch.tensor([[0]]), torch.tensor([1]))
    cache = make_split()
    assert cache.lengths.tolist() == [1, 1]
    for use in (lambda: cache.length, lambda: cache.rollback(0), lambda: cache.narrow(1)):
        with pytest.raises(ValueError, match="separately"):
            use()
    with pytest.raises(ValueError, match="a path of 4 nodes was chosen among 3"):
        cache.commit(torch.zeros(2, 4, dtype=torch.int64), torch.tensor([2, 2]))
