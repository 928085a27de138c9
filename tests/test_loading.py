"""From a checkpoint to a model that is ready: sizes, vocabulary, device, number format, ranks, memory, and what stays.

Wrong input goes through `Llama.build`, as people meet it.
"""

import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from llama import ModelArgs, Transformer, device, loading, parallel
from llama.model import KVCache
from support.checkpoints import write_checkpoint
from support.folders import PARAMS, PROMPTS, WORDS, build, rewrite_params, weights
from support.models import BASE_PARAMS, random_weights
from support.process import global_state
from support.refusals import refusal

ROOT = Path(__file__).parents[1]
F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture
def folder(tmp_path, tokenizer_path) -> Path:
    return write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path)


# --- params.json -----------------------------------------------------------------------------------------------------


def test_params_with_unknown_keys_warn_and_are_not_used(folder):
    rewrite_params(folder, use_scaled_rope=True, flavour="vanilla")
    with pytest.warns(UserWarning, match=r"params\.json.*flavour, use_scaled_rope") as caught:
        llama = build(folder)
    assert len(caught) == 1
    assert llama.model.params.dim == PARAMS["dim"]


def test_params_with_known_keys_do_not_warn(folder):
    rewrite_params(folder, rope_theta=1e6, ffn_dim_multiplier=None, norm_eps=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        params = build(folder).model.params
    assert (params.rope_theta, params.norm_eps, params.n_kv_heads) == (1e6, 1e-6, 2)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"dim": 64}, ["(480, 32)", "(480, 64)"]),
        ({"n_layers": 3}, ["lacks", "layers.2."]),
        ({"n_layers": 1}, ["unknown", "layers.1."]),
        ({"n_kv_heads": 4}, ["attention.wk", "(16, 32)", "(32, 32)"]),
        ({"vocab_size": 481}, ["(480, 32)", "(481, 32)"]),
        ({"multiple_of": 128}, ["feed_forward", "(96, 32)", "(128, 32)"]),
        ({"ffn_dim_multiplier": 2.0}, ["feed_forward", "(96, 32)", "(176, 32)"]),
    ],
    ids=str,
)
def test_sizes_that_contradict_the_weights_are_named(folder, changes, words):
    rewrite_params(folder, **changes)
    refusal(lambda: build(folder), "params.json", *words)


NONSENSE = [
    *[(name, value) for name in ("dim", "n_layers", "n_heads") for value in (0, -4, "4", 4.5, None, True, [4])],
    *[("n_kv_heads", value) for value in (0, -1, "2", 3, 8)],
    *[("vocab_size", value) for value in (0, -2, None, "480", 480.0)],
    *[("multiple_of", value) for value in (0, -16, "16", None)],
    *[("norm_eps", value) for value in (0, -1e-5, "1e-5", None, float("nan"), float("inf"))],
    *[("rope_theta", value) for value in (0, -1, "1e4", None, float("nan"), float("inf"))],
    *[("ffn_dim_multiplier", value) for value in (0, -1.3, "1.3", float("nan"), float("inf"), [1.3], True)],
    ("n_heads", 12),  # does not divide dim
    ("n_heads", 32),  # heads of one feature, which rotation cannot pair
]


@pytest.mark.parametrize("name, value", NONSENSE, ids=str)
def test_sizes_that_are_nonsense_are_named(folder, name, value):
    rewrite_params(folder, **{name: value})
    refusal(lambda: build(folder), name.removeprefix("n_"))


