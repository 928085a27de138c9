"""Hugging Face folders open as they are: the same logits as `transformers`, at any rank count, and nothing ignored.

The models are made and saved by `transformers` itself, so names, row order and configuration are not ours.
"""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama import Llama, ModelArgs, Tokenizer, formats
from llama.formats import hf_layout, hugging_face, reading, slicing
from support import reference
from support.checkpoints import write_checkpoint
from support.mapping import is_mapped, only_linux
from support.models import BASE_PARAMS, as_float64, random_weights
from support.refusals import refusal

WORDS = 480  # ids of the tests' tokenizer
IDS = torch.tensor([[1, 17, 450, 33, 5, 260, 479], [1, 9, 9, 100, 301, 2, 44]])
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": WORDS,
    "max_position_embeddings": 64,
}
VARIANTS = {
    "mha": {},
    "gqa": {
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "intermediate_size": 72,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    },
    "tied": {"tie_word_embeddings": True, "num_key_value_heads": 1, "intermediate_size": 130},
}


def make(variant: str = "gqa", **changes) -> LlamaForCausalLM:
    """A random model whose logits spread over several units and whose norms are not all one."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**(SIZES | VARIANTS[variant] | {"initializer_range": 0.3} | changes)))
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, 1, 0.2)
    return model.eval()


def save(model: LlamaForCausalLM, folder: Path, tokenizer_path: Path, **options) -> Path:
    model.save_pretrained(folder, **options)
    (folder / "tokenizer.model").write_bytes(tokenizer_path.read_bytes())
    return folder


@pytest.fixture
def folder(tmp_path, tokenizer_path) -> Path:
    return save(make(), tmp_path / "model", tokenizer_path)


def build(folder: Path, **options) -> Llama:
    return Llama.build(folder, max_seq_len=32, max_batch_size=2, **({"device": "cpu"} | options))


@torch.no_grad()
def logits(model: LlamaForCausalLM) -> torch.Tensor:
    return model(IDS).logits


def refused(folder: Path, *words: str, error: type[Exception] = ValueError, **options) -> str:
    """The message with which `build` refuses the folder."""
    return refusal(lambda: build(folder, **options), *words, error=error)


def reconfigure(folder: Path, **changes) -> None:
    """Set keys of `config.json`; None removes them."""
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


# --- the same model ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("layout", ["one file", "an index", "one pickle", "pickles"])
def test_logits_equal_those_of_transformers(tmp_path, tokenizer_path, variant, layout):
    model = make(variant)
    folder = save(model, tmp_path, tokenizer_path, max_shard_size="20KB" if layout == "an index" else "1GB")
    assert (folder / "model.safetensors").exists() == (layout != "an index")
    if "pickle" in layout:
        as_pickles(folder, 3 if layout == "pickles" else 1)
    found = build(folder).model(IDS, 0)
    torch.testing.assert_close(found, logits(model), atol=1e-4, rtol=0)
    assert found.std() > 1, "logits that are all alike prove nothing"


def as_pickles(folder: Path, count: int) -> None:
    """Put the tensors of `model.safetensors` into `count` files of torch's own format, as older folders have them."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if count == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names = sorted(tensors)
    placed = {name: f"pytorch_model-{n % count + 1:05d}-of-{count:05d}.bin" for n, name in enumerate(names)}
    for file in set(placed.values()):
        torch.save({name: tensors[name] for name in names if placed[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


@pytest.mark.parametrize("variant", ["mha", "gqa"])
def test_logits_equal_the_float64_reference(tmp_path, tokenizer_path, variant):
    """Independent of transformers: rows of q and k put in order by hand, a row at a time."""
    model = make(variant)
    folder = save(model, tmp_path, tokenizer_path)
    config = model.config
    weights = {ours: model.state_dict()[theirs].clone() for ours, theirs in hf_layout.hugging_face_names(2).items()}
    for name in [name for name in weights if ".wq." in name or ".wk." in name]:
        theirs = weights[name].clone()
        for row in range(theirs.shape[0]):
            head, place = divmod(row, 8)
            weights[name][head * 8 + (2 * place if place < 4 else 2 * (place - 4) + 1)] = theirs[row]
    theta = config.rope_parameters["rope_theta"]
    shape = reference.Shape(2, 4, config.num_key_value_heads, config.rms_norm_eps, theta)
    found = build(folder).model(IDS, 0)
    for row, ids in enumerate(IDS.tolist()):
        expected = torch.from_numpy(reference.logits(ids, as_float64(weights), shape))
        torch.testing.assert_close(found[row].double(), expected, atol=1e-4, rtol=0)


def test_rows_of_a_head_of_six():
    rows = torch.tensor([[0], [2], [4], [1], [3], [5], [10], [12], [14], [11], [13], [15]])
    assert hf_layout.interleave(rows, 6).flatten().tolist() == [0, 1, 2, 3, 4, 5, 10, 11, 12, 13, 14, 15]
    assert hf_layout.deinterleave(hf_layout.interleave(rows, 6), 6).equal(rows)


@pytest.mark.parametrize("dim, start, length", [(0, 0, 12), (0, 3, 5), (0, 6, 6), (0, 11, 1), (1, 0, 2), (1, 1, 1)])
def test_rows_of_any_part_are_in_metas_order(dim, start, length):
    """A part may begin and end inside a head, and may be of columns."""
    rows = torch.arange(24).view(12, 2)
    expected = hf_layout.interleave(rows, 6).narrow(dim, start, length)
    assert hf_layout.HalfSplit(rows, 6).narrow(dim, start, length).equal(expected)


def test_config_gives_the_sizes(folder):
    params = build(folder).model.params
    assert (params.dim, params.n_layers, params.n_heads, params.n_kv_heads) == (32, 2, 4, 2)
    assert (params.ffn_hidden_dim, params.vocab_size, params.rope_theta, params.norm_eps) == (72, WORDS, 1e6, 1e-5)


@pytest.mark.parametrize("dim, width", [(4096, 11008), (5120, 13824), (8192, 28672), (8192, 22016), (32, 1), (32, 85)])
def test_config_may_have_any_feed_forward_width(dim, width):
    """The widths of 7B, 13B, 70B and 34B, and one below and one at two thirds of four times the dimension."""
    params = hugging_face.feed_forward_params(dim, width)
    assert ModelArgs(dim=dim, **params).ffn_hidden_dim == width
    assert (params == {"multiple_of": 256}) == (width in (11008, 13824, 22016))


@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_config_may_spell_theta_the_older_way(folder, theta):
    """Written as `rope_theta` before transformers 5; absent in the oldest files, where it was always 10,000."""
    reconfigure(folder, rope_parameters=None, rope_theta=None if theta == 1e4 else theta, torch_dtype="float32")
    model = LlamaForCausalLM.from_pretrained(folder)
    assert model.config.rope_parameters["rope_theta"] == theta
    torch.testing.assert_close(build(folder).model(IDS, 0), logits(model), atol=1e-4, rtol=0)


def test_tied_weights_that_are_stored_twice(tmp_path, tokenizer_path):
    """A file that holds an output layer of its own is taken at its word, as transformers does."""
    model = make("mha")
    folder = save(model, tmp_path, tokenizer_path)
    reconfigure(folder, tie_word_embeddings=True)
    torch.testing.assert_close(build(folder).model(IDS, 0), logits(model), atol=1e-4, rtol=0)


def test_rotary_frequencies_in_safetensors_are_ignored(folder):
    expected = build(folder).model(IDS, 0)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.full((4,), float("nan"))
    save_file(tensors, folder / "model.safetensors")
    assert build(folder).model(IDS, 0).equal(expected)


def test_folder_of_both_layouts_is_read_as_metas(tmp_path, tokenizer_path):
    params = BASE_PARAMS | {"vocab_size": WORDS}
    folder = save(make(), tmp_path, tokenizer_path)
    write_checkpoint(folder, params, random_weights(params))
    assert build(folder).model.params.norm_eps == params["norm_eps"]
    assert build(folder).model.params.kv_heads == 4


def test_generated_ids_are_those_of_transformers(folder):
    ids, logprobs = build(folder).generate([[1, 17, 450], [1]], 6, 0, logprobs=True)
    model = LlamaForCausalLM.from_pretrained(folder)
    for prompt, row, values in zip([[1, 17, 450], [1]], ids, logprobs, strict=True):
        assert row
        with torch.no_grad():
            scores = model(torch.tensor([prompt + row])).logits[0].log_softmax(-1)
        at = range(len(prompt) - 1, len(prompt) + len(row) - 1)
        assert row == [int(scores[t].argmax()) for t in at]
        expected = [float(scores[t, id]) for t, id in zip(at, row, strict=True)]
        torch.testing.assert_close(torch.tensor(values), torch.tensor(expected), atol=1e-4, rtol=0)


def test_dtype_as_stored_is_kept(tmp_path, tokenizer_path):
    folder = save(make().bfloat16(), tmp_path, tokenizer_path)
    weights = build(folder, dtype="bfloat16").model.state_dict()
    stored = load_file(folder / "model.safetensors")
    assert weights["layers.1.feed_forward.w2.weight"].equal(stored["model.layers.1.mlp.down_proj.weight"])
    assert weights["norm.weight"].dtype == torch.bfloat16


# --- only what is asked for is read ------------------------------------------------------------------------------


def test_safetensors_give_a_rank_its_rows_alone(folder, monkeypatch):
    """No tensor of the file is asked for whole by one rank of two, but for the norms."""
    source = formats.find(folder)
    source.open()
    asked = []
    read = reading.StoredTensor.narrow

    def narrow(self, dim, start, length):
        asked.append((tuple(self.shape), dim, start, length))
        return read(self, dim, start, length)

    monkeypatch.setattr(reading.StoredTensor, "narrow", narrow)
    local = {
        "layers.0.attention.wq.weight": (16, 32),
        "layers.0.attention.wk.weight": (8, 32),
        "layers.0.attention.wo.weight": (32, 16),
        "tok_embeddings.weight": (WORDS, 16),
        "norm.weight": (32,),
    }
    sizes = {"vocab_size": WORDS, "kv_rows": 16, "head_dim": 8}
    shares = dict(slicing.cut_for_rank(slicing.join(source.shards), local, rank=1, size=2, **sizes))
    assert asked == [
        ((32, 32), 0, 16, 16),
        ((16, 32), 0, 8, 8),
        ((32, 32), 1, 16, 16),
        ((WORDS, 32), 1, 16, 16),
        ((32,), 0, 0, 32),
    ]
    stored = load_file(folder / "model.safetensors")
    heads = stored["model.layers.0.self_attn.k_proj.weight"][8:]
    assert shares["layers.0.attention.wk.weight"].equal(heads[[0, 4, 1, 5, 2, 6, 3, 7]])
    assert shares["tok_embeddings.weight"].equal(stored["model.embed_tokens.weight"][:, 16:])


@only_linux
def test_safetensors_stay_in_the_file(folder):
    """At one rank nothing is copied but the rows of q and k, whose order differs."""
    model = build(folder).model
    mapped = {name for name, weight in model.named_parameters() if is_mapped(weight, folder / "model.safetensors")}
    copied = {name for name, _ in model.named_parameters()} - mapped
    assert copied == {f"layers.{n}.attention.{part}.weight" for n in range(2) for part in ("wq", "wk")}


# --- several ranks -----------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, torch
from llama import Llama
torch.set_num_threads(1)
found = {}
for folder in sys.argv[2:]:
    llama = Llama.build(folder, max_seq_len=32, max_batch_size=2, device="cpu")
    ids = torch.tensor(json.loads(open(sys.argv[1]).read()))
    found[os.path.basename(folder)] = llama.model(ids, 0).tolist()
json.dump(found, open(f"{sys.argv[1]}.{os.environ['RANK']}", "w"))
"""


@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_compute_what_transformers_does(tmp_path, tokenizer_path, ranks):
    """Each folder is cut whole head by whole head; with one key-value head, all ranks keep it.

    The vocabulary of 483 divides by neither number of ranks; the rows beyond the tokenizer are padding.
    """
    models = {
        "mha": make("mha"),
        "gqa": make("gqa", vocab_size=WORDS + 3),
        "tied": make("tied", vocab_size=WORDS + 3, intermediate_size=132),
    }
    folders = [save(model, tmp_path / name, tokenizer_path) for name, model in models.items()]
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "ids").write_text(json.dumps(IDS.tolist()))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    done = subprocess.run(
        [*command, tmp_path / "worker.py", tmp_path / "ids", *folders],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    for rank in range(ranks):
        found = json.loads((tmp_path / f"ids.{rank}").read_text())
        for name, model in models.items():
            torch.testing.assert_close(torch.tensor(found[name]), logits(model), atol=1e-4, rtol=0)


# --- vocabularies and older sizes --------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_vocabulary_padding_is_never_sampled(tmp_path, tokenizer_path, layout):
    """More rows than the tokenizer has ids, the likeliest ones at that; `vocab_size` -1 leaves the number open."""
    if layout == "hf":
        model = make("mha", vocab_size=512)
        model.lm_head.weight.data[WORDS:] *= 20
        folder = save(model, tmp_path, tokenizer_path)
    else:
        params = BASE_PARAMS | {"vocab_size": 512}
        weights = random_weights(params)
        weights["output.weight"][WORDS:] *= 20
        folder = write_checkpoint(tmp_path, params | {"vocab_size": -1}, weights, tokenizer_path)
    llama = build(folder)
    assert llama.model.vocab_size == 512
    assert (llama.model(IDS, 0).argmax(-1) >= WORDS).float().mean() > 0.5
    for temperature in (0, 5.0):
        ids, _ = llama.generate([[1, 17], [1]], 16, temperature, 1.0)
        assert ids[0] and max(id for row in ids for id in row) < WORDS


def test_vocabulary_of_an_extended_tokenizer_is_used(tmp_path, tokenizer_path):
    """A tokenizer with more pieces than the base model's and as many rows in the model: all of them are used."""
    extended = extend(tokenizer_path, tmp_path / "extended.model", ["안녕", "です", "ます"])
    model = make("mha", vocab_size=WORDS + 3)
    model.lm_head.weight.data[WORDS:] *= 20  # likely, so that the test sees them chosen
    llama = build(save(model, tmp_path / "model", extended))
    assert llama.tokenizer.n_words == WORDS + 3
    assert llama.tokenizer.encode("안녕", bos=False, eos=False)[-1] == WORDS
    new = torch.tensor([[1, WORDS, WORDS + 2]])
    with torch.no_grad():
        torch.testing.assert_close(llama.model(new, 0), model(new).logits, atol=1e-3, rtol=1e-5)
    (ids,), _ = llama.generate([[1, 17, 450]], 20, 0)
    assert max(ids) >= WORDS
    (result,) = llama.text_completion(["안녕"], 0, max_gen_len=3, echo=True)
    assert result["generation"].startswith("안녕")


def extend(path: Path, new: Path, pieces: list[str]) -> Path:
    """Add pieces to a sentencepiece model, as fine-tunes for other languages do.

    In its protocol buffer, field 1 is repeated: a piece with its text (field 1) and score (field 2), and messages
    that are joined end to end are one message.
    """

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    added = (field(1, field(1, piece.encode()) + b"\x15" + struct.pack("<f", 0.0)) for piece in pieces)
    new.write_bytes(path.read_bytes() + b"".join(added))
    return new


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_vocabulary_of_more_ids_than_rows_is_refused(tmp_path, tokenizer_path, layout):
    if layout == "hf":
        folder = save(make("mha", vocab_size=470), tmp_path, tokenizer_path)
    else:
        params = BASE_PARAMS | {"vocab_size": 470}
        folder = write_checkpoint(tmp_path, params | {"vocab_size": -1}, random_weights(params), tokenizer_path)
    refused(folder, "480 ids", "470 rows")


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_llama_1_sizes(tmp_path, tokenizer_path, shards):
    """No `n_kv_heads`, the vocabulary left open, rotary frequencies stored; 7B, 13B, 30B and 65B by their files."""
    sizes = {"dim": 64, "n_layers": 2, "n_heads": 8, "multiple_of": 32, "norm_eps": 1e-6}
    weights = random_weights(sizes | {"vocab_size": WORDS})
    stored = weights | {"rope.freqs": torch.ones(4)}
    folder = write_checkpoint(tmp_path, sizes | {"vocab_size": -1}, stored, tokenizer_path, shards)
    found = build(folder).model(IDS, 0)
    expected = reference.logits(IDS[0].tolist(), as_float64(weights), reference.Shape(2, 8, 8, 1e-6))
    torch.testing.assert_close(found[0].double(), torch.from_numpy(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize("vocab_size, theta", [(WORDS, 1e6), (WORDS + 16, 1e6), (WORDS, 1e4)])
def test_code_llama_sizes(tmp_path, tokenizer_path, vocab_size, theta):
    """`rope_theta` is what `params.json` says, whatever the vocabulary: some Code Llamas have 10,000."""
    sizes = {"dim": 64, "n_layers": 1, "n_heads": 8, "n_kv_heads": 2, "multiple_of": 16, "norm_eps": 1e-5}
    sizes |= {"ffn_dim_multiplier": 1.0, "vocab_size": vocab_size, "rope_theta": theta}
    weights = random_weights(sizes)
    found = build(write_checkpoint(tmp_path, sizes, weights, tokenizer_path, 4)).model(IDS, 0)
    expected = reference.logits(IDS[0].tolist(), as_float64(weights), reference.Shape(1, 8, 2, 1e-5, theta))
    torch.testing.assert_close(found[0].double(), torch.from_numpy(expected), atol=1e-4, rtol=0)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"model_type": "mistral"}, ["model_type 'mistral'", "'llama'"]),
        ({"architectures": ["LlamaForSequenceClassification"]}, ["LlamaForSequenceClassification"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'", "silu"]),
        ({"attention_bias": True}, ["attention_bias True"]),
        ({"mlp_bias": True}, ["mlp_bias True"]),
        ({"head_dim": 16}, ["head_dim 16", "8"]),
        (
            {"quantization_config": {"bits": 4}},
            ["quantization_config", "bits", "original", "quantize='int8' or 'int4'"],
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ["rope_scaling", "linear"]),
        ({"rope_scaling": {"factor": 2.0}}, ["rope_scaling", "factor"]),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0}}, ["rope_parameters", "llama3"]),
        ({"hidden_size": None}, ["hidden_size", "None"]),
        ({"intermediate_size": "72"}, ["intermediate_size", "'72'"]),
        ({"num_hidden_layers": 0}, ["num_hidden_layers", "0"]),
        ({"num_key_value_heads": 3}, ["n_kv_heads 3"]),
        ({"rms_norm_eps": -1.0}, ["norm_eps"]),
    ],
    ids=str,
)
def test_config_of_another_model_is_refused_by_name(folder, changes, words):
    reconfigure(folder, **changes)
    refused(folder, *words)


