"""`python -m llama.convert SRC DST`: any checkpoint that opens here, written anew in Meta's layout or Hugging Face's.

Numbers are copied bit for bit unless another format is asked for. The output grows under a temporary name and gets its
own name at the end; the sizes are written last. So nothing unfinished can be taken for a checkpoint. Nothing imports
this module, and it does not know how the model computes.
"""

from __future__ import annotations

import errno
import inspect
import json
import shutil
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import fire
import torch
from torch import Tensor

from llama import formats
from llama.device import choose_dtype, dtype_name
from llama.formats import slicing
from llama.formats.hf_layout import HALF_SPLIT, deinterleave, hugging_face_names
from llama.formats.hugging_face import HuggingFaceCheckpoint
from llama.formats.lora import Adapter
from llama.formats.slicing import DTYPES
from llama.formats.writing import Bar, Output
from llama.kernels import FORMATS
from llama.loading import empty_matrix, expect_quantized, model_args
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer

HF_FILE_BYTES = 5 * 10**9  # of one safetensors file, unless their number is given

# Beside the weights, and worth taking from one Hugging Face folder to another.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
)


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
        self.checkpoint = formats.find(folder)
        self.tokenizer_path = Path(tokenizer_path or formats.find_tokenizer(folder))
        self.tokenizer = Tokenizer(self.tokenizer_path)

        # The sizes, and what each tensor becomes.
        self.checkpoint.open()
        self.args = model_args(self.checkpoint.params, self.tokenizer.n_words, 1, 1)
        with torch.device("meta"):
            model = Transformer(self.args)
        self.shapes = {name: weight.shape for name, weight in model.state_dict().items()}
        # The quantized matrix of each tensor, None for one that stays plain.
        self.matrices = {name: empty_matrix(model, name, quantize) for name in self.shapes}
        if expect_quantized(model, self.checkpoint):
            raise ValueError(f"{folder} is quantized; convert the original that it was made from.")

        # The tensors.
        slicing.check_names(self.checkpoint, self.shapes)
        stored = slicing.stored_dtype(self.checkpoint, list(self.shapes), convert=dtype is not None)
        self.dtype = stored if dtype is None else choose_dtype(dtype, stored, torch.device("cpu"))
        self.slices = slicing.join(self.checkpoint.shards)
        self.check_shapes()
        if lora is not None:
            adapter = Adapter(str(lora), self.args.n_layers, self.args.head_dim)
            self.slices = adapter.apply(self.slices)

    def check_shapes(self) -> None:
        for name, expected in self.shapes.items():
            found = self.slices[name].shape
            if tuple(found) != tuple(expected):
                what = f"{self.checkpoint.stored_name(name)} in {self.checkpoint.folder} has the shape {tuple(found)}"
                raise ValueError(
                    f"{what}, but {self.checkpoint.sizes.name} describes {tuple(expected)}."
                )

    def share(self, name: str, index: int = 0, count: int = 1) -> Tensor:
        """Part `index` of `count` of a tensor as Meta cuts it, nearly even where `count` does not divide it."""
        shape = self.shapes[name]
        dim = slicing.cut_dimension(name, shape)
        if dim is None:
            dim, index, count = 0, 0, 1
        begin = shape[dim] * index // count
        end = shape[dim] * (index + 1) // count

        tensor = slicing.take(self.slices[name], dim, begin, end - begin)
        if self.matrices[name] is not None:
            return tensor  # quantizing it will round, once
        return tensor.to(self.dtype)

    def stored(self, name: str, index: int, count: int) -> dict[str, Tensor]:
        """What a file holds of a tensor: its share, or the parts of the quantized matrix."""
        matrix = self.matrices[name]
        if matrix is None:
            return {name: alone(self.share(name, index, count))}
        matrix.quantize(self.share(name))
        parts = {f"{name}.{part}": getattr(matrix, part) for part in matrix.parts}
        matrix.to("meta")
        return parts

    def size(self, name: str) -> int:
        """The bytes that a tensor will take."""
        matrix = self.matrices[name]
        if matrix is not None:
            return sum(part.nbytes for part in matrix.buffers())
        return self.shapes[name].numel() * self.dtype.itemsize

    def total(self) -> int:
        return sum(self.size(name) for name in self.shapes)


