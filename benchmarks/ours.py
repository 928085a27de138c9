"""This library as an engine of `bench.py`: models of any shape, and the clock around the library's public calls.

Another checkout of the library is measured in a process of its own, over the same weights: `Elsewhere` starts it and
sends it one request a line, `answer` runs there. So `Ours` keeps to what every checkout has: `Llama(model, tokenizer)`,
`generate` and `stream`.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.clock import Clocked, seconds
from llama import Llama, ModelArgs, Transformer, parallel
from llama.device import choose_device, choose_dtype, collective_backend, use_device

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo"
SHAPES = {
    "15m": dict(dim=288, n_layers=6, n_heads=6, vocab_size=32000, multiple_of=32),
    "110m": dict(dim=768, n_layers=12, n_heads=12, vocab_size=32000, multiple_of=32),
    "1.1b": dict(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000, multiple_of=256),
    "7b": dict(dim=4096, n_layers=32, n_heads=32, vocab_size=32000, multiple_of=256),
}
EOS = 2
QUANTIZED = ("int8", "int4")
# The other checkout's library comes first, then these benchmarks, which that checkout may have too.
CHILD = """
import sys
sys.path[0] = sys.argv[1]
import llama
sys.path[0] = sys.argv[2]
from benchmarks.ours import answer
answer(sys.argv[1])
"""


class Letters:
    """A tokenizer for random weights: each id is one letter. `eos_id` -1 is an end that never comes."""

    bos_id = 1
    pad_id = -1
    prefix_id = suffix_id = middle_id = eot_id = None

    def __init__(self, n_words: int, eos_id: int = -1):
        self.n_words = n_words
        self.eos_id = eos_id
        self.sp_model = self

    def is_byte(self, id: int) -> bool:
        return False

    def is_control(self, id: int) -> bool:
        return id == self.eos_id

    def is_unknown(self, id: int) -> bool:
        return False

    def id_to_piece(self, id: int) -> str:
        return "a"

    def decode(self, ids: int | list[int]) -> str:
        return "a" if isinstance(ids, int) else "a" * len(ids)


def make_model(
    shape: str,
    longest: int,
    most: int,
    device: str | None = None,
    dtype: str | None = None,
    ckpt_dir: str | None = None,
    layers: int | None = None,
    counting: bool = False,
) -> Transformer:
    """The checkpoint, the demo's by default, or random weights of a shape; `counting` as `count_down` says."""
    folder = ckpt_dir or (DEMO if shape == "demo" and not counting else None)
    if folder is not None:
        return Llama.build(folder, max_seq_len=longest, max_batch_size=most, device=device, dtype=dtype).model
    return random_model(shape, longest, most, device, dtype, layers, counting)


def random_model(
    shape: str,
    longest: int,
    most: int,
    device: str | None,
    dtype: str | None,
    layers: int | None = None,
    counting: bool = False,
) -> Transformer:
    """Weights of the shape, made in place from a seed."""
    device = choose_device(device, parallel.local_world()[0])
    use_device(device)
    parallel.initialize(None, collective_backend(device), device)
    dtype = choose_dtype(dtype, torch.bfloat16, device)

    args = ModelArgs(**sizes_of(shape), max_seq_len=longest, max_batch_size=most)
    args.n_layers = layers or args.n_layers
    with torch.device("meta"):
        model = Transformer(args)

    generator = torch.Generator(device).manual_seed(0)
    state = {name: torch.empty(p.shape, dtype=dtype, device=device) for name, p in model.named_parameters()}
    for name, weight in state.items():
        weight.fill_(1.0) if "norm" in name else weight.normal_(std=0.02, generator=generator)
    if counting:
        count_down(state)
    model.load_state_dict(state, assign=True)
    return model.requires_grad_(False).eval()


def sizes_of(shape: str) -> dict:
    if shape == "demo":
        return json.loads((DEMO / "params.json").read_text())
    if shape not in SHAPES:
        raise ValueError(f"shape is {shape!r}; it must be demo or one of {', '.join(SHAPES)}.")
    return SHAPES[shape]


def count_down(state: dict[str, Tensor]) -> None:
    """Make i - 1 the likeliest token after token i, in every model that reads these weights.

    The output layer's row for an id is the embedding of the next id, and embeddings are so much larger than what the
    layers add to them that the layers, which compute as ever, change no choice. So a prompt that ends in id
    `EOS + 1 + n` is answered with n tokens and the end of sequence, whatever runs it.
    """
    embedding = state["tok_embeddings.weight"]
    embedding.mul_(1 / 0.02)
    state["output.weight"].copy_(embedding.roll(-1, dims=0))


