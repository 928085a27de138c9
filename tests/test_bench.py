"""bench.py runs as documented: its table has a line for each engine and case, its last line is the same as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_every_engine_is_measured_and_the_last_line_is_json():
    options = ["--dtype", "float32", "--prompts", "8,20", "--batches", "1,2", "--steps", "2", "--turns", "1", "--peers"]
    options += ["--formats", "plain,int8,int4", "--ragged"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "bench.py"), *options],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    *table, last = done.stdout.strip().splitlines()
    results = json.loads(last)["results"]
    cases, engines = ([8], [20], [20, 20], [8, 64, 256, 512]), ("llama", "llama int8", "llama int4", "transformers")
    assert [(r["engine"], r["prompts"]) for r in results] == [(name, case) for case in cases for name in engines]
    assert all(r["first_token_s"] > 0 and r["step_s"] > 0 for r in results)
    plain, int8, int4, peer = (r["bytes"] for r in results[:4])  # of a step
    assert int4 < int8 < 0.3 * plain and abs(peer - plain) < 1000
    rows = [line for line in table if line.startswith(tuple(f"| {name} | " for name in engines))]
    assert len(rows) == len(results)