def test_config_with_no_scaling_is_plain(folder):
    expected = build(folder).model(IDS, 0)
    reconfigure(folder, rope_scaling={"type": "default"}, attention_bias=False, head_dim=8)
    assert build(folder).model(IDS, 0).equal(expected)


def test_biases_in_the_files_are_named(tmp_path, tokenizer_path):
    """A config that does not say so must not hide them."""
    folder = save(make(attention_bias=True), tmp_path, tokenizer_path)
    refused(folder, "attention_bias")
    reconfigure(folder, attention_bias=None)
    refused(folder, "unknown", "self_attn.k_proj.bias")


def test_tokenizer_json_alone_is_refused(folder, tokenizer_path):
    """Even with a tokenizer one level up, which would belong to another model."""
    (folder / "tokenizer.model").rename(folder.parent / "tokenizer.model")
    (folder / "tokenizer.json").write_text("{}")
    refused(folder, "tokenizer.json", "add the tokenizer.model", "tokenizer_path", error=FileNotFoundError)
    assert build(folder, tokenizer_path=tokenizer_path).tokenizer.n_words == WORDS


def test_config_without_weights_is_refused(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors", "it holds", "config.json", error=FileNotFoundError)


def test_safetensors_without_their_library_name_it(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    refused(folder, "model.safetensors", "pip install safetensors", error=ImportError)


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_index_that_names_a_missing_file_is_refused(tmp_path, tokenizer_path, suffix):
    folder = save(make(), tmp_path, tokenizer_path)
    if suffix == "bin":
        as_pickles(folder, 3)
    else:
        folder = save(make(), tmp_path / "more", tokenizer_path, max_shard_size="20KB")
    gone = sorted(folder.glob(f"*-00002-of-*.{suffix}"))[0]
    gone.unlink()
    refused(folder, "index.json", gone.name, "fetch", error=FileNotFoundError)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', "[]", "{", '{"weight_map": {}}'])
def test_index_that_is_none_is_refused(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, "model.safetensors.index.json", "fetch it again")


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.7, 0.9999])
def test_safetensors_cut_short_are_refused(folder, part):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    message = refused(folder, str(path), "fetch it again")
    assert "cut short" in message or part == 0


