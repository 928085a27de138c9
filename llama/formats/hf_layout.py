"""Hugging Face's layout: what it calls Meta's tensors, and its order of the rows of q and k.

Its checkpoints have this layout, and so have the adapters that PEFT writes, whatever layout their base has here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llama.formats.slicing import Slice

# From Meta's names to Hugging Face's: inside a layer, then outside the layers.
IN_LAYER = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
OUTSIDE = {
    "tok_embeddings": "model.embed_tokens",
    "norm": "model.norm",
    "output": "lm_head",
}

# Ends of the names of the matrices whose rows are reordered.
HALF_SPLIT = ("attention.wq.weight", "attention.wk.weight")


def hugging_face_names(n_layers: int) -> dict[str, str]:
    """From Meta's name of each tensor to Hugging Face's."""
    names = {}
    for n in range(n_layers):
        for ours, theirs in IN_LAYER.items():
            names[f"layers.{n}.{ours}.weight"] = f"model.layers.{n}.{theirs}.weight"
    for ours, theirs in OUTSIDE.items():
        names[f"{ours}.weight"] = f"{theirs}.weight"
    return names


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Copy rows of q or k, whole heads, from Hugging Face's order to Meta's.

    The rotary embedding turns pairs of rows: i and i + D/2 of a head in Hugging Face's order, 2i and 2i + 1 in Meta's.
    A head of D = 6 whose rows are stored as 0 2 4 1 3 5 becomes 0 1 2 3 4 5.
    """
    heads = rows.unflatten(0, (-1, 2, head_dim // 2))
    return heads.transpose(1, 2).flatten(0, 2)


def deinterleave(rows: Tensor, head_dim: int) -> Tensor:
    """Copy rows of q or k, whole heads, from Meta's order to Hugging Face's."""
    heads = rows.unflatten(0, (-1, head_dim // 2, 2))
    return heads.transpose(1, 2).flatten(0, 2)


class HalfSplit:
    """A slice of q or k in Meta's order of rows, made of a slice in Hugging Face's."""

    def __init__(self, stored: Slice, head_dim: int):
        self.stored = stored
        self.head_dim = head_dim
        self.shape: torch.Size = stored.shape
        self.dtype: torch.dtype = stored.dtype

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        if dim != 0:
            return interleave(self.stored.narrow(dim, start, length), self.head_dim)

        # Rows move within their head: read whole heads, from that of the first row to that of the last.
        first = start // self.head_dim * self.head_dim
        end = -(-(start + length) // self.head_dim) * self.head_dim
        heads = self.stored.narrow(0, first, end - first)
        rows = interleave(heads, self.head_dim)
        return rows.narrow(0, start - first, length)
