"""Plain matrices packed for a processor: beside each a copy in the layout in which oneDNN's kernels multiply it.

A copy takes as much memory as its matrix, and time at the loading. So there is a rule, which knows for which
processors, number formats and sizes copies were measured to be worth that. Nothing is timed at the loading, and free
memory does not count: the two ways round differently, and ids must not depend on what else a machine was doing.

This module knows nothing of Llama's layer names or of files.
"""

from __future__ import annotations

import contextlib
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama import parallel
from llama.device import CGROUP, dtype_name, is_native, physical_memory
from llama.parallel import ColumnParallelLinear, RowParallelLinear

LINEAR = (ColumnParallelLinear, RowParallelLinear)
CPUINFO = Path("/proc/cpuinfo")


# --- the rule ----------------------------------------------------------------------------------------------------


class Processor(NamedTuple):
    """What decides how a processor multiplies matrices."""

    maker: str  # as the processor spells it, "GenuineIntel" or "AuthenticAMD"; empty if it does not say
    avx512: bool
    bfloat16: bool  # whether it has instructions for this format


def processor() -> Processor:
    """The processor of this machine."""
    maker = ""
    with contextlib.suppress(OSError):  # not Linux
        found = re.search(r"^vendor_id\s*: (\w+)", CPUINFO.read_text(), re.MULTILINE)
        maker = found[1] if found else ""

    avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return Processor(maker, avx512, is_native(torch.bfloat16, torch.device("cpu")))


@dataclass(frozen=True)
class Packing:
    """The products that a packed copy of the matrix computes."""

    numbers: int = 1  # of the smallest matrix that has a copy
    least_rows: int = 1  # of x
    most_rows: int = 2**62


# Where packed copies were measured to be faster than `F.linear`. Smaller matrices were slower, or not measured.
# AMD EPYC, two cores: 1.6 to 4 times in float32 and 1.1 to 2.8 times in bfloat16, at 1 to 2,048 rows.
# Intel Xeon (Emerald Rapids, without AMX), one core: in float32 1.2 to 2 times at 4 to 16 rows, 1.0 to 1.2 times up to
# 64, 0.7 to 0.9 below 4; in bfloat16 1.1 to 1.4 times up to 32 rows, 1.0 to 1.1 times beyond.
MEASURED: dict[tuple[str, torch.dtype], Packing] = {
    ("AuthenticAMD", torch.float32): Packing(numbers=2**19),
    ("AuthenticAMD", torch.bfloat16): Packing(numbers=2**19),
    ("GenuineIntel", torch.float32): Packing(numbers=2**20, least_rows=4, most_rows=64),
    ("GenuineIntel", torch.bfloat16): Packing(numbers=2**16),
}


def packing_that_pays(processor: Processor, dtype: torch.dtype) -> Packing | None:
    """The products that are faster packed on this processor, None where there are none or nobody has measured."""
    if not processor.avx512 or (dtype == torch.bfloat16 and not processor.bfloat16):
        return None
    return MEASURED.get((processor.maker, dtype))


def can_pack(processor: Processor, dtype: torch.dtype) -> bool:
    """Whether oneDNN has a packed product in this number format here."""
    native = processor.bfloat16 if dtype == torch.bfloat16 else dtype == torch.float32
    return native and torch.backends.mkldnn.is_available()


def total_memory() -> int | None:
    """Bytes of memory in this machine, or what its container may use of them; None where the system does not say."""
    total = physical_memory()
    try:
        limit = int((CGROUP / "memory.max").read_text())
    except (OSError, ValueError):  # no such file, or the word "max"
        return total
    return limit if total is None else min(limit, total)


# --- a product ---------------------------------------------------------------------------------------------------


