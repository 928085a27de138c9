"""`python -m llama.convert SRC DST`: any checkpoint that opens here, written anew in Meta's layout or Hugging Face's.

Numbers are copied bit for bit unless another format is asked for. What is written grows under a temporary name and
gets its own at the end, with the sizes last, so nothing unfinished can be taken for a checkpoint. Nothing imports this
module; it does not know how the model computes.
"""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import shutil
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fire
import torch
from torch import Tensor

from llama import checkpoint
from llama.checkpoint import CUT, DTYPES, HALF_SPLIT, deinterleave, joined_shape, take
from llama.device import choose_dtype, dtype_name
from llama.loading import empty_matrix, model_args
from llama.lora import Adapter, Product
from llama.model import ModelArgs, Transformer
from llama.quantize import FORMATS
from llama.tokenizer import Tokenizer

HF_FILE_BYTES = 5 * 10**9  # of one safetensors file, unless their number is given
# Beside the weights, and worth taking from one Hugging Face folder to another.
COMPANIONS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


class Bar:
    """How much of all bytes has been written, on standard error: redrawn at each percent if that is a terminal."""

    def __init__(self, total: int):
        self.total, self.written, self.shown = total, 0, -1

    def advance(self, count: int) -> None:
        self.written += count
        percent = min(100 * self.written // max(self.total, 1), 100)
        if percent > self.shown and (percent == 100 or sys.stderr.isatty()):
            self.shown = percent
            bar = f"[{'#' * (percent // 4):<25}] {percent:3d}%  {self.written / 1e9:.2f} of {self.total / 1e9:.2f} GB"
            print(f"\rllama.convert: {bar}", end="" if percent < 100 else "\n", file=sys.stderr, flush=True)


class Output:
    """A folder that is being written: knows the checksum of each file and moves the bar as bytes go out."""

    def __init__(self, folder: Path, bar: Bar):
        self.folder, self.bar, self.sums = folder, bar, {}

    def create(self, name: str) -> OutputFile:
        return OutputFile(self, name)

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        with self.create(name) as file:
            file.write(json.dumps(value, indent=2).encode() + b"\n")

    def copy(self, path: Path, name: str) -> None:
        with self.create(name) as file:
            file.write(path.read_bytes())

    def write_checklist(self) -> None:
        """`checklist.chk`, which `md5sum -c` reads."""
        (self.folder / "checklist.chk").write_text("".join(f"{sum}  {name}\n" for name, sum in self.sums.items()))


class OutputFile:
    """One file of an `Output`; `error` is what a write failed of, which torch replaces by words of its own."""

    def __init__(self, output: Output, name: str):
        self.output, self.name = output, name
        self.file = open(output.folder / name, "wb", buffering=0)  # noqa: SIM115
        self.md5 = hashlib.md5(usedforsecurity=False)
        self.error: OSError | None = None

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self.md5.update(view)
        try:
            done = 0
            while done < len(view):  # one call to the system writes at most 2 GiB
                done += self.file.write(view[done : done + 2**26])
        except OSError as error:
            self.error = error
            raise
        self.output.bar.advance(len(view))
        return len(view)

    def flush(self) -> None:
        """Nothing is held back."""

    def __enter__(self) -> OutputFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                os.fsync(self.file.fileno())
                self.output.sums[self.name] = self.md5.hexdigest()
        finally:
            self.file.close()
        if self.error is not None:
            raise self.error from None


class Source:
    """An opened checkpoint with its sizes: any part of any tensor as it will be written, an adapter merged in.

    Raises `ValueError` for shapes that do not agree, else as `Llama.build`.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer_path: str | Path | None,
        dtype: str | None,
        lora: str | None = None,
        quantize: str | None = None,
    ):
        self.checkpoint = checkpoint.find(folder)
        self.tokenizer_path = Path(tokenizer_path or checkpoint.find_tokenizer(folder))
        self.tokenizer = Tokenizer(self.tokenizer_path)
        self.checkpoint.open()
        self.args = model_args(self.checkpoint.params, self.tokenizer.n_words, 1, 1)
        with torch.device("meta"):
            model = Transformer(self.args)
        self.shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        self.matrices = {name: matrix for name in self.shapes if (matrix := empty_matrix(model, name, quantize))}
        if any(".weight." in name for name in self.checkpoint.shards[0]):
            raise ValueError(f"{folder} is quantized; convert the original that it was made from.")
        checkpoint.check_names(self.checkpoint, self.shapes)
        stored = checkpoint.stored_dtype(self.checkpoint, convert=dtype is not None)
        self.dtype = stored if dtype is None else choose_dtype(dtype, stored, torch.device("cpu"))
        stored_name = self.checkpoint.stored_name
        found = {name: joined_shape(stored_name(name), self.pieces(name), self.cut(name)) for name in self.shapes}
        self.check_shapes(found, str(folder))
        adapter = None if lora is None else Adapter(Path(str(lora)), self.args.n_layers, self.args.head_dim)
        self.changes = {} if adapter is None else adapter.changes
        self.check_shapes({name: list(change.shape) for name, change in self.changes.items()}, str(lora))

    def check_shapes(self, found: Mapping[str, list[int]], where: str) -> None:
        for name, shape in found.items():
            if shape != list(self.shapes[name]):
                raise ValueError(
                    f"{self.checkpoint.stored_name(name)} in {where} has the shape {tuple(shape)}, but "
                    f"{self.checkpoint.sizes.name} describes {tuple(self.shapes[name])}."
                )

    def cut(self, name: str) -> int | None:
        return CUT.get(checkpoint.module_name(name))

    def pieces(self, name: str) -> list[checkpoint.Piece]:
        return [shard[name] for shard in self.checkpoint.shards]

    def share(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Part `index` of `count` of a tensor as Meta cuts it, nearly even where `count` does not divide it."""
        pieces, cut, length = self.pieces(name), self.cut(name), self.shapes[name][self.cut(name) or 0]
        if cut is None:
            pieces, index, count = pieces[:1], 0, 1
        begin, end = length * index // count, length * (index + 1) // count
        tensor = take(pieces, cut or 0, begin, end - begin)
        if name in self.changes:
            change = take([self.changes[name]], cut or 0, begin, end - begin)
            tensor = tensor.float() + change if isinstance(self.changes[name], Product) else change
        return tensor if name in self.matrices else tensor.to(self.dtype)  # quantizing rounds, once

    def stored(self, name: str, index: int, count: int) -> dict[str, Tensor]:
        """What a file holds of a tensor: its share, or the parts of the quantized matrix."""
        if name not in self.matrices:
            return {name: alone(self.share(name, index, count))}
        matrix = self.matrices[name]
        matrix.quantize(self.share(name))
        parts = {f"{name}.{part}": getattr(matrix, part) for part in matrix.parts}
        matrix.to("meta")
        return parts

    def size(self, name: str) -> int:
        if name in self.matrices:
            return sum(part.nbytes for part in self.matrices[name].buffers())
        return self.shapes[name].numel() * self.dtype.itemsize

    def total(self) -> int:
        return sum(self.size(name) for name in self.shapes)


def convert(
    src: str | Path,
    dst: str | Path,
    to: str = "meta",
    shards: int | None = None,
    dtype: str | None = None,
    tokenizer_path: str | Path | None = None,
    lora: str | Path | None = None,
    quantize: str | None = None,
) -> None:
    """Write the checkpoint in folder SRC to the new folder DST.

    Args:
        src: folder with consolidated.NN.pth and params.json, or with config.json and safetensors or pytorch_model.bin.
        dst: folder to make; it may exist if it is empty.
        to: meta or hf, the layout to write.
        shards: number of weight files; if not given, 1 for meta, and for hf as many as keep them under 5 GB.
        dtype: float32, bfloat16 or float16; if not given, every number is copied as it is.
        tokenizer_path: the tokenizer.model; found in SRC or one level up if not given.
        lora: folder of an adapter, merged into what is written.
        quantize: int8 or int4, for the matrices of the layers; one file in Meta's layout.
    """
    src, dst = Path(str(src)), Path(str(dst))
    if to not in ("meta", "hf"):
        raise ValueError(f"--to is {to!r}; it must be meta or hf.")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise FileExistsError(f"{dst} exists and is not an empty folder; give a new name, or remove it first.")
    if quantize is not None and (quantize not in FORMATS or to != "meta" or shards not in (None, 1)):
        raise ValueError(
            f"--quantize is {quantize!r}; it must be one of {', '.join(FORMATS)}, into one file, --to meta."
        )
    source = Source(src, tokenizer_path, dtype, lora, quantize)
    plan = plan_meta(source, shards) if to == "meta" else plan_hf(source, shards)
    partial = dst.absolute().with_name(dst.name + ".partial")
    free = shutil.disk_usage(next(parent for parent in partial.parents if parent.is_dir())).free
    if source.total() > free:
        raise OSError(full(dst, source, free))
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        raise FileExistsError(
            f"{partial} exists: another conversion is writing it, or one was killed; remove it if none is running."
        ) from None
    try:
        output = Output(partial, Bar(source.total()))
        write = write_meta if to == "meta" else write_hf
        write(source, plan, output)
        output.write_checklist()
        partial.replace(dst)  # over an empty folder too
    except BaseException as error:  # an interruption is none of the ordinary ones
        shutil.rmtree(partial)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(full(dst, source, shutil.disk_usage(partial.parent).free)) from None
        raise


def full(dst: Path, source: Source, free: int) -> str:
    return (
        f"The disk of {dst} is full: the converted weights take {source.total() / 1e9:.2f} GB and {free / 1e9:.2f} GB "
        "are free; nothing was left there."
    )


def plan_meta(source: Source, shards: int | None) -> int:
    """The number of files. Raises `ValueError` for one that does not divide the matrices."""
    args, count = source.args, 1 if shards is None else shards
    lengths = (args.dim, args.ffn_hidden_dim, args.kv_heads * args.head_dim)
    allowed = [n for n in range(1, args.n_heads + 1) if not any(length % n for length in lengths)]
    if type(count) is not int or count not in allowed:
        raise ValueError(f"--shards is {count!r}; the matrices of this model divide into {allowed} files.")
    return count


def write_meta(source: Source, count: int, output: Output) -> None:
    """`consolidated.NN.pth`, `tokenizer.model`, `params.json`. Holds what one file needs beyond mapped views."""
    for index in range(count):
        state: dict[str, Tensor] = {}
        for name in source.shapes:
            state |= source.stored(name, index, count)
        with output.create(f"consolidated.{index:02d}.pth") as file:
            try:
                torch.save(state, file)
            except RuntimeError:
                if file.error is None:
                    raise
    output.copy(source.tokenizer_path, "tokenizer.model")
    output.write_json("params.json", meta_params(source.args))


def alone(tensor: Tensor) -> Tensor:
    """The same numbers without the storage around them, of which `torch.save` would write all; nothing is copied."""
    begin = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[begin : begin + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


def meta_params(args: ModelArgs) -> dict[str, int | float]:
    """The sizes under the names of `params.json`; what an older reader may not know is left out where it can be."""
    params = {name: getattr(args, name) for name in ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of")}
    params["norm_eps"] = args.norm_eps
    if args.kv_heads != args.n_heads:
        params["n_kv_heads"] = args.kv_heads
    if args.ffn_dim_multiplier is not None:
        params["ffn_dim_multiplier"] = args.ffn_dim_multiplier
    if args.rope_theta != ModelArgs.rope_theta:
        params["rope_theta"] = args.rope_theta
    return params


def plan_hf(source: Source, shards: int | None) -> dict[str, list[str]]:
    """The names of the tensors, Meta's, in each file to write, in order. Raises `ValueError` for too many files."""
    total = source.total()
    count = max(-(-total // HF_FILE_BYTES), 1) if shards is None else shards
    if type(count) is not int or not 1 <= count <= len(source.shapes):
        raise ValueError(f"--shards is {count!r}; it must be an integer from 1 to {len(source.shapes)}.")
    groups: list[list[str]] = [[]]
    written = 0
    for left, name in zip(range(len(source.shapes), 0, -1), source.shapes, strict=True):
        due = written >= total * len(groups) / count or left == count - len(groups)
        if groups[-1] and due and len(groups) < count:
            groups.append([])
        groups[-1].append(name)
        written += source.size(name)
    if count == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{n:05d}-of-{count:05d}.safetensors": group for n, group in enumerate(groups, 1)}


def write_hf(source: Source, plan: Mapping[str, list[str]], output: Output) -> None:
    """Safetensors, their index if there are several, tokenizer, `config.json`. Holds one tensor at a time."""
    names = checkpoint.hugging_face_names(source.args.n_layers)
    for file, group in plan.items():
        write_safetensors(source, {name: names[name] for name in group}, output, file)
    if len(plan) > 1:
        placed = {names[name]: file for file, group in plan.items() for name in group}
        index = {"metadata": {"total_size": source.total()}, "weight_map": placed}
        output.write_json("model.safetensors.index.json", index)
    output.copy(source.tokenizer_path, "tokenizer.model")
    if isinstance(source.checkpoint, checkpoint.HuggingFaceCheckpoint):
        for name in COMPANIONS:
            if (source.checkpoint.folder / name).is_file():
                output.copy(source.checkpoint.folder / name, name)
    output.write_json("config.json", hf_config(source))


def write_safetensors(source: Source, names: Mapping[str, str], output: Output, file: str) -> None:
    """The length of a JSON header (8 bytes), the header, then the numbers, tensor after tensor."""
    code = next(code for code, dtype in DTYPES.items() if dtype == source.dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, theirs in names.items():
        begin, end = end, end + source.size(name)
        header[theirs] = {"dtype": code, "shape": list(source.shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8
    with output.create(file) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = source.share(name)
            if name.endswith(HALF_SPLIT):
                tensor = deinterleave(tensor, source.args.head_dim)
            out.write(memoryview(tensor.contiguous().view(torch.uint8).numpy()))


def hf_config(source: Source) -> dict[str, Any]:
    """The sizes under the names of `config.json`.

    `params.json` does not say how many positions a model was trained for: unless the source does, it is 4,096, which
    is Llama 2's.
    """
    args, earlier = source.args, getattr(source.checkpoint, "config", {})
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.ffn_hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.kv_heads,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "max_position_embeddings": earlier.get("max_position_embeddings", 4096),
        "bos_token_id": source.tokenizer.bos_id,
        "eos_token_id": source.tokenizer.eos_id,
        "torch_dtype": dtype_name(source.dtype),
    }


def main() -> None:
    sys.tracebacklimit = 0  # a wrong argument ends in its one sentence
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that the partial folder is removed
    names = {*inspect.signature(convert).parameters, "help", "h"}
    for flag in (argument.partition("=")[0] for argument in sys.argv[1:] if argument.startswith("-")):
        if flag.lstrip("-").replace("-", "_") not in names:  # fire would say so when all is done
            sys.exit(f"{flag} is not a flag of llama.convert; --help lists them.")
    fire.Fire(convert)


if __name__ == "__main__":
    main()
