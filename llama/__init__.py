"""Llama 2 inference: the model, its tokenizer and its decoding, on any device and any number of ranks."""

from llama.generation import Dialog, Llama
from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer

__all__ = ["Dialog", "Llama", "ModelArgs", "Tokenizer", "Transformer"]
__version__ = "0.1.0"
