"""A checkpoint to a model that is ready: sizes, device, ranks, memory, weights; and what to do where memory is short.

This module knows the order in which these are decided, and which matrices of a model are quantized. It does not know
text, sampling or what a file looks like inside.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from llama import kernels, parallel
from llama.device import (
    choose_device,
    choose_dtype,
    collective_backend,
    dtype_name,
    free_memory,
    use_device,
)
from llama.formats import slicing
from llama.formats.lora import Adapter
from llama.formats.slicing import Checkpoint
from llama.kernels import FORMATS, Quantized
from llama.model import ModelArgs, Transformer
from llama.packing import choose_packing, pack_matrices, packed_bytes

LEAST_POSITIONS = 128  # of a cache that an error message proposes
PADDING_ROWS = 128  # an embedding with fewer rows beyond the tokenizer's ids is padded; with more, it has other tokens


def join(model_parallel_size: int | None, device: str | torch.device | None) -> torch.device:
    """Choose this rank's device and meet the other ranks; an error after this is printed by one rank for all."""
    device = choose_device(device, parallel.local_world()[0])
    use_device(device)
    parallel.initialize(model_parallel_size, collective_backend(device), device)
    return device


def load(
    source: Checkpoint,
    n_words: int,
    max_seq_len: int,
    max_batch_size: int,
    device: torch.device,
    dtype: str | torch.dtype | None = None,
    quantize: str | None = None,
    lora: str | Path | None = None,
    pack: bool | None = None,
) -> Transformer:
    """This rank's share of the model in `source`, changed by the adapter in `lora`, with its cache, on `device`.

    `n_words` is the size of the tokenizer's vocabulary. It is the model's too, where the sizes leave that open; a
    tokenizer with more ids than the model has rows is refused. Errors as for `Llama.build`.
    """
    started = time.perf_counter()

    # The sizes, and a model without numbers that expects what the files hold.
    source.open()
    args = model_args(source.params, n_words, max_seq_len, max_batch_size)
    with torch.device("meta"):
        model = Transformer(args)
    stored_kind = expect_quantized(model, source)
    if stored_kind and (lora or quantize not in (None, stored_kind)):
        raise ValueError(
            f"{source.folder} is quantized to {stored_kind}; start from the original for anything else."
        )
    slicing.check_names(source, model.state_dict())

    # The number format, and whether there is room.
    kind = stored_kind or quantize
    plain = [name for name, _ in model.named_parameters()]
    stored = slicing.stored_dtype(source, plain, convert=dtype is not None)
    dtype = choose_dtype(dtype, stored, device)
    besides = sum(held(args, dtype.itemsize, kind, parallel.size()))
    packing = choose_packing(model, dtype, device, kind, pack, max_batch_size, besides)
    copies = packed_bytes(model, dtype, packing)
    check_memory(args, dtype, device, kind, copies)

    # The numbers.
    adapter = None if lora is None else Adapter(lora, args.n_layers, args.head_dim)
    fill(model, share(model, source, adapter), device, dtype, quantize)
    packing_took = pack_matrices(model, packing)
    model.own_cache()
    if parallel.world()[0] == 0:
        ready = f"ready in {elapsed(started):.2f} s"
        if copies:
            ready += f", {packing_took:.2f} of them to pack"
        print(f"{summary(args, device, dtype, stored, kind, copies)}, {ready}", file=sys.stderr)
    return model


def elapsed(since: float) -> float:
    return time.perf_counter() - since


def summary(
    args: ModelArgs,
    device: torch.device,
    dtype: torch.dtype,
    stored: torch.dtype,
    kind: str | None,
    copies: int,
) -> str:
    """What was loaded, for the line on standard error."""
    weights, cache = held(args, dtype.itemsize, kind, parallel.size())
    form = dtype_name(dtype)
    if kind:
        form += f" with {kind} matrices"
    if dtype != stored:
        form += f" (stored as {dtype_name(stored)})"
    sizes = f"weights {weights / 1e6:,.0f} MB"
    if copies:
        sizes += f", packed copies {copies / 1e6:,.0f} MB"
    sizes += f" and cache {cache / 1e6:,.0f} MB"
    if parallel.size() > 1:
        sizes += f" on each of {parallel.size()} ranks"
    return f"llama: {device}, {form}, {sizes}"


# --- sizes -------------------------------------------------------------------------------------------------------


