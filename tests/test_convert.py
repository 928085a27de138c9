"""`llama.convert`: bit for bit both ways, into any number of files, and nothing half done under a final name."""

import hashlib
import itertools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from llama import Llama, formats
from llama.convert import convert
from llama.formats.writing import OutputFile
from support.checkpoints import write_checkpoint
from support.children import python
from support.models import BASE_PARAMS, random_weights

WORDS = 480
IDS = torch.tensor([[1, 17, 450, 33, 5, 260, 479], [1, 9, 9, 100, 301, 2, 44]])
VARIANTS = {
    "mha": {"vocab_size": WORDS},
    "gqa": {
        "vocab_size": WORDS + 3,  # 2 and 4 files share it unevenly
        "n_kv_heads": 2,  # fewer than 4 files
        "rope_theta": 1e6,
        "norm_eps": 1e-6,
        "ffn_dim_multiplier": 1.3,
    },
}


def params_of(variant: str) -> dict:
    return BASE_PARAMS | VARIANTS[variant]


def meta_folder(folder: Path, tokenizer_path: Path, variant: str = "gqa", shards: int = 1, dtype=None) -> Path:
    weights = {name: tensor.to(dtype) for name, tensor in random_weights(params_of(variant)).items()}
    return write_checkpoint(folder, params_of(variant), weights, tokenizer_path, shards)


@pytest.fixture
def source(tmp_path, tokenizer_path) -> Path:
    return meta_folder(tmp_path / "source", tokenizer_path)


def ours(folder: Path, **options) -> torch.Tensor:
    llama = Llama.build(folder, max_seq_len=16, max_batch_size=2, **({"device": "cpu"} | options))
    return llama.model(IDS, 0)


