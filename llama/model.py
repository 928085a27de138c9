"""The Llama 2 transformer: a function from token ids to logits, and the cache that makes its next call cheap.

Sources: Llama 2 (arXiv:2307.09288, section 2.2 and its appendix A.2), LLaMA (arXiv:2302.13971, section 2.2), RMSNorm
(arXiv:1910.07467), rotary embedding (arXiv:2104.09864, section 3.4.2), SwiGLU (arXiv:2002.05202), grouped-query
attention (arXiv:2305.13245).

Letters used for shapes, here and in the tests:

    B  batch rows               H  query heads            C  model dimension (`dim`)
    T  new tokens of this call  K  key and value heads    V  vocabulary
    S  cached positions         D  dimension of a head    L  layers

This module knows nothing of files, text, sampling or quantization, nor which device it runs on, nor who calls it.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import parallel
from llama.args import ModelArgs
from llama.cache import KVCache, Window
from llama.parallel import ColumnParallelLinear, ParallelEmbedding, RowParallelLinear

__all__ = [  # what callers import from here, some of it defined elsewhere
    "Attention", "FeedForward", "KVCache", "ModelArgs", "RMSNorm", "Transformer", "TransformerBlock",
    "apply_rotary_emb", "precompute_freqs_cis", "repeat_kv",
]  # fmt: skip


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
    features = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu")
    frequencies = 1.0 / theta ** (features / head_dim)
    positions = torch.arange(end, dtype=torch.float32, device="cpu")

    angles = torch.outer(positions, frequencies)
    return angles.cos(), angles.sin()


def paired(cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """The table as `rotate` reads it, a number for each of a head's D: (cos, cos) and (-sin, sin) for every pair."""
    cosines = cos.repeat_interleave(2, dim=-1)
    signed_sines = torch.stack((-sin, sin), dim=-1)
    return cosines, signed_sines.flatten(-2)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each neighbouring pair (x[2i], x[2i + 1]) of a head by its position's angle, in float32.

    x (B, T, H, D); cos and sin, as `paired` gives them, (T, D), or (B, T, D) where rows differ in position. The pairs
    of Meta's checkpoints are neighbours; Hugging Face's are the two halves of a head.
    """
    wide = x.float()
    swapped = wide.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # x[1], x[0], x[3], x[2], ...

    # All heads of a position turn by the same angles.
    cos = cos.unsqueeze(-2)
    sin = sin.unsqueeze(-2)
    return torch.addcmul(wide * cos, swapped, sin).type_as(x)


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    """The rotary table as complex numbers, (end, dim / 2) complex64, for callers that want that form."""
    cos, sin = rotary_table(dim, end, theta)
    return torch.complex(cos, sin)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries (B, T, H, D) and keys (B, T, K, D) by complex `freqs_cis` (T, D / 2)."""
    cos, sin = paired(freqs_cis.real, freqs_cis.imag)
    return rotate(xq, cos, sin), rotate(xk, cos, sin)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeat each key-value head for its group of queries: (B, S, K, D) -> (B, S, K * n_rep, D).

    The model itself never does this: attention reads grouped heads as they are.
    """
    return x.repeat_interleave(n_rep, dim=2)


@dataclass
class Pass:
    """What all layers of one forward pass share: angles, which keys each query may see, where new keys are stored.

    With T = 3 new tokens after 2 cached ones, `mask` lets the queries (rows) see the keys (columns) marked x:

        x x x . .
        x x x x .
        x x x x x

    A key is visible if its position is not after the query's. That test alone hides a neighbour's padding and what
    an earlier, longer sequence left in the cache, so no row is ever fully masked. `causal` says that the triangle
    begins at the first key, which attention kernels know without a mask. `where` indexes the (B, K, S, D) keys of a
    layer.
    """

    cos: Tensor
    sin: Tensor
    mask: Tensor | None
    causal: bool
    where: tuple[slice | Tensor, ...]
    window: Window | None


class Attention(nn.Module):
    """Causal attention with grouped key-value heads and rotary positions, over this rank's share of the heads."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        ranks = parallel.size()
        self.head_dim = args.head_dim
        self.n_local_heads = args.n_heads // ranks
        self.n_local_kv_heads = max(args.kv_heads // ranks, 1)

        kv_features = (
            max(args.kv_heads, ranks) * args.head_dim
        )  # several ranks may keep the same head
        self.wq = ColumnParallelLinear(args.dim, args.n_heads * args.head_dim)
        copies = max(ranks // args.kv_heads, 1)
        self.wk = ColumnParallelLinear(args.dim, kv_features, copies=copies)
        self.wv = ColumnParallelLinear(args.dim, kv_features, copies=copies)
        self.wo = RowParallelLinear(args.n_heads * args.head_dim, args.dim)

    def forward(self, x: Tensor, layer: int, now: Pass) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, self.n_local_heads, self.head_dim)
        k = self.wk(x).view(B, T, self.n_local_kv_heads, self.head_dim)
        v = self.wv(x).view(B, T, self.n_local_kv_heads, self.head_dim)

        heads = (self.n_local_heads, self.n_local_kv_heads)
        q, k = rotate(torch.cat((q, k), dim=2), now.cos, now.sin).split(heads, dim=2)

        keys = k.transpose(1, 2)  # (B, K, T, D)
        values = v.transpose(1, 2)
        if now.window is not None:
            now.window.keys[layer][now.where] = keys
            now.window.values[layer][now.where] = values
            keys = now.window.keys[layer]  # (B, K, S, D)
            values = now.window.values[layer]

        return self.wo(self.attend(q, keys, values, now))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, now: Pass) -> Tensor:
        """softmax(q k' / sqrt(D)) v for q (B, T, H, D) and keys, values (B, K, S, D) -> (B, T, H * D).

        Softmax runs in float32 inside the kernel. A single new token takes its group's queries as if they were
        positions: they see the same keys, and the kernel then reads each key-value head once.
        """
        B, T, H, D = q.shape

        if T == 1:
            q = q.view(B, self.n_local_kv_heads, -1, D)  # (B, K, H / K, D)
            out = F.scaled_dot_product_attention(q, keys, values, attn_mask=now.mask)
            return out.reshape(B, 1, H * D)

        grouped = self.n_local_kv_heads != H
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            keys,
            values,
            attn_mask=now.mask,
            is_causal=now.causal,
            enable_gqa=grouped,
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

    def forward(self, x: Tensor, now: Pass) -> Tensor:
        """(B, T, C) -> (B, T, C)."""
        h = x + self.attention(self.attention_norm(x), self.layer_id, now)
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
            raise ValueError(
                f"{parallel.size()} ranks cannot share {sizes}; use one of {params.rank_counts()}."
            )

        self.params = params
        self.vocab_size = params.vocab_size
        self.n_layers = params.n_layers
        self.tok_embeddings = ParallelEmbedding(params.vocab_size, params.dim)
        self.layers = nn.ModuleList(TransformerBlock(i, params) for i in range(params.n_layers))
        self.norm = RMSNorm(params.dim, params.norm_eps)
        self.output = ColumnParallelLinear(params.dim, params.vocab_size, gather_output=True)
        # Not a buffer, so that it stays float32; made when it is needed.
        self.rope: tuple[Tensor, Tensor] | None = None
        self.cache: KVCache | None = None

    def own_cache(self) -> KVCache:
        """The model's cache, allocated at the first call, where and as the weights are."""
        weight = self.norm.weight
        if (
            self.cache is None
            or self.cache.k.device != weight.device
            or self.cache.k.dtype != weight.dtype
        ):
            self.cache = KVCache.allocate(self.params.cache_shape(), weight.dtype, weight.device)
        return self.cache

    def forward(
        self,
        tokens: Tensor,
        start_pos: int | None = None,
        *,
        positions: Tensor | None = None,
        cache: KVCache | Window | None = None,
        logits_at: Tensor | None = None,
    ) -> Tensor:
        """Float32 logits (B, T, V) of int64 tokens (B, T); with `logits_at` (B,) only those of one index a row, (B, V).

        `positions` is (B,) int64. A `Window` stands for rows of a cache whose owner keeps account of what they hold;
        of any other cache, the rows that are used become unknown. Raises `ValueError` for positions that are negative
        or that the cache (without one, the rotary table) does not hold, `RuntimeError` for a cache in use.
        """
        # What is written to a cache outlives the call, so it cannot carry gradients.
        cached = start_pos is not None or positions is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() and not cached):
            if positions is None:
                now = self.pass_from(start_pos, tokens, cache)
            elif start_pos is None:
                now = self.pass_at(positions, tokens, cache)
            else:
                raise ValueError("Both start_pos and positions are given; give one of them.")

            h = self.tok_embeddings(tokens)  # (B, T, C)
            for layer in self.layers:
                h = layer(h, now)
            h = self.norm(h)

            if logits_at is not None:
                h = h[torch.arange(h.shape[0], device=h.device), logits_at]  # (B, C)
            return self.output(h).float()  # the same on every rank

    def pass_from(
        self, start_pos: int | None, tokens: Tensor, cache: KVCache | Window | None
    ) -> Pass:
        """Plan a pass whose rows all begin at `start_pos`; None: at 0, through no cache."""
        if start_pos is None and cache is not None:
            raise ValueError(
                "A cache needs to know where the tokens go: give start_pos or positions."
            )
        try:
            start = 0 if start_pos is None else operator.index(start_pos)
        except TypeError:
            raise ValueError(
                f"start_pos is {start_pos!r}; it must be an integer, the first token's position."
            ) from None

        B, T = tokens.shape
        end = start + T
        cos, sin = self.rotary(tokens.device)
        if start < 0 or end > cos.shape[0]:
            raise ValueError(f"Positions {start} to {end - 1} exceed max_seq_len {cos.shape[0]}.")

        mask = None
        if start and T > 1:
            seen = torch.arange(end, device=tokens.device)
            mask = seen <= seen[start:, None]  # (T, S)

        window = None if start_pos is None else self.open(cache, B, end)
        where = (slice(None), slice(None), slice(start, end))
        return Pass(cos[start:end], sin[start:end], mask, start == 0 and T > 1, where, window)

    def pass_at(self, positions: Tensor, tokens: Tensor, cache: KVCache | Window | None) -> Pass:
        """Plan a pass whose row b begins at `positions[b]`."""
        B, T = tokens.shape
        cos, sin = self.rotary(tokens.device)

        # Whoever makes a window has counted the positions, and need not wait for a device here.
        if not isinstance(cache, Window):
            self.check_positions(positions, B, T)
        window = self.open(cache, B, cos.shape[0])

        S = window.keys[0].shape[2]
        at = positions[:, None] + torch.arange(T, device=tokens.device)  # (B, T)
        mask = torch.arange(S, device=tokens.device) <= at[:, None, :, None]  # (B, 1, T, S)

        rows = torch.arange(B, device=tokens.device)[:, None, None]
        heads = torch.arange(window.keys[0].shape[1], device=tokens.device)[:, None]
        where = (rows, heads, at[:, None, :])  # (B, K, T)
        return Pass(cos[at], sin[at], mask, False, where, window)

    def check_positions(self, positions: Tensor, B: int, T: int) -> None:
        """Raise `ValueError` unless `positions` are one row's first position each, with room for T tokens."""
        if (
            not isinstance(positions, Tensor)
            or positions.dtype != torch.int64
            or positions.shape != (B,)
        ):
            kind = (
                f"{tuple(positions.shape)} {positions.dtype}"
                if isinstance(positions, Tensor)
                else repr(positions)
            )
            raise ValueError(
                f"positions are {kind}; they must be an int64 tensor of shape ({B},), one for each row."
            )

        limit = self.params.max_seq_len
        lowest = int(positions.min())
        highest = int(positions.max()) + T - 1
        if lowest < 0 or highest >= limit:
            raise ValueError(f"Positions {lowest} to {highest} exceed max_seq_len {limit}.")

    def rotary(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The rotary table as `rotate` reads it, each part (max_seq_len, D), on the device."""
        if self.rope is None or self.rope[0].device != device:
            params = self.params
            # A table that is made in inference mode could not take part in training.
            with torch.inference_mode(False):
                cos, sin = paired(
                    *rotary_table(params.head_dim, params.max_seq_len, params.rope_theta)
                )
                self.rope = (cos.to(device), sin.to(device))
        return self.rope

    def open(self, cache: KVCache | Window | None, rows: int, length: int) -> Window:
        """The window of a cache, the model's own by default, for that many rows and positions."""
        if isinstance(cache, Window):
            return cache
        cache = self.own_cache() if cache is None else cache

        most_rows = cache.k.shape[1]
        most_positions = cache.k.shape[3]
        if rows > most_rows:
            raise ValueError(f"{rows} rows do not fit a cache of max_batch_size {most_rows}.")
        if length > most_positions:
            raise ValueError(
                f"Position {length - 1} does not fit a cache of max_seq_len {most_positions}."
            )

        cache.forget(rows)
        return cache.window(0, rows, length)
