"""The key-value cache: what attention remembers of the tokens seen so far, and which ids these were.

Letters for shapes as in `model.py`. This module knows nothing of the network, nor of what a token means.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

Versions = list[tuple[int, ...]]  # of a model's weights, see `versions`


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, allocated once: k and v are (L, B, K, S, D), K this rank's heads.

    `ids[b]` are the token ids whose keys row b is known to hold, from position 0 on. A direct call of the model makes
    the rows that it touches unknown. `running` are the rows that somebody is generating in: a direct call, which would
    overwrite them, is refused meanwhile.
    """

    k: Tensor
    v: Tensor
    ids: list[list[int]]
    running: set[int]

    @classmethod
    def allocate(
        cls, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str
    ) -> KVCache:
        """An empty cache; `shape` is (L, B, K, S, D)."""
        # A tensor that is made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            k = torch.zeros(tuple(shape), dtype=dtype, device=device)
            v = torch.zeros(tuple(shape), dtype=dtype, device=device)
        return cls(k, v, ids=[[] for _ in range(shape[1])], running=set())

    def window(self, first: int, count: int, length: int) -> Window:
        """A view of `count` rows from row `first` on, and of their first `length` positions."""
        rows = slice(first, first + count)
        keys = self.k[:, rows, :, :length].unbind(0)
        values = self.v[:, rows, :, :length].unbind(0)
        return Window(keys, values)

    def forget(self, rows: int) -> None:
        """Forget which ids the first `rows` rows hold. Raises `RuntimeError` while somebody is generating."""
        if self.running:
            raise RuntimeError(
                "The model's cache is in use by a call that is still running; give another cache."
            )
        for held in self.ids[:rows]:
            held.clear()

    def copy(self, source: int, target: int, length: int) -> None:
        """Give row `target` the first `length` ids of row `source`, with their keys and values."""
        for tensor in (self.k, self.v):
            tensor[:, target, :, :length] = tensor[:, source, :, :length]
        self.ids[target] = self.ids[source][:length]

    def clear(self) -> None:
        """Empty all rows."""
        for row in range(len(self.ids)):
            self.wipe(row)

    def wipe(self, row: int) -> None:
        """Empty a row: a number that is not finite spoils what is added to it, even with the weight 0."""
        self.k[:, row] = 0
        self.v[:, row] = 0
        self.ids[row] = []


class Window(NamedTuple):
    """Some rows and positions of a cache, layer by layer: each of `keys` and `values` is (B, K, S, D)."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]


def versions(model: nn.Module) -> Versions:
    """Which tensors a model's weights are, where they lie, and how often each was changed in place.

    torch does not count what is written through `.data`.
    """
    found = []
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        place = tensor.data_ptr() if tensor.layout == torch.strided else 0
        count = 0 if tensor.is_inference() else tensor._version
        found.append((id(tensor), place, count))
    return found