@torch.no_grad()
def theirs(folder: Path) -> torch.Tensor:
    return LlamaForCausalLM.from_pretrained(folder).eval()(IDS).logits


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """The tensors of a folder in Meta's layout, put together by hand."""
    shards = [torch.load(path, weights_only=True) for path in sorted(folder.glob("consolidated.*.pth"))]
    joined = {}
    for name in shards[0]:
        kind = name.split(".")[-2]
        dim = 1 if kind in ("wo", "w2", "tok_embeddings") else 0
        joined[name] = shards[0][name] if "norm" in kind else torch.cat([shard[name] for shard in shards], dim)
    return joined


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """The same names, number formats and bits; -0.0 is not 0.0."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].contiguous().view(torch.uint8).equal(right[name].contiguous().view(torch.uint8))
        for name in left
    )


# --- there and back ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips_compute_the_same(tmp_path, tokenizer_path, variant):
    """transformers to 1, 2 and 4 files and back: its own logits to the bit, and ours to the bit as well."""
    sizes = params_of(variant)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=sizes.get("n_kv_heads", 4),
        vocab_size=sizes["vocab_size"],
        rms_norm_eps=sizes["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": sizes.get("rope_theta", 1e4)},
        max_position_embeddings=777,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "hf")
    shutil.copy(tokenizer_path, tmp_path / "hf" / "tokenizer.model")
    expected, direct = theirs(tmp_path / "hf"), ours(tmp_path / "hf")
    torch.testing.assert_close(direct, expected, atol=1e-4, rtol=0)
    for shards in (1, 2, 4):
        meta, back = tmp_path / f"meta{shards}", tmp_path / f"back{shards}"
        convert(tmp_path / "hf", meta, shards=shards)
        assert len(list(meta.glob("consolidated.*.pth"))) == shards
        assert ours(meta).equal(direct)
        convert(meta, back, "hf", shards=shards)
        assert len(list(back.glob("*.safetensors"))) == shards
        assert theirs(back).equal(expected)
        assert ours(back).equal(direct)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trips_are_exact(tmp_path, tokenizer_path, variant, dtype):
    """Meta to Hugging Face and back, then cut and joined again: every bit, and the sizes."""
    source = meta_folder(tmp_path / "source", tokenizer_path, variant, 2, dtype)
    original = whole(source)
    convert(source, tmp_path / "hf", to="hf")
    convert(tmp_path / "hf", tmp_path / "one")
    convert(tmp_path / "one", tmp_path / "four", shards=4)
    convert(tmp_path / "four", tmp_path / "again", to="hf", shards=3)
    convert(tmp_path / "again", tmp_path / "last", shards=2)
    for name in ("one", "four", "last"):
        assert same(whole(tmp_path / name), original), name
        built = Llama.build(tmp_path / name, max_seq_len=8, max_batch_size=1, device="cpu").model.params
        first = Llama.build(source, max_seq_len=8, max_batch_size=1, device="cpu").model.params
        for size in (
            "dim",
            "n_layers",
            "n_heads",
            "kv_heads",
            "vocab_size",
            "ffn_hidden_dim",
            "norm_eps",
            "rope_theta",
        ):
            assert getattr(built, size) == getattr(first, size), size
    again = [load_file(path) for path in sorted((tmp_path / "again").glob("*.safetensors"))]
    assert same(
        dict(itertools.chain(*(tensors.items() for tensors in again))), load_file(tmp_path / "hf/model.safetensors")
    )


def test_layout_of_rows_is_what_transformers_reads(source, tmp_path):
    """Row 2i of a head becomes row i, row 2i + 1 row i + D/2; k by its own heads."""
    convert(source, tmp_path / "hf", to="hf")
    written = load_file(tmp_path / "hf/model.safetensors")
    stored = whole(source)
    for ours_, theirs_, heads in (("wq", "q_proj", 4), ("wk", "k_proj", 2)):
        order = [head * 8 + row for head in range(heads) for row in (0, 2, 4, 6, 1, 3, 5, 7)]
        expected = stored[f"layers.1.attention.{ours_}.weight"][order]
        assert written[f"model.layers.1.self_attn.{theirs_}.weight"].equal(expected)
    assert written["model.layers.1.self_attn.v_proj.weight"].equal(stored["layers.1.attention.wv.weight"])


def test_layout_that_stays_is_cut_anew(source, tmp_path):
    """Rows of an uneven vocabulary are shared out without padding, and a file holds no more than its share."""
    convert(source, tmp_path / "four", shards=4)
    parts = [torch.load(path, weights_only=True) for path in sorted((tmp_path / "four").glob("*.pth"))]
    assert [len(part["output.weight"]) for part in parts] == [120, 121, 121, 121]
    assert {tuple(part["tok_embeddings.weight"].shape) for part in parts} == {(483, 8)}
    assert all(part["norm.weight"].equal(parts[0]["norm.weight"]) for part in parts)
    sizes = [path.stat().st_size for path in (tmp_path / "four").glob("*.pth")]
    held = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
    assert max(sizes) < max(held) + 10_000
    assert same(whole(tmp_path / "four"), whole(source))
    assert ours(tmp_path / "four").equal(ours(source))


def test_dtype_that_is_asked_for_is_written(source, tmp_path):
    convert(source, tmp_path / "meta", dtype="bfloat16")
    convert(source, tmp_path / "hf", to="hf", dtype="float16")
    stored = whole(source)
    rounded = whole(tmp_path / "meta")
    assert same(rounded, {name: tensor.bfloat16() for name, tensor in stored.items()})
    assert {tensor.dtype for tensor in load_file(tmp_path / "hf/model.safetensors").values()} == {torch.float16}
    assert json.loads((tmp_path / "hf/config.json").read_text())["torch_dtype"] == "float16"


def test_tied_weights_are_written_out(tmp_path, tokenizer_path):
    config = LlamaConfig(
        hidden_size=32, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4, vocab_size=WORDS,
        tie_word_embeddings=True, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "tied")
    shutil.copy(tokenizer_path, tmp_path / "tied" / "tokenizer.model")
    expected = theirs(tmp_path / "tied")
    convert(tmp_path / "tied", tmp_path / "hf", to="hf")
    convert(tmp_path / "tied", tmp_path / "two", shards=2)
    convert(tmp_path / "two", tmp_path / "back", to="hf")
    assert theirs(tmp_path / "hf").equal(expected)
    assert theirs(tmp_path / "back").equal(expected)


def write_adapter(folder: Path, rows: int = 16) -> Path:
    """An adapter for the grouped-query model: a product in q, k and the feed-forward layer, a new output layer."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"self_attn.q_proj": (32, 32), "self_attn.k_proj": (rows, 32), "mlp.down_proj": (32, 112)}
    tensors = {"base_model.model.lm_head.weight": torch.randn(WORDS + 3, 32, generator=generator)}
    for n in range(2):
        for name, (out, into) in shapes.items():
            prefix = f"base_model.model.model.layers.{n}.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(4, into, generator=generator)
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(out, 4, generator=generator) * 0.1
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "modules_to_save": ["lm_head"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("to, shards", [("meta", 1), ("meta", 4), ("hf", 1)])
def test_adapter_is_merged_into_what_is_written(source, tmp_path, to, shards):
    """What is written opens without the adapter and computes what base and adapter compute; 4 files cut k's heads."""
    adapter = write_adapter(tmp_path / "adapter")
    convert(source, tmp_path / "merged", to, shards, lora=adapter)
    expected = ours(source, lora=adapter)
    torch.testing.assert_close(ours(tmp_path / "merged"), expected, atol=1e-4, rtol=0)
    assert not expected.allclose(ours(source), atol=0.1)


def test_adapter_for_another_base_is_refused(source, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", rows=32)
    refusal(tmp_path, source, "layers.0.attention.wk.weight", str(adapter), "(32, 32)", "(16, 32)", lora=adapter)


def test_llama_1_with_an_open_vocabulary(tmp_path, tokenizer_path):
    """`vocab_size` -1 and no `n_kv_heads`: what is written says both, and keeps padding beyond the tokenizer."""
    sizes = BASE_PARAMS | {"vocab_size": WORDS + 8}
    folder = write_checkpoint(tmp_path / "v1", sizes | {"vocab_size": -1}, random_weights(sizes), tokenizer_path, 2)
    convert(folder, tmp_path / "hf", to="hf")
    convert(folder, tmp_path / "one")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert (config["vocab_size"], config["num_key_value_heads"]) == (WORDS + 8, 4)
    assert ours(tmp_path / "one").equal(ours(folder))
    params = json.loads((tmp_path / "one/params.json").read_text())
    assert params["vocab_size"] == WORDS + 8
    assert not {"n_kv_heads", "rope_theta", "ffn_dim_multiplier"} & params.keys(), "older readers know none of them"


def test_companions_come_along(tmp_path, tokenizer_path, source):
    """The tokenizer always; what transformers reads beside it only from one of its folders to another."""
    convert(source, tmp_path / "hf", to="hf")
    (tmp_path / "hf/tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["max_position_embeddings"] == 4096
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"max_position_embeddings": 16384}))
    convert(tmp_path / "hf", tmp_path / "again", to="hf")
    convert(tmp_path / "hf", tmp_path / "meta")
    assert json.loads((tmp_path / "again/config.json").read_text())["max_position_embeddings"] == 16384
    for name in ("hf", "again", "meta"):
        assert (tmp_path / name / "tokenizer.model").read_bytes() == tokenizer_path.read_bytes()
    assert (tmp_path / "again/tokenizer_config.json").exists()
    assert not (tmp_path / "meta/tokenizer_config.json").exists()


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_checklist_has_every_file(source, tmp_path, to):
    """Every file but the checklist itself, in the format of md5sum."""
    convert(source, tmp_path / "out", to=to, shards=2)
    lines = (tmp_path / "out/checklist.chk").read_text().splitlines()
    listed = dict(reversed(line.split("  ")) for line in lines)
    assert listed.keys() | {"checklist.chk"} == {path.name for path in (tmp_path / "out").iterdir()}
    for name, digest in listed.items():
        assert hashlib.md5((tmp_path / "out" / name).read_bytes()).hexdigest() == digest


