"""From logits to the next token's id, and to the log-probability of an id.

This module knows nothing of tokenizers, positions or models. Randomness comes in as numbers: `sample` is a function.
"""

from __future__ import annotations

import torch
from torch import Tensor

CANDIDATES = 256  # probabilities that are sorted first; all are where these do not hold the nucleus


def log_probs(logits: Tensor, ids: Tensor) -> Tensor:
    """log softmax(logits)[ids] in float32: logits (..., V), ids (...) int64 -> (...)."""
    logits = logits.float()
    return logits.gather(-1, ids.unsqueeze(-1)).squeeze(-1) - logits.logsumexp(-1)


def keep_top_p(probs: Tensor, top_p: float) -> Tensor:
    """Zero each probability whose predecessors, in falling order, hold more than `top_p`; renormalize the rest.

    `probs` (..., V) falls along its last dimension. The first always stays. (Nucleus sampling, arXiv:1904.09751.)
    """
    total = probs.cumsum(-1)
    dropped = total - probs > top_p
    kept = probs.masked_fill(dropped, 0.0)
    last = (~dropped).sum(-1, keepdim=True) - 1
    return kept / total.gather(-1, last)  # the sum in falling order: zeros after it change no digit


def invert(probs: Tensor, uniforms: Tensor) -> Tensor:
    """The index at which the running sum of `probs` (..., V) first exceeds `uniforms` (...): (...) int64.

    Rounding may leave the whole sum a little under a uniform near 1; the last index with any probability takes it.
    """
    index = (probs.cumsum(-1) <= uniforms.unsqueeze(-1)).sum(-1)
    return torch.minimum(index, ((probs > 0).sum(-1) - 1).clamp(min=0))


def likeliest(probs: Tensor, top_p: float, top_k: int | None) -> tuple[Tensor, Tensor]:
    """At least the nucleus, and the `top_k` largest, of `probs` (B, V): (values, indices) falling, ties by index.

    Sorting a whole vocabulary costs more than a small model's step. The first CANDIDATES suffice where even the first
    of those that equal the smallest of them is outside, so that no tie with what was left out matters. Asking that
    would make the host wait for any device but a CPU.
    """
    if probs.is_cpu and probs.shape[-1] > CANDIDATES and (top_p < 1 if top_k is None else top_k < CANDIDATES):
        values, indices = probs.topk(CANDIDATES, dim=-1)
        indices, order = indices.sort(dim=-1)  # ties by index ...
        values, order = values.gather(-1, order).sort(dim=-1, descending=True, stable=True)  # ... stay in that order
        larger = values > values[..., -1:]
        enough = (values * larger).sum(-1) > top_p
        if top_k is not None:
            enough |= larger.sum(-1) >= top_k
        if bool(enough.all()):
            return values, indices.gather(-1, order)
    return probs.sort(dim=-1, descending=True, stable=True)


def sample(
    logits: Tensor, uniforms: Tensor | None, temperature: float, top_p: float = 1.0, top_k: int | None = None
) -> Tensor:
    """Next ids (B,) from logits (B, V) and one uniform number in [0, 1) for each row, (B,) float32.

    Temperature 0 takes the largest logit and reads no uniform. Otherwise softmax(logits / temperature) in float32,
    cut to the `top_k` largest, then to the `top_p` nucleus, and inverted at the uniform in falling order.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float()
    logits = logits - logits.amax(-1, keepdim=True)  # 0 at the top: any temperature is safe to divide by
    probs, order = likeliest((logits / temperature).softmax(-1), top_p, top_k)
    if top_k is not None:
        probs = probs[..., :top_k] / probs[..., :top_k].sum(-1, keepdim=True)
    chosen = invert(keep_top_p(probs, top_p), uniforms)
    return order.gather(-1, chosen.unsqueeze(-1)).squeeze(-1)


def sample_top_p(probs: Tensor, p: float) -> Tensor:
    """Draw ids (..., 1) from the `p` nucleus of probabilities (..., V), with torch's global generator.

    For callers that sample by themselves; the library uses `sample`, which leaves global state alone.
    """
    ordered, order = probs.float().sort(dim=-1, descending=True, stable=True)
    uniforms = torch.rand(probs.shape[:-1], device=probs.device)
    return order.gather(-1, invert(keep_top_p(ordered, p), uniforms).unsqueeze(-1))