def model_args(
    params: Mapping[str, object], n_words: int, max_seq_len: int, max_batch_size: int
) -> ModelArgs:
    """`params.json` as sizes; `vocab_size` -1 means the tokenizer's.

    Warns of keys that this model has no use for, and of a tokenizer that knows far fewer tokens than the model.
    """
    names = {field.name for field in dataclasses.fields(ModelArgs)} - {
        "max_seq_len",
        "max_batch_size",
    }
    unknown = sorted(params.keys() - names)
    first = parallel.world()[0] == 0
    if unknown and first:
        warnings.warn(
            f"params.json has keys that are not used: {', '.join(unknown)}.", stacklevel=3
        )

    sizes = {name: value for name, value in params.items() if name in names}
    args = ModelArgs(**sizes, max_seq_len=max_seq_len, max_batch_size=max_batch_size)
    if args.vocab_size == -1:
        args.vocab_size = n_words
    args.check()
    check_vocabulary(n_words, args.vocab_size)

    unreadable = args.vocab_size - n_words
    if unreadable >= PADDING_ROWS and first:
        what = f"The tokenizer has {n_words} ids, but the model {args.vocab_size} rows"
        advice = "if the model has a tokenizer of its own, give it as tokenizer_path"
        warnings.warn(
            f"{what}: {unreadable} tokens can be neither read nor written; {advice}.", stacklevel=3
        )
    return args


def check_vocabulary(n_words: int, vocab_size: int) -> None:
    """Raise `ValueError` if the tokenizer makes ids for which the model has no row; the other way round is fine."""
    if n_words > vocab_size:
        ids = f"{n_words} ids, but the model only {vocab_size} rows in its embedding"
        raise ValueError(
            f"The tokenizer has {ids}; use the tokenizer.model that belongs to the checkpoint."
        )


# --- what is quantized -------------------------------------------------------------------------------------------
# The matrices of the layers have the format that was asked for. The output layer stays at int8: an error there changes
# the chosen token directly. The embedding, of which a step reads single rows, and the norms are never quantized. A
# checkpoint stores a quantized matrix as the parts that `kernels` names: layers.0.attention.wq.weight.int4, ...scale.

OUTPUT_KIND = "int8"


def kind_of(layer: str, quantize: str) -> str:
    """The format of a layer in a model that is quantized to `quantize`."""
    return quantize if layer.startswith("layers.") else OUTPUT_KIND


def empty_matrix(model: Transformer, name: str, quantize: str | None) -> Quantized | None:
    """The matrix that a weight is quantized into, without numbers; None for a weight that stays as it is."""
    if quantize is None:
        return None
    layer = name.removesuffix(".weight")
    return kernels.empty_matrix(model.get_submodule(layer), kind_of(layer, quantize))


def stored_kinds(source: Checkpoint) -> dict[str, str]:
    """The layers that a checkpoint holds quantized: {"layers.0.attention.wq": "int4", ..., "output": "int8"}."""
    kinds = {}
    for name in source.shards[0]:
        layer, _, part = name.rpartition(".weight.")
        if part in FORMATS:
            kinds[layer] = part
    return kinds


def expect_quantized(model: Transformer, source: Checkpoint) -> str | None:
    """Make the model expect the quantized matrices of a checkpoint; return the format of its layers, None without."""
    modules = dict(model.named_modules())
    found = None
    for layer, kind in stored_kinds(source).items():
        if layer in modules:
            kernels.install(modules[layer], kernels.empty_matrix(modules[layer], kind))
            found = kind if layer.startswith("layers.") else found
    return found


def held(args: ModelArgs, itemsize: int, quantize: str | None, ranks: int) -> tuple[int, int]:
    """Bytes of (weights, cache) that each of `ranks` ranks holds."""
    if quantize is None:
        return needed(args, itemsize, ranks)
    layers = FORMATS[quantize].bytes_a_number
    output = FORMATS[OUTPUT_KIND].bytes_a_number
    return needed(args, itemsize, ranks, layers, output)


