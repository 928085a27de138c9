"""A naive Llama 2 in numpy float64, for the tests to measure the library against.

Written from the papers, one sequence at a time, recomputing everything for every token; it knows nothing of batches,
caches, chunks or devices. Weights are a dict from checkpoint names to arrays.

Sources: RMSNorm, Zhang and Sennrich 2019, equation 4. Rotary embedding, Su et al. 2021, equations 15 and 34 (pairs of
neighbouring features, angle m * theta**(-2i/d)). Scaled dot-product attention, Vaswani et al. 2017, equation 1.
Grouped queries, Ainslie et al. 2023, section 2.2. SwiGLU, Shazeer 2020, equation 6. Pre-normalised blocks, Touvron et
al. 2023, section 2. Nucleus sampling, Holtzman et al. 2020, section 3.1.

Legend: T tokens, C model dimension, H query heads, K key-value heads, D head dimension, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Shape:
    """What the formulas need besides the weights; everything else is read off the weights' shapes."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0


# --- the model ---------------------------------------------------------------------------------------------------


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """Divide each vector by its root mean square, then scale each feature. (..., C) -> (..., C)"""
    mean_square = (x * x).mean(axis=-1, keepdims=True)
    return x / np.sqrt(mean_square + eps) * weight


def rotate_pairs(x: np.ndarray, positions: Sequence[int], theta: float) -> np.ndarray:
    """Turn the pair (x[2i], x[2i+1]) of the vector at position m by the angle m * theta**(-2i/D). (T, heads, D)"""
    out = np.empty_like(x)
    head_dim = x.shape[-1]
    for row, position in enumerate(positions):
        for i in range(head_dim // 2):
            angle = position * theta ** (-2 * i / head_dim)
            cos, sin = math.cos(angle), math.sin(angle)
            even, odd = x[row, :, 2 * i], x[row, :, 2 * i + 1]
            out[row, :, 2 * i] = even * cos - odd * sin
            out[row, :, 2 * i + 1] = even * sin + odd * cos
    return out


def softmax(x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def log_softmax(x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def attention(x: np.ndarray, weights: Weights, name: str, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Causal grouped attention over one whole sequence. (T, C) -> (T, C), rotated keys (T, K, D), values (T, K, D)"""
    length = x.shape[0]
    queries = (x @ weights[f"{name}.wq.weight"].T).reshape(length, shape.n_heads, -1)  # (T, H, D)
    keys = (x @ weights[f"{name}.wk.weight"].T).reshape(length, shape.n_kv_heads, -1)  # (T, K, D)
    values = (x @ weights[f"{name}.wv.weight"].T).reshape(length, shape.n_kv_heads, -1)  # (T, K, D)
    queries = rotate_pairs(queries, range(length), shape.rope_theta)
    keys = rotate_pairs(keys, range(length), shape.rope_theta)

    head_dim = queries.shape[-1]
    queries_per_key = shape.n_heads // shape.n_kv_heads
    mixed = np.zeros_like(queries)  # (T, H, D)
    for head in range(shape.n_heads):
        group = head // queries_per_key
        for t in range(length):
            scores = keys[: t + 1, group] @ queries[t, head] / math.sqrt(head_dim)
            mixed[t, head] = softmax(scores) @ values[: t + 1, group]
    return mixed.reshape(length, -1) @ weights[f"{name}.wo.weight"].T, keys, values


def feed_forward(x: np.ndarray, weights: Weights, name: str) -> np.ndarray:
    """w2(silu(w1 x) * w3 x). (T, C) -> (T, C)"""
    gate = x @ weights[f"{name}.w1.weight"].T
    swish = gate / (1.0 + np.exp(-gate))
    return (swish * (x @ weights[f"{name}.w3.weight"].T)) @ weights[f"{name}.w2.weight"].T


def block(x: np.ndarray, weights: Weights, name: str, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Attention and feed-forward, each behind its norm and added to the stream. Also the layer's keys and values."""
    normed = rms_norm(x, weights[f"{name}.attention_norm.weight"], shape.norm_eps)
    mixed, keys, values = attention(normed, weights, f"{name}.attention", shape)
    x = x + mixed
    normed = rms_norm(x, weights[f"{name}.ffn_norm.weight"], shape.norm_eps)
    return x + feed_forward(normed, weights, f"{name}.feed_forward"), keys, values


def run(tokens: Sequence[int], weights: Weights, shape: Shape) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The whole model on one sequence. T ids -> logits (T, V), keys and values (n_layers, T, K, D)"""
    x = weights["tok_embeddings.weight"][list(tokens)]
    keys, values = [], []
    for layer in range(shape.n_layers):
        x, layer_keys, layer_values = block(x, weights, f"layers.{layer}", shape)
        keys.append(layer_keys)
        values.append(layer_values)
    x = rms_norm(x, weights["norm.weight"], shape.norm_eps)
    return x @ weights["output.weight"].T, np.stack(keys), np.stack(values)


def logits(tokens: Sequence[int], weights: Weights, shape: Shape) -> np.ndarray:
    """Logits (T, V) of one sequence."""
    return run(tokens, weights, shape)[0]


def token_log_probs(tokens: Sequence[int], weights: Weights, shape: Shape) -> list[float]:
    """Log-probability of each token given those before it; the first, which nothing predicts, counts as 0.0."""
    table = log_softmax(logits(tokens, weights, shape))
    return [0.0] + [float(table[t - 1, tokens[t]]) for t in range(1, len(tokens))]


# --- sampling ----------------------------------------------------------------------------------------------------


def kept_distribution(
    row: np.ndarray, temperature: float, top_p: float, top_k: int | None = None
) -> list[tuple[int, float]]:
    """The ids that survive temperature, top-k and top-p, in falling order, each with its renormalised probability."""
    probs = softmax(np.asarray(row, dtype=np.float64) / temperature)
    falling = sorted(range(len(probs)), key=lambda i: -probs[i])
    if top_k is not None:
        falling = falling[:top_k]
    total = math.fsum(probs[i] for i in falling)
    kept, preceding = [], 0.0
    for i in falling:
        if preceding <= top_p:
            kept.append((i, probs[i] / total))
        preceding += probs[i] / total
    mass = math.fsum(p for _, p in kept)
    return [(i, p / mass) for i, p in kept]


def invert(kept: list[tuple[int, float]], uniform: float) -> int:
    """The id whose stretch of the cumulated distribution holds the uniform number."""
    reached = 0.0
    for i, p in kept:
        reached += p
        if uniform < reached:
            return i
    return kept[-1][0]


def distance_to_edge(kept: list[tuple[int, float]], uniform: float) -> float:
    """How far the uniform number is from where another id would be drawn; float32 cannot decide below about 1e-6."""
    reached = np.cumsum([p for _, p in kept])[:-1]
    return float(np.abs(reached - uniform).min()) if len(reached) else 1.0


# --- generation --------------------------------------------------------------------------------------------------


@dataclass
class Completion:
    """What one row of `generate` and `text_completion` should be; ids and logprobs are of generated tokens only."""

    ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str
    margin: float  # smallest lead of the best logit over the next: below 1e-3, float32 may rightly choose otherwise


def first_match(text: str, stops: Sequence[str]) -> int:
    """Where the stop string that begins first begins, or -1."""
    return min((text.find(stop) for stop in stops if stop in text), default=-1)


def tokens_before(ids: Sequence[int], text: str, decode: Callable[[list[int]], str]) -> int:
    """How many ids have all of their characters inside `text`, the part of the decoded ids before a match."""
    return max(n for n in range(len(ids) + 1) if text.startswith(decode(list(ids[:n]))))


def complete(
    prompt: Sequence[int],
    next_logits: Callable[[list[int]], np.ndarray],
    *,
    max_seq_len: int,
    max_gen_len: int | None = None,
    eos_id: int,
    decode: Callable[[list[int]], str],
    stop: Sequence[str | int] = (),
    pick: Callable[[np.ndarray, int], int] | None = None,
) -> Completion:
    """Generate for one prompt, asking for the logits (V,) after all ids so far again for every token.

    `pick(logits, t)` chooses generated token t; by default the largest logit. `decode` turns ids into text. The row
    ends at `eos_id`, at a stop id, when the text so far holds a stop string, or after as many tokens as fit.
    """
    limit = max_seq_len - len(prompt)
    if max_gen_len is not None:
        limit = min(limit, max_gen_len)
    stop_ids = [s for s in stop if isinstance(s, int)]
    stop_texts = [s for s in stop if isinstance(s, str)]
    ids, logprobs, margin = [], [], math.inf
    for t in range(limit):
        last = next_logits([*prompt, *ids])
        if pick is None:
            chosen = int(last.argmax())
            margin = min(margin, float(last[chosen] - np.delete(last, chosen).max()))
        else:
            chosen = pick(last, t)
        if chosen == eos_id or chosen in stop_ids:
            return Completion(ids, logprobs, decode(ids), "eos" if chosen == eos_id else "stop", margin)
        ids.append(chosen)
        logprobs.append(float(log_softmax(last)[chosen]))
        text = decode(ids)
        begin = first_match(text, stop_texts)
        if begin >= 0:
            n = tokens_before(ids, text[:begin], decode)
            return Completion(ids[:n], logprobs[:n], text[:begin], "stop", margin)
    return Completion(ids, logprobs, decode(ids), "length", margin)
