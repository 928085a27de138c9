"""What a file really is, before a parser reads it: the wrong files that people have under the right names.

A parser describes an error page or a pointer file in its own words ("magic number", "protobuf"), which help nobody.
This module looks at the first bytes and knows nothing else. It needs no torch.
"""

from __future__ import annotations

import os
import re
from pathlib import Path


def describe(path: Path) -> str | None:
    """Say in words what stands in place of a binary model file; None for a file that may be one."""
    with open(path, "rb") as file:
        head = file.read(512)

    if not head:
        return "an empty file"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer (run `git lfs pull` where it was cloned)"
    if re.match(rb"\s*<(!doctype|html|\?xml|head|error)", head, re.IGNORECASE):
        return "an HTML or XML page saved in its place (a failed download)"
    if re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", head):
        return "a Llama 3 (tiktoken) tokenizer, which Llama 2 models do not use"
    return None


def refuse(path: Path, expected: str, advice: str = "fetch it again") -> None:
    """Raise `ValueError` for a file that is plainly not the `expected` one."""
    if found := describe(path):
        raise ValueError(f"{path} is {found}, not {expected}; {advice}.")


def folder_path(value: str | Path, argument: str, content: str) -> Path:
    """The path given as an argument. Raises `ValueError` for what is no path, such as None."""
    if not isinstance(value, str | os.PathLike):
        raise ValueError(
            f"{argument} is {value!r}; give the path of the folder that holds {content}."
        )
    return Path(value)


def check_folder(folder: Path) -> None:
    """Raise `FileNotFoundError` or `ValueError`, with what to do, for a ckpt_dir that plainly is no checkpoint."""
    if not folder.exists():
        advice = "give the folder that holds the weights, which ./download.sh fetches"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", folder.as_posix()):
            name = folder.as_posix()
            advice += f"; a model of the Hugging Face hub comes by `hf download {name} --local-dir {folder.name}`"
        raise FileNotFoundError(f"ckpt_dir {folder} does not exist; {advice}.")

    instead = "give the folder of the same model in Meta's or Hugging Face's layout"
    if folder.suffix == ".gguf":
        raise ValueError(
            f"ckpt_dir {folder} is a GGUF file, which this library does not read; {instead}."
        )
    if not folder.is_dir():
        raise FileNotFoundError(
            f"ckpt_dir {folder} is a file, not a folder; give the folder that holds the weights."
        )

    if (folder / "config.json").is_file() or any(folder.glob("consolidated.*.pth")):
        return
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds an adapter; give its base as ckpt_dir, and this folder as lora."
        )
    if any(folder.glob("*.gguf")):
        raise ValueError(f"{folder} holds GGUF files, which this library does not read; {instead}.")


def listing(folder: Path, limit: int = 8) -> str:
    """The names in a folder, for a message that says what was found instead."""
    names = sorted(path.name + "/" if path.is_dir() else path.name for path in folder.iterdir())
    if not names:
        return "nothing"
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
