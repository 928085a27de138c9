"""How a matrix is kept for a device and multiplied: in int8 or int4 instead of plain numbers; activations stay plain.

int8: a row (an output channel) has one scale; w = scale q with q in -127..127. int4: every GROUP numbers of a row have
a scale and a zero, both fitted by least squares; w = scale (q - 8) + zero with q in 0..15.

A product of a few rows runs in torch's packed kernels, which read the small numbers alone. In a product of many rows
arithmetic costs more than reading: the matrix is written out in plain numbers first, on a processor in parts that its
cache holds.

A quantized matrix is a module that stands in the place of a layer's `weight`, so the layer cuts and adds up as it
always does. This module knows nothing of Llama's layer names or of files.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.parallel import ColumnParallelLinear, RowParallelLinear

GROUP = 32  # numbers of an int4 row that share a scale and a zero
ROWS_AT_ONCE = 1024  # rows of a matrix that are quantized at once
WRITTEN_OUT = 2**21  # numbers of a matrix that a processor writes out at once: 8 MB in float32
ALL = slice(None)
FIT_ROUNDS = 4  # of rounding and least squares by turns; each of them can only lower the error
SMALLEST_SCALE = 1e-12  # of a row of zeros, which has no other


class Quantized(nn.Module, ABC):
    """A matrix of `rows` x `columns` in small numbers.

    `parts` names the tensors that hold it and gives the rows, columns and dtype of each; the first of them is named
    after the format. A checkpoint stores the parts under these names.
    """

    bytes_a_number: float  # with the number's share of scales and zeros
    packed_rows: int  # rows of a product up to which the packed kernel is faster

    def __init__(self, parts: dict[str, tuple[int, int, torch.dtype]]):
        super().__init__()
        self.parts = parts
        for name, (rows, columns, dtype) in parts.items():
            empty = torch.empty(rows, columns, dtype=dtype)
            self.register_buffer(name, empty)
            self.rows = rows

    def quantize(self, weight: Tensor) -> None:
        """Take the numbers of `weight`, some rows at a time, so that their float32 form stays small."""
        encoded = [self.encode(rows.float()) for rows in weight.split(ROWS_AT_ONCE)]
        for name, tensors in zip(self.parts, zip(*encoded, strict=True), strict=True):
            setattr(self, name, torch.cat(tensors))

    @abstractmethod
    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The `parts` of a float32 matrix, in their order."""

    def pack(self) -> None:
        """Take the layout of torch's kernel for this device, where the kernel has a layout of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), as `F.linear` of the dequantized matrix."""
        few = x.shape[:-1].numel() <= self.packed_rows
        if not few or not self.has_kernel(x):
            return self.written_out(x)

        flat = x.reshape(-1, x.shape[-1])  # (rows, K)
        y = self.kernel(flat.bfloat16())  # (rows, N)
        return y.view(*x.shape[:-1], -1).type_as(x)

    def written_out(self, x: Tensor) -> Tensor:
        """The product of `x` and the matrix in plain numbers, on a processor some rows of the matrix at a time."""
        count = self.rows
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            blocks = WRITTEN_OUT // x.shape[-1] // 64  # of 64 rows, by which int4 is packed
            count = 64 * max(blocks, 1)

        products = []
        for start in range(0, self.rows, count):
            rows = slice(start, start + count)
            products.append(self.part(x, rows))
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def has_kernel(self, x: Tensor) -> bool:
        """Whether a packed kernel multiplies `x`: on a processor, if 16 divides K, which torch does not check."""
        on_cpu = x.device.type == "cpu"
        return on_cpu and x.shape[-1] % 16 == 0

    @abstractmethod
    def kernel(self, x: Tensor) -> Tensor:
        """The packed product of x (rows, K) bfloat16, the format in which the kernels compute: (rows, N)."""

    @abstractmethod
    def dequantized(
        self,
        dtype: torch.dtype = torch.float32,
        rows: slice = ALL,
    ) -> Tensor:
        """Some rows of the matrix, or all, as numbers of `dtype`."""

    def part(self, x: Tensor, rows: slice) -> Tensor:
        """The product of `x` and some rows of the matrix in plain numbers."""
        weight = self.dequantized(x.dtype, rows)
        return F.linear(x, weight)