class Ours(Clocked):
    """This library: the likeliest token each time, chosen, read and given out as text by a stream."""

    def __init__(self, model: Transformer, form: str = "plain", eos_id: int = -1):
        self.model = quantized_copy(model, form) if form in QUANTIZED else model
        self.device = model.norm.weight.device
        compiled = "cudagraph" if form == "compiled" else None
        self.llama = Llama(self.model, Letters(model.vocab_size, eos_id), compile=compiled)
        self.weight_bytes = step_weights(self.model, model)
        self.cache_itemsize = model.norm.weight.itemsize

    def prefill(self, prompts: list[list[int]]) -> None:
        self.rows = len(prompts)
        self.pieces = self.llama.stream(prompts, temperature=0)
        begun: set[int] = set()
        while len(begun) < self.rows:
            begun.add(next(self.pieces).row)

    def step(self) -> None:
        missing = self.rows
        while missing > 0:
            missing -= len(next(self.pieces).ids)

    def end(self) -> None:
        self.pieces.close()

    def rows_at_once(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        """Seconds until all prompts are answered that are given in one call, and the tokens of each answer."""
        answers: list[list[int]] = []
        spent = seconds(lambda: answers.extend(self.llama.generate(prompts, None, temperature=0)[0]), self.device)
        return spent, [len(ids) for ids in answers]

    def rows_in_chunks(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        """The same, each call given as many prompts as the cache has rows."""
        size = self.model.params.max_batch_size
        spent = 0.0
        lengths = []
        for first in range(0, len(prompts), size):
            chunk = self.rows_at_once(prompts[first : first + size])
            spent += chunk[0]
            lengths += chunk[1]
        return spent, lengths

    def lone_steps(self, prompts: list[list[int]], row: int, steps: int) -> list[float]:
        """Seconds of each of so many steps of one row, after all other rows of the batch have ended."""
        running = set(range(len(prompts)))
        self.pieces = self.llama.stream(prompts, temperature=0)
        while running != {row}:
            piece = next(self.pieces)
            if piece.finish_reason is not None:
                running.remove(piece.row)

        # The first piece may come from a step that other rows shared, or from its middle.
        next(self.pieces)
        times = []
        for _ in range(steps):
            started = time.perf_counter()
            next(self.pieces)
            times.append(time.perf_counter() - started)
        self.end()
        return times


def quantized_copy(model: Transformer, kind: str) -> Transformer:
    """The same model with quantized matrices; embedding, norms and cache are shared."""
    from llama import kernels  # not in every checkout that is measured
    from llama.loading import place

    with torch.device("meta"):
        copy = Transformer(model.params)
    for name, weight in model.state_dict().items():
        place(copy, name, weight, weight.dtype, kind)
    kernels.pack(copy)
    copy.cache = model.own_cache()
    return copy.requires_grad_(False).eval()


def resized_copy(model: Transformer, max_batch_size: int) -> Transformer:
    """The same weights with a cache of its own, of another number of rows."""
    args = ModelArgs(**vars(model.params) | {"max_batch_size": max_batch_size})
    with torch.device("meta"):
        copy = Transformer(args)
    copy.load_state_dict(model.state_dict(), assign=True)
    return copy.requires_grad_(False).eval()


def step_weights(engine: nn.Module, model: Transformer) -> int:
    """Bytes of the weights that a step reads: of the embedding it takes some rows only."""
    return sum(t.nbytes for t in (*engine.parameters(), *engine.buffers())) - model.tok_embeddings.weight.nbytes


class Elsewhere:
    """The library of another checkout, as `Ours` in a process of its own, which times its own work."""

    def __init__(self, folder: Path, model: dict, eos_id: int = -1):
        """`model` holds the arguments of `make_model`. Raises `ValueError` for a folder without the library."""
        folder = Path(folder).resolve()
        if not (folder / "llama" / "__init__.py").exists():
            raise ValueError(f"{folder} is no checkout of this library: it has no llama/; give one to --against.")
        command = [sys.executable, "-c", CHILD, str(folder), str(ROOT)]
        self.folder = folder
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        about = self.ask("open", model, eos_id)
        self.weight_bytes = about["weight_bytes"]
        self.cache_itemsize = about["cache_itemsize"]
        self.version = {f"llama of {folder.name}": commit(folder)}

    def ask(self, call: str, *arguments: object) -> object:
        print(json.dumps([call, *arguments]), file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process that ran the library of {self.folder} has ended; its error stands above.")
        return json.loads(line)

    def turn(self, prompts: list[list[int]], steps: int) -> tuple[float, float]:
        return tuple(self.ask("turn", prompts, steps))

    def peak(self, prompts: list[list[int]]) -> int | None:
        return self.ask("peak", prompts)

    def rows_at_once(self, prompts: list[list[int]]) -> tuple[float, list[int]]:
        return tuple(self.ask("rows_at_once", prompts))

    def lone_steps(self, prompts: list[list[int]], row: int, steps: int) -> list[float]:
        return self.ask("lone_steps", prompts, row, steps)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def commit(folder: Path) -> str:
    command = ["git", "-C", str(folder), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def answer(folder: str) -> None:
    """Answer each request on standard input until there are no more; the first one opens the model."""
    library = Path(sys.modules["llama"].__file__)
    if not library.is_relative_to(folder):
        raise RuntimeError(f"The library came from {library.parent}, not from {folder}.")

    _, model, eos_id = json.loads(sys.stdin.readline())
    ours = Ours(make_model(**model), eos_id=eos_id)
    ours.model.own_cache().clear()
    print(json.dumps({"weight_bytes": ours.weight_bytes, "cache_itemsize": ours.cache_itemsize}), flush=True)
    for line in sys.stdin:
        call, *arguments = json.loads(line)
        print(json.dumps(getattr(ours, call)(*arguments)), flush=True)
