"""Hugging Face's layout: `config.json`, and whole matrices in safetensors files or `pytorch_model*.bin`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llama.formats.hf_layout import HALF_SPLIT, HalfSplit, hugging_face_names
from llama.formats.reading import open_tensors, read_json
from llama.formats.recognise import listing
from llama.formats.slicing import Checkpoint

SIZES = {
    "dim": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
}

# What a config.json may say beyond sizes, and what it may not ask for at all: that would be another model.
ALLOWED = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
}
REFUSED = ("attention_bias", "mlp_bias")


@dataclass
class HuggingFaceCheckpoint(Checkpoint):
    """A folder in Hugging Face's layout.

    `config` is what `config.json` says. `names` leads from Meta's name of each tensor to the name in the files.
    """

    config: dict[str, Any] = field(kw_only=True)
    names: dict[str, str] = field(kw_only=True)

    def open(self) -> None:
        opened = [open_tensors(path) for path in self.files]
        counts = Counter(name for tensors in opened for name in tensors)
        twice = sorted(name for name, count in counts.items() if count > 1)
        if twice:
            names = ", ".join(twice[:4])
            raise ValueError(
                f"{names} is in more than one file of {self.folder}; keep the right one."
            )

        # All files together are one shard, under Meta's names and with Meta's order of rows.
        ours = {theirs: name for name, theirs in self.names.items()}
        shard = {}
        for tensors in opened:
            for name, tensor in tensors.items():
                shard[ours.get(name, name)] = tensor
        head_dim = self.params["dim"] // self.params["n_heads"]
        for name in shard:
            if name.endswith(HALF_SPLIT):
                shard[name] = HalfSplit(shard[name], head_dim)

        # Tied weights are one tensor under two names, unless the files hold the output layer too.
        if self.config.get("tie_word_embeddings") and "tok_embeddings.weight" in shard:
            shard.setdefault("output.weight", shard["tok_embeddings.weight"])
        self.shards = [shard]

    def stored_name(self, name: str) -> str:
        return self.names.get(name, name)


def find(folder: Path) -> HuggingFaceCheckpoint:
    """Find the files of a folder in Hugging Face's layout.

    Raises `FileNotFoundError` if some are missing, `ValueError` for a model that this library does not compute.
    """
    sizes = folder / "config.json"
    config = read_json(sizes)
    params = convert_config(config, sizes)
    files = find_weight_files(folder)
    names = hugging_face_names(params["n_layers"])
    return HuggingFaceCheckpoint(folder, sizes, params, files, config=config, names=names)


def find_weight_files(folder: Path) -> list[Path]:
    """The files of tensors: safetensors rather than pickles, the files of an index rather than a single file.

    Raises `FileNotFoundError` if there is none, or if the folder lacks a file that the index names.
    """
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if index.is_file():
            return find_indexed_files(folder, index)
        if (folder / name).is_file():
            return [folder / name]

    names = "model.safetensors, pytorch_model.bin or index of several"
    raise FileNotFoundError(f"No {names} in {folder}; it holds {listing(folder)}.")


def find_indexed_files(folder: Path, index: Path) -> list[Path]:
    """The files that an index names. Raises `FileNotFoundError` for files that the folder lacks."""
    file_of_tensor = read_json(index).get("weight_map")
    if not isinstance(file_of_tensor, dict) or not file_of_tensor:
        raise ValueError(
            f"{index} has no weight_map, which says the file of each tensor; fetch it again."
        )

    files = sorted({folder / Path(str(file)).name for file in file_of_tensor.values()})
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{index} names {', '.join(missing)}, not in {folder}; fetch what is missing."
        )
    return files


# --- sizes -------------------------------------------------------------------------------------------------------


def convert_config(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """A `config.json` as the sizes of `params.json`. Raises `ValueError` for a model that is not computed here."""
    # What would make it another model.
    fixed = ALLOWED | dict.fromkeys(REFUSED, False)
    for key, value in fixed.items():
        if config.get(key) not in (None, value):
            raise ValueError(
                f"{path} asks for {key} {config[key]!r}; this library computes only {value!r}."
            )

    if config.get("quantization_config"):
        asked = f"asks for quantization_config {config['quantization_config']!r}"
        advice = "give the unquantized original, which quantize='int8' or 'int4' makes small"
        raise ValueError(f"{path} {asked}, in which this library reads no weights; {advice}.")

    # The sizes that have to be there.
    for key in (*SIZES.values(), "vocab_size", "intermediate_size"):
        if type(config.get(key)) is not int or config[key] < 1:
            raise ValueError(
                f"{path} says {config.get(key)!r} for {key}; it must be a positive integer."
            )
    params = {ours: config[theirs] for ours, theirs in SIZES.items()}
    head_dim = params["dim"] // params["n_heads"]
    if config.get("head_dim") not in (None, head_dim):
        raise ValueError(
            f"{path} asks for head_dim {config['head_dim']}; this library computes only {head_dim} here."
        )

    # The sizes that have defaults.
    return params | {
        "vocab_size": config["vocab_size"],
        "n_kv_heads": config.get("num_key_value_heads"),
        "norm_eps": config.get("rms_norm_eps", 1e-6),
        "rope_theta": rope_theta(config, path),
        **feed_forward_params(params["dim"], config["intermediate_size"]),
    }


def rope_theta(config: Mapping[str, Any], path: Path) -> float:
    """The base of the rotary angles. Raises `ValueError` for scaled positions.

    Files that transformers 5 writes state it in `rope_parameters`, older files beside the sizes, the oldest not at all.
    """
    scaling = config.get("rope_scaling") or {}
    parameters = config.get("rope_parameters") or {}
    rope = scaling | parameters
    theta = rope.pop("rope_theta", config.get("rope_theta", 10000.0))

    if any(value not in (None, "default") for value in rope.values()):
        key = "rope_scaling" if scaling else "rope_parameters"
        raise ValueError(
            f"{path} asks for {key} {config[key]!r}; this library computes only unscaled positions."
        )
    return theta


def feed_forward_params(dim: int, width: int) -> dict[str, int | float]:
    """A feed-forward width in the terms of `params.json`, which states only a rule that rounds up to the width.

    The rule takes two thirds of 4 `dim`, times a factor if there is one, and rounds up to a multiple. The usual
    multiple of 256 is taken where it gives the width. Elsewhere the multiple is the width itself, and a factor makes
    the two thirds at most as large.
    """
    two_thirds = int(2 * 4 * dim / 3)
    if -(-two_thirds // 256) * 256 == width:
        return {"multiple_of": 256}
    if width < two_thirds:
        return {"multiple_of": width, "ffn_dim_multiplier": width / two_thirds}
    return {"multiple_of": width}