# --- the command -------------------------------------------------------------------------------------------------


def test_command_writes_files_and_one_line(source, tmp_path):
    options = ["--to", "hf", "--shards", 2, "--dtype", "bfloat16"]
    with python("-m", "llama.convert", source, tmp_path / "out", *options) as process:
        out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert out == "", "results are files; what is shown belongs on standard error"
    assert "100%" in err and err.count("%") == 1, "one line where it cannot be redrawn"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2
    assert not list(tmp_path.glob("*.partial"))


def test_command_with_a_wrong_argument_ends_in_a_sentence(source, tmp_path):
    with python("-m", "llama.convert", source, tmp_path / "out", "--to", "gguf") as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode != 0
    assert err.strip().endswith("--to is 'gguf'; it must be meta or hf.") and "Traceback" not in err
    assert not (tmp_path / "out").exists()


def test_command_ends_with_a_test_that_fails():
    """The child of a failing interruption test waited at its pipe for ever."""
    with (
        pytest.raises(AssertionError),
        python("-c", "import sys; print('up', flush=True); sys.stdin.read()") as process,
    ):
        assert process.stdout.readline() == "down\n"
    assert process.poll() == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="holds the command still with a named pipe")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=str)
def test_command_interrupted_leaves_nothing_that_looks_finished(source, tmp_path, number):
    """Stopped once its first file is written, at the tokenizer: a pipe into which nobody writes the rest."""
    pipe = tmp_path / "tokenizer.pipe"
    script = (
        "import signal, llama.convert as c\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # tests run in the background inherit its absence
        "def copy(self, path, name):\n"
        "    print('copying', flush=True)\n"
        f"    open({str(pipe)!r}, 'rb').read()\n"
        "c.Output.copy = copy\n"
        "c.main()\n"
    )
    os.mkfifo(pipe)
    partial = tmp_path / "out.partial"
    with python("-c", script, source, tmp_path / "out") as process:
        assert process.stdout.readline() == "copying\n"
        assert (partial / "consolidated.00.pth").exists() and not (tmp_path / "out").exists()
        process.send_signal(number)
        process.communicate(timeout=300)
    assert process.returncode != 0
    assert not (tmp_path / "out").exists()
    assert partial.exists() == (number == signal.SIGKILL), "what can clean up after itself does"
    if number == signal.SIGKILL:
        with pytest.raises(FileNotFoundError, match=r"params\.json"):
            Llama.build(partial, source / "tokenizer.model", device="cpu")
        with pytest.raises(FileExistsError, match=r"out\.partial exists: .* remove it if none is running\.$"):
            convert(source, tmp_path / "out")


