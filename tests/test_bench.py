"""bench.py runs as documented: its table has a line for each engine and case, its last line is the same as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_both_engines_are_measured_and_the_last_line_is_json():
    options = ["--dtype", "float32", "--prompts", "8,20", "--batches", "1,2", "--steps", "2", "--turns", "1", "--peers"]
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
    cases = [(r["engine"], r["rows"], r["prompt"]) for r in results]
    assert cases == [(name, *case) for case in ((1, 8), (1, 20), (2, 20)) for name in ("llama", "transformers")]
    assert all(r["first_token_s"] > 0 and r["step_s"] > 0 for r in results)
    rows = [line for line in table if line.startswith(("| llama ", "| transformers "))]
    assert len(rows) == len(cases)
