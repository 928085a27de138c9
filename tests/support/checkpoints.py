"""Checkpoints in Meta's layout, cut into any number of files."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch

from support.models import Weights

ON_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
ON_COLUMNS = ("wo", "w2", "tok_embeddings")


def shard(name: str, tensor: torch.Tensor, index: int, count: int) -> torch.Tensor:
    """The part of a weight that file `index` of `count` holds."""
    kind = name.split(".")[-2]
    if kind in ON_ROWS:
        return tensor.chunk(count, dim=0)[index].clone()
    if kind in ON_COLUMNS:
        return tensor.chunk(count, dim=1)[index].clone()
    return tensor.clone()


def write_checkpoint(
    folder: Path, params: Mapping, weights: Weights, tokenizer_path: Path | None = None, shards: int = 1
) -> Path:
    """Write `consolidated.NN.pth`, `params.json` and, where one is given, `tokenizer.model`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(shards):
        state = {name: shard(name, tensor, index, shards) for name, tensor in weights.items()}
        torch.save(state, folder / f"consolidated.{index:02d}.pth")
    (folder / "params.json").write_text(json.dumps(dict(params)))
    if tokenizer_path is not None:
        (folder / "tokenizer.model").write_bytes(Path(tokenizer_path).read_bytes())
    return folder
