"""How long a checkpoint takes to open and how much memory that needs: from one file, two, and a Hugging Face folder.

    python benchmarks/loading.py write FOLDER --shape 7B      random bfloat16 weights, three times 13.5 GB
    python benchmarks/loading.py measure FOLDER               a markdown table, at one and two ranks
    python benchmarks/loading.py measure FOLDER --quantize int8 --ranks 1 --layouts meta1

Each measurement is a fresh process (or two, under torchrun) that builds the model and then reads one number of every
page of its weights: weights that stay in a mapped file cost nothing to open and something to read, so both moments are
timed. The kernel drops the files from its page cache before a cold measurement, and reads them all before a warm one.
Resident memory is that of the rank that holds most: anonymous (what this process has to itself, and what counts where
memory is short) and file-backed (pages of the mapped files, which processes share and the kernel may drop). Nothing
here computes with the weights, so their values do not matter: each tensor repeats one block of normal numbers.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path

import fire
import torch
from torch import Tensor

from llama import Llama, ModelArgs, Tokenizer, Transformer
from llama.convert import Source, convert, plan_hf, write_hf
from llama.formats.writing import Bar, Output

SHAPES = {
    "7B": ModelArgs(dim=4096, n_layers=32, n_heads=32, vocab_size=32000),
    "1.1B": ModelArgs(dim=2048, n_layers=22, n_heads=32, n_kv_heads=4, vocab_size=32000),
    "tiny": ModelArgs(dim=256, n_layers=2, n_heads=8, n_kv_heads=2, vocab_size=4096),
}
TOKENIZER = Path(__file__).parent.parent / "demo" / "tokenizer.model"
FORMATS = {"hf": "Hugging Face", "meta1": "Meta, 1 file", "meta2": "Meta, 2 files"}
PAGE = 4096
BUFFER = 2**24


class RandomSource(Source):
    """A checkpoint that is nowhere: sizes, and as many random numbers as are asked for."""

    def __init__(self, args: ModelArgs, tokenizer_path: Path):
        self.args = args
        self.dtype = torch.bfloat16
        self.checkpoint = None
        self.tokenizer_path = tokenizer_path
        self.tokenizer = Tokenizer(tokenizer_path)
        with torch.device("meta"):
            self.shapes = {name: weight.shape for name, weight in Transformer(args).state_dict().items()}
        self.matrices = dict.fromkeys(self.shapes)
        generator = torch.Generator().manual_seed(0)
        self.block = (torch.randn(2**22, generator=generator) * 0.02).bfloat16()

    def share(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        length = self.shapes[name].numel()
        return self.block.repeat(-(-length // len(self.block)))[:length].view(self.shapes[name])


def write(folder: str, shape: str = "7B", tokenizer_path: str | None = None, layouts: tuple[str, ...] = tuple(FORMATS)):
    """Write a random checkpoint as `hf`, `meta1` and `meta2` in FOLDER; what is there already is kept.

    Args:
        folder: where there is room for three copies.
        shape: 7B, 1.1B or tiny.
        tokenizer_path: any tokenizer.model; the demo's if not given.
        layouts: some of hf, from which the others are made, meta1 and meta2.
    """
    folder = Path(folder)
    tokenizer = Path(tokenizer_path or TOKENIZER)
    if not (folder / "hf" / "config.json").exists():
        source = RandomSource(SHAPES[shape], tokenizer)
        (folder / "hf").mkdir(parents=True, exist_ok=True)
        write_hf(source, plan_hf(source, None), Output(folder / "hf", Bar(source.total())))
    for count in (1, 2):
        if f"meta{count}" in layouts and not (folder / f"meta{count}").exists():
            convert(folder / "hf", folder / f"meta{count}", shards=count)


def measure(
    folder: str,
    ranks: tuple[int, ...] = (1, 2),
    dtype: str = "bfloat16",
    quantize: str = "",
    layouts: tuple[str, ...] = tuple(FORMATS),
) -> None:
    """Print the table for the checkpoints that `write` left in FOLDER.

    Args:
        folder: what was given to `write`.
        ranks: numbers of processes.
        dtype: the format to compute in; on a CPU without bfloat16 it has to be asked for, or weights are converted.
        quantize: int8 or int4, to quantize while loading.
        layouts: some of hf, meta1 and meta2.
    """
    folder = Path(folder)
    ranks, layouts = ((x,) if isinstance(x, int | str) else x for x in (ranks, layouts))
    lines = [
        "| checkpoint | ranks | page cache | build, s | all weights read, s | anonymous, GB | file-backed, GB "
        "| weights of a rank, GB | cache, GB |",
        "| --- | ---: | --- |" + " ---: |" * 6,
    ]
    for name, title in ((name, FORMATS[name]) for name in layouts):
        files = sorted(path for path in (folder / name).iterdir() if path.suffix in (".pth", ".safetensors"))
        for count in ranks:
            for cold in (False, True):
                (drop if cold else read)(files)
                found = run(folder / name, count, dtype, quantize)
                worst = {key: max(rank[key] for rank in found) for key in found[0]}
                numbers = (worst["build"], worst["touched"], *(worst[key] / 1e9 for key in MEMORY))
                state = "cold" if cold else "warm"
                lines.append(f"| {title} | {count} | {state} | " + " | ".join(f"{n:.2f}" for n in numbers) + " |")
                print(lines[-1], file=sys.stderr)
    drop(files)
    size = sum(path.stat().st_size for path in files)
    began = time.perf_counter()
    read(files)
    rate = size / (time.perf_counter() - began) / 1e9
    print("\n".join(lines))
    print(f"\n{size / 1e9:.2f} GB a checkpoint; one process reads such files from the disk at {rate:.2f} GB/s.\n")
    print(f"{date.today()}, {machine()}; Python {platform.python_version()}, torch {torch.__version__}.")


MEMORY = ("anonymous", "file", "weights", "cache")


def drop(files: list[Path]) -> None:
    """Ask the kernel to forget what it holds of the files; it does, as nothing has them open or unwritten."""
    for path in files:
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(files: list[Path]) -> None:
    """Bring the files into the page cache."""
    buffer = bytearray(BUFFER)
    for path in files:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def run(checkpoint: Path, ranks: int, dtype: str, quantize: str) -> list[dict[str, float]]:
    """What each rank of a fresh job measured."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    with tempfile.TemporaryDirectory() as out:
        worker = [str(Path(__file__).resolve()), "rank", str(checkpoint), dtype, out, quantize]
        root = Path(__file__).resolve().parent.parent
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)} | os.environ
        subprocess.run([sys.executable, *launcher, *worker], check=True, env=environment)
        return [json.loads(path.read_text()) for path in sorted(Path(out).iterdir())]


