"""The sizes of a model and of its cache, and over how many ranks they divide."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from llama import parallel

COUNTS = [
    "dim",
    "n_layers",
    "n_heads",
    "n_kv_heads",
    "vocab_size",
    "multiple_of",
    "max_batch_size",
    "max_seq_len",
]
OPTIONAL = ("n_kv_heads", "ffn_dim_multiplier")


@dataclass
class ModelArgs:
    """The sizes of a model, under the names `params.json` gives them, and of its cache.

    `n_kv_heads=None` means one key-value head for each query head. `max_batch_size` and `max_seq_len` size the cache
    in rows and positions; they are no property of the weights.
    """

    dim: int = 4096
    n_layers: int = 32
    n_heads: int = 32
    n_kv_heads: int | None = None
    vocab_size: int = -1
    multiple_of: int = 256
    ffn_dim_multiplier: float | None = None
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    max_batch_size: int = 32
    max_seq_len: int = 2048

    @property
    def kv_heads(self) -> int:
        return self.n_heads if self.n_kv_heads is None else self.n_kv_heads

    @property
    def head_dim(self) -> int:
        return self.dim // self.n_heads

    @property
    def ffn_hidden_dim(self) -> int:
        """Width of the feed-forward layer: 2/3 of 4 `dim`, scaled, then rounded up to `multiple_of`.

        Three matrices of that width hold as many weights as the two of a plain feed-forward layer of width 4 `dim`
        (SwiGLU, section 2). 7B: dim 4096 -> 10922 -> 11008.
        """
        hidden = int((self.ffn_dim_multiplier or 1) * int(2 * 4 * self.dim / 3))
        return -(-hidden // self.multiple_of) * self.multiple_of

    def check(self) -> None:
        """Raise `ValueError` for sizes that describe no model."""
        for name in (field.name for field in fields(ModelArgs)):
            value = getattr(self, name)
            if value is None and name in OPTIONAL:
                continue

            allowed = int if name in COUNTS else int | float
            is_number = isinstance(value, allowed) and not isinstance(value, bool)
            if not is_number or not 0 < value < math.inf:
                kind = "integer" if name in COUNTS else "number"
                raise ValueError(f"{name} is {value!r}; it must be a positive {kind}.")

        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(
                f"dim {self.dim} does not divide into {self.n_heads} heads of an even dimension."
            )

        if self.n_heads % self.kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.kv_heads}."
            )

    def cache_shape(self) -> tuple[int, int, int, int, int]:
        """(L, B, K, S, D) of a cache for this rank's heads; several ranks may keep the same one."""
        kv_heads = max(self.kv_heads // parallel.size(), 1)
        return self.n_layers, self.max_batch_size, kv_heads, self.max_seq_len, self.head_dim

    def rank_counts(self) -> list[int]:
        """The numbers of model-parallel ranks this model divides over: whole heads, equal shares of every matrix.

        Key-value heads are shared out, or each is kept by several ranks where there are more ranks than heads.
        """
        counts = []

        for n in range(1, self.n_heads + 1):
            shares_queries = self.n_heads % n == 0 and self.ffn_hidden_dim % n == 0
            shares_keys = self.kv_heads % n == 0 or n % self.kv_heads == 0
            if shares_queries and shares_keys:
                counts.append(n)

        return counts