def alone(tensor: Tensor) -> Tensor:
    """The same numbers without the storage around them, all of which `torch.save` would write; nothing is copied."""
    begin = tensor.storage_offset() * tensor.itemsize
    storage = tensor.untyped_storage()[begin : begin + tensor.nbytes]
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())


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
    src = Path(str(src))
    dst = Path(str(dst))
    check_arguments(dst, to, shards, quantize)
    source = Source(src, tokenizer_path, dtype, lora, quantize)
    if to == "meta":
        file_count = plan_meta(source, shards)
        write_into(dst, source, lambda output: write_meta(source, file_count, output))
    else:
        plan = plan_hf(source, shards)
        write_into(dst, source, lambda output: write_hf(source, plan, output))


def check_arguments(dst: Path, to: str, shards: int | None, quantize: str | None) -> None:
    if to not in ("meta", "hf"):
        raise ValueError(f"--to is {to!r}; it must be meta or hf.")
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise FileExistsError(
            f"{dst} exists and is not an empty folder; give a new name, or remove it first."
        )

    one_file = to == "meta" and shards in (None, 1)
    if quantize is not None and (quantize not in FORMATS or not one_file):
        allowed = f"one of {', '.join(FORMATS)}, into one file, --to meta"
        raise ValueError(f"--quantize is {quantize!r}; it must be {allowed}.")


def write_into(dst: Path, source: Source, write: Callable[[Output], None]) -> None:
    """Have `write` fill the folder `dst`, under a temporary name until all is there; leave nothing if it fails."""
    partial = dst.absolute().with_name(dst.name + ".partial")
    existing = next(parent for parent in partial.parents if parent.is_dir())
    free = shutil.disk_usage(existing).free
    if source.total() > free:
        raise OSError(full(dst, source, free))

    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError:
        why = "another conversion is writing it, or one was killed"
        raise FileExistsError(f"{partial} exists: {why}; remove it if none is running.") from None

    try:
        output = Output(partial, Bar(source.total()))
        write(output)
        output.write_checklist()
        partial.replace(dst)  # an empty folder is replaced too
    except BaseException as error:  # an interruption is not an Exception
        shutil.rmtree(partial)
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise OSError(full(dst, source, shutil.disk_usage(partial.parent).free)) from None
        raise


def full(dst: Path, source: Source, free: int) -> str:
    needed = f"{source.total() / 1e9:.2f} GB"
    left = f"{free / 1e9:.2f} GB"
    sizes = f"the converted weights take {needed} and {left} are free"
    return f"The disk of {dst} is full: {sizes}; nothing was left there."


# --- Meta's layout -----------------------------------------------------------------------------------------------


def plan_meta(source: Source, shards: int | None) -> int:
    """The number of files. Raises `ValueError` for one that does not divide the matrices."""
    args = source.args
    count = 1 if shards is None else shards
    lengths = (args.dim, args.ffn_hidden_dim, args.kv_heads * args.head_dim)
    allowed = [n for n in range(1, args.n_heads + 1) if all(length % n == 0 for length in lengths)]
    if type(count) is not int or count not in allowed:
        raise ValueError(
            f"--shards is {count!r}; the matrices of this model divide into {allowed} files."
        )
    return count


def write_meta(source: Source, count: int, output: Output) -> None:
    """Write `consolidated.NN.pth`, `tokenizer.model` and `params.json`.

    Beyond views of the mapped source, this holds what one file needs.
    """
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


def meta_params(args: ModelArgs) -> dict[str, int | float]:
    """The sizes under the names of `params.json`; what an older reader may not know is left out where it can be."""
    names = ("dim", "n_layers", "n_heads", "vocab_size", "multiple_of", "norm_eps")
    params = {name: getattr(args, name) for name in names}
    if args.kv_heads != args.n_heads:
        params["n_kv_heads"] = args.kv_heads
    if args.ffn_dim_multiplier is not None:
        params["ffn_dim_multiplier"] = args.ffn_dim_multiplier
    if args.rope_theta != ModelArgs.rope_theta:
        params["rope_theta"] = args.rope_theta
    return params


