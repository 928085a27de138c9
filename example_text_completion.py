"""Continue a few texts with a base model; without arguments, with the demo checkpoint in demo/.

python example_text_completion.py
python example_text_completion.py "Once upon a time" --temperature 0
torchrun --standalone --nproc_per_node 2 example_text_completion.py --ckpt_dir llama-2-13b/
"""

import sys
from pathlib import Path

import flags
from llama import Llama
from llama.parallel import world

DEMO = str(Path(__file__).parent / "demo")
DEMO_PROMPTS = [
    "Once upon a time",
    "The little dog",
    "One sunny morning, Anna",
]
PROMPTS = [
    "I believe the meaning of life is",
    "Simply put, the theory of relativity states that ",
    "A list of translations from English to French:\n\nsea otter => loutre de mer\ncheese =>",
]


def main(
    *prompts: str,
    ckpt_dir: str = DEMO,
    tokenizer_path: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    max_seq_len: int = 256,
    max_gen_len: int | None = 128,
    max_batch_size: int = 4,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    seed: int = 1,
    stream: bool = False,
):
    """Print each prompt with the model's continuation.

    Args:
        prompts: texts to continue; some examples if there are none.
        ckpt_dir: folder with consolidated.NN.pth and params.json.
        tokenizer_path: the tokenizer.model; found in ckpt_dir or one level up if not given.
        temperature: 0 takes the likeliest token each time; higher values choose more freely.
        top_p: sample from the likeliest tokens that together have this probability.
        max_seq_len: tokens of prompt and continuation together, at most.
        max_gen_len: tokens of the continuation, at most.
        max_batch_size: prompts to work on at once.
        device: cuda, mps or cpu; the best of them if not given.
        dtype: float32, bfloat16 or float16; the checkpoint's where the device computes it if not given.
        quantize: int8 or int4, to keep the weights in that many bits.
        seed: the same seed gives the same text.
        stream: print the text as it is made, one prompt after the other.
    """
    options = {"device": device, "dtype": dtype, "quantize": quantize}
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **options)
    texts = [str(prompt) for prompt in prompts] or (DEMO_PROMPTS if ckpt_dir == DEMO else PROMPTS)
    out = sys.stdout if world()[0] == 0 else None
    if stream:
        for text in texts:
            ids = llama.tokenizer.encode(text, bos=True, eos=False)
            for piece in llama.stream([ids], max_gen_len, temperature, top_p, echo=True):
                show(piece.text, out, end="")
            show("\n\n==================================\n", out)
        return
    for result in llama.text_completion(texts, temperature, top_p, max_gen_len, echo=True):
        show(result["generation"], out)
        show("\n==================================\n", out)


def show(text: str, out, end: str = "\n") -> None:
    """Print on the first rank only."""
    if out:
        print(text, end=end, file=out, flush=True)


if __name__ == "__main__":
    flags.run(main)
