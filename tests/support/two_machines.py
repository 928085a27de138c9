"""What `two_machines.sh` runs: make a tiny checkpoint, and print a checkpoint's greedy ids from the first rank."""

import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[n]) for n in (2, 1)]  # where nothing is installed

from llama import Llama  # noqa: E402
from llama.parallel import size, world  # noqa: E402

PROMPTS = ["Where is the red cup?", "Anna took", ""]


def make(folder: Path) -> None:
    from support.checkpoints import write_checkpoint
    from support.models import BASE_PARAMS, random_weights
    from support.tokenizers import train_tokenizer

    params = BASE_PARAMS | {"n_kv_heads": 2, "vocab_size": 480}
    with tempfile.TemporaryDirectory() as temporary:
        write_checkpoint(folder, params, random_weights(params, seed=8), train_tokenizer(Path(temporary)))


def print_ids(folder: Path) -> None:
    """One line a row, each id followed by a comma; on two machines, the model must really be shared."""
    llama = Llama.build(folder, max_seq_len=64, device="cpu", dtype="float32")
    assert size() == world()[1], "the ranks do not share one model"
    prompts = [llama.tokenizer.encode(prompt, bos=True, eos=False) for prompt in PROMPTS]
    rows, _ = llama.generate(prompts, 24, temperature=0)
    if world()[0] == 0:
        for row in rows:
            print("".join(f"{id}," for id in row))


if __name__ == "__main__":
    command, folder = sys.argv[1:]
    {"make": make, "ids": print_ids}[command](Path(folder))
