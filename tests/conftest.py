"""What the tests share: one thread, tiny random models, a tokenizer trained on the spot, checkpoints in Meta's layout.

Nothing here calls the library to compute anything, except `build_model` and `tokenizer`, which hand it what was made.
"""

import json
import os
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy, which read it once

import numpy as np
import pytest
import sentencepiece as spm
import torch
from hypothesis import HealthCheck, settings
from reference import Shape

from llama.model import ModelArgs, Transformer
from llama.tokenizer import Tokenizer

torch.set_num_threads(1)
settings.register_profile("llama", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("llama")

Weights = dict[str, torch.Tensor]

BASE_PARAMS = {"dim": 32, "n_layers": 2, "n_heads": 4, "vocab_size": 97, "multiple_of": 16, "norm_eps": 1e-5}
VARIANTS = {
    "mha": {},
    "gqa": {"n_kv_heads": 2, "rope_theta": 1e6, "norm_eps": 1e-6, "ffn_dim_multiplier": 1.3},
}


@pytest.fixture(params=VARIANTS, ids=str)
def tiny_params(request) -> dict:
    """A params.json of a model of some tens of thousands of weights: multi-head, then grouped-query."""
    return BASE_PARAMS | VARIANTS[request.param]


@pytest.fixture
def tiny_args(tiny_params) -> ModelArgs:
    return ModelArgs(**tiny_params, max_batch_size=4, max_seq_len=64)


# --- models ------------------------------------------------------------------------------------------------------


def hidden_size(params: Mapping) -> int:
    """Two thirds of 4 * dim, times the multiplier, rounded up; in integers, as the released sizes need."""
    hidden = int(2 * 4 * params["dim"] / 3)
    if params.get("ffn_dim_multiplier") is not None:
        hidden = int(params["ffn_dim_multiplier"] * hidden)
    multiple = params["multiple_of"]
    return (hidden + multiple - 1) // multiple * multiple


def random_weights(params: Mapping, seed: int = 0) -> Weights:
    """Weights large enough that logits spread over several units, so that float32 noise rarely changes a choice."""
    generator = torch.Generator().manual_seed(seed)
    dim, heads, hidden, vocab = params["dim"], params["n_heads"], hidden_size(params), params["vocab_size"]
    kv_dim = dim // heads * (params.get("n_kv_heads") or heads)

    def normal(*shape: int, std: float) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * std

    weights = {"tok_embeddings.weight": normal(vocab, dim, std=1.0)}
    for n in range(params["n_layers"]):
        weights |= {
            f"layers.{n}.attention.wq.weight": normal(dim, dim, std=0.3),
            f"layers.{n}.attention.wk.weight": normal(kv_dim, dim, std=0.3),
            f"layers.{n}.attention.wv.weight": normal(kv_dim, dim, std=0.2),
            f"layers.{n}.attention.wo.weight": normal(dim, dim, std=0.2),
            f"layers.{n}.feed_forward.w1.weight": normal(hidden, dim, std=0.2),
            f"layers.{n}.feed_forward.w2.weight": normal(dim, hidden, std=0.2),
            f"layers.{n}.feed_forward.w3.weight": normal(hidden, dim, std=0.2),
            f"layers.{n}.attention_norm.weight": 1 + normal(dim, std=0.2),
            f"layers.{n}.ffn_norm.weight": 1 + normal(dim, std=0.2),
        }
    return weights | {"norm.weight": 1 + normal(dim, std=0.2), "output.weight": normal(vocab, dim, std=0.3)}


def build_model(params: Mapping, weights: Weights, max_batch_size: int = 4, max_seq_len: int = 64) -> Transformer:
    model = Transformer(ModelArgs(**params, max_batch_size=max_batch_size, max_seq_len=max_seq_len))
    model.load_state_dict(weights, strict=True)
    return model.eval()


def as_float64(weights: Weights) -> dict[str, np.ndarray]:
    return {name: tensor.double().numpy() for name, tensor in weights.items()}


def shape_of(params: Mapping) -> Shape:
    """The same model's numbers for the reference."""
    heads = params["n_heads"]
    return Shape(
        n_layers=params["n_layers"],
        n_heads=heads,
        n_kv_heads=params.get("n_kv_heads") or heads,
        norm_eps=params["norm_eps"],
        rope_theta=params.get("rope_theta", 10000.0),
    )


# --- tokenizer ---------------------------------------------------------------------------------------------------


def sentences() -> Iterator[str]:
    """A small language: enough repetition for merges, few enough words that most text falls back to bytes."""
    rng = random.Random(7)
    people = ["Anna", "Tom", "Maria", "Peter", "Lily", "Oskar", "Nina", "Paul", "Clara", "Hugo"]
    things = ["cup", "ball", "book", "lamp", "apple", "chair", "shoe", "clock"]
    colours = ["red", "green", "blue", "yellow", "black", "white"]
    places = ["kitchen", "garden", "school", "station", "forest", "market"]
    for _ in range(700):
        who, what, colour, where = (rng.choice(words) for words in (people, things, colours, places))
        yield f"{who} took the {colour} {what} to the {where}."
        yield f"[INST] Where is the {colour} {what}? [/INST] It is in the {where}, said {who}."
        yield f"<<SYS>>\nAnswer in one word.\n<</SYS>>\n\nWho has {rng.randrange(100)} {what}s?  {who}!"
        yield rng.choice(["  two spaces", "Привет, мир", "日本の本", "naïve café", '"quoted" and it\'s fine'])


def train_tokenizer(folder: Path, **options) -> Path:
    """A sentencepiece model with Llama's choices: BPE, byte fallback, no normalisation, a dummy prefix space."""
    spm.SentencePieceTrainer.train(
        sentence_iterator=sentences(),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        character_coverage=0.99,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=True,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
        **options,
    )
    return folder / "tokenizer.model"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path) -> Tokenizer:
    return Tokenizer(str(tokenizer_path))


