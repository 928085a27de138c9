"""Slices of tensors: the protocol, the record of a found checkpoint, and cutting for a rank.

The head of `llama.formats` explains slices. Every format stands on this module, which imports nothing of the library.
It knows the names of Meta's tensors, but not `nn.Module` or process groups: rank and size arrive as plain numbers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

# The dimension on which Meta's files, and our ranks, cut each matrix. Norms are not in it: every rank holds them whole.
CUT = {
    "wq": 0,
    "wk": 0,
    "wv": 0,
    "wo": 1,
    "w1": 0,
    "w2": 1,
    "w3": 0,
    "tok_embeddings": 1,
    "output": 0,
}

# The number formats that weights may have, by their names in safetensors files.
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class Slice(Protocol):
    """A tensor, or what stands for one, from which parts can be taken. `torch.Tensor` is a slice."""

    shape: torch.Size
    dtype: torch.dtype

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        """The `length` entries from `start` on dimension `dim`, and all of the other dimension."""


class Joined:
    """A slice made of pieces that lie side by side on `dim`, in order."""

    def __init__(self, pieces: Sequence[Slice], dim: int):
        shape = list(pieces[0].shape)
        shape[dim] = sum(piece.shape[dim] for piece in pieces)
        self.pieces = pieces
        self.dim = dim
        self.shape = torch.Size(shape)
        self.dtype = pieces[0].dtype

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        if dim != self.dim:
            return torch.cat([piece.narrow(dim, start, length) for piece in self.pieces], self.dim)

        parts = []
        begin = 0  # of the piece, in the whole
        for piece in self.pieces:
            low = max(start - begin, 0)
            high = min(start + length - begin, piece.shape[dim])
            if low < high:
                parts.append(piece.narrow(dim, low, high - low))
            begin += piece.shape[dim]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@dataclass
class Checkpoint(ABC):
    """The record of a checkpoint that was found in a folder. Each format has a class of its own.

    `params` holds the sizes under the names of `ModelArgs`, and `sizes` is the file that states them. `files` are the
    files that hold tensors. `shards` is what each of them holds, under Meta's names; it is empty until `open`.
    """

    folder: Path
    sizes: Path
    params: dict[str, Any]
    files: list[Path]
    shards: list[Mapping[str, Slice]] = field(default_factory=list, init=False)

    @abstractmethod
    def open(self) -> None:
        """Open the files and fill `shards`."""

    def stored_name(self, name: str) -> str:
        """What the files call the tensor that Meta calls `name`."""
        return name


def layer_name(name: str) -> str:
    """The layer that a tensor belongs to: wq for "layers.0.attention.wq.weight" or "...wq.weight.scale"."""
    return name.partition(".weight")[0].rpartition(".")[2]


def cut_dimension(name: str, shape: Sequence[int]) -> int | None:
    """The dimension on which files and ranks cut a tensor; None for a tensor that each of them holds whole."""
    dim = CUT.get(layer_name(name))
    one_number_a_row = dim == 1 and list(shape[1:]) == [1]  # the scales of an int8 matrix
    return None if one_number_a_row else dim


# --- of a whole checkpoint ---------------------------------------------------------------------------------------


def check_names(checkpoint: Checkpoint, expected: Mapping[str, object]) -> None:
    """Raise `ValueError` unless every file holds exactly the expected names."""
    one_by_one = len(checkpoint.shards) == len(checkpoint.files)
    paths = checkpoint.files if one_by_one else [checkpoint.folder]

    for path, shard in zip(paths, checkpoint.shards, strict=True):
        missing = sorted(expected.keys() - shard.keys())
        extra = sorted(shard.keys() - expected.keys())
        differences = []
        if missing:
            differences.append(f"lacks {some_names(checkpoint, missing)}")
        if extra:
            differences.append(f"has the unknown {some_names(checkpoint, extra)}")
        if differences:
            raise ValueError(
                f"{path} {' and '.join(differences)}; it does not match its {checkpoint.sizes.name}."
            )


def some_names(checkpoint: Checkpoint, names: Sequence[str], limit: int = 4) -> str:
    """The first names, as the files have them, and how many more there are."""
    shown = ", ".join(checkpoint.stored_name(name) for name in names[:limit])
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown


def stored_dtype(checkpoint: Checkpoint, names: Sequence[str], convert: bool) -> torch.dtype:
    """The number format of the tensors in `names`; the commonest of several if all will be converted anyway.

    Raises `ValueError` for a format that is not supported, or for several that nobody has asked to convert to one.
    """
    counts: Counter[torch.dtype] = Counter()
    for shard in checkpoint.shards:
        for name in names:
            dtype = shard[name].dtype
            if dtype not in DTYPES.values():
                where = f"{checkpoint.stored_name(name)} in {checkpoint.folder}"
                readable = ", ".join(str(dtype) for dtype in DTYPES.values())
                raise ValueError(f"{where} is stored as {dtype}; this library reads {readable}.")
            counts[dtype] += 1

    ranked = counts.most_common()
    commonest = ranked[0][0]
    if len(ranked) > 1 and not convert:
        mixed = " and ".join(f"{count} tensors in {dtype}" for dtype, count in ranked)
        advice = f"say in which to compute, such as dtype='{commonest}'"
        raise ValueError(f"{checkpoint.folder} holds {mixed}; {advice}.")
    return commonest


def join(shards: Sequence[Mapping[str, Slice]]) -> dict[str, Slice]:
    """One slice for each tensor of a checkpoint whose files hold equal names.

    Raises `ValueError` for pieces that are not parts of one matrix.
    """
    if len(shards) == 1:
        return dict(shards[0])
    return {name: join_pieces(name, [shard[name] for shard in shards]) for name in shards[0]}


def join_pieces(name: str, pieces: Sequence[Slice]) -> Slice:
    """The pieces of one tensor, side by side; the first of them where every file holds the whole."""
    shape = pieces[0].shape
    dim = cut_dimension(name, shape)
    if dim is None or len(shape) != 2:
        return pieces[0]

    other = 1 - dim
    if any(len(piece.shape) != 2 or piece.shape[other] != shape[other] for piece in pieces):
        shapes = ", ".join(str(tuple(piece.shape)) for piece in pieces)
        raise ValueError(f"{name} has the shapes {shapes}, which are not parts of one matrix.")
    return Joined(pieces, dim)


# --- for one rank ------------------------------------------------------------------------------------------------


def cut_for_rank(
    slices: Mapping[str, Slice],
    local_shapes: Mapping[str, Sequence[int]],
    *,
    rank: int,
    size: int,
    vocab_size: int,
    kv_rows: int,
    head_dim: int,
    sizes: str = "params.json",
    stored_name: Callable[[str], str] = str,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the part of each tensor that rank `rank` of `size` holds, in the shape that `local_shapes` says.

    `kv_rows` is the number of rows of the whole wk. Where key-value heads are fewer than ranks, rank r takes the head
    r * heads // size, so that neighbours hold the same one. An output layer that `size` does not divide is padded with
    zero rows. A part on dimension 0 of one file is a view of that file; any other part is a copy.

    Raises `ValueError` for a tensor whose whole shape does not fit; `sizes` and `stored_name` are what its message
    calls the file of the sizes and the tensor.
    """
    for name, shape in local_shapes.items():
        stored = slices[name]
        layer = layer_name(name)
        dim = cut_dimension(name, stored.shape)
        whole = list(shape)

        # Where this rank's part begins, and the shape that all parts have together.
        if dim is None:
            start = 0
        elif layer in ("wk", "wv"):
            start = rank * (kv_rows // head_dim) // size * head_dim
            whole[dim] = kv_rows
        else:
            start = rank * shape[dim]
            whole[dim] = vocab_size if layer == "output" else shape[dim] * size

        if list(stored.shape) != whole:
            found = f"{stored_name(name)} has the shape {tuple(stored.shape)}"
            raise ValueError(f"{found}, but {sizes} describes {tuple(whole)}.")
        if dim is None:
            dim = 0
        yield name, take(stored, dim, start, shape[dim])


def take(stored: Slice, dim: int, start: int, length: int) -> Tensor:
    """The `length` entries from `start`, contiguous; entries beyond the end of the tensor are zeros."""
    count = min(length, stored.shape[dim] - start)
    if count == length:
        return stored.narrow(dim, start, length).contiguous()

    shape = list(stored.shape)
    shape[dim] = length - max(count, 0)
    padding = torch.zeros(shape, dtype=stored.dtype, device="cpu")
    if count <= 0:
        return padding
    return torch.cat((stored.narrow(dim, start, count), padding), dim)
