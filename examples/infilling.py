"""Write the missing middle of a few pieces of code with Code Llama 7B or 13B.

python examples/infilling.py --ckpt_dir CodeLlama-7b/
torchrun --standalone --nproc_per_node 2 examples/infilling.py --ckpt_dir CodeLlama-13b/ --suffix_first
"""

import sys

from llama import cli

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
NEEDED = """Infilling needs a model that was made for it: Code Llama 7B or 13B, base or Instruct.
With the link from Meta's e-mail for Code Llama:
    ./download.sh --models 7b
    python examples/infilling.py --ckpt_dir CodeLlama-7b/
or from the Hugging Face hub:
    ./download.sh --from hf --layout hf --family codellama --models 7b
    python examples/infilling.py --ckpt_dir CodeLlama-7b-hf/"""


def main(
    ckpt_dir: str | None = None,
    tokenizer_path: str | None = None,
    lora: str | None = None,
    temperature: float = 0.0,
    top_p: float = 0.9,
    top_k: int | None = None,
    max_seq_len: int = 512,
    max_gen_len: int | None = 128,
    max_batch_size: int = 2,
    suffix_first: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: str | None = None,
    seed: int = 1,
):
    """Print each program with its hole filled in, the new part between two marks.

    Args:
        ckpt_dir: folder with the weights of Code Llama 7B or 13B, base or Instruct; without one, how to get it.
        tokenizer_path: the tokenizer.model; found in ckpt_dir or one level up if not given.
        lora: folder of an adapter, in PEFT's layout, to merge into the weights.
        temperature: 0 takes the likeliest token each time; higher values choose more freely.
        top_p: sample from the likeliest tokens that together have this probability.
        top_k: sample from that many of the likeliest tokens.
        max_seq_len: tokens of a program with its middle, at most.
        max_gen_len: tokens of the middle, at most; None for as many as max_seq_len allows.
        max_batch_size: programs to work on at once.
        suffix_first: show the model what follows the hole before what precedes it.
        device: cuda, mps or cpu; the best of them if not given.
        dtype: float32, bfloat16 or float16; the checkpoint's where the device computes it if not given.
        quantize: int8 or int4, to keep the weights in that many bits.
        compile: default or cudagraph, to let torch compile the steps; the first tokens then take a minute or more.
        seed: the same seed gives the same code.
    """
    if ckpt_dir is None:
        sys.exit(NEEDED)
    options = cli.chosen(temperature=temperature, top_p=top_p, top_k=top_k, max_gen_len=max_gen_len)

    from llama import Llama

    how = {"device": device, "dtype": dtype, "quantize": quantize, "lora": lora, "compile": compile}
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **how)

    prefixes, suffixes = zip(*(program.split(HOLE) for program in PROGRAMS), strict=True)
    results = llama.text_infilling(prefixes, suffixes, suffix_first=suffix_first, **options)
    for prefix, suffix, result in zip(prefixes, suffixes, results, strict=True):
        cli.show(f"{prefix}>>>{result['generation']}<<<{suffix}{cli.RULE}")


if __name__ == "__main__":
    cli.run(main)
