"""The Llama 2 transformer: a function from token ids to logits, and the cache that makes its next call cheap.

Sources: Llama 2 (arXiv:2307.09288, section 2.2 and its appendix A.2), LLaMA (arXiv:2302.13971, section 2.2), RMSNorm
(arXiv:1910.07467), rotary embedding (arXiv:2104.09864, section 3.4.2), SwiGLU (arXiv:2002.05202), grouped-query
attention (arXiv:2305.13245).

Letters used for shapes, here and in the tests:

    B  batch rows               H  query heads            C  model dimension (`dim`)
    T  new tokens of this call  K  key and value heads    V  vocabulary
    S  cached positions         D  dimension of a head    L  layers

This module knows nothing of files, text, sampling or quantization, nor which device it runs on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import parallel
from llama.parallel import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear

COUNTS = ["dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "max_batch_size", "max_seq_len"]
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
        for name, value in ((size.name, getattr(self, size.name)) for size in fields(ModelArgs)):
            allowed, kind = (int, "integer") if name in COUNTS else (int | float, "number")
            positive = isinstance(value, allowed) and not isinstance(value, bool) and 0 < value < math.inf
            if not positive and not (value is None and name in OPTIONAL):
                raise ValueError(f"{name} is {value!r}; it must be a positive {kind}.")
        if self.dim % self.n_heads or self.head_dim % 2:
            raise ValueError(f"dim {self.dim} does not divide into {self.n_heads} heads of an even dimension.")
        if self.n_heads % self.kv_heads:
            raise ValueError(f"n_heads {self.n_heads} is not a multiple of n_kv_heads {self.kv_heads}.")

    def rank_counts(self) -> list[int]:
        """The numbers of model-parallel ranks this model divides over: whole heads, equal shares of every matrix.

        Key-value heads are shared out, or each is kept by several ranks where there are more ranks than heads.
        """
        counts = [n for n in range(1, self.n_heads + 1) if self.n_heads % n == 0 and self.ffn_hidden_dim % n == 0]
        return [n for n in counts if self.kv_heads % n == 0 or n % self.kv_heads == 0]

    def memory(
        self, itemsize: int, ranks: int = 1, *, layers: float | None = None, output: float | None = None
    ) -> tuple[int, int]:
        """Bytes of (weights, cache) that each of `ranks` ranks holds at `itemsize` bytes a number.

        The numbers of the matrices in `layers` and of the `output` layer may take another number of bytes.
        """
        kv_heads = max(self.kv_heads // ranks, 1)  # of this rank
        attention = 2 * self.dim * self.dim // ranks + 2 * self.dim * kv_heads * self.head_dim
        feed_forward = 3 * self.dim * self.ffn_hidden_dim // ranks
        others = self.vocab_size * self.dim // ranks + (2 * self.n_layers + 1) * self.dim  # embedding and norms
        weights = self.n_layers * (attention + feed_forward) * (layers or itemsize) + others * itemsize
        weights += -(-self.vocab_size // ranks) * self.dim * (output or itemsize)
        cache = 2 * self.n_layers * self.max_batch_size * self.max_seq_len * kv_heads * self.head_dim
        return int(weights), cache * itemsize


class RMSNorm(nn.Module):
    """x / rms(x), scaled by a learned weight; the mean square is taken in float32. (..., C) -> (..., C)."""

    def __init__(self, dim: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], eps=self.eps).type_as(x) * self.weight


def rotary_table(head_dim: int, end: int, theta: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine of position * theta^(-2i / head_dim), each (end, head_dim / 2) float32 on the CPU."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    angles = torch.outer(torch.arange(end, dtype=torch.float32, device="cpu"), 1.0 / theta**exponents)
    return angles.cos(), angles.sin()


def paired(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The table as `rotate` reads it, a number for each of a head's D: (cos, cos) and (-sin, sin) for every pair."""
    return cos.repeat_interleave(2, dim=-1), torch.stack((-sin, sin), dim=-1).flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each neighbouring pair (x[2i], x[2i + 1]) of a head by its position's angle, in float32.

    x (B, T, H, D); cos and sin, as `paired` gives them, (T, D), or (B, T, D) where rows differ in position. The pairs
    of Meta's checkpoints are neighbours; Hugging Face's are the two halves of a head.
    """
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # x[1], x[0], x[3], x[2], ...
    return torch.addcmul(wide * cos.unsqueeze(-2), swapped, sin.unsqueeze(-2)).type_as(x)  # one angle for all heads


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    """The rotary table as complex numbers, (end, dim / 2) complex64, for callers that want that form."""
    return torch.complex(*rotary_table(dim, end, theta))


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries (B, T, H, D) and keys (B, T, K, D) by complex `freqs_cis` (T, D / 2)."""
    table = paired(freqs_cis.real, freqs_cis.imag)
    return rotate(xq, *table), rotate(xk, *table)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeat each key-value head for its group of queries: (B, S, K, D) -> (B, S, K * n_rep, D).

    The model itself never does this: attention reads grouped heads as they are.
    """
    return x.repeat_interleave(n_rep, dim=2)


@dataclass
class KVCache:
    """Keys and values of the tokens seen so far, allocated once: k and v are (L, B, K, S, D), K this rank's heads.

    `ids` is a generator's note of the token ids whose keys each row holds. A forward pass through the cache drops it;
    the generator, which passes a view of its own, keeps it.
    """

    k: Tensor
    v: Tensor
    ids: list[list[int]] = field(default_factory=list)

    @classmethod
    def allocate(cls, args: ModelArgs, dtype: torch.dtype, device: torch.device | str) -> KVCache:
        kv_heads = max(args.kv_heads // parallel.size(), 1)
        shape = (args.n_layers, args.max_batch_size, kv_heads, args.max_seq_len, args.head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    def clear(self) -> None:
        """Forget everything: a number that is not finite spoils what is added to it, even with the weight 0."""
        self.k.zero_()
        self.v.zero_()
        self.ids = []

    def narrow(self, batch: int, length: int) -> KVCache:
        """A view of the first `batch` rows and `length` positions."""
        if batch > self.k.shape[1]:
            raise ValueError(f"{batch} rows do not fit a cache of max_batch_size {self.k.shape[1]}.")
        if length > self.k.shape[3]:
            raise ValueError(f"Position {length - 1} does not fit a cache of max_seq_len {self.k.shape[3]}.")
        return KVCache(self.k[:, :batch, :, :length], self.v[:, :batch, :, :length])

    def write(self, layer: int, where: int | tuple[Tensor, Tensor], k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values (B, T, K, D) from position `where` on, or at (rows, positions).

        Returns all of the layer's, (B, K, S, D) each.
        """
        keys, values = self.k[layer], self.v[layer]
        if isinstance(where, int):
            keys[:, :, where : where + k.shape[1]] = k.transpose(1, 2)
            values[:, :, where : where + v.shape[1]] = v.transpose(1, 2)
        else:
            rows, positions = where
            keys[rows, :, positions] = k
            values[rows, :, positions] = v
        return keys, values