def rank(checkpoint: str, dtype: str, out: str, quantize: str) -> None:
    """One process of `run`: build, read every page, and write down times and the largest resident sizes in OUT."""
    peaks, done = {"anonymous": 0, "file": 0}, threading.Event()

    def watch() -> None:
        while True:
            last = done.wait(0.005)
            for key, value in resident().items():
                peaks[key] = max(peaks[key], value)
            if last:
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    began = time.perf_counter()
    options = {"max_seq_len": 512, "max_batch_size": 1, "device": "cpu", "dtype": dtype, "quantize": quantize or None}
    model = Llama.build(checkpoint, **options).model
    built = time.perf_counter()
    weights = [*model.parameters(), *model.buffers()]
    for weight in weights:
        weight.view(torch.uint8).flatten()[::PAGE].sum()
    touched = time.perf_counter()
    done.set()
    watcher.join()
    found = {"build": built - began, "touched": touched - began, **peaks}
    found["weights"] = sum(weight.nbytes for weight in weights)
    found["cache"] = model.cache.k.nbytes + model.cache.v.nbytes
    (Path(out) / os.environ.get("RANK", "0")).write_text(json.dumps(found))


def resident() -> dict[str, int]:
    """Bytes of this process in memory, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Rss")}
    return {"anonymous": sizes["RssAnon"], "file": sizes["RssFile"] + sizes["RssShmem"]}


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB"


if __name__ == "__main__":
    fire.Fire({"write": write, "measure": measure, "rank": rank})
