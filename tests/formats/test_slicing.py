"""Slices cut for any number of ranks: counted numbers, where a misplaced row shows, and no processes."""

import numpy as np
import pytest
import torch

from llama.formats import slicing
from support.refusals import refusal

HEADS, HEAD_DIM, DIM, HIDDEN = 8, 8, 64, 96
COUNTS = [1, 2, 4, 8]


def counted(*shape: int) -> torch.Tensor:
    """1, 2, 3, ...: a row out of place shows, and zeros are padding."""
    return torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float64).view(shape)


def pieces(whole: torch.Tensor, dim: int | None, count: int) -> list[torch.Tensor]:
    """The tensor as `count` files hold it."""
    return [whole] * count if dim is None else [part.clone() for part in whole.tensor_split(count, dim)]


def cut(name: str, parts: list[torch.Tensor], local: tuple[int, ...], rank: int, size: int, **sizes) -> torch.Tensor:
    whole = {"vocab_size": 32, "kv_rows": HEADS * HEAD_DIM, "head_dim": HEAD_DIM} | sizes
    shards = [{name: part} for part in parts]
    ((found, tensor),) = slicing.cut_for_rank(slicing.join(shards), {name: local}, rank=rank, size=size, **whole)
    assert found == name and tuple(tensor.shape) == tuple(local)
    return tensor


KINDS = {
    "layers.0.attention.wq.weight": ((HEADS * HEAD_DIM, DIM), 0),
    "layers.0.attention.wk.weight": ((HEADS * HEAD_DIM, DIM), 0),
    "layers.0.attention.wv.weight": ((HEADS * HEAD_DIM, DIM), 0),
    "layers.0.attention.wo.weight": ((DIM, HEADS * HEAD_DIM), 1),
    "layers.0.feed_forward.w1.weight": ((HIDDEN, DIM), 0),
    "layers.0.feed_forward.w2.weight": ((DIM, HIDDEN), 1),
    "layers.0.feed_forward.w3.weight": ((HIDDEN, DIM), 0),
    "tok_embeddings.weight": ((32, DIM), 1),
    "output.weight": ((32, DIM), 0),
    "norm.weight": ((DIM,), None),
    "layers.0.attention_norm.weight": ((DIM,), None),
    "layers.0.ffn_norm.weight": ((DIM,), None),
}


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("files", COUNTS)
@pytest.mark.parametrize("name", KINDS)
def test_cutting_gives_every_rank_its_share_of_any_number_of_files(name, files, size):
    shape, dim = KINDS[name]
    whole = counted(*shape)
    shares = [whole] * size if dim is None else whole.chunk(size, dim)
    for rank, expected in enumerate(shares):
        assert torch.equal(cut(name, pieces(whole, dim, files), expected.shape, rank, size), expected)


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("files", COUNTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("part", ["wk", "wv"])
def test_cutting_lets_ranks_share_key_value_heads(part, kv_heads, files, size):
    name, whole = f"layers.3.attention.{part}.weight", counted(kv_heads * HEAD_DIM, DIM)
    for rank in range(size):
        queries = range(rank * HEADS // size, (rank + 1) * HEADS // size)
        needed = sorted({query * kv_heads // HEADS for query in queries})  # the heads this rank's queries read
        expected = torch.cat([whole[head * HEAD_DIM : (head + 1) * HEAD_DIM] for head in needed])
        share = cut(name, pieces(whole, 0, files), expected.shape, rank, size, kv_rows=kv_heads * HEAD_DIM)
        assert torch.equal(share, expected)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("files", [1, 2, 4])
@pytest.mark.parametrize("vocab", [33, 37, 5])
def test_cutting_pads_a_vocabulary_with_zeros(vocab, files, size):
    whole, rows = counted(vocab, DIM), -(-vocab // size)
    parts = pieces(whole, 0, files)
    shares = [cut("output.weight", parts, (rows, DIM), rank, size, vocab_size=vocab) for rank in range(size)]
    together = torch.cat(shares)
    assert torch.equal(together[:vocab], whole)
    assert together.shape[0] == rows * size and not together[vocab:].any()
    assert all(share.dtype == whole.dtype for share in shares)


def test_joined_pieces_lie_side_by_side():
    left, right = counted(2, 3), counted(2, 2) + 100
    joined = slicing.Joined([left, right], 1)
    assert slicing.take(joined, 1, 2, 2).tolist() == [[3, 101], [6, 103]]
    assert slicing.take(joined, 1, 4, 2).tolist() == [[102, 0], [104, 0]]
    assert slicing.take(joined, 1, 5, 1).tolist() == [[0], [0]]
    assert slicing.take(left, 0, 1, 1).tolist() == [[4, 5, 6]]


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_cutting_rows_gives_views_and_columns_small_copies():
    rows, columns = counted(HEADS * HEAD_DIM, DIM), counted(DIM, HEADS * HEAD_DIM)
    for rank in range(4):
        share = cut("layers.0.attention.wq.weight", [rows], (16, DIM), rank, 4)
        assert same_memory(share, rows) and share.is_contiguous()
        share = cut("layers.0.attention.wo.weight", [columns], (DIM, 16), rank, 4)
        assert share.is_contiguous() and share.untyped_storage().nbytes() == share.nbytes
    assert same_memory(cut("layers.0.attention.wo.weight", [columns], (DIM, 64), 0, 1), columns)
    halves = pieces(rows, 0, 2)
    assert same_memory(cut("layers.0.attention.wq.weight", halves, (16, DIM), 3, 4), halves[1])


@pytest.mark.parametrize(
    "name, shape", [("output.weight", (31, DIM)), ("norm.weight", (DIM - 1,)), ("output.weight", (32,))]
)
def test_cutting_names_a_tensor_of_another_shape(name, shape):
    local = KINDS[name][0]
    refusal(lambda: cut(name, [counted(*shape)], local, 0, 1), name, str(tuple(shape)), str(local))
