"""From a folder to a model: every wrong file is named in one sentence, and every right one is cut as each rank needs.

Wrong input goes through `Llama.build`, as people meet it. Cutting is tested on counted numbers, where a misplaced row
shows, for ranks that need no processes.
"""

import functools
import json
import os
import pickle
import random
import re
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from llama import Llama, ModelArgs, Transformer, loading, parallel
from llama.formats import meta, slicing
from llama.formats.reading import open_pickle
from llama.model import KVCache
from support.checkpoints import write_checkpoint
from support.models import BASE_PARAMS, random_weights
from support.process import global_state
from support.refusals import refusal

ROOT = Path(__file__).parents[2]
WORDS = 480  # ids of the tests' tokenizer
PARAMS = BASE_PARAMS | {"n_kv_heads": 2, "vocab_size": WORDS}
PROMPTS = [[1, 400, 7, 19], [1], [1, 300]]


@functools.cache
def weights() -> dict[str, torch.Tensor]:
    return random_weights(PARAMS)


@pytest.fixture
def folder(tmp_path, tokenizer_path) -> Path:
    return write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path)


def build(folder: Path, tokenizer_path=None, max_seq_len: int = 32, max_batch_size: int = 4, **options) -> Llama:
    return Llama.build(folder, tokenizer_path, max_seq_len, max_batch_size, **({"device": "cpu"} | options))


def rewrite_params(folder: Path, **changes) -> None:
    (folder / "params.json").write_text(json.dumps(PARAMS | changes))


# --- folders and files -------------------------------------------------------------------------------------------


def test_no_such_directory(tmp_path):
    missing = tmp_path / "nowhere"
    refusal(lambda: build(missing), str(missing), "does not exist", error=FileNotFoundError)


def test_a_file_instead_of_a_directory(folder):
    path = folder / "consolidated.00.pth"
    refusal(lambda: build(path), str(path), "is a file", error=FileNotFoundError)


def test_a_directory_without_checkpoint_files_says_what_it_holds(folder):
    (folder / "consolidated.00.pth").rename(folder / "model.safetensors")
    (folder / "extra").mkdir()
    words = ("consolidated", str(folder), "model.safetensors", "params.json", "tokenizer.model", "extra/")
    refusal(lambda: build(folder), *words, error=FileNotFoundError)


def test_an_empty_directory_holds_nothing(tmp_path):
    refusal(lambda: build(tmp_path), str(tmp_path), "holds nothing", error=FileNotFoundError)


def test_a_long_listing_is_cut(tmp_path):
    for number in range(30):
        (tmp_path / f"photo{number:02d}.png").touch()
    message = refusal(lambda: build(tmp_path), "photo00.png", "and 22 more", error=FileNotFoundError)
    assert "photo20.png" not in message


@pytest.mark.parametrize("gone", ["00", "01", "02"])
def test_a_gap_in_the_numbering_is_named(tmp_path, tokenizer_path, gone):
    folder = write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path, shards=4)
    (folder / f"consolidated.{gone}.pth").unlink()
    message = refusal(lambda: build(folder), f"not consolidated.{gone}.pth", error=FileNotFoundError)
    assert message.count(f"consolidated.{gone}.pth") == 1


def test_a_missing_tokenizer_says_where_it_was_looked_for(folder, tokenizer_path):
    (folder / "tokenizer.model").unlink()
    refusal(lambda: build(folder), str(folder), "folder above", "tokenizer_path", error=FileNotFoundError)
    wrong = folder / "other.model"
    refusal(lambda: build(folder, wrong), str(wrong), error=FileNotFoundError)
    assert build(folder, tokenizer_path).tokenizer.n_words == WORDS


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 13476925163\n"
HTML = b"<!DOCTYPE html>\n<html><head><title>403 Forbidden</title></head></html>"
XML = b'<?xml version="1.0" encoding="UTF-8"?><Error><Code>AccessDenied</Code></Error>'
FILES = ["consolidated.00.pth", "params.json", "tokenizer.model"]


