"""Checkpoint files to the tensors one rank holds, cut anew for any number of ranks: Meta's layout or Hugging Face's.

A `Checkpoint` says where a folder's files are and which sizes they state; once opened it has, under Meta's names, the
pieces of each tensor, whatever they are stored in. Files are memory-mapped and each tensor is read when its turn comes,
so a rank never holds more than its share. This module knows nothing of `nn.Module` or process groups: names and
shapes, rank and size arrive as plain values.
"""

from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.files import describe, listing, refuse

# The dimension on which Meta's files, and our ranks, cut each matrix; norms are whole everywhere.
CUT = {"wq": 0, "wk": 0, "wv": 0, "wo": 1, "w1": 0, "w3": 0, "w2": 1, "tok_embeddings": 1, "output": 0}
IGNORED = ("rope.freqs", "rotary_emb.inv_freq")  # endings of stored rotary frequencies, which follow from the sizes
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}  # by their names in safetensors files

# Hugging Face's names for what a layer holds, for what stands outside the layers, and for the sizes.
ATTENTION = {"wq": "q_proj", "wk": "k_proj", "wv": "v_proj", "wo": "o_proj"}
FEED_FORWARD = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}
NORMS = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
HALF_SPLIT = ("attention.wq.weight", "attention.wk.weight")  # rows in another order there
OUTER = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}
SIZES = {"dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}

# What a config.json may say beyond sizes, and what it may not ask for at all: that would be another model.
ALLOWED = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
REFUSED = ("attention_bias", "mlp_bias", "quantization_config")


def hugging_face_names(n_layers: int) -> dict[str, str]:
    """From Meta's name of each tensor to Hugging Face's."""
    groups = (("attention.", "self_attn.", ATTENTION), ("feed_forward.", "mlp.", FEED_FORWARD), ("", "", NORMS))
    layers = {
        f"layers.{n}.{ours}{name}.weight": f"model.layers.{n}.{theirs}{names[name]}.weight"
        for n in range(n_layers)
        for ours, theirs, names in groups
        for name in names
    }
    return layers | {f"{ours}.weight": f"{theirs}.weight" for ours, theirs in OUTER.items()}


def interleave(rows: Tensor, head_dim: int) -> Tensor:
    """Rows of q or k, whole heads, from Hugging Face's rotary layout to Meta's; a copy.

    A rotary pair is two rows: i and i + D/2 of a head there, 2i and 2i + 1 here. A head of D = 6 that is stored as
    0 2 4 1 3 5 becomes 0 1 2 3 4 5.
    """
    return rows.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2)


def deinterleave(rows: Tensor, head_dim: int) -> Tensor:
    """The inverse of `interleave`."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


class Checkpoint:
    """A folder of weights in Meta's layout: each file holds a slice of every matrix.

    `files` are those that hold tensors, `params` the sizes under `ModelArgs`' names, `sizes` the file that states
    them. `shards` is empty until `open` has been called. Raises `FileNotFoundError` or `ValueError` for a folder that
    is incomplete or holds something else.
    """

    def __init__(self, folder: Path):
        self.folder, self.sizes = folder, folder / "params.json"
        self.files = find_shards(folder)
        self.params = read_json(self.sizes)
        self.shards: list[Mapping[str, Piece]] = []

    def open(self) -> None:
        """Open the files. A vocabulary that the sizes leave open (-1) is then the number of rows in the embedding."""
        self.shards = [open_shard(path) for path in self.files]
        embedding = self.shards[0].get("tok_embeddings.weight")
        if self.params.get("vocab_size", -1) == -1 and embedding is not None:
            self.params["vocab_size"] = embedding.shape[0]

    def stored_name(self, name: str) -> str:
        """What the files call the tensor that Meta calls `name`."""
        return name


class HuggingFaceCheckpoint(Checkpoint):
    """A folder with `config.json` and either safetensors or `pytorch_model*.bin`: whole matrices, in any file."""

    def __init__(self, folder: Path):
        self.folder, self.sizes = folder, folder / "config.json"
        self.config = read_json(self.sizes)
        self.params = convert_config(self.config, self.sizes)
        self.files = find_weight_files(folder)
        self.names = hugging_face_names(self.params["n_layers"])
        self.shards = []

    def open(self) -> None:
        """Open the files. Tied weights are one tensor under two names, unless the files hold the output layer too."""
        opened = [open_safetensors(path) if path.suffix == ".safetensors" else open_shard(path) for path in self.files]
        counts = Counter(name for tensors in opened for name in tensors)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            raise ValueError(f"{', '.join(twice[:4])} is in more than one file of {self.folder}; keep the right one.")
        ours = {theirs: name for name, theirs in self.names.items()}
        shard = {ours.get(name, name): tensor for tensors in opened for name, tensor in tensors.items()}
        head_dim = self.params["dim"] // self.params["n_heads"]
        shard |= {name: HalfSplit(shard[name], head_dim) for name in shard if name.endswith(HALF_SPLIT)}
        if self.config.get("tie_word_embeddings") and "tok_embeddings.weight" in shard:
            shard.setdefault("output.weight", shard["tok_embeddings.weight"])
        self.shards = [shard]

    def stored_name(self, name: str) -> str:
        return self.names.get(name, name)


def find(folder: Path) -> Checkpoint:
    """The checkpoint in a folder; Meta's files come first where it holds both. Errors as for `Checkpoint`."""
    if (folder / "config.json").is_file() and not any(folder.glob("consolidated.*.pth")):
        return HuggingFaceCheckpoint(folder)
    return Checkpoint(folder)


