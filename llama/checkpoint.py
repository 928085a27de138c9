"""Checkpoint files to the tensors one rank holds: Meta's `consolidated.NN.pth`, cut anew for any number of ranks.

Files are memory-mapped and each tensor is read when its turn comes, so a rank never holds more than its share. This
module knows nothing of `nn.Module` or process groups: names and shapes, rank and size arrive as plain values.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from llama.files import describe, listing

# The dimension on which Meta's files, and our ranks, cut each matrix; norms are whole everywhere.
CUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "tok_embeddings": 1, "output": 0}
IGNORED = {"rope.freqs"}  # the release's rotary frequencies, which follow from the sizes


def find_shards(folder: Path) -> list[Path]:
    """The folder's `consolidated.NN.pth` in order. Raises `FileNotFoundError` saying what is there instead."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"ckpt_dir {folder} {what}; give the folder that holds consolidated.00.pth.")
    shards = sorted(folder.glob("consolidated.*.pth"))
    if not shards:
        raise FileNotFoundError(f"No consolidated.NN.pth in {folder}; it holds {listing(folder)}.")
    expected = [f"consolidated.{number:02d}.pth" for number in range(len(shards))]
    missing = sorted(set(expected) - {path.name for path in shards})
    if missing:
        found = ", ".join(path.name for path in shards)
        raise FileNotFoundError(f"{folder} holds {found}, but not {', '.join(missing)}; fetch the missing files.")
    return shards


def find_tokenizer(folder: Path) -> Path:
    """`tokenizer.model` in the folder or one level up, where `download.sh` leaves it."""
    for path in (folder / "tokenizer.model", folder.absolute().parent / "tokenizer.model"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"No tokenizer.model in {folder} or the folder above; give its path as tokenizer_path.")


def read_params(folder: Path) -> dict[str, object]:
    """The sizes in `params.json`. Raises `FileNotFoundError`, or `ValueError` if it is not a JSON object."""
    path = folder / "params.json"
    if not path.is_file():
        raise FileNotFoundError(f"No params.json in {folder}, which says the model's sizes; fetch it with the weights.")
    try:
        params = json.loads(path.read_text())
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is {describe(path) or f'not JSON ({error})'}; fetch it again.") from None
    if not isinstance(params, dict):
        raise ValueError(f"{path} holds {type(params).__name__}, not an object of sizes; fetch it again.")
    return params


def open_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, memory-mapped, without running code that a pickle may hold.

    Raises `ValueError` for a file that is something else, is cut short, or holds more than tensors.
    """
    found = describe(path)
    if found:
        raise ValueError(f"{path} is {found}, not a checkpoint; fetch it again.")
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"  # torch's format since 1.6; the older one cannot be mapped
    try:
        tensors = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except pickle.UnpicklingError:
        raise ValueError(
            f"{path} holds more than tensors (pickled code, or not a checkpoint at all); it was not run. "
            "Use a file of weights from a source you trust."
        ) from None
    except (RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"{path} is cut short or not a PyTorch checkpoint ({reason}); fetch it again.") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is not a dictionary of tensors; give a checkpoint in Meta's layout.")
    return {name: tensor for name, tensor in tensors.items() if name not in IGNORED}


def check_names(shards: Sequence[Mapping[str, Tensor]], expected: Mapping[str, object], paths: Sequence[Path]) -> None:
    """Raise `ValueError` unless every file holds exactly the expected names."""
    for path, shard in zip(paths, shards, strict=True):
        missing, extra = sorted(expected.keys() - shard.keys()), sorted(shard.keys() - expected.keys())
        differences = [
            f"{kind} {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for kind, names in (("lacks", missing), ("has the unknown", extra))
            if names
        ]
        if differences:
            raise ValueError(f"{path} {' and '.join(differences)}; it does not match its params.json.")


def slices(
    shards: Sequence[Mapping[str, Tensor]],
    local_shapes: Mapping[str, Sequence[int]],
    *,
    rank: int,
    size: int,
    vocab_size: int,
    kv_rows: int,
    head_dim: int,
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of rank `rank` of `size`, in the shape that `local_shapes` says, one at a time.

    `kv_rows` is the number of rows of the whole wk. With fewer key-value heads than ranks, rank r takes the head
    r * heads // size, so neighbours share one; an output layer that `size` does not divide is padded with zero rows.
    A slice of one file on dimension 0 is a view of the file, any other a copy. Raises `ValueError` for a tensor whose
    whole shape does not fit.
    """
    for name, shape in local_shapes.items():
        part = name.split(".")[-2]
        cut = CUT.get(part)
        pieces = [shard[name] for shard in shards]
        if cut is None:
            start, whole, pieces = 0, list(shape), pieces[:1]
        elif part in ("wk", "wv"):
            start, whole = rank * (kv_rows // head_dim) // size * head_dim, [kv_rows, shape[1]]
        else:
            start, whole = rank * shape[cut], [length * size if d == cut else length for d, length in enumerate(shape)]
        if part == "output":
            whole[0] = vocab_size
        found = list(pieces[0].shape)
        if cut is not None and len(found) == 2:
            found[cut] = sum(piece.shape[cut] for piece in pieces)
        if found != whole:
            raise ValueError(f"{name} has the shape {tuple(found)}, but params.json describes {tuple(whole)}.")
        yield name, pieces[0] if cut is None else take(pieces, cut, start, shape[cut])


def take(pieces: Sequence[Tensor], dim: int, start: int, length: int) -> Tensor:
    """`length` entries from `start` of the pieces laid side by side on `dim`, padded with zeros at the end."""
    parts, begin = [], 0
    for piece in pieces:
        low, high = max(start - begin, 0), min(start + length - begin, piece.shape[dim])
        if low < high:
            parts.append(piece.narrow(dim, low, high - low))
        begin += piece.shape[dim]
    padding = length - sum(part.shape[dim] for part in parts)
    if padding:
        shape = [padding if d == dim else extent for d, extent in enumerate(pieces[0].shape)]
        parts.append(torch.zeros(shape, dtype=pieces[0].dtype))
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=dim)