@pytest.fixture(scope="session")
def raw_sp(tokenizer_path) -> spm.SentencePieceProcessor:
    """sentencepiece itself, to check the tokenizer and the chat encoding against."""
    return spm.SentencePieceProcessor(model_file=str(tokenizer_path))


# --- checkpoints -------------------------------------------------------------------------------------------------

ON_ROWS = ("wq", "wk", "wv", "w1", "w3", "output")
ON_COLUMNS = ("wo", "w2", "tok_embeddings")


def shard(name: str, tensor: torch.Tensor, index: int, count: int) -> torch.Tensor:
    """The part of a weight that file `index` of `count` holds."""
    kind = name.split(".")[-2]
    if kind in ON_ROWS:
        return tensor.chunk(count, dim=0)[index].clone()
    if kind in ON_COLUMNS:
        return tensor.chunk(count, dim=1)[index].clone()
    return tensor.clone()


def write_checkpoint(
    folder: Path, params: Mapping, weights: Weights, tokenizer_path: Path | None = None, shards: int = 1
) -> Path:
    """Write `consolidated.NN.pth`, `params.json` and, where one is given, `tokenizer.model`; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(shards):
        state = {name: shard(name, tensor, index, shards) for name, tensor in weights.items()}
        torch.save(state, folder / f"consolidated.{index:02d}.pth")
    (folder / "params.json").write_text(json.dumps(dict(params)))
    if tokenizer_path is not None:
        (folder / "tokenizer.model").write_bytes(Path(tokenizer_path).read_bytes())
    return folder


# --- what the library must leave alone -----------------------------------------------------------------------


def global_state() -> list:
    """What a call must leave as it found it: random numbers, defaults, modes, streams, warnings, the process."""
    return [
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_num_threads(),
        sys.stdout,
        sys.stderr,
        sys.excepthook,
        list(warnings.filters),
        dict(os.environ),
        os.getcwd(),
    ]
