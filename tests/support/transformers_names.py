"""What transformers calls a model's tensors, and how it orders the rows of q and k, written down a second time."""

import torch


def interleave(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key matrix from (first half, second half) order to neighbouring pairs, head by head."""
    rows = []
    for head in weight.chunk(heads):
        first, second = head.chunk(2)
        for pair in zip(first, second, strict=True):
            rows.extend(pair)
    return torch.stack(rows)


def renamed(state: dict[str, torch.Tensor], heads: int, kv_heads: int) -> dict[str, torch.Tensor]:
    """transformers' state dict under the names and in the layout of Meta's checkpoints."""
    parts = {
        "self_attn.q_proj": "attention.wq",
        "self_attn.k_proj": "attention.wk",
        "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "model.embed_tokens": "tok_embeddings",
        "model.norm": "norm",
        "lm_head": "output",
    }
    ours = {}
    for name, tensor in state.items():
        for theirs, our in parts.items():
            name = name.replace(theirs, our)
        if name.endswith("wq.weight"):
            tensor = interleave(tensor, heads)
        if name.endswith("wk.weight"):
            tensor = interleave(tensor, kv_heads)
        ours[name.removeprefix("model.")] = tensor.clone()
    return ours