@pytest.mark.parametrize("value", [0, -1, "16", 2.5, None, True], ids=repr)
@pytest.mark.parametrize("name", ["max_seq_len", "max_batch_size"])
def test_sizes_of_a_nonsense_cache_are_named(folder, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*positive integer\.$"):
        build(folder, **{name: value})


# --- the tokenizer and the embedding ---------------------------------------------------------------------------------


def test_vocabulary_smaller_than_the_tokenizers_is_refused(tmp_path, tokenizer_path):
    params = PARAMS | {"vocab_size": 470}
    folder = write_checkpoint(tmp_path / "model", params, random_weights(params), tokenizer_path)
    refusal(lambda: build(folder), "480", "470", "tokenizer")


@pytest.mark.parametrize("rows, warned", [(WORDS + 127, False), (WORDS + 128, True), (4000, True)])
def test_vocabulary_far_beyond_the_tokenizers_is_warned_of(tmp_path, tokenizer_path, rows, warned):
    """The base's tokenizer beside a model with an extended vocabulary: its own tokens were lost without a word."""
    params = PARAMS | {"vocab_size": rows}
    folder = write_checkpoint(tmp_path / "model", params, random_weights(params), tokenizer_path)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build(folder)
    messages = [str(warning.message) for warning in caught]
    words = f"The tokenizer has {WORDS} ids, but the model {rows} rows: {rows - WORDS} tokens can be neither read"
    assert [message.startswith(words) for message in messages] == [True] * warned


def test_vocabulary_beyond_the_tokenizers_is_never_chosen(tmp_path, tokenizer_path):
    params = PARAMS | {"vocab_size": 500}
    large = random_weights(params)
    push = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    large["output.weight"][WORDS:] = torch.cat([push * 20 * (-1) ** n for n in range(20)])
    llama = build(write_checkpoint(tmp_path / "model", params, large, tokenizer_path))
    assert llama.model(torch.tensor(PROMPTS[:1]), 0).argmax(-1).min() >= WORDS, "they must be the likeliest"
    for options in (
        {"temperature": 0},
        {"temperature": 5.0, "top_p": 1.0},
        {"temperature": 1.0, "top_k": 3},
    ):
        ids, _ = llama.generate(PROMPTS, 12, **options)
        assert sum(map(len, ids)) > 20
        assert max(id for row in ids for id in row) < WORDS
    (result,) = llama.text_completion(["Anna"], max_gen_len=8, logprobs=True)
    assert len(result["tokens"]) == len(result["logprobs"]) > 0


def test_vocabulary_of_minus_one_means_the_tokenizers(folder):
    expected = build(folder).generate(PROMPTS, 8, 0)
    rewrite_params(folder, vocab_size=-1)
    llama = build(folder)
    assert llama.model.vocab_size == WORDS
    assert llama.generate(PROMPTS, 8, 0) == expected


# --- device, number format, ranks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float8", "int8", "fp16", "double", "", torch.float64, 16], ids=repr)
def test_dtype_that_does_not_exist_names_those_that_do(folder, name):
    refusal(lambda: build(folder, dtype=name), repr(str(name)), "float32", "bfloat16", "float16")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "tpu", ""])
def test_device_that_does_not_exist_names_those_that_do(folder, name):
    refusal(lambda: build(folder, device=name), repr(name), "available", "cpu")


def test_device_that_is_not_here_is_refused(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal(lambda: build(folder, device="cuda"), "'cuda'", "not available", "cpu")
    refusal(lambda: build(folder, device="meta"), "'meta'", "cpu")


@pytest.mark.parametrize("ranks", [2, 8, 0, -1])
def test_ranks_that_do_not_divide_the_processes_are_refused(folder, ranks):
    refusal(lambda: build(folder, model_parallel_size=ranks), f"is {ranks}", "1 process;", "torchrun")
    assert not torch.distributed.is_initialized()


def test_ranks_of_one_process_are_one(folder):
    assert build(folder, model_parallel_size=1).generate(PROMPTS, 4, 0) == build(folder).generate(PROMPTS, 4, 0)


@pytest.mark.parametrize("dtype, error", [("float16", 0.05), ("bfloat16", 0.5)])
def test_dtype_of_half_precision_computes_and_says_what_it_was(folder, capsys, dtype, error):
    expected = build(folder).score(["Anna took the red cup"])[0]
    capsys.readouterr()
    llama = build(folder, dtype=dtype)
    assert f"{dtype} (stored as float32)" in capsys.readouterr().err
    assert {parameter.dtype for parameter in llama.model.parameters()} == {getattr(torch, dtype)}
    assert llama.model.cache.k.dtype == llama.model.cache.v.dtype == getattr(torch, dtype)
    (score,) = llama.score(["Anna took the red cup"])
    assert score["tokens"] == expected["tokens"]
    difference = np.abs(np.subtract(score["logprobs"], expected["logprobs"])).max()
    assert 0 < difference < error
    for temperature in (0, 0.8):
        (ids, *_), (logprobs, *_) = llama.generate([[1, 300]], 10, temperature, logprobs=True)
        assert 0 < len(ids) == len(logprobs)
        assert all(np.isfinite(logprobs))


def test_dtype_that_the_device_lacks_is_converted(tmp_path, tokenizer_path, monkeypatch, capsys):
    halved = {name: tensor.bfloat16() for name, tensor in weights().items()}
    folder = write_checkpoint(tmp_path / "half", PARAMS, halved, tokenizer_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    llama = build(folder)
    assert "float32 (stored as bfloat16)" in capsys.readouterr().err
    same = write_checkpoint(tmp_path / "same", PARAMS, {n: t.float() for n, t in halved.items()}, tokenizer_path)
    assert llama.generate(PROMPTS, 10, 0, logprobs=True) == build(same).generate(PROMPTS, 10, 0, logprobs=True)


# --- memory ----------------------------------------------------------------------------------------------------------

WIDE = {"max_batch_size": 8, "max_seq_len": 1024}
LARGE = ModelArgs(**PARAMS, **WIDE)


def memory_message(folder: Path, monkeypatch, free: int, **options) -> str:
    monkeypatch.setattr(loading, "free_memory", lambda device: free)
    return refusal(lambda: build(folder, **(WIDE | options)), "GB", "cpu", error=RuntimeError)


def advice(message: str) -> list[dict[str, object]]:
    """Each alternative a message offers, as arguments of `build`."""
    alternatives = []
    for part in message.partition("what fits:")[2].split(", or "):
        found = dict(re.findall(r"(max_batch_size|max_seq_len|dtype)=(\w+|'\w+')", part))
        if found:
            alternatives.append({name: value.strip("'") for name, value in found.items()})
    return [{n: int(v) if v.isdigit() else v for n, v in found.items()} for found in alternatives]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.45, 0.55, 0.8, 0.99])