# --- what is refused ---------------------------------------------------------------------------------------------


def refusal(tmp_path: Path, source: Path, *words: str, error=ValueError, **options) -> None:
    """`convert` raises one sentence with `words` and leaves nothing behind."""
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(error) as caught:
        convert(source, **({"dst": tmp_path / "out"} | options))
    message = str(caught.value)
    assert type(caught.value) is error
    assert "\n" not in message and message.endswith("."), message
    assert not [word for word in words if word not in message], message
    assert sorted(tmp_path.rglob("*")) == before


def test_destination_that_holds_something_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/notes.txt").write_text("mine")
    refusal(tmp_path, source, "out exists", error=FileExistsError)
    refusal(tmp_path, source, "source exists", error=FileExistsError, dst=source)
    refusal(tmp_path, source, "notes.txt exists", error=FileExistsError, dst=tmp_path / "out/notes.txt")
    assert (tmp_path / "out/notes.txt").read_text() == "mine"


def test_destination_that_is_empty_is_filled(source, tmp_path):
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out")
    convert(source, tmp_path / "new" / "and" / "deep")
    assert same(whole(tmp_path / "out"), whole(source))
    assert same(whole(tmp_path / "new/and/deep"), whole(source))


@pytest.mark.parametrize("shards", [0, -1, 3, 8, "2", 1.5, 1.0, True])
def test_shards_that_do_not_divide_are_refused(source, tmp_path, shards):
    refusal(tmp_path, source, f"--shards is {shards!r}", "[1, 2, 4]", shards=shards)


@pytest.mark.parametrize("shards", [0, -1, 22, "2", 1.5])
def test_shards_beyond_the_tensors_are_refused(source, tmp_path, shards):
    refusal(tmp_path, source, f"--shards is {shards!r}", "from 1 to 21", to="hf", shards=shards)


