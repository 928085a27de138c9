"""Jobs of several ranks, started as a user would start them."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("rank_worker.py")


class Job(NamedTuple):
    code: int
    out: str
    err: str
    ranks: list[dict]


def launch(folder: Path, task: str, ranks: int) -> Job:
    """Run a task of `rank_worker.py` on some ranks, as a user would start it."""
    starter = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [*starter, str(WORKER), task, str(folder)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=300,
    )
    files = [folder / f"{task}.{rank}.json" for rank in range(ranks)]
    return Job(done.returncode, done.stdout, done.stderr, [json.loads(f.read_text()) for f in files if f.exists()])


def succeeded(job: Job, ranks: int) -> Job:
    assert job.code == 0, job.err
    assert len(job.ranks) == ranks
    return job
