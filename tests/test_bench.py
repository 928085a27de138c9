"""bench.py runs as documented: its table has a line for each engine and case, its last line is the same as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
    cases, engines = ([8], [20], [20, 20], [8, 64, 256, 512]), ("llama", "llama int8", "llama int4", "transformers")
    assert [(r["engine"], r["prompts"]) for r in results] == [(name, case) for case in cases for name in engines]
    assert all(r["first_token_s"] > 0 and r["step_s"] > 0 for r in results)
    plain, int8, int4, peer = (r["bytes"] for r in results[:4])  # of a step
    assert int4 < int8 < 0.3 * plain and abs(peer - plain) < 1000
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
