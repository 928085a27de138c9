"""The key-value cache: windows are views, rows are copied and wiped whole, and what rows hold is known."""

import pytest
import torch

from llama.cache import KVCache
from llama.model import ModelArgs
from support.models import BASE_PARAMS, build_model, random_weights

PARAMS = BASE_PARAMS | {"n_kv_heads": 2}


@pytest.fixture
def cache() -> KVCache:
    args = ModelArgs(**PARAMS, max_batch_size=4, max_seq_len=16)
    cache = KVCache.allocate(args.cache_shape(), torch.float32, "cpu")
    cache.k.copy_(torch.arange(cache.k.numel(), dtype=torch.float32).view_as(cache.k))
    cache.v.copy_(-cache.k)
    return cache


@pytest.fixture
def model():
    return build_model(PARAMS, random_weights(PARAMS), max_seq_len=16)


def test_a_window_is_a_view(cache):
    window = cache.window(1, 2, 5)
    assert len(window.keys) == PARAMS["n_layers"]
    for layer, (keys, values) in enumerate(zip(*window, strict=True)):
        assert torch.equal(keys, cache.k[layer, 1:3, :, :5])
        assert torch.equal(values, cache.v[layer, 1:3, :, :5])
    window.values[1][0, 1, 4] = 7.0
    assert torch.equal(cache.v[1, 1, 1, 4], torch.full((8,), 7.0))


def test_copying_a_row_takes_its_ids_and_nothing_more(cache):
    cache.ids[2] = [5, 6, 7, 8]
    before = cache.k.clone()
    cache.copy(2, 0, 3)
    assert cache.ids == [[5, 6, 7], [], [5, 6, 7, 8], []]
    assert torch.equal(cache.k[:, 0, :, :3], before[:, 2, :, :3])
    assert torch.equal(cache.v[:, 0, :, :3], -before[:, 2, :, :3])
    assert torch.equal(cache.k[:, 0, :, 3:], before[:, 0, :, 3:])


def test_wiping_a_row_leaves_the_others(cache):
    cache.ids = [[1], [2], [3], [4]]
    before = cache.k.clone()
    cache.wipe(1)
    assert cache.ids == [[1], [], [3], [4]]
    assert cache.k[:, 1].count_nonzero() == cache.v[:, 1].count_nonzero() == 0
    assert torch.equal(cache.k[:, 2:], before[:, 2:])


@pytest.mark.parametrize("given", [False, True])
def test_a_direct_call_makes_only_its_rows_unknown(model, given):
    cache = model.own_cache()
    cache.ids = [[1, 2], [3], [4], [5]]
    model(torch.tensor([[9], [9]]), 0, cache=cache if given else None)
    assert cache.ids == [[], [], [4], [5]]


def test_a_direct_call_is_refused_while_rows_are_running(model):
    model.own_cache().running.add(3)
    with pytest.raises(RuntimeError, match=r"in use by a call that is still running"):
        model(torch.tensor([[9]]), 0)
    other = KVCache.allocate(model.params.cache_shape(), torch.float32, "cpu")
    assert model(torch.tensor([[9]]), 0, cache=other).shape == (1, 1, PARAMS["vocab_size"])


def test_too_many_rows_are_named(model):
    with pytest.raises(ValueError, match="5 rows do not fit a cache of max_batch_size 4"):
        model(torch.zeros(5, 1, dtype=torch.int64), 0)


def test_a_cache_shorter_than_the_context_is_named(model):
    args = ModelArgs(**PARAMS, max_batch_size=2, max_seq_len=4)
    small = KVCache.allocate(args.cache_shape(), torch.float32, "cpu")
    with pytest.raises(ValueError, match="Position 4 does not fit a cache of max_seq_len 4"):
        model(torch.zeros(1, 5, dtype=torch.int64), 0, cache=small)