class Packed:
    """The product of x and a layer's weight by a packed copy of the weight, where that is faster and possible.

    The weight stays the layer's parameter. A product that needs gradients, or that torch compiles, uses the weight
    itself. A weight that was changed or replaced is packed again at its next product. What is written through
    `weight.data` torch does not count, so nobody sees it here: call `pack_matrices` afterwards.
    """

    def __init__(self, packing: Packing):
        self.packing = packing
        self.copied: tuple[Tensor, int, Tensor] | None = None  # the weight, its version, its copy

    def __getstate__(self) -> dict[str, object]:
        """Copies of a model pack for themselves."""
        return {"packing": self.packing, "copied": None}

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., K) -> (..., N), as `F.linear`."""
        if torch.compiler.is_compiling() or not self.suits(x, weight):
            return F.linear(x, weight)
        copy = self.copy_of(weight)
        return torch.ops.mkldnn._linear_pointwise(x, copy, None, "none", [], "")

    def suits(self, x: Tensor, weight: Tensor) -> bool:
        """Whether the packed product of `x` is faster and possible."""
        rows = x.numel() // x.shape[-1]
        if not self.packing.least_rows <= rows <= self.packing.most_rows:
            return False
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            return False
        counted = not weight.is_inference()  # torch counts the changes of other tensors
        return x.is_cpu and weight.is_cpu and x.dtype == weight.dtype and counted

    def copy_of(self, weight: Tensor) -> Tensor:
        """The packed copy of the weight as it is now."""
        if self.copied is not None:
            packed, version, copy = self.copied
            same = packed.data_ptr() == weight.data_ptr() and packed.dtype == weight.dtype
            if same and version == weight._version:
                return copy

        # A tensor that shares the weight's numbers keeps their address from being given to others.
        plain = weight.detach()
        copy = torch.ops.mkldnn._reorder_linear_weight(plain.contiguous())
        self.copied = (plain, weight._version, copy)
        return copy


# --- in a model --------------------------------------------------------------------------------------------------


def to_pack(model: nn.Module, packing: Packing) -> list[nn.Module]:
    """The layers of a model whose plain matrices are to have packed copies."""
    layers = [module for module in model.modules() if isinstance(module, LINEAR)]
    plain = [layer for layer in layers if isinstance(layer.weight, Tensor)]
    return [layer for layer in plain if layer.weight.numel() >= packing.numbers]


def packed_bytes(model: nn.Module, dtype: torch.dtype, packing: Packing | None) -> int:
    """Bytes of the packed copies of a model's matrices."""
    layers = [] if packing is None else to_pack(model, packing)
    return sum(layer.weight.numel() for layer in layers) * dtype.itemsize


def choose_packing(
    model: nn.Module,
    dtype: torch.dtype,
    device: torch.device,
    kind: str | None,
    pack: bool | None,
    rows: int,
    besides: int,
) -> Packing | None:
    """The products of a model that are to be packed: all, none, or with None those that gain.

    These are the ones that were measured to gain on this processor, if steps have as many `rows` as they need, and the
    copies fit into half of the memory there is, together with the `besides` bytes of weights and cache; the other half
    is for files and other programs. `kind` is the format of quantized matrices. Raises `ValueError` where nothing can
    be packed.
    """
    facts = processor()
    if pack is not None:
        check_packing(facts, dtype, device, kind, pack)
        return Packing() if pack else None
    if device.type != "cpu" or kind:
        return None

    packing = packing_that_pays(facts, dtype)
    if packing is None or rows < packing.least_rows:
        return None
    copies = packed_bytes(model, dtype, packing)
    room = (total_memory() or 0) // parallel.local_world()[1] // 2
    return packing if copies and copies + besides <= room else None


def check_packing(
    facts: Processor, dtype: torch.dtype, device: torch.device, kind: str | None, pack: bool
) -> None:
    """Raise `ValueError` where `pack` is neither True nor False, or True and the matrices cannot be packed."""
    if not isinstance(pack, bool):
        raise ValueError(f"pack is {pack!r}; it must be True, False or None.")
    if not pack:
        return
    if kind:
        raise ValueError(f"{kind} matrices have a layout of their own; leave pack=True out.")
    if device.type != "cpu":
        raise ValueError(f"pack=True is for a processor, not for {device}; leave it out.")
    if not can_pack(facts, dtype):
        form = dtype_name(dtype)
        raise ValueError(f"pack=True does not work in {form} on this processor; leave it out.")


def pack_matrices(model: nn.Module, packing: Packing | None) -> float:
    """Give the plain matrices of a model packed copies; return the seconds that took.

    Done once more, the copies hold what the matrices now do.
    """
    started = time.perf_counter()
    layers = [] if packing is None else to_pack(model, packing)
    for layer in layers:
        layer.multiply = Packed(packing)
        layer.multiply.copy_of(layer.weight)
    return time.perf_counter() - started