def needed(
    args: ModelArgs,
    itemsize: int,
    ranks: int = 1,
    layers: float | None = None,
    output: float | None = None,
) -> tuple[int, int]:
    """Bytes of (weights, cache) that each of `ranks` ranks holds at `itemsize` bytes a number.

    The numbers of the matrices in `layers` and of the `output` layer may take another number of bytes.
    """
    dim = args.dim
    kv_features = max(args.kv_heads // ranks, 1) * args.head_dim  # of this rank

    attention = 2 * dim * dim // ranks + 2 * dim * kv_features
    feed_forward = 3 * dim * args.ffn_hidden_dim // ranks
    of_layers = args.n_layers * (attention + feed_forward)
    of_output = -(-args.vocab_size // ranks) * dim
    norms = (2 * args.n_layers + 1) * dim
    others = args.vocab_size * dim // ranks + norms

    weights = (
        of_layers * (layers or itemsize) + of_output * (output or itemsize) + others * itemsize
    )
    cached = args.max_batch_size * args.max_seq_len * kv_features
    return int(weights), 2 * args.n_layers * cached * itemsize


# --- memory ------------------------------------------------------------------------------------------------------


def check_memory(
    args: ModelArgs,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None = None,
    copies: int = 0,
) -> None:
    """Raise `RuntimeError`, naming values that fit, if all that is held exceeds the free memory of this device.

    That is the weights, `copies` bytes of packed copies, and the cache.
    """
    free = free_memory(device)
    if free is None:
        return
    if device.type == "cpu":
        free //= parallel.local_world()[1]  # the ranks of a machine share its memory
    weights, cache = held(args, dtype.itemsize, quantize, parallel.size())
    if weights + copies + cache <= free:
        return

    fits = what_fits(args, dtype, device, quantize, free, packed=copies > 0)
    advice = (
        ", or ".join(fits) or "nothing, whatever max_batch_size, max_seq_len, dtype or quantize"
    )
    more = f", {copies / 1e9:.2f} GB of packed copies" if copies else ""
    raise RuntimeError(
        f"{weights / 1e9:.2f} GB of weights{more} and {cache / 1e9:.2f} GB of cache in {quantize or dtype_name(dtype)} "
        f"exceed the {free / 1e9:.2f} GB free for this process on {device}; what fits: {advice}."
    )


def what_fits(
    args: ModelArgs,
    dtype: torch.dtype,
    device: torch.device,
    quantize: str | None,
    free: int,
    packed: bool = False,
) -> list[str]:
    """The changes of arguments with which the model fits into `free` bytes, those that change least first."""
    ranks = parallel.size()
    plain = "pack=False" if packed else ""
    formats = {plain: (dtype.itemsize, quantize)}
    if dtype.itemsize > 2:
        formats[f"{plain} with dtype='bfloat16'" if packed else "dtype='bfloat16'"] = (2, quantize)
    if quantize is None:
        for kind in FORMATS:
            formats[f"quantize='{kind}'"] = (dtype.itemsize, kind)

    # Another format with the same cache; or else, up to the first one that fits so, a smaller cache.
    fits: list[str] = []
    for label, (itemsize, kind) in formats.items():
        weights, cache = held(args, itemsize, kind, ranks)
        if weights + cache <= free:
            fits.append(label)
        elif not fits:
            smaller = smaller_caches(args, weights, cache, free)
            fits += [f"{label} with {values}" if label else values for values in smaller]

    # More devices; ranks on one processor share its memory.
    if device.type != "cpu":
        for count in args.rank_counts():
            if count > ranks and sum(held(args, dtype.itemsize, quantize, count)) <= free:
                fits.append(f"{count} processes on as many devices")
                break
    return fits


def smaller_caches(args: ModelArgs, weights: int, cache: int, free: int) -> list[str]:
    """The largest `max_batch_size`, or `max_seq_len` of at least 128, that fits; else the longest single row."""
    left = free - weights
    rows = left * args.max_batch_size // cache
    positions = left * args.max_seq_len // cache
    fits = []
    if rows >= 1:
        fits.append(f"max_batch_size={rows}")
    if positions >= LEAST_POSITIONS:
        fits.append(f"max_seq_len={positions}")
    if fits:
        return fits

    of_one_row = left * args.max_batch_size * args.max_seq_len // cache
    return (
        [f"max_batch_size=1 with max_seq_len={of_one_row}"] if of_one_row >= LEAST_POSITIONS else []
    )


# --- weights -----------------------------------------------------------------------------------------------------


def share(
    model: Transformer, source: Checkpoint, adapter: Adapter | None
) -> Iterator[tuple[str, Tensor]]:
    """This rank's part of each tensor that the model expects, changed by the adapter, one at a time."""
    args = model.params
    slices = slicing.join(source.shards)
    return slicing.cut_for_rank(
        slices if adapter is None else adapter.apply(slices),
        {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()},
        rank=parallel.rank(),
        size=parallel.size(),
        vocab_size=args.vocab_size,
        kv_rows=args.kv_heads * args.head_dim,
        head_dim=args.head_dim,
        sizes=source.sizes.name,
        stored_name=source.stored_name,
    )


def fill(
    model: Transformer,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype,
    quantize: str | None,
) -> None:
    """Give a model on the meta device its weights, one tensor at a time; show how far it is if that takes long."""
    started = time.perf_counter()
    expected = len(model.state_dict())
    on_terminal = parallel.world()[0] == 0 and sys.stderr.isatty()

    for count, (name, tensor) in enumerate(tensors, 1):
        place(model, name, tensor.to(device), dtype, quantize)
        if on_terminal and elapsed(started) > 1:
            print(f"\rllama: loading, {count / expected:4.0%}", end="", file=sys.stderr, flush=True)
    if on_terminal and elapsed(started) > 1:
        print(file=sys.stderr)

    kernels.pack(model)
    model.requires_grad_(False).eval()


def place(
    model: Transformer, name: str, tensor: Tensor, dtype: torch.dtype, quantize: str | None
) -> None:
    """Put a tensor where it belongs, converted to `dtype`, or quantized if it is a linear layer's."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    if leaf != "weight":  # a part of a matrix that is stored quantized
        setattr(module, leaf, tensor)
    elif matrix := empty_matrix(model, name, quantize):
        matrix.quantize(tensor)
        kernels.install(module, matrix)
    else:
        module.weight = nn.Parameter(tensor.to(dtype))
