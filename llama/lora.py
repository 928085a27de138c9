"""A LoRA adapter in PEFT's layout: what it adds to a base model's weights, and what it puts in their place.

LoRA, arXiv:2106.09685, section 4.1: W becomes W + alpha / r * B A, with B of r columns and A of r rows; rsLoRA,
arXiv:2312.03732, divides by sqrt(r) instead. Each product is computed for the part of W that a rank holds. Adapters
have Hugging Face's names and order of rows, whatever their base is stored in here. Knows nothing of `nn.Module`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from llama import checkpoint
from llama.checkpoint import Piece

# What an adapter_config.json may say without changing the sum above, and what it must say where it matters: other
# initialisations begin by changing the base, so their products do not belong to the base as it is.
HARMLESS = """alpha_pattern auto_mapping base_model_name_or_path eva_config exclude_modules inference_mode
layers_pattern layers_to_transform lora_alpha lora_dropout megatron_core modules_to_save peft_version qalora_group_size
r rank_pattern revision runtime_config target_modules task_type use_rslora"""
ALLOWED = {"peft_type": ["LORA"], "bias": ["none"], "init_lora_weights": [True, False, "gaussian", "eva", "orthogonal"]}
REPLACED = ("tok_embeddings.weight", "output.weight")


class Product:
    """The change of one matrix, scale * B A; `narrow` computes a part of it, in float32."""

    def __init__(self, a: Piece, b: Piece, scale: float):
        self.a, self.b, self.scale, self.shape = a, b, scale, (b.shape[0], a.shape[1])

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        rows, columns = [(start, length) if d == dim else (0, whole) for d, whole in enumerate(self.shape)]
        return self.scale * (self.b.narrow(0, *rows).float() @ self.a.narrow(1, *columns).float())


class Adapter:
    """The adapter in a folder, for a base of `n_layers` layers with heads of `head_dim`.

    Raises `FileNotFoundError` or `ValueError` for files that are missing or damaged, and for an adapter that does
    anything but add products to the matrices of layers and replace the embedding and the output layer.
    """

    def __init__(self, folder: Path, n_layers: int, head_dim: int):
        self.folder, self.config = folder, checkpoint.read_json(folder / "adapter_config.json")
        for key, value in ({"peft_type": None} | self.config).items():
            if key not in HARMLESS.split() and value not in ALLOWED.get(key, [None, False, [], {}]):
                raise ValueError(f"{folder} asks for {key} {value!r}, which this library does not merge.")
        known = checkpoint.hugging_face_names(n_layers).items()
        names = {f"base_model.model.{theirs}": ours for ours, theirs in known if "norm" not in ours}
        self.changes: dict[str, Piece | Product] = {}
        found: dict[str, dict[str, Piece]] = {"": self.changes, "A": {}, "B": {}}
        for key, piece in self.open().items():
            module, _, factor = key.removesuffix(".weight").partition(".lora_")
            name = names.get(f"{module}.weight")
            if name is None or factor not in ([""] if name in REPLACED else ["A", "B"]):
                raise ValueError(f"{folder} changes {key}, which this library cannot merge into {n_layers} layers.")
            permuted = factor == "B" and name.endswith(checkpoint.HALF_SPLIT)
            found[factor][name] = checkpoint.HalfSplit(piece, head_dim) if permuted else piece
        for theirs, name in names.items():
            if name in found["A"] or name in found["B"]:
                module = theirs.removeprefix("base_model.model.").removesuffix(".weight")
                self.changes[name] = self.product(module, found["A"].get(name), found["B"].get(name))

    def open(self) -> dict[str, Piece]:
        for name in ("adapter_model.safetensors", "adapter_model.bin"):
            if (self.folder / name).is_file():
                read = checkpoint.open_shard if name.endswith(".bin") else checkpoint.open_safetensors
                return read(self.folder / name)
        raise FileNotFoundError(f"No adapter_model.safetensors or adapter_model.bin in {self.folder}.")

    def setting(self, key: str, patterns: str, module: str) -> float:
        """Rank or alpha of a module: of the first pattern that its name ends in, else the common one, 8 unless said."""
        patterns = self.config.get(patterns) or {}
        matching = (value for end, value in patterns.items() if re.fullmatch(rf"(.*\.)?({end})", module))
        return next(matching, self.config.get(key, 8))

    def product(self, module: str, a: Piece | None, b: Piece | None) -> Product:
        rank, alpha = self.setting("r", "rank_pattern", module), self.setting("lora_alpha", "alpha_pattern", module)
        shapes = [None if piece is None else tuple(piece.shape) for piece in (a, b)]
        if None in shapes or [len(shapes[0]), len(shapes[1]), shapes[0][0], shapes[1][-1]] != [2, 2, rank, rank]:
            raise ValueError(f"{self.folder}: lora_A {shapes[0]}, lora_B {shapes[1]} of {module} need rank {rank}.")
        return Product(a, b, alpha / (rank**0.5 if self.config.get("use_rslora") else rank))

    def merge(self, tensors: Iterable[tuple[str, Tensor]], cut: Callable) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a rank as the adapter changes them, sums in float32: the caller rounds, once.

        `cut` is `checkpoint.slices` for that rank. Raises `ValueError`, naming the tensor, if shapes do not agree.
        """
        own = {"sizes": "the base", "stored_name": lambda name: f"{self.folder} fits another base: its {name}"}
        for name, tensor in tensors:
            if name in self.changes:
                ((_, change),) = cut([self.changes], {name: tuple(tensor.shape)}, **own)
                tensor = tensor.float() + change if isinstance(self.changes[name], Product) else change
            yield name, tensor
