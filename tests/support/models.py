"""Tiny random models, as weights under Meta's names; nothing here calls the library to compute anything."""

from collections.abc import Mapping

import numpy as np
import torch

from llama.model import ModelArgs, Transformer
from support.reference import Shape

Weights = dict[str, torch.Tensor]

BASE_PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 97, "multiple_of": 16, "norm_eps": 1e-5}
VARIANTS = {
    "mha": {},
    "gqa": {"n_kv_heads": 2, "rope_theta": 1e6, "norm_eps": 1e-6, "ffn_dim_multiplier": 1.3},
}


def hidden_size(params: Mapping) -> int:
    """Two thirds of 4 * dim, times the multiplier, rounded up; in integers, as the released sizes need."""
    hidden = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params["multiple_of"]
    return (hidden + multiple - 1) // multiple * multiple


def random_weights(params: Mapping, seed: int = 0) -> Weights:
    """Weights large enough that logits spread over several units, so that float32 noise rarely changes a choice."""
    generator = torch.Generator().manual_seed(seed)
    dim, heads, hidden, vocab = params["dim"], params["n_heads"], hidden_size(params), params["vocab_size"]
    kv_dim = dim // heads * (params.get("n_kv_heads") or heads)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    weights = {"tok_embeddings.weight": normal(vocab, dim, std=1.0)}
    for n in range(params["n_layers"]):
        weights |= {
            f"layers.{n}.attention.wq.weight": normal(dim, dim, std=0.3),
            f"layers.{n}.attention.wk.weight": normal(kv_dim, dim, std=0.3),
            f"layers.{n}.attention.wv.weight": normal(kv_dim, dim, std=0.2),
            f"layers.{n}.attention.wo.weight": normal(dim, dim, std=0.2),
            f"layers.{n}.feed_forward.w1.weight": normal(hidden, dim, std=0.2),
            f"layers.{n}.feed_forward.w2.weight": normal(dim, hidden, std=0.2),
            f"layers.{n}.feed_forward.w3.weight": normal(hidden, dim, std=0.2),
            f"layers.{n}.attention_norm.weight": 1 + normal(dim, std=0.2),
            f"layers.{n}.ffn_norm.weight": 1 + normal(dim, std=0.2),
        }
    return weights | {"norm.weight": 1 + normal(dim, std=0.2), "output.weight": normal(vocab, dim, std=0.3)}


def build_model(params: Mapping, weights: Weights, max_batch_size: int = 4, max_seq_len: int = 64) -> Transformer:
    model = Transformer(ModelArgs(**params, max_batch_size=max_batch_size, max_seq_len=max_seq_len))
    model.load_state_dict(weights, strict=True)
    return model.eval()


def as_float64(weights: Weights) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in weights.items()}


def shape_of(params: Mapping) -> Shape:
    """The same model's numbers for the reference."""
    heads = params["n_heads"]
    return Shape(
        n_layers=params["n_layers"],
        n_heads=heads,
        n_kv_heads=params.get("n_kv_heads") or heads,
        norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0),
    )