class Int8(Quantized):
    """A matrix (N, K): `int8` (N, K) int8 and `scale` (N, 1) bfloat16."""

    bytes_a_number = 1.0
    packed_rows = 32

    def __init__(self, rows: int, columns: int):
        super().__init__(
            {
                "int8": (rows, columns, torch.int8),
                "scale": (rows, 1, torch.bfloat16),
            }
        )

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        largest = weight.abs().amax(1, keepdim=True)
        scale = (largest / 127).clamp(min=SMALLEST_SCALE).bfloat16()
        q = (weight / scale.float()).round_().clamp_(-127, 127)
        return q.to(torch.int8), scale

    def kernel(self, x: Tensor) -> Tensor:
        scales = self.scale.view(-1)
        return torch._weight_int8pack_mm(x, self.int8, scales)

    def part(self, x: Tensor, rows: slice) -> Tensor:
        """Multiply by q first, which float32 and bfloat16 hold exactly, and by the scale afterwards."""
        if x.dtype == torch.float16:  # the product with q alone can exceed its largest number
            return super().part(x, rows)
        q = self.int8[rows].to(x.dtype)
        scale = self.scale[rows].view(-1).to(x.dtype)
        return F.linear(x, q) * scale

    def dequantized(
        self,
        dtype: torch.dtype = torch.float32,
        rows: slice = ALL,
    ) -> Tensor:
        q = self.int8[rows].to(dtype)
        scale = self.scale[rows].to(dtype)
        return q * scale


