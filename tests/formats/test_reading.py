"""Files that formats share, opened where memory is short."""

import pytest
import safetensors
import torch
from safetensors.torch import save_file

from llama.formats.reading import open_pickle, open_safetensors
from support.refusals import refusal

SHORT = [
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("unable to mmap 13476925163 bytes from file <consolidated.00.pth>: Cannot allocate memory (12)"),
    OSError(12, "Cannot allocate memory"),
]


def failing(error: Exception):
    def fail(*args: object, **options: object) -> None:
        raise error

    return fail


@pytest.mark.parametrize("error", SHORT, ids=lambda error: type(error).__name__)
def test_reading_a_pickle_without_memory_says_so(tmp_path, monkeypatch, error):
    """The file was called damaged, and people fetched it again."""
    path = tmp_path / "consolidated.00.pth"
    torch.save({"norm.weight": torch.ones(2)}, path)
    monkeypatch.setattr(torch, "load", failing(error))
    message = refusal(lambda: open_pickle(path), "too little memory", str(path), error=MemoryError)
    assert "fetch" not in message


@pytest.mark.parametrize("error", [SHORT[0], SHORT[-1]], ids=lambda error: type(error).__name__)
def test_reading_safetensors_without_memory_says_so(tmp_path, monkeypatch, error):
    path = tmp_path / "model.safetensors"
    save_file({"norm.weight": torch.ones(2)}, path)
    monkeypatch.setattr(safetensors, "safe_open", failing(error))
    message = refusal(lambda: open_safetensors(path), "too little memory", str(path), error=MemoryError)
    assert "fetch" not in message
