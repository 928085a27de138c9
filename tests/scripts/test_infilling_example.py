"""examples/infilling.py as a newcomer runs it: without a model, with one made for infilling, with any other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import write_checkpoint
from support.models import BASE_PARAMS, random_weights
from support.tokenizers import train_tokenizer

ROOT = Path(__file__).parents[2]
PIECES = ["▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>"]
PARAMS = BASE_PARAMS | {"vocab_size": 480}


@pytest.fixture(scope="module")
def code_path(tmp_path_factory) -> Path:
    """A tokenizer with the infilling pieces."""
    return train_tokenizer(tmp_path_factory.mktemp("code"), user_defined_symbols=PIECES)


def run_example(*arguments: str) -> subprocess.CompletedProcess:
    settings = {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(ROOT / "examples" / "infilling.py"), *arguments]
    return subprocess.run(
        command, capture_output=True, env=os.environ | settings, cwd=ROOT, encoding="latin-1", timeout=240
    )


def test_without_a_model_it_says_which_and_how_to_get_it():
    result = run_example()
    assert result.returncode == 1 and result.stdout == ""
    assert "Code Llama 7B or 13B" in result.stderr
    for command in ("./download.sh --models 7b", "./download.sh --from hf", "--ckpt_dir CodeLlama-7b/"):
        assert command in result.stderr


def test_help_names_the_flags():
    result = run_example("--help")
    assert result.returncode == 0 and result.stderr == ""
    assert "--suffix_first" in result.stdout and "--ckpt_dir" in result.stdout


def test_it_fills_its_holes(tmp_path, code_path):
    write_checkpoint(tmp_path, PARAMS, random_weights(PARAMS, seed=3), code_path)
    result = run_example("--ckpt_dir", str(tmp_path), "--max_gen_len", "5", "--suffix_first")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("def ") == result.stdout.count(">>>") == result.stdout.count("\n====") == 2


def test_it_refuses_a_model_for_text(tmp_path, tokenizer_path):
    write_checkpoint(tmp_path, PARAMS, random_weights(PARAMS), tokenizer_path)
    result = run_example("--ckpt_dir", str(tmp_path))
    assert result.returncode == 1 and "lacks the pieces for infilling" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_commands_that_it_names_are_understood_by_the_download_script():
    """`download.sh` answers a wrong flag with status 2; these reach the question of the link, or of the client."""
    for line in run_example().stderr.splitlines():
        if "download.sh" in line:
            words = line.split()
            done = subprocess.run(["bash", *words, "--url", "nowhere"], cwd=ROOT, capture_output=True, text=True)
            assert done.returncode == 1, done.stderr
