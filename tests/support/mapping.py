"""Where the memory of a tensor comes from, by Linux's own account."""

from pathlib import Path

import pytest
import torch

only_linux = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="asks Linux where memory comes from")


def mapped_ranges(path: Path) -> list[range]:
    """Where this process has mapped the file, by Linux's own account."""
    lines = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    bounds = [line[0].split("-") for line in lines if len(line) == 6 and line[5] == str(path)]
    return [range(int(low, 16), int(high, 16)) for low, high in bounds]


def is_mapped(tensor: torch.Tensor, path: Path) -> bool:
    last = tensor.data_ptr() + tensor.nbytes - 1
    return any(tensor.data_ptr() in part and last in part for part in mapped_ranges(path.resolve()))
