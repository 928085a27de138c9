"""Code Llama: the middle of a text with a hole, and sizes that come from params.json alone."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llama.generation import Llama
from llama.loading import model_args
from llama.tokenizer import Tokenizer
from support.checkpoints import write_checkpoint
from support.models import BASE_PARAMS, build_model, random_weights

ROOT = Path(__file__).parent.parent
MID, EOT = 4, 6
BOS, EOS = 1, 2
CONTEXT = 48


# --- filling in --------------------------------------------------------------------------------------------------


def saying(tokenizer: Tokenizer, chain: list[int], max_seq_len: int = CONTEXT) -> Llama:
    """A model that follows each id of the chain with the next one and any other with EOS: layers that add nothing."""
    params = BASE_PARAMS | {"dim": 512, "n_layers": 1, "vocab_size": tokenizer.n_words, "ffn_dim_multiplier": 0.05}
    state = {name: torch.zeros_like(weight) for name, weight in random_weights(params).items()}
    state |= {name: torch.ones_like(weight) for name, weight in state.items() if "norm" in name}
    state["tok_embeddings.weight"] = torch.eye(tokenizer.n_words, 512)
    followers = dict.fromkeys(range(tokenizer.n_words), EOS) | dict(itertools.pairwise(chain))
    for id, follower in followers.items():
        state["output.weight"][follower, id] = 16 / math.sqrt(512)
    return Llama(build_model(params, state, max_seq_len=max_seq_len), tokenizer)


def middle(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, bos=False, eos=False, inner=True)


def test_the_middle_joins_its_neighbours(code_tokenizer):
    """A middle that begins with a space keeps it, which text at the very beginning would lose."""
    llama = saying(code_tokenizer, [MID, *middle(code_tokenizer, " red cup"), EOT, 7])
    (result,) = llama.text_infilling(["Where is the"], [" in the garden?"], temperature=0)
    assert result == {
        "generation": " red cup",
        "full_text": "Where is the red cup in the garden?",
        "finish_reason": "stop",
    }


def test_suffix_first_continues_the_prefix(code_tokenizer):
    last = code_tokenizer.encode("Anna", False, False)[-1]
    llama = saying(code_tokenizer, [last, *middle(code_tokenizer, " said"), EOT])
    results = llama.text_infilling(["Anna"], ["!"], 0, suffix_first=True)
    assert results[0]["full_text"] == "Anna said!"
    assert llama.text_infilling(["Anna"], ["!"], 0)[0]["generation"] == ""  # after <MID>, the chain is not there


def test_tokens_and_logprobs(code_tokenizer):
    ids = middle(code_tokenizer, "red cup")
    llama = saying(code_tokenizer, [MID, *ids, EOT])
    (result,) = llama.text_infilling(["the "], ["."], temperature=0, logprobs=True)
    assert result["tokens"] == [code_tokenizer.decode(id) for id in ids]
    assert len(result["logprobs"]) == len(ids) and all(-0.01 < p < 0 for p in result["logprobs"])
    assert "tokens" not in llama.text_infilling(["the "], ["."], temperature=0)[0]


@pytest.mark.parametrize(
    ("chain_end", "options", "text", "reason"),
    [
        ([EOT], {}, "red cup", "stop"),
        ([EOS], {}, "red cup", "eos"),
        ([EOT], {"max_gen_len": 1}, "red", "length"),
        ([EOT], {"stop": [" c"]}, "red", "stop"),
        ([EOT], {"stop": []}, "red cup", "stop"),
    ],
)
def test_why_it_ended(code_tokenizer, chain_end, options, text, reason):
    llama = saying(code_tokenizer, [MID, *middle(code_tokenizer, "red cup"), *chain_end])
    (result,) = llama.text_infilling(["the "], ["."], temperature=0, **options)
    assert (result["generation"], result["finish_reason"]) == (text, reason)


def test_eot_stops_nothing_else(code_tokenizer):
    """In a completion the same id is a piece like another: what it means is for infilling to say."""
    llama = saying(code_tokenizer, [317, EOT, 351])
    assert llama.generate([[BOS, 317]], 5, temperature=0)[0] == [[EOT, 351]]


def test_rows_keep_their_order_and_their_text(code_tokenizer):
    """More holes than the batch has rows; every third ends at once."""
    llama = saying(code_tokenizer, [MID, *middle(code_tokenizer, "red"), EOT])
    prefixes, suffixes = [f"cup {n} " for n in range(6)], [" " + "ball " * n for n in range(6)]
    results = llama.text_infilling(prefixes, suffixes, temperature=0)
    assert [r["full_text"] for r in results] == [p + "red" + s for p, s in zip(prefixes, suffixes, strict=True)]
    assert llama.text_infilling([], []) == []


@pytest.mark.parametrize(("prefixes", "suffixes"), [(["a", "b"], ["c"]), ("a", "b"), (["a"], "b")])
def test_lists_that_do_not_match_are_refused(code_tokenizer, prefixes, suffixes):
    llama = saying(code_tokenizer, [MID, EOT])
    with pytest.raises(ValueError, match="two lists of strings, of equal length"):
        llama.text_infilling(prefixes, suffixes)


def test_arguments_are_checked_as_elsewhere(code_tokenizer):
    llama = saying(code_tokenizer, [MID, EOT], max_seq_len=8)
    with pytest.raises(ValueError, match="stop is 'x'"):
        llama.text_infilling(["a"], ["b"], stop="x")
    with pytest.raises(ValueError, match=r"Prompt 1 has \d+ tokens, over max_seq_len 8"):
        llama.text_infilling(["a", "a " * 20], ["b", "b"])


def test_a_model_that_is_not_for_infilling_says_so(tokenizer):
    with pytest.raises(ValueError, match="lacks the pieces for infilling"):
        saying(tokenizer, [7, 8]).text_infilling(["a"], ["b"])


# --- sizes -------------------------------------------------------------------------------------------------------

CODE_7B = {"dim": 4096, "n_layers": 32, "n_heads": 32, "multiple_of": 256, "ffn_dim_multiplier": 1.0}
CODE_34B = {"dim": 8192, "n_layers": 48, "n_heads": 64, "n_kv_heads": 8, "multiple_of": 256, "ffn_dim_multiplier": 1.0}
CODE_70B = CODE_34B | {"n_layers": 80, "multiple_of": 4096, "ffn_dim_multiplier": 1.3}


@pytest.mark.parametrize(
    ("params", "n_words", "vocab_size", "rope_theta", "hidden"),
    [
        (CODE_7B | {"rope_theta": 1000000}, 32016, 32016, 1e6, 11008),  # with infilling
        (CODE_7B | {"rope_theta": 1000000, "vocab_size": 32016}, 32016, 32016, 1e6, 11008),
        (CODE_7B | {"rope_theta": 1e6, "vocab_size": 32000}, 32000, 32000, 1e6, 11008),  # Python
        (CODE_34B | {"rope_theta": 1000000}, 32000, 32000, 1e6, 22016),
        (CODE_70B | {"rope_theta": 10000}, 32016, 32016, 1e4, 28672),  # Python and Instruct: not 1e6
        (CODE_7B, 32016, 32016, 1e4, 11008),  # not said: the default, whatever the vocabulary
    ],
)
def test_sizes_come_from_params_alone(params, n_words, vocab_size, rope_theta, hidden):
    args = model_args(params | {"norm_eps": 1e-5}, n_words, 512, 4)
    assert (args.vocab_size, args.rope_theta, args.ffn_hidden_dim) == (vocab_size, rope_theta, hidden)


def test_a_checkpoint_with_the_larger_vocabulary_opens_and_fills_in(tmp_path, code_path):
    params = BASE_PARAMS | {"vocab_size": 480, "rope_theta": 1000000}
    write_checkpoint(tmp_path, params | {"vocab_size": -1}, random_weights(params, seed=3), code_path)
    llama = Llama.build(tmp_path, max_seq_len=64, device="cpu")
    assert llama.model.params.rope_theta == 1e6 and llama.model.vocab_size == 480
    (result,) = llama.text_infilling(["Where is "], ["?"], seed=1, max_gen_len=8)
    assert result["full_text"] == "Where is " + result["generation"] + "?"


# --- the example -------------------------------------------------------------------------------------------------


def run_example(*arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, str(ROOT / "example_infilling.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, encoding="latin-1")


def test_the_example_says_what_it_needs():
    result = run_example()
    assert result.returncode == 1 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "--ckpt_dir" in result.stderr and "Code Llama 7B or 13B" in result.stderr


def test_the_example_fills_its_holes(tmp_path, code_path):
    params = BASE_PARAMS | {"vocab_size": 480}
    write_checkpoint(tmp_path, params, random_weights(params, seed=3), code_path)
    result = run_example("--ckpt_dir", str(tmp_path), "--max_gen_len", "5", "--suffix_first")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("def ") == result.stdout.count(">>>") == result.stdout.count("\n====") == 2


def test_the_example_refuses_a_model_for_text(tmp_path, tokenizer_path):
    params = BASE_PARAMS | {"vocab_size": 480}
    write_checkpoint(tmp_path, params, random_weights(params), tokenizer_path)
    result = run_example("--ckpt_dir", str(tmp_path))
    assert result.returncode == 1 and "lacks the pieces for infilling" in result.stderr
    assert "Traceback" not in result.stderr
