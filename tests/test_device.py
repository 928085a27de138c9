"""Which device and number format are chosen on which machine, and how much memory it has free."""

import os
from pathlib import Path

import pytest
import torch

from llama import device
from support.refusals import refusal

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.fixture
def gpus(monkeypatch):
    """A machine with two GPUs of a chosen generation, as far as the questions that `device.py` asks."""

    def install(capability: tuple[int, int] = (8, 0), count: int = 2) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return install


def no_gpu(monkeypatch, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)


def test_the_best_device_is_chosen(monkeypatch, gpus):
    no_gpu(monkeypatch)
    assert device.choose_device() == torch.device("cpu")
    no_gpu(monkeypatch, mps=True)
    assert device.choose_device() == torch.device("mps")
    assert device.choose_device("cpu") == torch.device("cpu")
    gpus()
    assert device.choose_device() == torch.device("cuda", 0)
    assert device.choose_device("mps") == torch.device("mps")


def test_each_local_rank_takes_its_own_gpu(gpus):
    gpus()
    assert [device.choose_device(None, index) for index in (0, 1)] == [torch.device("cuda", n) for n in (0, 1)]
    assert device.choose_device("cuda", 1) == torch.device("cuda", 1)
    assert device.choose_device("cuda:0", 1) == torch.device("cuda", 0)
    refusal(lambda: device.choose_device(None, 2), "has 2", "2 processes", "cpu")
    gpus(count=1)
    refusal(lambda: device.choose_device("cuda:1"), "GPU 1", "has 1", "1 process ")


@pytest.mark.parametrize(
    "capability, stored, chosen",
    [
        ((7, 0), BF16, F16),  # V100
        ((7, 5), BF16, F16),  # T4
        ((7, 5), F16, F16),
        ((7, 5), F32, F32),
        ((8, 0), BF16, BF16),  # A100
        ((9, 0), BF16, BF16),
        ((9, 0), F16, F16),
        ((9, 0), torch.float64, F16),
    ],
)
def test_dtype_on_gpus(gpus, capability, stored, chosen):
    gpus(capability)
    assert device.choose_dtype(None, stored, torch.device("cuda", 0)) == chosen


@pytest.mark.parametrize(
    "capabilities, stored, chosen",
    [
        ({}, BF16, F32),
        ({"avx512_bf16": False, "amx_bf16": False}, BF16, F32),
        ({"avx512_bf16": True}, BF16, BF16),
        ({"amx_bf16": True}, BF16, BF16),
        ({"avx512_bf16": True}, F16, F32),
        ({"avx512_bf16": True}, F32, F32),
    ],
    ids=str,
)
def test_dtype_on_processors(monkeypatch, capabilities, stored, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert device.choose_dtype(None, stored, torch.device("cpu")) == chosen


@pytest.mark.parametrize("recent, chosen", [(True, BF16), (False, F16)])
def test_dtype_on_apple(monkeypatch, recent, chosen):
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: recent)
    assert device.choose_dtype(None, BF16, torch.device("mps")) == chosen
    assert device.choose_dtype(None, F16, torch.device("mps")) == F16


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float32", BF16])
def test_a_requested_dtype_is_taken_as_it_is(monkeypatch, name):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    expected = name if isinstance(name, torch.dtype) else getattr(torch, name)
    assert device.choose_dtype(name, F32, torch.device("cpu")) == expected


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="reads Linux's own account")
def test_free_memory_of_the_processor_is_the_systems():
    free, pages = device.free_memory(torch.device("cpu")), os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert 2**20 < free < pages