def test_pickle_of_a_folder_cut_short_is_refused(folder):
    as_pickles(folder, 1)
    path = folder / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-5000])
    refused(folder, str(path), "cut short")


def test_pickle_with_code_in_a_folder_is_not_run(folder, tmp_path):
    class Trap:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "sprung"),)

    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors | {"model.norm.weight": Trap()}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "not run")
    assert not (tmp_path / "sprung").exists()


def test_safetensors_that_are_a_pointer_are_recognised(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 9\n")
    refused(folder, "model.safetensors", "Git LFS pointer")


def test_tensors_in_two_files_are_refused(tmp_path, tokenizer_path):
    folder = save(make(), tmp_path, tokenizer_path, max_shard_size="20KB")
    first, second = sorted(folder.glob("model-*.safetensors"))[:2]
    name, tensor = next(iter(load_file(first).items()))
    save_file(load_file(second) | {name: tensor}, second)
    refused(folder, name, "more than one file")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_tensors_that_are_missing_are_named(folder, name):
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, f"lacks {name};", "config.json")


@pytest.mark.parametrize("name", ["layers.1.self_attn.k_proj", "layers.0.mlp.down_proj", "embed_tokens", "norm"])
def test_tensors_of_a_wrong_shape_are_named(folder, name):
    tensors = load_file(folder / "model.safetensors")
    wrong = tensors[f"model.{name}.weight"]
    tensors[f"model.{name}.weight"] = wrong[: len(wrong) // 2].clone()
    save_file(tensors, folder / "model.safetensors")
    refused(folder, f"model.{name}.weight", str(tuple(wrong.shape)), "config.json describes")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8, torch.float64], ids=str)
