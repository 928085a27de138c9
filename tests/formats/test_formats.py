"""The protocol that `llama.formats` explains, and what it finds in a folder."""

import doctest
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama import formats
from llama.formats.slicing import Joined
from support.checkpoints import write_checkpoint
from support.folders import PARAMS, WORDS, build, weights
from support.refusals import refusal

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path, tokenizer_path) -> Path:
    return write_checkpoint(tmp_path / "model", PARAMS, weights(), tokenizer_path)


def test_slices_are_what_the_worked_example_shows():
    names = {"torch": torch, "Joined": Joined}
    example = doctest.DocTestParser().get_doctest(formats.__doc__, names, "llama.formats", None, 0)
    runner = doctest.DocTestRunner()
    runner.run(example)
    assert (runner.failures, runner.tries) == (0, 6)


LIGHT = """
import sys, types
package = types.ModuleType("llama")  # in the place of llama/__init__.py, which imports everything
package.__path__ = [sys.argv[1]]
sys.modules["llama"] = package
import llama.formats.recognise, llama.tokenizer
print("torch" in sys.modules)
"""


def test_formats_bring_no_torch_to_modules_of_text():
    """The tokenizer asks `recognise` what a wrong file is."""
    command = [sys.executable, "-c", LIGHT, str(ROOT / "llama")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == ("False\n", "")


# --- finding -----------------------------------------------------------------------------------------------------


def test_find_refuses_a_folder_that_does_not_exist(tmp_path):
    missing = tmp_path / "nowhere"
    refusal(lambda: build(missing), str(missing), "does not exist", error=FileNotFoundError)


@pytest.mark.parametrize("ckpt_dir", [None, True, 7, ["model"], b"model"], ids=repr)
def test_find_refuses_what_is_no_path(ckpt_dir):
    """`build(None)` ended in a bare TypeError."""
    refusal(lambda: build(ckpt_dir), f"ckpt_dir is {ckpt_dir!r}", "the folder that holds the weights")


def test_find_refuses_a_file_instead_of_a_folder(folder):
    path = folder / "consolidated.00.pth"
    refusal(lambda: build(path), str(path), "is a file", error=FileNotFoundError)


def test_find_says_what_a_folder_without_a_checkpoint_holds(folder):
    (folder / "consolidated.00.pth").rename(folder / "model.safetensors")
    (folder / "extra").mkdir()
    words = ("consolidated", str(folder), "model.safetensors", "params.json", "tokenizer.model", "extra/")
    refusal(lambda: build(folder), *words, error=FileNotFoundError)


def test_find_says_that_an_empty_folder_holds_nothing(tmp_path):
    refusal(lambda: build(tmp_path), str(tmp_path), "holds nothing", error=FileNotFoundError)


def test_find_cuts_a_long_listing(tmp_path):
    for number in range(30):
        (tmp_path / f"photo{number:02d}.png").touch()
    message = refusal(lambda: build(tmp_path), "photo00.png", "and 22 more", error=FileNotFoundError)
    assert "photo20.png" not in message


@pytest.mark.parametrize("name", ["meta-llama/Llama-2-7b-chat-hf", "mine/llama_2.hf"])
def test_find_says_how_a_hub_id_becomes_a_folder(name):
    words = (
        f"ckpt_dir {name} does not exist",
        "./download.sh",
        f"`hf download {name} --local-dir {name.split('/')[1]}`",
    )
    refusal(lambda: build(name), *words, error=FileNotFoundError)


def test_find_says_who_fetches_a_folder_that_is_not_there(tmp_path):
    message = refusal(lambda: build(tmp_path / "llama-2-7b"), "./download.sh", error=FileNotFoundError)
    assert "hub" not in message


def test_find_says_where_an_adapter_goes(folder, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text("{}")
    refusal(lambda: build(adapter), f"{adapter} holds an adapter", "its base as ckpt_dir", "as lora")
    (folder / "adapter_config.json").write_text("{}")
    assert build(folder).tokenizer.n_words == WORDS, "a checkpoint stays one"


def test_find_says_that_gguf_is_not_read(tmp_path):
    path = tmp_path / "llama-2-7b.Q4_K_M.gguf"
    path.write_bytes(b"GGUF")
    refusal(lambda: build(path), f"{path} is a GGUF file", "does not read", "Hugging Face")
    refusal(lambda: build(tmp_path), f"{tmp_path} holds GGUF files", "does not read", "Hugging Face")


def test_find_tokenizer_says_where_it_looked(folder, tokenizer_path):
    (folder / "tokenizer.model").unlink()
    refusal(lambda: build(folder), str(folder), "folder above", "tokenizer_path", error=FileNotFoundError)
    wrong = folder / "other.model"
    refusal(lambda: build(folder, wrong), str(wrong), error=FileNotFoundError)
    assert build(folder, tokenizer_path).tokenizer.n_words == WORDS
