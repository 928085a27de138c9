"""Write the missing middle of a few pieces of code with Code Llama 7B or 13B.

python example_infilling.py --ckpt_dir CodeLlama-7b/
torchrun --standalone --nproc_per_node 2 example_infilling.py --ckpt_dir CodeLlama-13b/ --suffix_first
"""

import sys

import flags
from llama import Llama
from llama.parallel import world

HOLE = "<HOLE>"
PROGRAMS = [
    f'''def longest_word(sentence: str) -> str:
    """{HOLE}"""
    words = sentence.split()
    return max(words, key=len, default="")
''',
    f'''import csv


def column_sums(path: str) -> dict[str, float]:
    """The sum of each numeric column of a CSV file with a header line."""
    sums: dict[str, float] = {{}}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            {HOLE}
    return sums
''',
]


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    temperature: float = 0.0,
    top_p: float = 0.9,
    max_seq_len: int = 512,
    max_gen_len: int | None = 128,
    max_batch_size: int = 2,
    suffix_first: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    seed: int = 1,
):
    """Print each program with its hole filled in, the new part between two marks.

    Args:
        ckpt_dir: folder with consolidated.NN.pth and params.json of Code Llama 7B or 13B, base or Instruct.
        tokenizer_path: the tokenizer.model; found in ckpt_dir or one level up if not given.
        temperature: 0 takes the likeliest token each time; higher values choose more freely.
        top_p: sample from the likeliest tokens that together have this probability.
        max_seq_len: tokens of a program with its middle, at most.
        max_gen_len: tokens of the middle, at most.
        max_batch_size: programs to work on at once.
        suffix_first: show the model what follows the hole before what precedes it.
        device: cuda, mps or cpu; the best of them if not given.
        dtype: float32, bfloat16 or float16; the checkpoint's where the device computes it if not given.
        seed: the same seed gives the same code.
    """
    if ckpt_dir is None:
        sys.exit(
            "Infilling needs a model made for it: give --ckpt_dir the folder of a Code Llama 7B or 13B checkpoint."
        )
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, device=device, dtype=dtype)
    prefixes, suffixes = zip(*(program.split(HOLE) for program in PROGRAMS), strict=True)
    results = llama.text_infilling(prefixes, suffixes, temperature, top_p, max_gen_len, suffix_first=suffix_first)
    for prefix, suffix, result in zip(prefixes, suffixes, results, strict=True):
        show(f"{prefix}>>>{result['generation']}<<<{suffix}\n==================================\n")


def show(text: str) -> None:
    """Print on the first rank only."""
    if world()[0] == 0:
        print(text, flush=True)


if __name__ == "__main__":
    flags.run(main)