@pytest.mark.parametrize("shards", [1, 2, 5, 20, 21])
def test_shards_of_any_number_hold_all_tensors(source, tmp_path, shards):
    convert(source, tmp_path / "out", to="hf", shards=shards)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) == shards and all(load_file(path) for path in files)
    assert ours(tmp_path / "out").equal(ours(source))


def test_arguments_that_are_wrong_are_named(source, tmp_path):
    refusal(tmp_path, source, "--to is 'pt'", "meta or hf", to="pt")
    refusal(tmp_path, source, "'int4'", "bfloat16", dtype="int4")
    refusal(tmp_path, tmp_path / "none", "none", "does not exist", error=FileNotFoundError)


def test_source_that_is_damaged_is_named(source, tmp_path):
    """Found before anything is written."""
    stored = torch.load(source / "consolidated.00.pth", weights_only=True)
    name = "layers.1.feed_forward.w2.weight"
    torch.save(stored | {name: stored[name][:, 1:].clone()}, source / "consolidated.00.pth")
    refusal(tmp_path, source, name, "(32, 111)", "(32, 112)", "params.json")
    torch.save({key: stored[key] for key in stored if key != name}, source / "consolidated.00.pth")
    refusal(tmp_path, source, f"lacks {name}")
    torch.save(stored | {name: stored[name].bfloat16()}, source / "consolidated.00.pth")
    refusal(tmp_path, source, "1 tensors in torch.bfloat16")
    convert(source, tmp_path / "out", dtype="float32")
    (source / "tokenizer.model").unlink()
    refusal(tmp_path, source, "tokenizer.model", error=FileNotFoundError, dst=tmp_path / "other")


def test_source_with_another_models_tokenizer_is_refused(tmp_path, tokenizer_path):
    params = BASE_PARAMS | {"vocab_size": 470}
    folder = write_checkpoint(tmp_path / "source", params, random_weights(params), tokenizer_path)
    refusal(tmp_path, folder, "480 ids", "470 rows")


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_disk_without_room_is_seen_before(source, tmp_path, monkeypatch, to):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    refusal(tmp_path, source, "is full", "GB are free", "nothing was left", error=OSError, to=to)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 96 KB, which the converted weights fill."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root on Linux")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("to", ["meta", "hf"])
@pytest.mark.parametrize("shards", [1, 2])
def test_disk_that_fills_up_is_named(source, small_disk, monkeypatch, to, shards):
    """Another program took the room after it was counted: the same sentence, and the partial output is gone."""
    free = shutil.disk_usage(small_disk)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free._replace(free=10**12))
    refusal(small_disk, source, "is full", "nothing was left", error=OSError, to=to, shards=shards)


@pytest.mark.parametrize("to", ["meta", "hf"])
def test_disk_that_fails_for_another_reason_is_named(source, tmp_path, monkeypatch, to):
    """torch has its own words for a failed write; the system's are what the user needs."""
    write = OutputFile.write

    def failing(self, data):
        if self.name in ("consolidated.00.pth", "model.safetensors") and len(data) > 1000:
            self.error = OSError(5, "Input/output error")
            raise self.error
        return write(self, data)

    monkeypatch.setattr(OutputFile, "write", failing)
    with pytest.raises(OSError, match="Input/output error"):
        convert(source, tmp_path / "out", to=to)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_source_is_only_read(source, tmp_path):
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()}
    convert(source, tmp_path / "out", to="hf")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in source.iterdir()} == before
    assert formats.find(tmp_path / "out").params["n_kv_heads"] == 2


def test_quantized_source_is_refused(source, tmp_path):
    convert(source, tmp_path / "small", quantize="int8")
    with pytest.raises(ValueError, match="is quantized; convert the original"):
        convert(tmp_path / "small", tmp_path / "again")
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("options", [{"quantize": "int3"}, {"to": "hf"}, {"shards": 2}])
def test_arguments_of_a_quantization_that_are_wrong_are_named(source, tmp_path, options):
    with pytest.raises(ValueError, match=r"--quantize is '\w+'; it must be"):
        convert(source, tmp_path / "small", **({"quantize": "int4"} | options))
    assert not (tmp_path / "small").exists()