@dataclass
class Step:
    """What all layers of one forward pass share: angles, which keys each query may see, where new keys are stored.

    With T = 3 new tokens after 2 cached ones, `mask` lets the queries (rows) see the keys (columns) marked x:

        x x x . .
        x x x x .
        x x x x x

    A key is visible if its position is not after the query's. That test alone hides a neighbour's padding and what
    an earlier, longer sequence left in the cache, so no row is ever fully masked.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    causal: bool
    where: int | tuple[Tensor, Tensor]
    cache: KVCache | None


class Attention(nn.Module):
    """Causal attention with grouped key-value heads and rotary positions, over this rank's share of the heads."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        ranks = parallel.size()
        self.head_dim = args.head_dim
        self.n_local_heads = args.n_heads // ranks
        self.n_local_kv_heads = max(args.kv_heads // ranks, 1)
        kv_features = max(args.kv_heads, ranks) * args.head_dim  # several ranks may keep the same head
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * args.head_dim)
        self.wk = ColumnParallelLinear(args.dim, kv_features)
        self.wv = ColumnParallelLinear(args.dim, kv_features)
        self.wo = RowParallelLinear(args.n_heads * args.head_dim, args.dim)

    def forward(self, x: Tensor, layer: int, step: Step) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_local_heads, self.head_dim)
        k = self.wk(x).view(B, T, self.n_local_kv_heads, self.head_dim)
        v = self.wv(x).view(B, T, self.n_local_kv_heads, self.head_dim)
        q, k = rotate(torch.cat((q, k), dim=2), step.cos, step.sin).split((q.shape[2], k.shape[2]), dim=2)
        if step.cache is None:
            keys, values = k.transpose(1, 2), v.transpose(1, 2)  # (B, K, T, D)
        else:
            keys, values = step.cache.write(layer, step.where, k, v)  # (B, K, S, D)
        return self.wo(self.attend(q, keys, values, step))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, step: Step) -> Tensor:
        """softmax(q k' / sqrt(D)) v for q (B, T, H, D) and keys, values (B, K, S, D) -> (B, T, H * D).

        Softmax runs in float32 inside the kernel. A single new token takes its group's queries as if they were
        positions: they see the same keys, and the kernel then reads each key-value head once.
        """
        B, T, H, D = q.shape
        if T == 1:
            q = q.view(B, self.n_local_kv_heads, -1, D)  # (B, K, H / K, D)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=step.mask)
            return out.reshape(B, 1, H * D)
        grouped = self.n_local_kv_heads != H
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), keys, values, attn_mask=step.mask, is_causal=step.causal, enable_gqa=grouped
        )  # (B, H, T, D)
        return out.transpose(1, 2).reshape(B, T, H * D)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) * w3 x). (B, T, C) -> (B, T, C)."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = ColumnParallelLinear(dim, hidden_dim)
        self.w2 = RowParallelLinear(hidden_dim, dim)
        self.w3 = ColumnParallelLinear(dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    """One layer: attention, then feed-forward, each on the normed input and added to it."""

    def __init__(self, layer_id: int, args: ModelArgs):
        super().__init__()
        self.layer_id = layer_id
        self.attention = Attention(args)
        self.feed_forward = FeedForward(args.dim, args.ffn_hidden_dim)
        self.attention_norm = RMSNorm(args.dim, args.norm_eps)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)

    def forward(self, x: Tensor, step: Step) -> Tensor:
        h = x + self.attention(self.attention_norm(x), self.layer_id, step)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    """The whole model. `state_dict()` has the names of Meta's checkpoints.

        model(tokens)                            every position, no cache, differentiable: training
        model(tokens, start_pos)                 through the model's own cache, from one position on
        model(tokens, positions=p)               the same, each row from its own position p[b]
        model(tokens, 0, logits_at=lengths - 1)  one position a row: (B, V)

    Positions before `start_pos` must have been given in earlier calls; any split of a sequence into calls gives the
    same logits, and going back to an earlier position is safe.
    """

    def __init__(self, params: ModelArgs):
        super().__init__()
        params.check()
        if parallel.size() not in params.rank_counts():
            sizes = f"{params.n_heads} heads, {params.kv_heads} key-value heads, feed-forward {params.ffn_hidden_dim}"
            raise ValueError(f"{parallel.size()} ranks cannot share {sizes}; use one of {params.rank_counts()}.")
        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        self.rope: tuple[Tensor, Tensor] | None = None  # no buffer: stays float32; made when it is needed
        self.cache: KVCache | None = None

    def own_cache(self) -> KVCache:
        """The model's cache, allocated at the first call, where and as the weights are."""
        weight = self.norm.weight
        if self.cache is None or self.cache.k.device != weight.device or self.cache.k.dtype != weight.dtype:
            self.cache = KVCache.allocate(self.params, weight.dtype, weight.device)
        return self.cache

    def forward(
        self,
        tokens: Tensor,
        start_pos: int | None = None,
        *,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Float32 logits (B, T, V) of int64 tokens (B, T); with `logits_at` (B,) only those of one index a row, (B, V).

        Raises `ValueError` for more rows, or from `start_pos` on more positions, than the cache (or, without one, the
        rotary table) holds.
        """
        start = start_pos if positions is None else positions
        h = self.hidden(tokens, start, cache)
        if logits_at is not None:
            h = h[torch.arange(h.shape[0], device=h.device), logits_at]  # (B, C)
        with torch.set_grad_enabled(start is None and torch.is_grad_enabled()):
            return self.logits(h)

    def hidden(self, tokens: Tensor, start: int | Tensor | None = None, cache: KVCache | None = None) -> Tensor:
        """What the output layer reads: the normed last hidden states, (B, T, C); `start` as for `plan`, or None."""
        if start is None:
            if cache is not None:
                raise ValueError("A cache needs to know where the tokens go: give start_pos or positions.")
            return self.run_layers(tokens, self.plan(tokens, 0, None))
        cache = self.own_cache() if cache is None else cache
        cache.ids = []
        length = start + tokens.shape[1] if isinstance(start, int) else cache.k.shape[3]
        with torch.no_grad():  # what is written to a cache outlives the call: it cannot carry gradients
            return self.run_layers(tokens, self.plan(tokens, start, cache.narrow(tokens.shape[0], length)))

    def plan(self, tokens: Tensor, start: int | Tensor, cache: KVCache | None) -> Step:
        """Angles and mask of one pass; `start` is the position of the first token, of all rows or (B,) of each."""
        T, device = tokens.shape[1], tokens.device
        if self.rope is None or self.rope[0].device != device:
            table = rotary_table(self.params.head_dim, self.params.max_seq_len, self.params.rope_theta)
            self.rope = tuple(part.to(device) for part in paired(*table))
        cos, sin = self.rope
        if isinstance(start, int):
            if start < 0 or start + T > cos.shape[0]:
                raise ValueError(f"Positions {start} to {start + T - 1} exceed max_seq_len {cos.shape[0]}.")
            mask = None
            if start and T > 1:
                seen = torch.arange(start + T, device=device)
                mask = seen <= seen[start:, None]  # (T, S)
            cos, sin = cos[start : start + T], sin[start : start + T]  # (T, D)
            return Step(cos, sin, mask, start == 0 and T > 1, start, cache)
        at = start[:, None] + torch.arange(T, device=device)  # (B, T)
        mask = torch.arange(cache.k.shape[3], device=device) <= at[:, None, :, None]  # (B, 1, T, S)
        rows = torch.arange(at.shape[0], device=device)[:, None]
        return Step(cos[at], sin[at], mask, False, (rows, at), cache)

    def run_layers(self, tokens: Tensor, step: Step) -> Tensor:
        h = self.tok_embeddings(tokens)  # (B, T, C)
        for layer in self.layers:
            h = layer(h, step)
        return self.norm(h)

    def logits(self, h: Tensor) -> Tensor:
        """The output layer: (..., C) -> (..., V) float32, the same on every rank."""
        return self.output(h).float()
