"""A LoRA adapter in PEFT's layout: what it adds to the weights of a base model, and what it puts in their place.

LoRA, arXiv:2106.09685, section 4.1: W becomes W + alpha / r * B A, where B has r columns and A has r rows. rsLoRA,
arXiv:2312.03732, divides by sqrt(r) instead. Only the part of W that a rank holds is computed. Adapters have Hugging
Face's names and order of rows, whatever layout their base has.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.formats.hf_layout import HALF_SPLIT, HalfSplit, hugging_face_names
from llama.formats.reading import open_tensors, read_json
from llama.formats.recognise import folder_path
from llama.formats.slicing import Slice

# The keys of an adapter_config.json that do not change the sum above.
HARMLESS = """alpha_pattern auto_mapping base_model_name_or_path eva_config exclude_modules inference_mode
layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_version qalora_group_size
r rank_pattern revision runtime_config target_modules task_type use_rslora"""

# The values that other keys may have. Initialisations that are not listed begin by changing the base, so that their
# products do not belong to the base as it is.
ALLOWED = {
    "peft_type": ["LORA"],
    "bias": ["none"],
    "init_lora_weights": [True, False, "gaussian", "eva", "orthogonal"],
}
UNUSED = [None, False, [], {}]

REPLACED = ("tok_embeddings.weight", "output.weight")  # `modules_to_save` may hold these, whole
PREFIX = "base_model.model."  # of all names in an adapter's files


class Product:
    """The slice scale * B A, computed in float32."""

    dtype = torch.float32

    def __init__(self, a: Slice, b: Slice, scale: float):
        self.a = a
        self.b = b
        self.scale = scale
        self.shape = torch.Size((b.shape[0], a.shape[1]))

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        rows, columns = self.shape
        if dim == 0:
            a = self.a.narrow(1, 0, columns)
            b = self.b.narrow(0, start, length)
        else:
            a = self.a.narrow(1, start, length)
            b = self.b.narrow(0, 0, rows)
        return self.scale * (b.float() @ a.float())


class Sum:
    """The slice base + product, in float32: the caller rounds it, once."""

    dtype = torch.float32

    def __init__(self, base: Slice, product: Product):
        self.base = base
        self.product = product
        self.shape = base.shape

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        base = self.base.narrow(dim, start, length)
        return base.float() + self.product.narrow(dim, start, length)


class Adapter:
    """The adapter in a folder, for a base of `n_layers` layers with heads of `head_dim`.

    `changes` has, under Meta's names, a `Product` for a matrix to which the adapter adds, and another slice for one
    that it replaces. Raises `FileNotFoundError` or `ValueError` for files that are missing or damaged, and for an
    adapter that does anything but add products to the matrices of layers and replace the embedding and output layers.
    """

    def __init__(self, folder: str | Path, n_layers: int, head_dim: int):
        self.folder = folder_path(folder, "lora", "the adapter")
        self.config = read_json(self.folder / "adapter_config.json")
        check_config(self.config, self.folder)

        found = self.sort_tensors(n_layers, head_dim)
        factors_a = found["A"]
        factors_b = found["B"]
        self.changes = found["whole"]
        for name, theirs in hugging_face_names(n_layers).items():
            if name in factors_a or name in factors_b:
                module = theirs.removesuffix(".weight")
                product = self.product(module, factors_a.get(name), factors_b.get(name))
                self.changes[name] = product

    def sort_tensors(self, n_layers: int, head_dim: int) -> dict[str, dict[str, Slice]]:
        """The factors "A", the factors "B" and "whole" tensors, each under Meta's name of what it changes."""
        found: dict[str, dict[str, Slice]] = {"A": {}, "B": {}, "whole": {}}
        names = {theirs: name for name, theirs in hugging_face_names(n_layers).items()}

        for key, tensor in self.open().items():
            module, _, factor = key.removesuffix(".weight").partition(".lora_")
            name = names.get(module.removeprefix(PREFIX) + ".weight")
            kind = factor or "whole"
            allowed = ["whole"] if name in REPLACED else ["A", "B"]
            if name is None or "norm" in name or kind not in allowed or not key.startswith(PREFIX):
                what = f"changes {key}, which this library cannot merge into {n_layers} layers"
                raise ValueError(f"{self.folder} {what}.")

            if kind == "B" and name.endswith(HALF_SPLIT):
                tensor = HalfSplit(tensor, head_dim)  # the rows of B are the rows of W
            found[kind][name] = tensor
        return found

    def open(self) -> Mapping[str, Slice]:
        for name in ("adapter_model.safetensors", "adapter_model.bin"):
            if (self.folder / name).is_file():
                return open_tensors(self.folder / name)
        raise FileNotFoundError(
            f"No adapter_model.safetensors or adapter_model.bin in {self.folder}."
        )

    def product(self, module: str, a: Slice | None, b: Slice | None) -> Product:
        """What the adapter adds to a module's matrix. Raises `ValueError` for factors that do not fit each other."""
        rank = self.setting("r", "rank_pattern", module)
        alpha = self.setting("lora_alpha", "alpha_pattern", module)
        shape_a = None if a is None else tuple(a.shape)
        shape_b = None if b is None else tuple(b.shape)

        both = shape_a is not None and shape_b is not None
        matrices = both and len(shape_a) == len(shape_b) == 2
        if not matrices or shape_a[0] != rank or shape_b[1] != rank:
            found = f"lora_A {shape_a}, lora_B {shape_b} of {module}"
            raise ValueError(f"{self.folder}: {found} need rank {rank}.")

        divisor = rank**0.5 if self.config.get("use_rslora") else rank
        return Product(a, b, alpha / divisor)

    def setting(self, key: str, patterns: str, module: str) -> float:
        """The rank or alpha of a module: that of the first pattern that its name ends in, else the common one."""
        values = self.config.get(patterns) or {}
        for end, value in values.items():
            if re.fullmatch(rf"(.*\.)?({end})", module):
                return value
        return self.config.get(key, 8)

    def apply(self, slices: Mapping[str, Slice]) -> dict[str, Slice]:
        """The slices of a whole base, changed. Raises `ValueError` for shapes that do not agree."""
        changed = dict(slices)
        for name, change in self.changes.items():
            base = slices[name]
            found = tuple(change.shape)
            expected = tuple(base.shape)
            if found != expected:
                what = f"its {name} has the shape {found}, but the base describes {expected}"
                raise ValueError(f"{self.folder} fits another base: {what}.")
            changed[name] = Sum(base, change) if isinstance(change, Product) else change
        return changed


def check_config(config: Mapping[str, Any], folder: Path) -> None:
    """Raise `ValueError` for an adapter whose settings mean more than adding products."""
    settings = {"peft_type": None} | dict(config)
    harmless = HARMLESS.split()
    for key, value in settings.items():
        allowed = ALLOWED.get(key, UNUSED)
        if key not in harmless and value not in allowed:
            raise ValueError(
                f"{folder} asks for {key} {value!r}, which this library does not merge."
            )
