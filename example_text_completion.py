"""Continue a few texts with a base model; without arguments, with the demo checkpoint in demo/.

python example_text_completion.py
python example_text_completion.py "Once upon a time" --temperature 0
torchrun --standalone --nproc_per_node 2 example_text_completion.py --ckpt_dir llama-2-13b/
"""

from pathlib import Path

from llama import cli

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
    lora: str | None = None,
    temperature: float = 0.6,
    top_p: float = 0.9,
    top_k: int | None = None,
    min_p: float | None = None,
    presence_penalty: float | None = None,
    frequency_penalty: float | None = None,
    max_seq_len: int = 256,
    max_gen_len: int | None = 128,
    max_batch_size: int = 4,
    stop: list[str] | None = None,
    n: int = 1,
    device: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    compile: str | None = None,
    seed: int = 1,
    stream: bool = False,
):
    """Continue texts: print each prompt with what the model makes of it, as soon as it has ended.

    Args:
        prompts: texts to continue, each in quotes; some examples if there are none.
        ckpt_dir: folder with consolidated.NN.pth and params.json, or in the Hugging Face layout; demo/ if not given.
        tokenizer_path: the tokenizer.model; found in ckpt_dir or one level up if not given.
        lora: folder of an adapter, in PEFT's layout, to merge into the weights.
        temperature: 0 takes the likeliest token each time; higher values choose more freely.
        top_p: sample from the likeliest tokens that together have this probability.
        top_k: sample from that many of the likeliest tokens.
        min_p: drop tokens with less than this share of the likeliest token's probability.
        presence_penalty: subtract this from the logit of each token that has been generated already.
        frequency_penalty: subtract this for each time that a token has been generated.
        max_seq_len: tokens of prompt and continuation together, at most.
        max_gen_len: tokens of the continuation, at most; None for as many as max_seq_len allows.
        max_batch_size: prompts to work on at once.
        stop: a text that ends a continuation; give the flag once for each such text.
        n: continuations of each prompt; torchrun takes this flag for its own unless -- precedes the script.
        device: cuda, mps or cpu; the best of them if not given.
        dtype: float32, bfloat16 or float16; the checkpoint's where the device computes it if not given.
        quantize: int8 or int4, to keep the weights in that many bits.
        compile: default or cudagraph, to let torch compile the steps; the first tokens then take a minute or more.
        seed: the same seed gives the same text.
        stream: print each text while it is made.
    """
    cuts = {"top_p": top_p, "top_k": top_k, "min_p": min_p}
    penalties = {"presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty}
    options = cli.chosen(temperature=temperature, **cuts, **penalties, max_gen_len=max_gen_len, stop=stop, n=n)
    texts = prompts or (DEMO_PROMPTS if ckpt_dir == DEMO else PROMPTS)

    from llama import Llama

    how = {"device": device, "dtype": dtype, "quantize": quantize, "lora": lora, "compile": compile}
    llama = Llama.build(ckpt_dir, tokenizer_path, max_seq_len, max_batch_size, seed=seed, **how)

    prompt_tokens = [llama.tokenizer.encode(text, bos=True, eos=False) for text in texts]
    cli.show_rows(llama.stream(prompt_tokens, echo=True, **options), live=stream)


if __name__ == "__main__":
    cli.run(main)