@pytest.mark.parametrize("content, word", [(LFS, "Git LFS"), (HTML, "HTML"), (XML, "XML"), (b"", "empty file")])
@pytest.mark.parametrize("name", FILES)
def test_what_stands_in_a_files_place_is_recognised(folder, name, content, word):
    (folder / name).write_bytes(content)
    refusal(lambda: build(folder), str(folder / name), word)


def test_a_tiktoken_tokenizer_is_recognised(folder):
    (folder / "tokenizer.model").write_bytes(b"IQ== 0\nIg== 1\nIw== 2\nJA== 3\n")
    refusal(lambda: build(folder), "tokenizer.model", "Llama 3")


@pytest.mark.parametrize("content", [b"hello", bytes(range(256)) * 9, b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00"])
def test_a_damaged_tokenizer_is_named(folder, content):
    (folder / "tokenizer.model").write_bytes(content)
    refusal(lambda: build(folder), str(folder / "tokenizer.model"), "sentencepiece")


# --- params.json -------------------------------------------------------------------------------------------------


def test_params_missing(folder):
    (folder / "params.json").unlink()
    refusal(lambda: build(folder), "params.json", str(folder), error=FileNotFoundError)


@pytest.mark.parametrize("content", [b"{dim: 32}", b'{"dim": 32', b"dim = 32", b"\xff\xfe{\x00}\x00", b'{"dim": 32}}'])
def test_params_not_json(folder, content):
    (folder / "params.json").write_bytes(content)
    refusal(lambda: build(folder), str(folder / "params.json"), "not JSON")


@pytest.mark.parametrize("content, kind", [("[32, 2]", "list"), ("32", "int"), ('"dim"', "str"), ("null", "None")])
def test_params_not_an_object(folder, content, kind):
    (folder / "params.json").write_text(content)
    refusal(lambda: build(folder), "params.json", kind, "not an object")


def test_unknown_keys_warn_and_are_not_used(folder):
    rewrite_params(folder, use_scaled_rope=True, flavour="vanilla")
    with pytest.warns(UserWarning, match=r"params\.json.*flavour, use_scaled_rope") as caught:
        llama = build(folder)
    assert len(caught) == 1
    assert llama.model.params.dim == PARAMS["dim"]


def test_known_keys_do_not_warn(folder):
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
def test_sizes_that_contradict_the_weights(folder, changes, words):
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
def test_nonsense_sizes_are_named(folder, name, value):
    rewrite_params(folder, **{name: value})
    refusal(lambda: build(folder), name.removeprefix("n_"))


@pytest.mark.parametrize("value", [0, -1, "16", 2.5, None, True], ids=repr)
@pytest.mark.parametrize("name", ["max_seq_len", "max_batch_size"])
def test_nonsense_cache_sizes_are_named(folder, name, value):
    with pytest.raises(ValueError, match=rf"^{name} is .*positive integer\.$"):
        build(folder, **{name: value})


# --- what a file holds -------------------------------------------------------------------------------------------


def save(folder: Path, tensors: object, number: int = 0, **options) -> Path:
    path = folder / f"consolidated.{number:02d}.pth"
    torch.save(tensors, path, **options)
    return path


def test_a_missing_key_is_named(folder):
    name = "layers.1.feed_forward.w2.weight"
    path = save(folder, {key: tensor for key, tensor in weights().items() if key != name})
    refusal(lambda: build(folder), str(path), f"lacks {name};")


def test_an_extra_key_is_named(folder):
    save(folder, weights() | {"layers.0.attention.wq.bias": torch.zeros(32)})
    refusal(lambda: build(folder), "unknown layers.0.attention.wq.bias;")


def test_another_models_names_are_listed_in_part(folder):
    save(folder, {f"model.{name}": tensor for name, tensor in weights().items()})
    message = refusal(lambda: build(folder), "lacks", "unknown", "model.", "and 17 more")
    assert len(message) < 600


def test_every_file_is_checked(tmp_path, tokenizer_path):
    folder = write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path, shards=2)
    second = torch.load(folder / "consolidated.01.pth", weights_only=True)
    second["norms.weight"] = second.pop("norm.weight")
    path = save(folder, second, number=1)
    refusal(lambda: build(folder), str(path), "lacks norm.weight", "unknown norms.weight")


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.attention.wo.weight", "output.weight"])
def test_files_of_different_models_are_refused(tmp_path, tokenizer_path, name):
    """A part whose uncut dimension differs reached `torch.cat`, which speaks of tensor sizes and of no file."""
    folder = write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path, shards=2)
    second = torch.load(folder / "consolidated.01.pth", weights_only=True)
    uncut = 1 if name.startswith("output") else 0
    second[name] = second[name].narrow(uncut, 0, 8).clone()
    save(folder, second, number=1)
    refusal(lambda: build(folder), name)


