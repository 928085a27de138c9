"""bench.py runs as documented: its table has a line for each engine and case, its last line is the same as JSON."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import bench
from llama.decode import Batch

ROOT = Path(__file__).parents[2]
HAS_LLAMA_CPP = bool(find_spec("llama_cpp") and find_spec("gguf"))


def run(starter: list[str], options: list[str]) -> tuple[list[str], dict]:
    """The lines that bench.py prints, and the last one, read."""
    done = subprocess.run(
        [sys.executable, *starter, str(ROOT / "bench.py"), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *table, last = done.stdout.strip().splitlines()
    return table, json.loads(last)


def test_every_engine_is_measured_and_the_last_line_is_json():
    options = ["--dtype", "float32", "--prompts", "8,20", "--batches", "1,2", "--steps", "2", "--turns", "1", "--peers"]
    table, last = run([], [*options, "--formats", "plain,int8,int4", "--ragged"])
    results = last["results"]
    cases, engines = ([8], [20], [20, 20], [8, 64, 256, 512]), ["llama", "llama int8", "llama int4", "transformers"]
    engines += ["llama.cpp F32", "llama.cpp Q8_0", "llama.cpp Q4_0"] * HAS_LLAMA_CPP
    assert [(r["engine"], r["prompts"]) for r in results] == [(name, case) for case in cases for name in engines]
    assert all(r["first_token_s"] > 0 and r["step_s"] > 0 for r in results)
    plain, int8, int4, *peers = (r["bytes"] for r in results[: len(engines)])  # of a step
    assert int4 < int8 < 0.3 * plain and abs(peers[0] - plain) < 1000
    if HAS_LLAMA_CPP:
        cache = 2 * 4 * 8 * 4 * 32  # keys and values of 4 layers, 8 positions, 4 heads of 32 numbers
        assert peers[1] == plain - 2 * cache and peers[3] < peers[2] < 0.3 * plain
    rows = [line for line in table if line.startswith(tuple(f"| {name} | " for name in engines))]
    assert len(rows) == len(results)


def test_ranks_count_the_collectives_of_a_step():
    """Two sums for each of the demo's four layers, embedding and logits gathered, the choice broadcast."""
    ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    table, last = run(ranks, ["--prompts", "8", "--batches", "1", "--steps", "3", "--turns", "1", "--device", "cpu"])
    (result,) = last["results"]
    share = result["collectives"].pop("share")
    assert result["collectives"] == {"all_reduce": 8, "all_gather": 2, "broadcast": 1}
    assert 0 < share < 1
    assert table[-2].endswith(f"| {share:.0%}: 8 all_reduce, 2 all_gather, 1 broadcast |")


@pytest.mark.skipif(not HAS_LLAMA_CPP, reason="llama-cpp-python and gguf are not installed")
@pytest.mark.parametrize("form, bound", [("F32", 2e-3), ("Q8_0", 0.05), ("Q4_0", 0.2)])
def test_llama_cpp_computes_the_same_model(form, bound):
    """Prompts of different lengths, then steps: the same logits, up to a float16 cache and what 8 and 4 bits lose."""
    model = bench.load_checkpoint(bench.DEMO, 64, 3, "cpu", "float32")
    peer, prompts = bench.LlamaCpp(model, form), [[1, 300, 17, 401], [1], [1, 1260, 261, 262, 2263, 264, 265]]
    peer.prefill(prompts[::-1])  # nothing may be left of it
    batch = Batch(model, prompts)
    expected, ids = batch.prefill()[0], peer.prefill(prompts)
    for _ in range(12):
        if form == "F32":
            assert ids.equal(expected.argmax(-1))
        chosen = expected.argmax(-1)
        expected, found = batch.step(chosen, [True] * len(prompts)), peer.run([[id] for id in chosen.tolist()])
        assert (found - expected).norm() < bound * expected.norm()
        ids = found.argmax(-1)


def test_loading_is_measured_of_checkpoints_that_are_made(tmp_path):
    """The script that writes them shares `llama.convert`'s sources, whose changes broke it unseen."""
    script = [sys.executable, str(ROOT / "benchmarks" / "loading.py")]
    options = {"env": os.environ | {"PYTHONPATH": str(ROOT)}, "capture_output": True, "text": True, "timeout": 240}
    subprocess.run([*script, "write", str(tmp_path), "--shape", "tiny", "--layouts", "hf,meta2"], check=True, **options)
    chosen = ["--ranks", "1", "--quantize", "int8", "--layouts", "meta2"]
    measured = subprocess.run([*script, "measure", str(tmp_path), *chosen], check=True, **options).stdout
    assert len([line for line in measured.splitlines() if line.startswith("| Meta, 2 files | 1 |")]) == 2
    assert not (tmp_path / "meta1").exists()
