import pytest
import torch

from vistok.models.layers.kv_cache import KVCache, LayerCache


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
