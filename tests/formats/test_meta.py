"""Folders in Meta's layout: every wrong file is named in one sentence, and right ones are mapped, not copied.

Wrong input goes through `Llama.build`, as people meet it.
"""

import json
import os
import pickle
import random
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from llama.formats import meta, slicing
from llama.formats.reading import open_pickle
from support.checkpoints import write_checkpoint
from support.folders import PARAMS, PROMPTS, WORDS, build, save, weights
from support.mapping import is_mapped, only_linux
from support.refusals import refusal


@pytest.fixture
def folder(tmp_path, tokenizer_path) -> Path:
    return write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path)


# --- files -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", ["00", "01", "02"])
def test_shards_with_a_gap_in_their_numbers_are_named(tmp_path, tokenizer_path, gone):
    folder = write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path, shards=4)
    (folder / f"consolidated.{gone}.pth").unlink()
    message = refusal(lambda: build(folder), f"not consolidated.{gone}.pth", error=FileNotFoundError)
    assert message.count(f"consolidated.{gone}.pth") == 1


def test_params_that_are_missing_are_named(folder):
    (folder / "params.json").unlink()
    refusal(lambda: build(folder), "params.json", str(folder), error=FileNotFoundError)


@pytest.mark.parametrize("content", [b"{dim: 32}", b'{"dim": 32', b"dim = 32", b"\xff\xfe{\x00}\x00", b'{"dim": 32}}'])
def test_params_that_are_not_json_are_named(folder, content):
    (folder / "params.json").write_bytes(content)
    refusal(lambda: build(folder), str(folder / "params.json"), "not JSON")


@pytest.mark.parametrize("content, kind", [("[32, 2]", "list"), ("32", "int"), ('"dim"', "str"), ("null", "None")])
def test_params_that_are_not_an_object_are_named(folder, content, kind):
    (folder / "params.json").write_text(content)
    refusal(lambda: build(folder), "params.json", kind, "not an object")


def test_names_that_are_missing_are_said(folder):
    name = "layers.1.feed_forward.w2.weight"
    path = save(folder, {key: tensor for key, tensor in weights().items() if key != name})
    refusal(lambda: build(folder), str(path), f"lacks {name};")


def test_names_that_are_unknown_are_said(folder):
    save(folder, weights() | {"layers.0.attention.wq.bias": torch.zeros(32)})
    refusal(lambda: build(folder), "unknown layers.0.attention.wq.bias;")


def test_names_of_another_model_are_listed_in_part(folder):
    save(folder, {f"model.{name}": tensor for name, tensor in weights().items()})
    message = refusal(lambda: build(folder), "lacks", "unknown", "model.", "and 17 more")
    assert len(message) < 600


def test_names_are_checked_in_every_file(tmp_path, tokenizer_path):
    folder = write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path, shards=2)
    second = torch.load(folder / "consolidated.01.pth", weights_only=True)
    second["norms.weight"] = second.pop("norm.weight")
    path = save(folder, second, number=1)
    refusal(lambda: build(folder), str(path), "lacks norm.weight", "unknown norms.weight")


@pytest.mark.parametrize("name", ["tok_embeddings.weight", "layers.0.attention.wo.weight", "output.weight"])
def test_shards_of_different_models_are_refused(tmp_path, tokenizer_path, name):
    """A part whose uncut dimension differs reached `torch.cat`, which speaks of tensor sizes and of no file."""
    folder = write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path, shards=2)
    second = torch.load(folder / "consolidated.01.pth", weights_only=True)
    uncut = 1 if name.startswith("output") else 0
    second[name] = second[name].narrow(uncut, 0, 8).clone()
    save(folder, second, number=1)
    refusal(lambda: build(folder), name)


def test_rotary_frequencies_in_a_file_are_ignored(folder):
    expected = build(folder).generate(PROMPTS, 8, 0)
    save(folder, weights() | {"rope.freqs": torch.full((4,), float("nan"))})
    assert build(folder).generate(PROMPTS, 8, 0) == expected


@pytest.mark.parametrize("content", [[1, 2], {"step": 3}, torch.zeros(3), {"model": {"norm.weight": torch.ones(3)}}])
def test_pickle_of_something_else_than_named_tensors_is_refused(folder, content):
    path = save(folder, content)
    refusal(lambda: build(folder), str(path), "not a dictionary of tensors")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("part", [0.00001, 0.0002, 0.2, 0.5, 0.9, 0.999])
def test_pickle_that_is_cut_short_is_refused(folder, part, legacy):
    path = save(folder, weights(), _use_new_zipfile_serialization=not legacy)
    whole = path.read_bytes()
    path.write_bytes(whole[: 1 + int(len(whole) * part)])
    message = refusal(lambda: build(folder), str(path), "fetch it again")
    assert "cut short" in message and "code" not in message


@pytest.mark.parametrize("kind", ["text", "number", "zip", "safetensors", "json"])
def test_pickle_replaced_by_another_kind_of_file_is_refused(folder, kind):
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


def test_pickle_of_random_bytes_is_refused_in_words(folder):
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
def test_pickle_of_code_is_refused_and_not_run(folder, tmp_path, container):
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


# --- mapped, not copied ------------------------------------------------------------------------------------------


@only_linux
def test_mapped_file_is_what_one_rank_computes_on(folder):
    path = folder / "consolidated.00.pth"
    model = build(folder).model
    copied = [name for name, parameter in model.named_parameters() if not is_mapped(parameter, path)]
    assert not copied
    assert not is_mapped(model.cache.k, path)
    converted = build(folder, dtype="bfloat16").model
    assert not [name for name, parameter in converted.named_parameters() if is_mapped(parameter, path)]


@only_linux
def test_mapped_rows_are_what_several_ranks_hold(tmp_path, tokenizer_path):
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
def test_pickle_in_the_older_format_loads_too(folder, tmp_path, tokenizer_path, shards):
    expected = build(folder).generate(PROMPTS, 10, 0, logprobs=True)
    older = write_checkpoint(tmp_path / "older", PARAMS, weights(), tokenizer_path, shards=shards)
    for number in range(shards):
        tensors = torch.load(older / f"consolidated.{number:02d}.pth", weights_only=True)
        path = save(older, tensors, number, _use_new_zipfile_serialization=False)
        assert path.read_bytes()[:2] != b"PK"
    ids, logprobs = build(older).generate(PROMPTS, 10, 0, logprobs=True)
    assert ids == expected[0]
    np.testing.assert_allclose(np.concatenate(logprobs), np.concatenate(expected[1]), atol=1e-5)
