"""Checkpoints as people have them, each seen as slices.

A slice is anything with `shape`, `dtype` and `narrow(dim, start, length) -> Tensor`, kept under the name that Meta's
checkpoints give the tensor. Slices are the one protocol between files and ranks:

    a format    turns a folder into slices and sizes         meta.py, hugging_face.py
    an adapter  changes slices: W becomes W + scale * B A    lora.py
    a rank      asks each slice for its share                slicing.py

Nothing is read from a file before `narrow` asks for it, so a rank never holds more than its share. A `torch.Tensor` is
a slice already. As an example, take a matrix of four rows: a file has the first two, another file the rest, and an
adapter adds 10 to every number. Of two ranks, the second one holds the last two rows.

    >>> first, second = torch.tensor([[1, 2], [3, 4]]), torch.tensor([[5, 6], [7, 8]])
    >>> whole = Joined([first, second], dim=0)
    >>> whole.shape, whole.dtype
    (torch.Size([4, 2]), torch.int64)
    >>> class Plus10:
    ...     def __init__(self, base):
    ...         self.base, self.shape, self.dtype = base, base.shape, base.dtype
    ...
    ...     def narrow(self, dim, start, length):
    ...         return self.base.narrow(dim, start, length) + 10
    >>> Plus10(whole).narrow(0, 2, 2)
    tensor([[15, 16],
            [17, 18]])
    >>> Plus10(whole).narrow(1, 0, 1).tolist()
    [[11], [13], [15], [17]]

`slicing` is the lowest of these modules, beside `recognise`. The formats stand next to each other on `reading` and do
not import one another. A new format is one module: a function `find` from a folder to a `slicing.Checkpoint`, and its
line in `find` below.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llama.formats.recognise import check_folder, folder_path

if TYPE_CHECKING:
    from llama.formats.slicing import Checkpoint


def find(folder: str | Path) -> Checkpoint:
    """Find the checkpoint in a folder; where the folder holds Meta's files and Hugging Face's, take Meta's.

    Raises `FileNotFoundError` or `ValueError` for a folder that is incomplete or holds something else.
    """
    # These two import torch, without which `recognise` has to work.
    from llama.formats import hugging_face, meta

    folder = folder_path(folder, "ckpt_dir", "the weights")
    check_folder(folder)
    if (folder / "config.json").is_file() and not any(folder.glob("consolidated.*.pth")):
        return hugging_face.find(folder)
    return meta.find(folder)


def find_tokenizer(folder: Path) -> Path:
    """Find `tokenizer.model` in the folder or one level up, where `download.sh` leaves it.

    A folder with another kind of tokenizer has its own vocabulary: the file one level up is not tried there. Raises
    `FileNotFoundError`.
    """
    if not (folder / "tokenizer.model").is_file() and (folder / "tokenizer.json").is_file():
        advice = "add the tokenizer.model that the model was trained with, or give tokenizer_path"
        raise FileNotFoundError(
            f"{folder} has a tokenizer.json, which this library does not read; {advice}."
        )

    for path in (folder / "tokenizer.model", folder.absolute().parent / "tokenizer.model"):
        if path.is_file():
            return path
    raise FileNotFoundError(
        f"No tokenizer.model in {folder} or the folder above; give its path as tokenizer_path."
    )
