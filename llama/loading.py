"""Checkpoint files to a model that is ready to run: sizes, device, ranks, memory, weights.

Knows the order in which these are decided. Does not know text, sampling or how files are read.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llama import checkpoint, parallel
from llama.device import choose_device, choose_dtype, collective_backend, dtype_name, free_memory, use_device
from llama.lora import Adapter
from llama.model import ModelArgs, Transformer
from llama.quantize import BYTES, FORMATS, Quantized, install, pack, quantized


def join(model_parallel_size: int | None, device: str | torch.device | None) -> torch.device:
    """Choose this rank's device and meet the other ranks: what fails from here on, one of them says for all."""
    device = choose_device(device, parallel.local_world()[0])
    use_device(device)
    parallel.initialize(model_parallel_size, collective_backend(device), device)
    return device


def load(
    source: checkpoint.Checkpoint,
    n_words: int,
    max_seq_len: int,
    max_batch_size: int,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    lora: str | Path | None = None,
) -> Transformer:
    """This rank's share of the model in `source`, changed by the adapter in `lora`, with its cache, on `device`.

    `quantize` is the format of the layers' matrices; the output layer's is then int8, as it decides between words.
    `n_words` is the tokenizer's vocabulary, for sizes that leave theirs open and to refuse a tokenizer that does not
    belong. Errors as for `Llama.build`.
    """
    started = time.perf_counter()
    source.open()
    args = model_args(source.params, n_words, max_seq_len, max_batch_size)
    with torch.device("meta"):
        model = Transformer(args)
    stored_as = expect_quantized(model, source)
    if stored_as and (lora or quantize not in (None, stored_as)):
        raise ValueError(f"{source.folder} is quantized to {stored_as}; start from the original for anything else.")
    checkpoint.check_names(source, model.state_dict())
    stored = checkpoint.stored_dtype(source, convert=dtype is not None)
    dtype = choose_dtype(dtype, stored, device)
    check_memory(args, dtype, device, stored_as or quantize)
    adapter = None if lora is None else Adapter(Path(lora), args.n_layers, args.head_dim)
    fill(model, share(model, source, adapter), device, dtype, quantize)
    model.own_cache()
    if parallel.world()[0] == 0:
        sizes = held(args, dtype.itemsize, stored_as or quantize, parallel.size())
        weights, cache = (f"{size / 1e6:,.0f} MB" for size in sizes)
        matrices = f" with {stored_as or quantize} matrices" if stored_as or quantize else ""
        note = "" if dtype == stored else f" (stored as {dtype_name(stored)})"
        ranks = f" on each of {parallel.size()} ranks" if parallel.size() > 1 else ""
        what = f"{dtype_name(dtype)}{matrices}{note}, weights {weights} and cache {cache}{ranks}"
        print(f"llama: {device}, {what}, ready in {time.perf_counter() - started:.2f} s", file=sys.stderr)
    return model


def expect_quantized(model: Transformer, source: checkpoint.Checkpoint) -> str | None:
    """Make the model expect the quantized matrices that the files hold; the format of its layers', None without any."""
    found = None
    modules = dict(model.named_modules())
    for name in source.shards[0]:
        layer, _, kind = name.rpartition(".weight.")
        if kind in FORMATS and layer in modules:
            install(modules[layer], quantized(modules[layer], kind))
            found = kind if layer.startswith("layers.") else found
    return found


