"""What all tests run with: one thread, settled random examples, a tokenizer trained once."""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and numpy, which read it once

import pytest
import sentencepiece as spm
import torch
from hypothesis import HealthCheck, settings

from llama.device import use_device
from llama.model import ModelArgs
from llama.tokenizer import Tokenizer
from support.models import BASE_PARAMS, VARIANTS
from support.tokenizers import CODE_PIECES, train_tokenizer

torch.set_num_threads(1)
use_device(torch.device("cpu"))  # as `Llama.build` does: some tests make a model without it
settings.register_profile("llama", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("llama")


@pytest.fixture(params=VARIANTS, ids=str)
def tiny_params(request) -> dict:
    """A params.json of a model of some tens of thousands of weights: multi-head, then grouped-query."""
    return BASE_PARAMS | VARIANTS[request.param]


@pytest.fixture
def tiny_args(tiny_params) -> ModelArgs:
    return ModelArgs(**tiny_params, max_batch_size=4, max_seq_len=64)


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


@pytest.fixture(scope="session", params=["user_defined_symbols", "control_symbols"])
def code_path(request, tmp_path_factory) -> Path:
    """A tokenizer with the infilling pieces; as user-defined ones, sentencepiece finds them in ordinary text."""
    return train_tokenizer(tmp_path_factory.mktemp("code"), **{request.param: CODE_PIECES})


@pytest.fixture(scope="session")
def code_tokenizer(code_path) -> Tokenizer:
    return Tokenizer(code_path)
