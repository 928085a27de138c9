"""Open the files that formats share: JSON, pickled tensors, safetensors. Each wrong file is named in one sentence.

Tensors stay in their files, which are memory-mapped, until something asks for their numbers. No code in a file is
ever run.
"""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.formats.recognise import describe, refuse
from llama.formats.slicing import DTYPES

# Ends of names: rotary frequencies, which follow from the sizes.
IGNORED = ("rope.freqs", "rotary_emb.inv_freq")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `FileNotFoundError`, or `ValueError` if the file holds anything else."""
    if not path.is_file():
        raise FileNotFoundError(
            f"No {path.name} in {path.parent}, which belongs to the weights; fetch it with them."
        )
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(
            f"{path} is {describe(path) or f'not JSON ({error})'}; fetch it again."
        ) from None

    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object; fetch it again.")
    return found


def open_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a file that `torch.save` wrote.

    Raises `ValueError` for a file that is something else, is cut short, or holds more than tensors.
    """
    refuse(path, "a checkpoint")
    with open(path, "rb") as file:
        zipped = (
            file.read(2) == b"PK"
        )  # the format since torch 1.6; a file in the older one cannot be mapped

    try:
        tensors = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except Exception as error:  # a file that is no pickle makes the unpickler stumble in any way
        refuse_little_memory(error, path)
        raise ValueError(f"{path} {unpickling_failed(error)}.") from None

    if not isinstance(tensors, dict) or not all(
        isinstance(value, Tensor) for value in tensors.values()
    ):
        raise ValueError(
            f"{path} is not a dictionary of tensors; give a checkpoint in Meta's layout."
        )
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}


def unpickling_failed(error: Exception) -> str:
    """Say what is wrong with a file that torch could not unpickle."""
    if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(
        error
    ):  # it names a function or a class
        return "holds more than tensors (pickled code), which was not run; use a file from a source you trust"
    return f"is cut short or not a PyTorch checkpoint ({first_line(error)}); fetch it again"


def refuse_little_memory(error: Exception, path: Path) -> None:
    """Raise `MemoryError` if that is what `error` says: the file itself may be whole."""
    if isinstance(error, MemoryError) or "allocate memory" in str(error):
        what = f"There is too little memory to open {path}"
        raise MemoryError(
            f"{what}; end other programs, or share the model among more machines."
        ) from None


def first_line(error: Exception) -> str:
    """The beginning of another library's message, or the error's name where there is no message."""
    words = str(error) or type(error).__name__
    return words.splitlines()[0][:120]


class StoredTensor:
    """A slice of a safetensors file: only what `narrow` asks for is read."""

    def __init__(self, stored: Any):
        self.stored = stored
        self.shape = torch.Size(stored.get_shape())
        self.dtype = DTYPES.get(stored.get_dtype(), stored.get_dtype())

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        before = (slice(None),) * dim
        return self.stored[(*before, slice(start, start + length))]


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a safetensors file; none is read yet.

    Raises `ImportError` without the safetensors library, `ValueError` for a file that is something else.
    """
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(
            f"{path} needs the safetensors library; install it with `pip install safetensors`."
        ) from None

    refuse(path, "a checkpoint")
    try:
        file = safe_open(path, framework="pt")
        names = [name for name in file.keys() if not name.endswith(IGNORED)]  # noqa: SIM118
        return {name: StoredTensor(file.get_slice(name)) for name in names}
    except (SafetensorError, OSError, MemoryError) as error:
        refuse_little_memory(error, path)
        what = f"is cut short or not a safetensors file ({first_line(error)})"
        raise ValueError(f"{path} {what}; fetch it again.") from None


def open_tensors(path: Path) -> dict[str, Tensor] | dict[str, StoredTensor]:
    """The tensors of a file, by the kind that its name ends in."""
    return open_safetensors(path) if path.suffix == ".safetensors" else open_pickle(path)