def model_args(params: Mapping[str, object], n_words: int, max_seq_len: int, max_batch_size: int) -> ModelArgs:
    """`params.json` as sizes; `vocab_size` -1 means the tokenizer's. Warns of keys that this model has no use for."""
    names = {field.name for field in dataclasses.fields(ModelArgs)} - {"max_seq_len", "max_batch_size"}
    unknown = sorted(params.keys() - names)
    if unknown and parallel.world()[0] == 0:
        warnings.warn(f"params.json has keys that are not used: {', '.join(unknown)}.", stacklevel=3)
    sizes = {name: value for name, value in params.items() if name in names}
    args = ModelArgs(**sizes, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    if args.vocab_size == -1:
        args.vocab_size = n_words
    args.check()
    check_vocabulary(n_words, args.vocab_size)
    return args


def check_vocabulary(n_words: int, vocab_size: int) -> None:
    """Raise `ValueError` if the tokenizer makes ids for which the model has no row; the other way round is fine."""
    if n_words > vocab_size:
        ids = f"{n_words} ids, but the model only {vocab_size} rows in its embedding"
        raise ValueError(f"The tokenizer has {ids}; use the tokenizer.model that belongs to the checkpoint.")


def held(args: ModelArgs, itemsize: int, quantize: str | None, ranks: int) -> tuple[int, int]:
    """Bytes of (weights, cache) that each of `ranks` ranks holds."""
    products = {} if quantize is None else {"layers": BYTES[quantize], "output": BYTES["int8"]}
    return args.memory(itemsize, ranks, **products)


def check_memory(args: ModelArgs, dtype: torch.dtype, device: torch.device, quantize: str | None = None) -> None:
    """Raise `RuntimeError`, naming values that fit, if weights and cache exceed the free memory of this device."""
    ranks, free = parallel.size(), free_memory(device)
    if free is None:
        return
    if device.type == "cpu":
        free //= parallel.local_world()[1]  # the ranks of a machine share it
    weights, cache = held(args, dtype.itemsize, quantize, ranks)
    if weights + cache <= free:
        return
    formats = {"": (dtype.itemsize, quantize)}
    if dtype.itemsize > 2:
        formats["dtype='bfloat16'"] = (2, quantize)
    if quantize is None:
        formats |= {f"quantize='{kind}'": (dtype.itemsize, kind) for kind in FORMATS}
    fits: list[str] = []
    for label, form in formats.items():
        size = held(args, *form, ranks)
        if sum(size) <= free:
            fits.append(label)
        elif not fits:
            fits += [" with ".join(filter(None, (label, values))) for values in smaller_caches(args, *size, free)]
    more = (n for n in args.rank_counts() if n > ranks and sum(held(args, dtype.itemsize, quantize, n)) <= free)
    if device.type != "cpu" and (enough := next(more, None)):  # ranks on one processor share its memory
        fits.append(f"{enough} processes on as many devices")
    what_fits = ", or ".join(fits) or "nothing, whatever max_batch_size, max_seq_len, dtype or quantize"
    raise RuntimeError(
        f"{weights / 1e9:.2f} GB of weights and {cache / 1e9:.2f} GB of cache in {quantize or dtype_name(dtype)} "
        f"exceed the {free / 1e9:.2f} GB free for this process on {device}; what fits: {what_fits}."
    )


def smaller_caches(args: ModelArgs, weights: int, cache: int, free: int) -> list[str]:
    """The most rows, or positions (128 at least), for which weights and cache fit; one row of fewer if neither does."""
    rows, positions = ((free - weights) * size // cache for size in (args.max_batch_size, args.max_seq_len))
    fits = [f"max_batch_size={rows}"] * (rows >= 1) + [f"max_seq_len={positions}"] * (positions >= 128)
    of_one_row = (free - weights) * args.max_batch_size * args.max_seq_len // cache
    return fits or [f"max_batch_size=1 with max_seq_len={of_one_row}"] * (of_one_row >= 128)


Tensors = Iterator[tuple[str, Tensor]]


def share(model: Transformer, source: checkpoint.Checkpoint, adapter: Adapter | None) -> Tensors:
    """This rank's part of each tensor that the model expects, changed by the adapter, one at a time."""
    args, shapes = model.params, {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    sizes = {"vocab_size": args.vocab_size, "kv_rows": args.kv_heads * args.head_dim, "head_dim": args.head_dim}
    cut = functools.partial(checkpoint.slices, rank=parallel.rank(), size=parallel.size(), **sizes)
    tensors = cut(source.shards, shapes, sizes=source.sizes.name, stored_name=source.stored_name)
    return tensors if adapter is None else adapter.merge(tensors, cut)


def fill(model: Transformer, tensors: Tensors, device: torch.device, dtype: torch.dtype, quantize: str | None) -> None:
    """Give the meta-device model its weights, one tensor at a time."""
    started, expected = time.perf_counter(), len(model.state_dict())
    shown = parallel.world()[0] == 0 and sys.stderr.isatty()
    for count, (name, tensor) in enumerate(tensors, 1):
        place(model, name, tensor.to(device), dtype, quantize)
        if shown and time.perf_counter() - started > 1:
            print(f"\rllama: loading, {count / expected:4.0%}", end="", file=sys.stderr, flush=True)
    if shown and time.perf_counter() - started > 1:
        print(file=sys.stderr)
    pack(model)
    model.requires_grad_(False).eval()


def empty_matrix(model: Transformer, name: str, quantize: str | None) -> Quantized | None:
    """What a weight is quantized into; None for one that stays as it is. The output layer, which chooses, is int8."""
    if quantize is None:
        return None
    kind = quantize if name.startswith("layers.") else "int8"
    return quantized(model.get_submodule(name.rpartition(".")[0]), kind)


def place(model: Transformer, name: str, tensor: Tensor, dtype: torch.dtype, quantize: str | None) -> None:
    """Put a tensor where it belongs, converted to `dtype`, or quantized if it is a linear layer's."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf != "weight":  # a part of a matrix that is stored quantized
        setattr(module, leaf, tensor)
    elif matrix := empty_matrix(model, name, quantize):
        matrix.quantize(tensor)
        install(module, matrix)
    else:
        module.weight = nn.Parameter(tensor.to(dtype))