def find_shards(folder: Path) -> list[Path]:
    """The folder's `consolidated.NN.pth` in order. Raises `FileNotFoundError` saying what is there instead."""
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "does not exist"
        raise FileNotFoundError(f"ckpt_dir {folder} {what}; give the folder that holds the weights.")
    shards = sorted(folder.glob("consolidated.*.pth"))
    if not shards:
        raise FileNotFoundError(f"No consolidated.NN.pth or config.json in {folder}; it holds {listing(folder)}.")
    expected = [f"consolidated.{number:02d}.pth" for number in range(len(shards))]
    missing = sorted(set(expected) - {path.name for path in shards})
    if missing:
        found = ", ".join(path.name for path in shards)
        raise FileNotFoundError(f"{folder} holds {found}, but not {', '.join(missing)}; fetch the missing files.")
    return shards


def find_weight_files(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder: safetensors before pickles, those of an index before a single one.

    Raises `FileNotFoundError` for none, or for one that the index names and the folder lacks.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            placed = read_json(index).get("weight_map")
            if not isinstance(placed, dict) or not placed:
                raise ValueError(f"{index} has no weight_map, which says the file of each tensor; fetch it again.")
            files = sorted({folder / Path(str(file)).name for file in placed.values()})
            missing = [path.name for path in files if not path.is_file()]
            if missing:
                raise FileNotFoundError(f"{index} names {', '.join(missing)}, not in {folder}; fetch what is missing.")
            return files
        if (folder / name).is_file():
            return [folder / name]
    names = "model.safetensors, pytorch_model.bin or index of several"
    raise FileNotFoundError(f"No {names} in {folder}; it holds {listing(folder)}.")


def find_tokenizer(folder: Path) -> Path:
    """`tokenizer.model` in the folder or one level up, where `download.sh` leaves it.

    A folder with another kind of tokenizer has a vocabulary of its own: what lies one level up is not tried there.
    """
    if not (folder / "tokenizer.model").is_file() and (folder / "tokenizer.json").is_file():
        advice = "add the tokenizer.model of it or its base, or give tokenizer_path"
        raise FileNotFoundError(f"{folder} has a tokenizer.json, which this library does not read; {advice}.")
    for path in (folder / "tokenizer.model", folder.absolute().parent / "tokenizer.model"):
        if path.is_file():
            return path
    raise FileNotFoundError(f"No tokenizer.model in {folder} or the folder above; give its path as tokenizer_path.")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `FileNotFoundError`, or `ValueError` if it holds anything else."""
    if not path.is_file():
        raise FileNotFoundError(f"No {path.name} in {path.parent}, which belongs to the weights; fetch it with them.")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is {describe(path) or f'not JSON ({error})'}; fetch it again.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds {type(found).__name__}, not an object; fetch it again.")
    return found


def convert_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A `config.json` as the sizes of `params.json`. Raises `ValueError` for a model that is not computed here."""
    for key, value in (ALLOWED | dict.fromkeys(REFUSED, False)).items():
        if config.get(key) not in (None, value):
            raise ValueError(f"{path} asks for {key} {config[key]!r}; this library computes only {value!r}.")
    for key in (*SIZES.values(), "vocab_size", "intermediate_size"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(f"{path} says {config.get(key)!r} for {key}; it must be a positive integer.")
    params = {ours: config[theirs] for ours, theirs in SIZES.items()}
    head_dim = params["dim"] // params["n_heads"]
    if config.get("head_dim") not in (None, head_dim):
        raise ValueError(f"{path} asks for head_dim {config['head_dim']}; this library computes only {head_dim} here.")
    rope = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})  # one in older files, one in new
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))
    if any(value not in (None, "default") for value in rope.values()):
        key = "rope_scaling" if config.get("rope_scaling") else "rope_parameters"
        raise ValueError(f"{path} asks for {key} {config[key]!r}; this library computes only unscaled positions.")
    return params | {
        "vocab_size": config["vocab_size"],
        "n_kv_heads": config.get("num_key_value_heads"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": theta,
        **feed_forward_params(params["dim"], config["intermediate_size"]),
    }


def feed_forward_params(dim: int, width: int) -> dict[str, int | float]:
    """A feed-forward width in the terms of `params.json`, which states only a rule to round up to it.

    The usual multiple of 256 where that gives the width; else the width is a multiple of itself, of which two thirds
    of 4 `dim`, scaled down if need be, are at most one.
    """
    ruled = int(2 * 4 * dim / 3)
    if -(-ruled // 256) * 256 == width:
        return {"multiple_of": 256}
    return {"multiple_of": width} | ({"ffn_dim_multiplier": width / ruled} if width < ruled else {})


def open_shard(path: Path) -> dict[str, Tensor]:
    """The tensors of one file, memory-mapped, without running code that a pickle may hold.

    Raises `ValueError` for a file that is something else, is cut short, or holds more than tensors.
    """
    refuse(path, "a checkpoint")
    with open(path, "rb") as file:
        zipped = file.read(2) == b"PK"  # torch's format since 1.6; the older one cannot be mapped
    try:
        tensors = torch.load(path, map_location="cpu", mmap=zipped, weights_only=True)
    except Exception as error:  # what stands where a pickle should makes the unpickler stumble in any way
        reason = (str(error) or type(error).__name__).splitlines()[0][:120]
        what = f"is cut short or not a PyTorch checkpoint ({reason}); fetch it again"
        if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error):  # names a function or class
            what = "holds more than tensors (pickled code), which was not run; use a file from a source you trust"
        raise ValueError(f"{path} {what}.") from None
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{path} is not a dictionary of tensors; give a checkpoint in Meta's layout.")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(IGNORED)}


class StoredTensor:
    """A tensor in a safetensors file, of which only what `narrow` asks for is read; shape and dtype as a Tensor's."""

    def __init__(self, stored: Any):
        self.stored = stored
        self.shape = torch.Size(stored.get_shape())
        self.dtype = DTYPES.get(stored.get_dtype(), stored.get_dtype())

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        return self.stored[(slice(None),) * dim + (slice(start, start + length),)]


class HalfSplit:
    """Rows of q or k stored in Hugging Face's order; `narrow`, on dimension 0, gives them in Meta's."""

    def __init__(self, piece: Tensor | StoredTensor, head_dim: int):
        self.piece, self.head_dim = piece, head_dim
        self.shape, self.dtype = piece.shape, piece.dtype

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        first = start // self.head_dim * self.head_dim
        count = -(-(start + length) // self.head_dim) * self.head_dim - first
        return interleave(self.piece.narrow(dim, first, count), self.head_dim).narrow(0, start - first, length)


Piece = Tensor | StoredTensor | HalfSplit


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file, none read yet. Raises `ImportError` without the library, else as `open_shard`."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise ImportError(f"{path} needs the safetensors library; install it with `pip install safetensors`.") from None
    refuse(path, "a checkpoint")
    try:
        file = safe_open(path, framework="pt")
        return {name: StoredTensor(file.get_slice(name)) for name in file.keys() if not name.endswith(IGNORED)}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0][:120]
        raise ValueError(f"{path} is cut short or not a safetensors file ({reason}); fetch it again.") from None


def check_names(checkpoint: Checkpoint, expected: Mapping[str, object]) -> None:
    """Raise `ValueError` unless every file holds exactly the expected names."""
    paths = checkpoint.files if len(checkpoint.shards) == len(checkpoint.files) else [checkpoint.folder]
    for path, shard in zip(paths, checkpoint.shards, strict=True):
        missing, extra = sorted(expected.keys() - shard.keys()), sorted(shard.keys() - expected.keys())
        differences = [
            f"{kind} {', '.join(map(checkpoint.stored_name, names[:4]))}"
            f"{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
            for kind, names in (("lacks", missing), ("has the unknown", extra))
            if names
        ]
        if differences:
            raise ValueError(f"{path} {' and '.join(differences)}; it does not match its {checkpoint.sizes.name}.")


def stored_dtype(checkpoint: Checkpoint, convert: bool) -> torch.dtype:
    """The number format of all tensors, the commonest if they will be converted anyway.

    Raises `ValueError` for a format that is not supported, or for several that nobody has asked to convert to one.
    """
    tensors = [(name, tensor) for shard in checkpoint.shards for name, tensor in shard.items()]
    stored = [(name, tensor.dtype) for name, tensor in tensors if ".weight." not in name]  # that are not quantized
    for name, dtype in stored:
        if dtype not in DTYPES.values():
            readable, name = ", ".join(map(str, DTYPES.values())), checkpoint.stored_name(name)
            raise ValueError(f"{name} in {checkpoint.folder} is stored as {dtype}; this library reads {readable}.")
    counts = Counter(dtype for _, dtype in stored).most_common()
    if len(counts) > 1 and not convert:
        mixed = " and ".join(f"{count} tensors in {dtype}" for dtype, count in counts)
        raise ValueError(f"{checkpoint.folder} holds {mixed}; say in which to compute, such as dtype='{counts[0][0]}'.")
    return counts[0][0]


def slices(
    shards: Sequence[Mapping[str, Piece]],
    local_shapes: Mapping[str, Sequence[int]],
    *,
    rank: int,
    size: int,
    vocab_size: int,
    kv_rows: int,
    head_dim: int,
    sizes: str = "params.json",
    stored_name: Callable[[str], str] = str,
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of rank `rank` of `size`, in the shape that `local_shapes` says, one at a time.

    `kv_rows` is the number of rows of the whole wk. With fewer key-value heads than ranks, rank r takes the head
    r * heads // size, so neighbours share one; an output layer that `size` does not divide is padded with zero rows.
    A slice of one file on dimension 0 is a view of the file, any other a copy. Raises `ValueError`, in which `sizes`
    and `stored_name` name the files' things, for a tensor whose whole shape does not fit.
    """
    for name, shape in local_shapes.items():
        part = module_name(name)
        cut = CUT.get(part)
        pieces = [shard[name] for shard in shards]
        if cut is None or list(pieces[0].shape[cut:]) == [1]:  # one number for a whole row
            start, whole, pieces = 0, list(shape), pieces[:1]
        elif part in ("wk", "wv"):
            start, whole = rank * (kv_rows // head_dim) // size * head_dim, [kv_rows, shape[1]]
        else:
            start, whole = rank * shape[cut], [length * size if d == cut else length for d, length in enumerate(shape)]
        if part == "output":
            whole[0] = vocab_size
        found = joined_shape(stored_name(name), pieces, cut)
        if found != whole:
            raise ValueError(f"{stored_name(name)} has the shape {tuple(found)}, but {sizes} describes {tuple(whole)}.")
        yield name, take(pieces, cut or 0, start, shape[cut or 0])


def module_name(name: str) -> str:
    """The layer that a tensor belongs to: wq for "layers.0.attention.wq.weight" or "...wq.weight.scale"."""
    return name.partition(".weight")[0].rpartition(".")[2]


def joined_shape(name: str, pieces: Sequence[Piece], cut: int | None) -> list[int]:
    """The shape of the pieces laid side by side on `cut`; of the first where they are copies."""
    shape = list(pieces[0].shape)
    if cut is not None and len(shape) == 2:
        if any(len(piece.shape) != 2 or piece.shape[1 - cut] != shape[1 - cut] for piece in pieces):
            shapes = ", ".join(str(tuple(piece.shape)) for piece in pieces)
            raise ValueError(f"{name} has the shapes {shapes}, which are not parts of one matrix.")
        shape[cut] = sum(piece.shape[cut] for piece in pieces)
    return shape


def take(pieces: Sequence[Piece], dim: int, start: int, length: int) -> Tensor:
    """`length` entries from `start` of the pieces laid side by side on `dim`, padded with zeros at the end."""
    parts, begin = [], 0
    for piece in pieces:
        low, high = max(start - begin, 0), min(start + length - begin, piece.shape[dim])
        if low < high:
            parts.append(piece.narrow(dim, low, high - low))
        begin += piece.shape[dim]
    padding = length - sum(part.shape[dim] for part in parts)
    if padding:
        shape = [padding if d == dim else extent for d, extent in enumerate(pieces[0].shape)]
        parts.append(torch.zeros(shape, dtype=pieces[0].dtype))
    return parts[0].contiguous() if len(parts) == 1 else torch.cat(parts, dim=dim)