def test_memory_advice_really_fits(folder, monkeypatch, share):
    weight, cache = loading.needed(LARGE, 4)
    message = memory_message(folder, monkeypatch, weight + int(share * cache))
    alternatives = advice(message)
    assert alternatives, message
    for changes in alternatives:
        model = build(folder, **(WIDE | changes)).model
        held = sum(tensor.nbytes for tensor in [*model.parameters(), model.cache.k, model.cache.v])
        assert held <= weight + int(share * cache)
        for name in set(changes) & {"max_batch_size", "max_seq_len"}:
            more = changes | {name: changes[name] + 1}
            with pytest.raises(RuntimeError):
                build(folder, **(WIDE | more))


def test_memory_advice_has_every_kind(folder, monkeypatch):
    weight, cache = loading.needed(LARGE, 4)
    message = memory_message(folder, monkeypatch, weight + int(0.6 * cache))
    assert {name for changes in advice(message) for name in changes} == {
        "max_batch_size",
        "max_seq_len",
        "dtype",
    }
    message = memory_message(folder, monkeypatch, weight // 2 + cache // 2)
    assert {"dtype": "bfloat16"} in advice(message)


@pytest.mark.parametrize("free", [0, 1000, 60_000, 90_000, 110_000, 130_000, 140_000, 160_000, 190_000, 230_000])
def test_memory_advice_that_nothing_fits_is_true(folder, monkeypatch, free):
    """One row of a shorter context, or the same in 16 bits, was never tried: the message said that nothing fits."""
    message = memory_message(folder, monkeypatch, free)
    if not advice(message):
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(RuntimeError):
                build(folder, max_batch_size=1, max_seq_len=128, dtype=dtype)


def test_memory_that_is_exactly_enough_is_enough(folder, monkeypatch):
    needed = sum(loading.needed(LARGE, 4))
    monkeypatch.setattr(loading, "free_memory", lambda device: needed)
    assert build(folder, **WIDE).model.cache.k.shape[1] == 8
    memory_message(folder, monkeypatch, needed - 1)


def test_memory_is_at_most_what_the_container_has_left(folder, monkeypatch):
    """A container's own limit counts, however much the machine has free: beyond it the system kills the process."""
    needed = sum(loading.needed(LARGE, 4))
    monkeypatch.setattr(device, "container_memory", lambda: needed - 1)
    refusal(lambda: build(folder, **WIDE), "GB free", "cpu", error=RuntimeError)
    monkeypatch.setattr(device, "container_memory", lambda: needed)
    assert build(folder, **WIDE).model.cache.k.shape[1] == 8
    monkeypatch.setattr(device, "container_memory", lambda: None)
    build(folder, **WIDE)


def test_memory_is_checked_before_it_is_taken(folder, monkeypatch):
    taken = []
    monkeypatch.setattr(KVCache, "allocate", lambda *args: taken.append(args))
    memory_message(folder, monkeypatch, 1000)
    assert not taken


def test_memory_of_unknown_size_is_no_obstacle(folder, monkeypatch):
    monkeypatch.setattr(loading, "free_memory", lambda device: None)
    assert build(folder, **WIDE).generate(PROMPTS, 4, 0) == build(folder).generate(PROMPTS, 4, 0)


def test_memory_is_shared_by_the_ranks_of_a_machine(folder, monkeypatch):
    """More processes on the same processor need more memory, not less: they are no advice there."""
    needed = sum(loading.needed(LARGE, 4))
    monkeypatch.setattr(loading, "free_memory", lambda device: needed)
    monkeypatch.setattr(parallel, "local_world", lambda: (0, 2))
    refusal(lambda: loading.check_memory(LARGE, F32, torch.device("cpu")), "GB", error=RuntimeError)
    monkeypatch.setattr(parallel, "local_world", lambda: (0, 1))
    assert "process" not in memory_message(folder, monkeypatch, loading.needed(LARGE, 4)[0] * 3 // 4).partition(";")[2]


SIZES = [
    (PARAMS, 1),
    (BASE_PARAMS, 1),
    (BASE_PARAMS | {"ffn_dim_multiplier": 1.3, "multiple_of": 24}, 1),
    *[(BASE_PARAMS | {"n_heads": 8, "n_kv_heads": kv}, ranks) for kv in (1, 2, 8) for ranks in (1, 2, 4, 8)],
]


@pytest.mark.parametrize("params, ranks", SIZES, ids=lambda value: str(value) if isinstance(value, int) else "")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_memory_estimate_is_what_the_model_holds(monkeypatch, params, ranks, dtype):
    monkeypatch.setattr(parallel, "size", lambda: ranks)
    args = ModelArgs(**params, max_batch_size=3, max_seq_len=50)
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
    cache = KVCache.allocate(args.cache_shape(), dtype, "meta")
    held = (
        sum(parameter.nbytes for parameter in model.parameters()),
        cache.k.nbytes + cache.v.nbytes,
    )
    assert loading.needed(args, dtype.itemsize, ranks) == held


# --- what building leaves alone --------------------------------------------------------------------------------------


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_build_leaves_global_state_alone(folder, default):
    torch.set_default_dtype(default)
    try:
        before = global_state()
        build(folder, seed=5)
        assert global_state() == before
        rewrite_params(folder, dim=64)
        with pytest.raises(ValueError):
            build(folder)
        (folder / "consolidated.00.pth").write_bytes(b"PK")
        with pytest.raises(ValueError):
            build(folder)
        assert global_state() == before
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("default", [torch.float16, torch.float64])
def test_build_under_another_default_dtype_changes_no_number(folder, default):
    """Scores were collected in a tensor of the caller's default dtype."""
    expected = (
        build(folder).score(["Anna took the cup"]),
        build(folder).generate(PROMPTS, 8, 0.9, seed=3),
    )
    torch.set_default_dtype(default)
    try:
        llama = build(folder)
        assert (
            llama.score(["Anna took the cup"]),
            llama.generate(PROMPTS, 8, 0.9, seed=3),
        ) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_build_under_another_default_device_does_not_matter(folder):
    expected = build(folder).generate(PROMPTS, 8, 0, logprobs=True)
    torch.set_default_device("meta")
    try:
        assert build(folder).generate(PROMPTS, 8, 0, logprobs=True) == expected
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


def test_build_prints_one_line_on_standard_error(folder, capfd):
    build(folder)
    out, err = capfd.readouterr()
    assert out == ""
    assert re.fullmatch(r"llama: cpu, float32, weights \d+ MB and cache \d+ MB, ready in [\d.]+ s\n", err)


ALONE = """
import os, socket, sys

def refuse(*args, **kwargs):
    raise AssertionError("a socket was opened")

socket.socket.__init__ = socket.socket.connect = socket.socket.bind = refuse
import torch
torch.set_num_threads(1)
before = dict(os.environ)
from llama import Llama
llama = Llama.build(sys.argv[1], max_seq_len=32, device="cpu")
ids, _ = llama.generate([[1, 300]], 8, 0)
assert not torch.distributed.is_initialized()
assert dict(os.environ) == before
print(*ids[0])
"""


def test_build_in_one_process_needs_no_environment_and_no_socket(folder):
    command = [sys.executable, "-c", ALONE, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": os.defpath}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [int(id) for id in done.stdout.split()] == build(folder).generate([[1, 300]], 8, 0)[0][0]
