"""Processes that a test starts and that end with it, whatever happens in between."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def python(*arguments: object) -> Iterator[subprocess.Popen]:
    """A Python process with the library on its path; what is still running at the end is killed."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:  # closes its pipes, and waits
        try:
            yield process
        finally:
            process.kill()
