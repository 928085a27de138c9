"""A small checkpoint in Meta's layout, as the tests of loading and of its files write, spoil and build it."""

import functools
import json
from pathlib import Path

import torch

from llama import Llama
from support.models import BASE_PARAMS, random_weights

WORDS = 480  # ids of the tests' tokenizer
PARAMS = BASE_PARAMS | {"n_kv_heads": 2, "vocab_size": WORDS}
PROMPTS = [[1, 400, 7, 19], [1], [1, 300]]


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    return random_weights(PARAMS)


def build(folder: Path, tokenizer_path=None, max_seq_len: int = 32, max_batch_size: int = 4, **options) -> Llama:
    return Llama.build(folder, tokenizer_path, max_seq_len, max_batch_size, **({"device": "cpu"} | options))


def rewrite_params(folder: Path, **changes) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | changes))


def save(folder: Path, tensors: object, number: int = 0, **options) -> Path:
    path = folder / f"consolidated.{number:02d}.pth"
    torch.save(tensors, path, **options)
    return path