@pytest.mark.parametrize("given", [None, "float32"])
def test_dtype_that_is_not_read_is_named(folder, dtype, given):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    save_file(tensors, folder / "model.safetensors")
    refused(folder, "model.norm.weight", "stored as", "bfloat16", dtype=given)


@pytest.mark.parametrize("layout", ["hf", "meta"])
def test_dtype_of_mixed_files_has_to_be_said(tmp_path, tokenizer_path, layout):
    if layout == "hf":
        model = make().bfloat16()
        model.model.norm.float()
        folder = save(model, tmp_path, tokenizer_path)
        mixed = load_file(folder / "model.safetensors")
        mixed["model.norm.weight"] = mixed["model.norm.weight"].float()
        save_file(mixed, folder / "model.safetensors")
    else:
        params = BASE_PARAMS | {"vocab_size": WORDS}
        weights = {name: tensor.bfloat16() for name, tensor in random_weights(params).items()}
        weights["norm.weight"] = weights["norm.weight"].float()
        folder = write_checkpoint(tmp_path, params, weights, tokenizer_path)
    refused(folder, "20 tensors in torch.bfloat16", "1 tensors in torch.float32", "dtype='torch.bfloat16'")
    assert build(folder, dtype="torch.bfloat16").model.norm.weight.dtype == torch.bfloat16
    assert build(folder, dtype="float32").model.norm.weight.dtype == torch.float32


def test_tokenizer_of_the_folder_is_used(folder, tokenizer_path):
    assert build(folder).tokenizer.encode("Anna", True, False) == Tokenizer(tokenizer_path).encode("Anna", True, False)
