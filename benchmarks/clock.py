"""The clock of the benchmarks: seconds and memory of a piece of work, and what every engine does under it.

Knows nothing of this library or of another.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class Clocked:
    """An engine that runs one batch at a time, on `device`.

    `prefill(prompts)` runs the prompts and chooses the first token of each row; `step()` chooses one more for each.
    """

    device = torch.device("cpu")

    def prefill(self, prompts: list[list[int]]) -> None:
        raise NotImplementedError

    def step(self) -> None:
        raise NotImplementedError

    def end(self) -> None:
        """Give up the batch."""

    def turn(self, prompts: list[list[int]], steps: int) -> tuple[float, float]:
        """Seconds until every row has its first token, and the median of the steps after it."""
        first = seconds(lambda: self.prefill(prompts), self.device)
        decode = [seconds(self.step, self.device) for _ in range(steps)]
        self.end()
        return first, statistics.median(decode)

    def peak(self, prompts: list[list[int]]) -> int | None:
        """Bytes that a prefill holds at most, above what was held before it."""
        size = peak_memory(lambda: self.prefill(prompts), self.device)
        self.end()
        return size


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - started


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def peak_memory(work: Callable[[], object], device: torch.device) -> int | None:
    """Bytes held at most while `work` runs, above what was held before; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before

    if device.type != "cpu" or not CLEAR_REFS.exists():
        work()
        return None

    CLEAR_REFS.write_text("5")  # the peak begins anew
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(field: str) -> int:
    """Bytes of this process in memory: now (VmRSS) or at most so far (VmHWM)."""
    lines = STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def spread(values: list[float]) -> list[float]:
    return [min(values), max(values)]