# --- Hugging Face's layout ---------------------------------------------------------------------------------------


def plan_hf(source: Source, shards: int | None) -> dict[str, list[str]]:
    """The names of the tensors, Meta's, in each file to write, in order. Raises `ValueError` for too many files."""
    names = list(source.shapes)
    total = source.total()
    count = max(-(-total // HF_FILE_BYTES), 1) if shards is None else shards
    if type(count) is not int or not 1 <= count <= len(names):
        raise ValueError(f"--shards is {count!r}; it must be an integer from 1 to {len(names)}.")

    # A file ends where its share of all bytes is reached, or where each tensor that is left needs a file of its own.
    groups: list[list[str]] = [[]]
    written = 0
    for index, name in enumerate(names):
        reached = written >= total * len(groups) / count
        needed = len(names) - index == count - len(groups)
        if groups[-1] and len(groups) < count and (reached or needed):
            groups.append([])
        groups[-1].append(name)
        written += source.size(name)

    if count == 1:
        return {"model.safetensors": groups[0]}
    plan = {}
    for number, group in enumerate(groups, 1):
        plan[f"model-{number:05d}-of-{count:05d}.safetensors"] = group
    return plan


def write_hf(source: Source, plan: Mapping[str, list[str]], output: Output) -> None:
    """Write safetensors, their index if there are several, tokenizer and `config.json`; hold one tensor at a time."""
    names = hugging_face_names(source.args.n_layers)
    for file, group in plan.items():
        write_safetensors(source, {name: names[name] for name in group}, output, file)

    if len(plan) > 1:
        file_of_tensor = {names[name]: file for file, group in plan.items() for name in group}
        index = {"metadata": {"total_size": source.total()}, "weight_map": file_of_tensor}
        output.write_json("model.safetensors.index.json", index)

    output.copy(source.tokenizer_path, "tokenizer.model")
    if isinstance(source.checkpoint, HuggingFaceCheckpoint):
        for name in COMPANIONS:
            path = source.checkpoint.folder / name
            if path.is_file():
                output.copy(path, name)
    output.write_json("config.json", hf_config(source))


def write_safetensors(source: Source, names: Mapping[str, str], output: Output, file: str) -> None:
    """Write the length of a JSON header (8 bytes), the header, then the numbers, tensor after tensor."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, theirs in names.items():
        begin = end
        end = begin + source.size(name)
        header[theirs] = {
            "dtype": codes[source.dtype],
            "shape": list(source.shapes[name]),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the numbers begin at a multiple of 8

    with output.create(file) as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            tensor = source.share(name)
            if name.endswith(HALF_SPLIT):
                tensor = deinterleave(tensor, source.args.head_dim)
            numbers = tensor.contiguous().view(torch.uint8)
            out.write(memoryview(numbers.numpy()))


def hf_config(source: Source) -> dict[str, Any]:
    """The sizes under the names of `config.json`.

    `params.json` does not say how many positions a model was trained for: unless the source does, 4,096 is written,
    which is Llama 2's number.
    """
    args = source.args
    earlier = getattr(source.checkpoint, "config", {})
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


# --- the command -------------------------------------------------------------------------------------------------


def main() -> None:
    sys.tracebacklimit = 0  # a wrong argument ends in its one sentence
    # Ended by an exception, so that the partial folder is removed.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))

    # A wrong flag: fire would name it only after the work is done.
    parameters = inspect.signature(convert).parameters
    known = {*parameters, "help", "h"}
    for argument in sys.argv[1:]:
        flag = argument.partition("=")[0]
        name = flag.lstrip("-").replace("-", "_")
        if flag.startswith("-") and name not in known:
            sys.exit(f"{flag} is not a flag of llama.convert; --help lists them.")
    fire.Fire(convert)


if __name__ == "__main__":
    main()
