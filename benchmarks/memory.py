"""Print, as a markdown table, what each model needs of memory: the estimate `Llama.build` checks before it allocates.

python benchmarks/memory.py
"""

from llama import ModelArgs
from llama.loading import held, needed

MODELS = {
    "Llama 2 7B": ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000),
    "Llama 2 13B": ModelArgs(dim=5120, n_layers=40, n_heads=40, vocab_size=32000),
    "Llama 2 70B": ModelArgs(
        dim=8192,
        n_layers=80,
        n_heads=64,
        n_kv_heads=8,
        vocab_size=32000,
        multiple_of=4096,
        ffn_dim_multiplier=1.3,
    ),
}
FORMATS = (
    ("bfloat16, float16", 2, None),
    ("float32", 4, None),
    ("int8", 2, "int8"),
    ("int4", 2, "int4"),
)
RANKS = (1, 2, 8)


def table() -> str:
    """Weights a rank at each rank count, and the cache of 1,000 tokens, in GB (10^9 bytes)."""
    ranks = " | ".join(f"{n} rank{'s' * (n > 1)}" for n in RANKS)
    lines = [
        f"| model | dtype | {ranks} | cache of 1,000 tokens |",
        "| --- | --- |" + " ---: |" * (len(RANKS) + 1),
    ]
    for name, args in MODELS.items():
        args.max_batch_size, args.max_seq_len = 1, 1000
        for dtype, itemsize, quantize in FORMATS:
            weights = " | ".join(f"{held(args, itemsize, quantize, n)[0] / 1e9:.1f}" for n in RANKS)
            lines.append(f"| {name} | {dtype} | {weights} | {needed(args, itemsize)[1] / 1e9:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
