"""Meta's layout: `consolidated.NN.pth`, each with a part of every matrix, and `params.json` with the sizes."""

from __future__ import annotations

from pathlib import Path

from llama.formats.reading import open_pickle, read_json
from llama.formats.recognise import listing
from llama.formats.slicing import Checkpoint


class MetaCheckpoint(Checkpoint):
    """A folder in Meta's layout. `open` counts the embedding's rows where the sizes leave `vocab_size` open (-1)."""

    def open(self) -> None:
        self.shards = [open_pickle(path) for path in self.files]
        embedding = self.shards[0].get("tok_embeddings.weight")
        if self.params.get("vocab_size", -1) == -1 and embedding is not None:
            self.params["vocab_size"] = embedding.shape[0]


def find(folder: Path) -> MetaCheckpoint:
    """Find the files of a folder in Meta's layout. Raises `FileNotFoundError` or `ValueError` if some are missing."""
    files = find_shards(folder)
    sizes = folder / "params.json"
    return MetaCheckpoint(folder, sizes, read_json(sizes), files)


def find_shards(folder: Path) -> list[Path]:
    """The folder's `consolidated.NN.pth` in order. Raises `FileNotFoundError` that says what is there instead."""
    shards = sorted(folder.glob("consolidated.*.pth"))
    if not shards:
        raise FileNotFoundError(
            f"No consolidated.NN.pth or config.json in {folder}; it holds {listing(folder)}."
        )

    names = [path.name for path in shards]
    expected = [f"consolidated.{number:02d}.pth" for number in range(len(shards))]
    missing = sorted(set(expected) - set(names))
    if missing:
        found = f"{folder} holds {', '.join(names)}"
        raise FileNotFoundError(f"{found}, but not {', '.join(missing)}; fetch the missing files.")
    return shards
