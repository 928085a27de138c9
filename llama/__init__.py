"""Llama 2 inference: the model, its tokenizer and its decoding, on any device and any number of ranks.

Names are imported at their first use (PEP 562), so that a script can answer `--help` without waiting for torch.
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llama.generation import Dialog, Llama
    from llama.model import ModelArgs, Transformer
    from llama.tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer"]
__version__ = "0.1.0"

HOMES = {
    "Dialog": "prompts",
    "Llama": "generation",
    "ModelArgs": "model",
    "Tokenizer": "tokenizer",
    "Transformer": "model",
}


def __getattr__(name: str) -> object:
    """A public name from its module, or a module of the package, neither of them imported before."""
    if name in HOMES:
        return getattr(importlib.import_module(f"llama.{HOMES[name]}"), name)
    if not name.startswith("_") and importlib.util.find_spec(f"llama.{name}"):
        return importlib.import_module(f"llama.{name}")
    raise AttributeError(f"module 'llama' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
