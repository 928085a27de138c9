"""Which device and number format to compute with, and how much memory is free there.

The only module that names kinds of GPUs. It knows nothing of models, files or ranks.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_device(name: str | torch.device | None = None, index: int = 0) -> torch.device:
    """The device called `name`, or the best of CUDA, MPS and CPU; `index` tells GPUs of one machine apart.

    Raises `ValueError` for a device that is unknown or not here.
    """
    here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    available = [name for name, found in here.items() if found]
    try:
        device = torch.device(available[0] if name is None else name)
    except (RuntimeError, TypeError):
        raise ValueError(f"device {name!r} is unknown; available here: {', '.join(available)}.") from None
    if device.type not in available:
        raise ValueError(f"device {str(name)!r} is not available here; available: {', '.join(available)}.")
    if device.type != "cuda":
        return device
    index = index if device.index is None else device.index
    count = torch.cuda.device_count()
    if index >= count:
        advice = f"start at most {count} process{'es' * (count > 1)} a machine, one for each, or pass device='cpu'"
        raise ValueError(f"GPU {index} was asked for, but this machine has {count}; {advice}.")
    return torch.device("cuda", index)


def use_device(device: torch.device) -> None:
    """Make a GPU this process's current one, where collectives put what they send."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def collective_backend(device: torch.device) -> str | None:
    """The library that moves tensors between processes: NCCL, gloo, or None on Apple GPUs, where they do nothing."""
    return {"cuda": "nccl", "cpu": "gloo"}.get(device.type)


def is_native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has instructions for `dtype`, rather than converting every number."""
    if dtype == torch.float32:
        return True
    if dtype == torch.float16:
        return device.type in ("cuda", "mps")
    if dtype != torch.bfloat16:
        return False
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "mps":
        return torch.backends.mps.is_macos_or_newer(14, 0)
    features = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(features.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def choose_dtype(requested: str | torch.dtype | None, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """The number format of weights and cache: as requested, else as stored, else the nearest that is native.

    bfloat16 becomes float16 on a GPU without it (T4, V100); on a CPU both become float32. Raises `ValueError` for a
    name that is not float32, bfloat16 or float16.
    """
    if requested is not None:
        dtype = DTYPES.get(str(requested).removeprefix("torch."))
        if dtype is None:
            raise ValueError(f"dtype {str(requested)!r} is not supported; use one of {', '.join(DTYPES)}.")
        return dtype
    candidates = (stored, torch.float16, torch.float32)
    return next(dtype for dtype in candidates if is_native(dtype, device))


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    try:
        with open("/proc/meminfo") as meminfo:
            sizes = dict(line.split(":", 1) for line in meminfo)
        available = int(sizes["MemAvailable"].split()[0]) * 1024
        return min(available, container_memory() or available)
    except (OSError, KeyError):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None


def container_memory() -> int | None:
    """Bytes left under a container's own limit (cgroup v2), None without one. Cached file pages count as free."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((folder / name).read_text()) for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())["file"]
    except (OSError, ValueError, KeyError):  # no such file, or the word "max"
        return None
    return limit - used + int(cached)