def test_rotary_frequencies_are_ignored(folder):
    expected = build(folder).generate(PROMPTS, 8, 0)
    save(folder, weights() | {"rope.freqs": torch.full((4,), float("nan"))})
    assert build(folder).generate(PROMPTS, 8, 0) == expected


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, torch.zeros(3), {"model": {"norm.weight": torch.ones(3)}}])
def test_a_file_of_something_else_than_named_tensors(folder, content):
    path = save(folder, content)
    refusal(lambda: build(folder), str(path), "not a dictionary of tensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.00001, 0.0002, 0.2, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(folder, part, legacy):
    path = save(folder, weights(), _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: 1 + int(len(whole) * part)])
    message = refusal(lambda: build(folder), str(path), "fetch it again")
    assert "cut short" in message and "code" not in message


@pytest.mark.parametrize("kind", ["text", "number", "zip", "safetensors", "json"])
def test_a_file_of_another_kind_is_refused(folder, kind):
    path = folder / "consolidated.00.pth"
    if kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "weights to follow")
    else:
        header = json.dumps({"norm.weight": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
        content = {"text": b"see the mirror\n", "number": b"\x80\x02K\x01.", "json": header}
        content["safetensors"] = len(header).to_bytes(8, "little") + header + bytes(8)
        path.write_bytes(content[kind])
    refusal(lambda: build(folder), str(path), "not a")


def test_random_bytes_are_refused_in_words(folder):
    """Whatever the unpickler stumbles over (a missing key, a bad index) must not reach the caller as it is."""
    rng = random.Random(3)
    path = folder / "consolidated.00.pth"
    whole = save(folder, weights(), _use_new_zipfile_serialization=False).read_bytes()
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(3):
            damaged[rng.randrange(2000)] = rng.randrange(256)
        path.write_bytes(rng.choice([rng.randbytes(300), b"\x80\x02" + rng.randbytes(300), bytes(damaged)]))
        try:
            open_pickle(path)
        except ValueError as error:
            assert str(path) in str(error) and error.__suppress_context__


class Trap:
    """Pickles to a call that makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("container", ["zip", "legacy", "pickle"])
def test_pickled_code_is_refused_and_not_run(folder, tmp_path, container):
    sprung = tmp_path / "sprung"
    content = weights() | {"norm.weight": Trap(sprung)}
    path = folder / "consolidated.00.pth"
    if container == "pickle":
        path.write_bytes(pickle.dumps({"norm.weight": Trap(sprung)}, protocol=2))
    else:
        save(folder, content, _use_new_zipfile_serialization=container == "zip")
    refusal(lambda: build(folder), str(path), "code", "not run")
    assert not sprung.exists()
    if container == "pickle":
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert sprung.exists(), "the trap was no trap"


# --- the tokenizer and the embedding -----------------------------------------------------------------------------


def test_a_tokenizer_larger_than_the_embedding(tmp_path, tokenizer_path):
    params = PARAMS | {"vocab_size": 470}
    folder = write_checkpoint(tmp_path / "model", params, random_weights(params), tokenizer_path)
    refusal(lambda: build(folder), "480", "470", "tokenizer")


def test_ids_beyond_a_smaller_tokenizer_are_never_chosen(tmp_path, tokenizer_path):
    params = PARAMS | {"vocab_size": 500}
    large = random_weights(params)
    push = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    large["output.weight"][WORDS:] = torch.cat([push * 20 * (-1) ** n for n in range(20)])
    llama = build(write_checkpoint(tmp_path / "model", params, large, tokenizer_path))
    assert llama.model(torch.tensor(PROMPTS[:1]), 0).argmax(-1).min() >= WORDS, "they must be the likeliest"
    for options in ({"temperature": 0}, {"temperature": 5.0, "top_p": 1.0}, {"temperature": 1.0, "top_k": 3}):
        ids, _ = llama.generate(PROMPTS, 12, **options)
        assert sum(map(len, ids)) > 20
        assert max(id for row in ids for id in row) < WORDS
    (result,) = llama.text_completion(["Anna"], max_gen_len=8, logprobs=True)
    assert len(result["tokens"]) == len(result["logprobs"]) > 0


def test_vocab_size_minus_one_means_the_tokenizers(folder):
    expected = build(folder).generate(PROMPTS, 8, 0)
    rewrite_params(folder, vocab_size=-1)
    llama = build(folder)
    assert llama.model.vocab_size == WORDS
    assert llama.generate(PROMPTS, 8, 0) == expected


# --- device, number format, ranks --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["float8", "int8", "fp16", "double", "", torch.float64, 16], ids=repr)
def test_a_dtype_that_does_not_exist_names_those_that_do(folder, name):
    refusal(lambda: build(folder, dtype=name), repr(str(name)), "float32", "bfloat16", "float16")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "tpu", ""])
def test_a_device_that_does_not_exist_names_those_that_do(folder, name):
    refusal(lambda: build(folder, device=name), repr(name), "available", "cpu")


def test_a_device_that_is_not_here(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refusal(lambda: build(folder, device="cuda"), "'cuda'", "not available", "cpu")
    refusal(lambda: build(folder, device="meta"), "'meta'", "cpu")


@pytest.mark.parametrize("ranks", [2, 8, 0, -1])
def test_more_ranks_than_processes(folder, ranks):
    refusal(lambda: build(folder, model_parallel_size=ranks), f"is {ranks}", "1 process;", "torchrun")
    assert not torch.distributed.is_initialized()


def test_one_rank_of_one_process(folder):
    assert build(folder, model_parallel_size=1).generate(PROMPTS, 4, 0) == build(folder).generate(PROMPTS, 4, 0)


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype, error", [("float16", 0.05), ("bfloat16", 0.5)])
def test_half_precision_computes_and_says_what_it_was(folder, capsys, dtype, error):
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


def test_a_stored_format_that_the_device_lacks_is_converted(tmp_path, tokenizer_path, monkeypatch, capsys):
    halved = {name: tensor.bfloat16() for name, tensor in weights().items()}
    folder = write_checkpoint(tmp_path / "half", PARAMS, halved, tokenizer_path)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    llama = build(folder)
    assert "float32 (stored as bfloat16)" in capsys.readouterr().err
    same = write_checkpoint(tmp_path / "same", PARAMS, {n: t.float() for n, t in halved.items()}, tokenizer_path)
    assert llama.generate(PROMPTS, 10, 0, logprobs=True) == build(same).generate(PROMPTS, 10, 0, logprobs=True)


# --- memory ------------------------------------------------------------------------------------------------------

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
def test_what_a_memory_message_names_really_fits(folder, monkeypatch, share):
    weight, cache = LARGE.memory(4)
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


def test_each_kind_of_advice_is_given(folder, monkeypatch):
    weight, cache = LARGE.memory(4)
    message = memory_message(folder, monkeypatch, weight + int(0.6 * cache))
    assert {name for changes in advice(message) for name in changes} == {"max_batch_size", "max_seq_len", "dtype"}
    message = memory_message(folder, monkeypatch, weight // 2 + cache // 2)
    assert {"dtype": "bfloat16"} in advice(message)


@pytest.mark.parametrize("free", [0, 1000, 60_000, 90_000, 110_000, 130_000, 140_000, 160_000, 190_000, 230_000])
def test_a_message_that_nothing_fits_is_true(folder, monkeypatch, free):
    """One row of a shorter context, or the same in 16 bits, was never tried: the message said that nothing fits."""
    message = memory_message(folder, monkeypatch, free)
    if not advice(message):
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(RuntimeError):
                build(folder, max_batch_size=1, max_seq_len=128, dtype=dtype)


def test_exactly_enough_memory_is_enough(folder, monkeypatch):
    needed = sum(LARGE.memory(4))
    monkeypatch.setattr(loading, "free_memory", lambda device: needed)
    assert build(folder, **WIDE).model.cache.k.shape[1] == 8
    memory_message(folder, monkeypatch, needed - 1)


def test_memory_is_checked_before_it_is_taken(folder, monkeypatch):
    taken = []
    monkeypatch.setattr(KVCache, "allocate", lambda *args: taken.append(args))
    memory_message(folder, monkeypatch, 1000)
    assert not taken


def test_an_unknown_amount_of_memory_is_no_obstacle(folder, monkeypatch):
    monkeypatch.setattr(loading, "free_memory", lambda device: None)
    assert build(folder, **WIDE).generate(PROMPTS, 4, 0) == build(folder).generate(PROMPTS, 4, 0)


def test_ranks_of_one_machine_share_its_memory(folder, monkeypatch):
    """More processes on the same processor need more memory, not less: they are no advice there."""
    needed = sum(LARGE.memory(4))
    monkeypatch.setattr(loading, "free_memory", lambda device: needed)
    monkeypatch.setattr(parallel, "local_world", lambda: (0, 2))
    refusal(lambda: loading.check_memory(LARGE, F32, torch.device("cpu")), "GB", error=RuntimeError)
    monkeypatch.setattr(parallel, "local_world", lambda: (0, 1))
    assert "process" not in memory_message(folder, monkeypatch, LARGE.memory(4)[0] * 3 // 4).partition(";")[2]


SIZES = [
    (PARAMS, 1),
    (BASE_PARAMS, 1),
    (BASE_PARAMS | {"ffn_dim_multiplier": 1.3, "multiple_of": 24}, 1),
    *[(BASE_PARAMS | {"n_heads": 8, "n_kv_heads": kv}, ranks) for kv in (1, 2, 8) for ranks in (1, 2, 4, 8)],
]


@pytest.mark.parametrize("params, ranks", SIZES, ids=lambda value: str(value) if isinstance(value, int) else "")
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_estimate_is_what_the_model_holds(monkeypatch, params, ranks, dtype):
    monkeypatch.setattr(parallel, "size", lambda: ranks)
    args = ModelArgs(**params, max_batch_size=3, max_seq_len=50)
    with torch.device("meta"):
        model = Transformer(args).to(dtype)
    cache = KVCache.allocate(args, dtype, "meta")
    held = sum(parameter.nbytes for parameter in model.parameters()), cache.k.nbytes + cache.v.nbytes
    assert args.memory(dtype.itemsize, ranks) == held


# --- cutting for any number of ranks -----------------------------------------------------------------------------

HEADS, HEAD_DIM, DIM, HIDDEN = 8, 8, 64, 96
COUNTS = [1, 2, 4, 8]


def counted(*shape: int) -> torch.Tensor:
    """1, 2, 3, ...: a row out of place shows, and zeros are padding."""
    return torch.arange(1, 1 + int(np.prod(shape)), dtype=torch.float64).view(shape)


def pieces(whole: torch.Tensor, dim: int | None, count: int) -> list[torch.Tensor]:
    """The tensor as `count` files hold it."""
    return [whole] * count if dim is None else [part.clone() for part in whole.tensor_split(count, dim)]


def cut(name: str, parts: list[torch.Tensor], local: tuple[int, ...], rank: int, size: int, **sizes) -> torch.Tensor:
    whole = {"vocab_size": 32, "kv_rows": HEADS * HEAD_DIM, "head_dim": HEAD_DIM} | sizes
    shards = [{name: part} for part in parts]
    ((found, tensor),) = slicing.cut_for_rank(slicing.join(shards), {name: local}, rank=rank, size=size, **whole)
    assert found == name and tuple(tensor.shape) == tuple(local)
    return tensor


KINDS = {
    "layers.0.attention.wq.weight": ((HEADS * HEAD_DIM, DIM), 0),
    "layers.0.attention.wk.weight": ((HEADS * HEAD_DIM, DIM), 0),
    "layers.0.attention.wv.weight": ((HEADS * HEAD_DIM, DIM), 0),
    "layers.0.attention.wo.weight": ((DIM, HEADS * HEAD_DIM), 1),
    "layers.0.feed_forward.w1.weight": ((HIDDEN, DIM), 0),
    "layers.0.feed_forward.w2.weight": ((DIM, HIDDEN), 1),
    "layers.0.feed_forward.w3.weight": ((HIDDEN, DIM), 0),
    "tok_embeddings.weight": ((32, DIM), 1),
    "output.weight": ((32, DIM), 0),
    "norm.weight": ((DIM,), None),
    "layers.0.attention_norm.weight": ((DIM,), None),
    "layers.0.ffn_norm.weight": ((DIM,), None),
}


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("files", COUNTS)
@pytest.mark.parametrize("name", KINDS)
def test_every_rank_gets_its_share_of_any_number_of_files(name, files, size):
    shape, dim = KINDS[name]
    whole = counted(*shape)
    shares = [whole] * size if dim is None else whole.chunk(size, dim)
    for rank, expected in enumerate(shares):
        assert torch.equal(cut(name, pieces(whole, dim, files), expected.shape, rank, size), expected)


@pytest.mark.parametrize("size", COUNTS)
@pytest.mark.parametrize("files", COUNTS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("part", ["wk", "wv"])
def test_ranks_share_key_value_heads_where_there_are_too_few(part, kv_heads, files, size):
    name, whole = f"layers.3.attention.{part}.weight", counted(kv_heads * HEAD_DIM, DIM)
    for rank in range(size):
        queries = range(rank * HEADS // size, (rank + 1) * HEADS // size)
        needed = sorted({query * kv_heads // HEADS for query in queries})  # the heads this rank's queries read
        expected = torch.cat([whole[head * HEAD_DIM : (head + 1) * HEAD_DIM] for head in needed])
        share = cut(name, pieces(whole, 0, files), expected.shape, rank, size, kv_rows=kv_heads * HEAD_DIM)
        assert torch.equal(share, expected)


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("files", [1, 2, 4])
@pytest.mark.parametrize("vocab", [33, 37, 5])
def test_a_vocabulary_that_ranks_do_not_divide_is_padded_with_zeros(vocab, files, size):
    whole, rows = counted(vocab, DIM), -(-vocab // size)
    parts = pieces(whole, 0, files)
    shares = [cut("output.weight", parts, (rows, DIM), rank, size, vocab_size=vocab) for rank in range(size)]
    together = torch.cat(shares)
    assert torch.equal(together[:vocab], whole)
    assert together.shape[0] == rows * size and not together[vocab:].any()
    assert all(share.dtype == whole.dtype for share in shares)


def test_take_lays_pieces_side_by_side():
    left, right = counted(2, 3), counted(2, 2) + 100
    joined = slicing.Joined([left, right], 1)
    assert slicing.take(joined, 1, 2, 2).tolist() == [[3, 101], [6, 103]]
    assert slicing.take(joined, 1, 4, 2).tolist() == [[102, 0], [104, 0]]
    assert slicing.take(joined, 1, 5, 1).tolist() == [[0], [0]]
    assert slicing.take(left, 0, 1, 1).tolist() == [[4, 5, 6]]


def same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()


def test_rows_of_one_file_are_views_and_columns_are_small_copies():
    rows, columns = counted(HEADS * HEAD_DIM, DIM), counted(DIM, HEADS * HEAD_DIM)
    for rank in range(4):
        share = cut("layers.0.attention.wq.weight", [rows], (16, DIM), rank, 4)
        assert same_memory(share, rows) and share.is_contiguous()
        share = cut("layers.0.attention.wo.weight", [columns], (DIM, 16), rank, 4)
        assert share.is_contiguous() and share.untyped_storage().nbytes() == share.nbytes
    assert same_memory(cut("layers.0.attention.wo.weight", [columns], (DIM, 64), 0, 1), columns)
    halves = pieces(rows, 0, 2)
    assert same_memory(cut("layers.0.attention.wq.weight", halves, (16, DIM), 3, 4), halves[1])


@pytest.mark.parametrize(
    "name, shape", [("output.weight", (31, DIM)), ("norm.weight", (DIM - 1,)), ("output.weight", (32,))]
)
def test_a_tensor_of_another_shape_is_named(name, shape):
    local = KINDS[name][0]
    refusal(lambda: cut(name, [counted(*shape)], local, 0, 1), name, str(tuple(shape)), str(local))


# --- mapped, not copied ------------------------------------------------------------------------------------------


def mapped_ranges(path: Path) -> list[range]:
    """Where this process has mapped the file, by Linux's own account."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    bounds = [line[0].split("-") for line in lines if len(line) == 6 and line[5] == str(path)]
    return [range(int(low, 16), int(high, 16)) for low, high in bounds]


def is_mapped(tensor: torch.Tensor, path: Path) -> bool:
    last = tensor.data_ptr() + tensor.nbytes - 1
    return any(tensor.data_ptr() in part and last in part for part in mapped_ranges(path.resolve()))


only_linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux where memory comes from")


@only_linux
def test_one_rank_computes_on_the_mapped_file(folder):
    path = folder / "consolidated.00.pth"
    model = build(folder).model
    copied = [name for name, parameter in model.named_parameters() if not is_mapped(parameter, path)]
    assert not copied
    assert not is_mapped(model.cache.k, path)
    converted = build(folder, dtype="bfloat16").model
    assert not [name for name, parameter in converted.named_parameters() if is_mapped(parameter, path)]


@only_linux
def test_several_ranks_map_the_rows_of_their_file(tmp_path, tokenizer_path):
    folder = write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path, shards=2)
    paths = meta.find_shards(folder)
    shards = [open_pickle(path) for path in paths]
    name = "layers.0.attention.wq.weight"
    assert all(is_mapped(shard[name], path) for shard, path in zip(shards, paths, strict=True))
    sizes = {"vocab_size": WORDS, "kv_rows": 16, "head_dim": 8}
    for rank in range(2):
        ((_, share),) = slicing.cut_for_rank(slicing.join(shards), {name: (16, 32)}, rank=rank, size=2, **sizes)
        assert is_mapped(share, paths[rank])


@pytest.mark.parametrize("shards", [1, 2])
def test_files_in_the_older_format_load_too(folder, tmp_path, tokenizer_path, shards):
    expected = build(folder).generate(PROMPTS, 10, 0, logprobs=True)
    older = write_checkpoint(tmp_path / "older", PARAMS, weights(), tokenizer_path, shards=shards)
    for number in range(shards):
        tensors = torch.load(older / f"consolidated.{number:02d}.pth", weights_only=True)
        path = save(older, tensors, number, _use_new_zipfile_serialization=False)
        assert path.read_bytes()[:2] != b"PK"
    ids, logprobs = build(older).generate(PROMPTS, 10, 0, logprobs=True)
    assert ids == expected[0]
    np.testing.assert_allclose(np.concatenate(logprobs), np.concatenate(expected[1]), atol=1e-5)


# --- what building leaves alone ----------------------------------------------------------------------------------


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
def test_the_callers_default_dtype_changes_no_number(folder, default):
    """Scores were collected in a tensor of the caller's default dtype."""
    expected = build(folder).score(["Anna took the cup"]), build(folder).generate(PROMPTS, 8, 0.9, seed=3)
    torch.set_default_dtype(default)
    try:
        llama = build(folder)
        assert (llama.score(["Anna took the cup"]), llama.generate(PROMPTS, 8, 0.9, seed=3)) == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_default_device_elsewhere_does_not_matter(folder):
    expected = build(folder).generate(PROMPTS, 8, 0, logprobs=True)
    torch.set_default_device("meta")
    try:
        assert build(folder).generate(PROMPTS, 8, 0, logprobs=True) == expected
        assert torch.get_default_device().type == "meta"
    finally:
        torch.set_default_device(None)


def test_one_line_on_standard_error_and_none_on_standard_output(folder, capfd):
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


def test_one_process_needs_no_environment_and_no_socket(folder):
    command = [sys.executable, "-c", ALONE, str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={"PATH": os.defpath}, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [int(id) for id in done.stdout.split()] == build(folder).generate([[1, 300]], 8, 0)[0][0]
