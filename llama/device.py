"""Which device and number format to compute with, and how much memory is free there.

The only module that names kinds of GPUs. It knows nothing of models, files or ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import os
import select
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BELOW_AMX = "AVX512_CORE_FP16"  # oneDNN's name for the largest instruction set without AMX
MEMINFO = Path("/proc/meminfo")
CGROUP = Path("/sys/fs/cgroup")
TRIAL_SECONDS = 10  # a child's product takes 0.02; a child that takes this long is stuck


def choose_device(name: str | torch.device | None = None, index: int = 0) -> torch.device:
    """The device called `name`, or the best of CUDA, MPS and CPU; `index` tells GPUs of one machine apart.

    Raises `ValueError` for a device that is unknown or not here.
    """
    here = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    available = [kind for kind, found in here.items() if found]
    try:
        device = torch.device(available[0] if name is None else name)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device {name!r} is unknown; available here: {', '.join(available)}."
        ) from None
    if device.type not in available:
        raise ValueError(
            f"device {str(name)!r} is not available here; available: {', '.join(available)}."
        )
    if device.type != "cuda":
        return device

    # Of several GPUs, the one that was named, or the one for this process of the machine.
    if device.index is not None:
        index = device.index
    count = torch.cuda.device_count()
    if index >= count:
        processes = "1 process" if count == 1 else f"{count} processes"
        advice = f"start at most {processes} a machine, one for each, or pass device='cpu'"
        raise ValueError(f"GPU {index} was asked for, but this machine has {count}; {advice}.")
    return torch.device("cuda", index)


def use_device(device: torch.device) -> None:
    """Prepare the device for this process, before anything is computed there.

    A GPU becomes the process's current one, where collectives put what they send; a processor whose AMX instructions
    do not work computes without them.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu":
        avoid_broken_amx()


@functools.cache
def avoid_broken_amx() -> None:
    """Tell oneDNN to leave AMX alone where a bfloat16 product would end this process.

    Some virtual machines report the AMX instructions but do not let a program use them: torch's first bfloat16
    product then dies with "Illegal instruction", which nothing can catch. So the first call tries one in a child
    process. oneDNN reads the variable at its first operation. `os.putenv` is enough for oneDNN and leaves `os.environ`
    alone. A process that computed with oneDNN before this call cannot be mended; a warning says so.
    """
    if sys.platform != "linux" or not claims_amx() or survives(multiply_bfloat16):
        return

    os.putenv("ONEDNN_MAX_CPU_ISA", BELOW_AMX)
    if not survives(multiply_bfloat16):
        advice = f"set ONEDNN_MAX_CPU_ISA={BELOW_AMX} before Python starts, or compute in float32"
        warnings.warn(
            f"AMX does not work here, and bfloat16 products will end this process; {advice}.",
            stacklevel=3,
        )


def claims_amx() -> bool:
    """Whether the processor says that it has AMX instructions."""
    question = getattr(torch.cpu, "_is_amx_tile_supported", None)
    return question is not None and question()


def multiply_bfloat16() -> None:
    """The smallest round product that oneDNN computes with AMX (at 16 and below, torch computes it itself)."""
    x = torch.ones(64, 64, dtype=torch.bfloat16, device="cpu")
    x @ x


def survives(action: Callable[[], object]) -> bool:
    """Whether a forked child comes back from `action`; True if it is stuck, as that proves nothing.

    The child writes one byte into a pipe after the action. If the action fails, the pipe closes without it.
    """
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # A warning about other threads, which the child does not need.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        try_and_leave(action, writer)

    # The child now has the only writing end, so its death ends the wait.
    os.close(writer)
    pipe = select.poll()
    pipe.register(reader)
    try:
        stuck = not pipe.poll(1000 * TRIAL_SECONDS)
        return stuck or os.read(reader, 1) != b""

    # Whatever happened, Ctrl-C included, no child and no open file stay behind.
    finally:
        os.close(reader)
        # Where the system collects dead children, there may be none left.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def try_and_leave(action: Callable[[], object], writer: int) -> NoReturn:
    """Run `action` in the child, report if it came back, and leave without handlers or buffers of the parent."""
    try:
        import resource  # not on Windows

        # The child's death is no reason to write a core file.
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # nor to print a stack
        torch.set_num_threads(1)  # threads do not outlive a fork
        action()
        os.write(writer, b"1")
    finally:
        os._exit(0)


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


def choose_dtype(
    requested: str | torch.dtype | None, stored: torch.dtype, device: torch.device
) -> torch.dtype:
    """The number format of weights and cache: as requested, else as stored, else the nearest that is native.

    bfloat16 becomes float16 on a GPU without it (T4, V100); on a CPU both become float32. Raises `ValueError` for a
    name that is not float32, bfloat16 or float16.
    """
    if requested is not None:
        dtype = DTYPES.get(str(requested).removeprefix("torch."))
        if dtype is None:
            raise ValueError(
                f"dtype {str(requested)!r} is not supported; use one of {', '.join(DTYPES)}."
            )
        return dtype

    for dtype in (stored, torch.float16):
        if is_native(dtype, device):
            return dtype
    return torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on the device, None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    limits = (system_memory(), container_memory())
    return min((size for size in limits if size is not None), default=None)


def system_memory() -> int | None:
    """Bytes that the operating system can still give, or all there are where it does not say; None if neither."""
    try:
        with MEMINFO.open() as meminfo:
            sizes = dict(line.split(":", 1) for line in meminfo)
        kilobytes = sizes["MemAvailable"].split()[0]
        return int(kilobytes) * 1024
    except (OSError, KeyError):
        return physical_memory()  # not Linux


def physical_memory() -> int | None:
    """Bytes of memory in this machine, None where the system does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None  # Windows


def container_memory() -> int | None:
    """Bytes left under a container's own limit (cgroup v2), None without one.

    Cached pages of files count as free, as the system drops them when memory is needed.
    """
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        sizes = dict(line.split() for line in lines)
        cached = int(sizes["active_file"]) + int(sizes["inactive_file"])
    except (OSError, ValueError, KeyError):  # no such file, or the word "max"
        return None
    return max(limit - used + cached, 0)