class Int4(Quantized):
    """A matrix (N, K): `int4` (N, K / 2) uint8, `scale` and `zero` (N, K / GROUP) bfloat16.

    A byte of `int4` holds two neighbours of a row, the even column in its lower half:

        columns  0 1 2 3   q = 1 2 3 4   ->   bytes 0x21 0x43

    Once `pack` has been called, two other tensors hold the matrix; `state_dict()` has the three all the same. Raises
    `ValueError` for a K that GROUP does not divide.
    """

    bytes_a_number = 0.5 + 4 / GROUP
    packed_rows = 64

    def __init__(self, rows: int, columns: int):
        if columns % GROUP:
            raise ValueError(
                f"int4 needs a multiple of {GROUP} columns, not {columns}; use int8 or fewer ranks."
            )
        groups = columns // GROUP
        super().__init__(
            {
                "int4": (rows, columns // 2, torch.uint8),
                "scale": (rows, groups, torch.bfloat16),
                "zero": (rows, groups, torch.bfloat16),
            }
        )
        for name in ("packed", "scale_and_zero"):
            self.register_buffer(name, None, persistent=False)

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        groups = weight.unflatten(1, (-1, GROUP))  # (N, K / GROUP, GROUP)
        scale, zero = fit_groups(groups)
        scale = scale.bfloat16()
        zero = zero.bfloat16()
        q = rounded(groups, scale.float(), zero.float()) + 8
        q = q.flatten(1).byte()  # (N, K)
        return join_halves(q), scale.squeeze(-1), zero.squeeze(-1)

    def pack(self) -> None:
        width = block_width()
        on_cpu = self.int4.device.type == "cpu"
        whole_blocks = self.rows % 64 == 0
        if not on_cpu or not whole_blocks or width is None:
            return

        q = split_halves(self.int4)
        pairs = torch.stack((self.scale.T, self.zero.T), dim=-1)  # (K / GROUP, N, 2)
        self.width = width
        self.packed = torch._convert_weight_to_int4pack_for_cpu(q.int(), 1)
        self.scale_and_zero = pairs.contiguous()
        del self.int4, self.scale, self.zero

    def numbers(self, rows: slice = ALL) -> tuple[Tensor, Tensor, Tensor]:
        """q (N, K) uint8, scale and zero (N, K / GROUP) of some rows, whether the matrix is packed or not."""
        if self.packed is None:
            return split_halves(self.int4[rows]), self.scale[rows], self.zero[rows]
        scale, zero = self.scale_and_zero[:, rows].permute(2, 1, 0)
        return unpacked(self.packed[rows], self.width), scale, zero

    def stored(self) -> dict[str, Tensor]:
        """The `parts`, as a checkpoint stores them, of a packed matrix too."""
        q, scale, zero = self.numbers()
        parts = {"int4": join_halves(q), "scale": scale, "zero": zero}
        return {name: tensor.contiguous() for name, tensor in parts.items()}

    def _save_to_state_dict(
        self, destination: dict[str, Tensor], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.packed is not None:
            for name, tensor in self.stored().items():
                destination[prefix + name] = tensor

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], *options: object) -> None:
        packed = self.packed is not None
        if packed:
            for name, tensor in self.stored().items():
                self.register_buffer(name, tensor)
            self.packed = None
            self.scale_and_zero = None

        super()._load_from_state_dict(state_dict, *options)
        if packed:
            self.pack()

    def has_kernel(self, x: Tensor) -> bool:
        return super().has_kernel(x) and self.packed is not None

    def kernel(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(
            x, self.packed, GROUP, self.scale_and_zero
        )

    def dequantized(
        self,
        dtype: torch.dtype = torch.float32,
        rows: slice = ALL,
    ) -> Tensor:
        q, scale, zero = self.numbers(rows)
        scale = scale.to(dtype).unsqueeze(-1)  # (N, K / GROUP, 1)
        zero = zero.to(dtype).unsqueeze(-1)
        centred = q.to(dtype).sub_(8)
        groups = centred.unflatten(1, (-1, GROUP))  # (N, K / GROUP, GROUP)
        return groups.mul_(scale).add_(zero).flatten(1)


# --- int4 --------------------------------------------------------------------------------------------------------


def fit_groups(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and the zero of each group with the least squared error, (N, K / GROUP, 1) each.

    From the line between the extremes on: round to q, then fit a line through the points (q, w), by turns.
    """
    low = groups.amin(-1, keepdim=True)
    high = groups.amax(-1, keepdim=True)
    scale = (high - low) / 15
    zero = (7 * low + 8 * high) / 15

    middle = groups.mean(-1, keepdim=True)
    for _ in range(FIT_ROUNDS):
        q = rounded(groups, scale, zero)
        mean = q.mean(-1, keepdim=True)
        spread = q - mean
        covariance = (spread * (groups - middle)).sum(-1, keepdim=True)
        variance = spread.square().sum(-1, keepdim=True)
        scale = covariance / variance
        zero = middle - scale * mean

    varied = scale.isfinite()  # in a group of equal numbers, nothing spreads
    zero = torch.where(varied, zero, middle)
    return scale.nan_to_num(0.0), zero


def rounded(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """q - 8 of each number, -8 to 7, in float32."""
    divisor = scale.where(scale != 0, 1.0)
    steps = (groups - zero) / divisor
    return steps.round_().clamp_(-8, 7)


def join_halves(q: Tensor) -> Tensor:
    """Two neighbours in a byte, the even column in its lower half: (N, K) uint8 -> (N, K / 2) uint8."""
    low_halves = q[:, 0::2]
    high_halves = q[:, 1::2]
    return low_halves | high_halves << 4


def split_halves(pairs: Tensor) -> Tensor:
    """The inverse of `join_halves`."""
    low_halves = pairs & 15
    high_halves = pairs >> 4
    return torch.stack((low_halves, high_halves), dim=-1).flatten(1)


def unpacked(packed: Tensor, width: int) -> Tensor:
    """(N, K) uint8 of torch's layout: for each block of 2 `width` rows, column after column, two rows share a byte."""
    columns = 2 * packed.shape[1]
    blocks = packed.view(-1, columns, width)  # (N / 2 width, K, width)
    halves = torch.cat((blocks & 15, blocks >> 4), dim=-1)  # (N / 2 width, K, 2 width)
    return halves.transpose(1, 2).flatten(0, 1)


@functools.cache
def block_width() -> int | None:
    """The width of the blocks in torch's layout on this processor, found by packing known numbers."""
    numbers = torch.arange(64 * GROUP, dtype=torch.int32, device="cpu")
    scattered = numbers * 40503 >> 7 & 15  # 0..15, in no simple order
    known = scattered.view(64, GROUP)
    packed = torch._convert_weight_to_int4pack_for_cpu(known, 1)

    for width in (32, 16):
        found = unpacked(packed, width)
        if torch.equal(found.int(), known):
            return width
    return None


# --- in a model --------------------------------------------------------------------------------------------------

FORMATS: dict[str, type[Quantized]] = {"int8": Int8, "int4": Int4}


def empty_matrix(layer: nn.Module, kind: str) -> Quantized | None:
    """A matrix of that kind in the shape of a linear layer's weight, without numbers; None for other modules."""
    if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
        return None
    with layer.weight.device:
        return FORMATS[kind](*layer.weight.shape)


def install(layer: nn.Module, matrix: Quantized) -> None:
    """Put the matrix in the place of the layer's weight."""
    del layer.weight
    layer.weight = matrix


def pack(model: nn.Module) -> None:
    """Have every quantized matrix of a model take the layout of its kernel."""
    for module in model.modules():
        if isinstance(module, Quantized):
            module.pack()
