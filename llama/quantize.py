"""Weight-only quantization: the matrices of linear layers in 8 or 4 bits a number, activations as they were.

int8: a row (an output channel) has one scale, w = scale q with q in -127..127. int4: each GROUP numbers of a row have a
scale and a zero, w = scale (q - 8) + zero with q in 0..15, both fitted by least squares. A product of a few rows runs
in torch's packed kernels, which read the small numbers alone; a product of many, where arithmetic and not reading
costs, is one with the matrix written out, on a processor in parts that its cache holds.

A quantized matrix is a module in the place of a layer's `weight`, so a layer cuts and adds up as it always does. This
module knows nothing of Llama's layer names or of files.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.parallel import ColumnParallelLinear, RowParallelLinear

GROUP = 32  # numbers of an int4 row that share a scale and a zero
PACKED_ROWS = {"int8": 32, "int4": 64}  # rows of a product up to which the packed kernels are faster
ROWS_AT_ONCE = 1024
WRITTEN_OUT = 2**21  # numbers of a matrix that are written out at once on a processor: 8 MB in float32
FIT_ROUNDS = 4  # of rounding and least squares by turns, each of which can only lower the error


class Quantized(nn.Module, ABC):
    """A matrix of `rows` x `columns` in small numbers, kept in the tensors named and shaped in `parts`."""

    def __init__(self, parts: dict[str, tuple[int, int, torch.dtype]]):
        super().__init__()
        kind, (self.rows, _, _) = next(iter(parts.items()))
        self.parts, self.packed_rows = parts, PACKED_ROWS[kind]
        for name, (rows, columns, dtype) in parts.items():
            self.register_buffer(name, torch.empty(rows, columns, dtype=dtype))

    def quantize(self, weight: Tensor) -> None:
        """Take the numbers of `weight`, some rows at a time: what that needs in float32 stays small."""
        found = zip(*(self.encode(rows.float()) for rows in weight.split(ROWS_AT_ONCE)), strict=True)
        for name, tensors in zip(self.parts, found, strict=True):
            setattr(self, name, torch.cat(tensors))

    @abstractmethod
    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        """The `parts` of a float32 matrix, in their order."""

    def pack(self) -> None:
        """Take the layout of torch's kernel for this device, where there is one of its own."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N), as `F.linear` of the dequantized matrix."""
        if x.shape[:-1].numel() <= self.packed_rows and self.has_kernel(x):
            y = self.kernel(x.reshape(-1, x.shape[-1]).bfloat16())
            return y.view(*x.shape[:-1], -1).type_as(x)
        whole = x.device.type != "cpu" or torch.compiler.is_compiling()
        count = self.rows if whole else max(64, WRITTEN_OUT // x.shape[-1] // 64 * 64)  # int4 is packed by 64 rows
        products = [self.part(x, slice(start, start + count)) for start in range(0, self.rows, count)]
        return products[0] if len(products) == 1 else torch.cat(products, dim=-1)

    def has_kernel(self, x: Tensor) -> bool:
        """Whether a packed kernel multiplies `x`: on a processor, if 16 divides K, which torch does not check."""
        return x.device.type == "cpu" and x.shape[-1] % 16 == 0

    @abstractmethod
    def kernel(self, x: Tensor) -> Tensor:
        """The product of x (rows, K) bfloat16, in which the kernels compute, with the packed matrix: (rows, N)."""

    @abstractmethod
    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        """Some rows of the matrix, or all, as numbers of `dtype`."""

    def part(self, x: Tensor, rows: slice) -> Tensor:
        """The product of `x` and some rows of the matrix, written out."""
        return F.linear(x, self.dequantized(x.dtype, rows))


class Int8(Quantized):
    """A matrix (N, K): `int8` (N, K) int8 and `scale` (N, 1) bfloat16."""

    def __init__(self, rows: int, columns: int):
        super().__init__({"int8": (rows, columns, torch.int8), "scale": (rows, 1, torch.bfloat16)})

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-12).bfloat16()
        return (weight / scale.float()).round_().clamp_(-127, 127).to(torch.int8), scale

    def kernel(self, x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, self.int8, self.scale.view(-1))

    def part(self, x: Tensor, rows: slice) -> Tensor:
        if x.dtype == torch.float16:  # in which a product with q alone can exceed the largest number
            return super().part(x, rows)
        return F.linear(x, self.int8[rows].to(x.dtype)) * self.scale[rows].view(-1).to(x.dtype)  # q is exact in others

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        return self.int8[rows].to(dtype) * self.scale[rows].to(dtype)


class Int4(Quantized):
    """A matrix (N, K): `int4` (N, K / 2) uint8, even columns in the low halves; `scale`, `zero` (N, K / GROUP).

    The latter are bfloat16. `pack` puts two other tensors in the place of these. Raises `ValueError` for a K that
    groups do not divide.
    """

    def __init__(self, rows: int, columns: int):
        if columns % GROUP:
            raise ValueError(f"int4 needs a multiple of {GROUP} columns, not {columns}; use int8 or fewer ranks.")
        of_group = (rows, columns // GROUP, torch.bfloat16)
        super().__init__({"int4": (rows, columns // 2, torch.uint8), "scale": of_group, "zero": of_group})
        for name in ("packed", "scale_and_zero"):
            self.register_buffer(name, None, persistent=False)

    def encode(self, weight: Tensor) -> tuple[Tensor, ...]:
        groups = weight.unflatten(1, (-1, GROUP))  # (N, K / GROUP, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        scale, zero = (high - low) / 15, (7 * low + 8 * high) / 15
        middle = groups.mean(-1, keepdim=True)
        for _ in range(FIT_ROUNDS):
            q = rounded(groups, scale, zero)
            spread = q - q.mean(-1, keepdim=True)
            scale = (spread * (groups - middle)).sum(-1, keepdim=True) / spread.square().sum(-1, keepdim=True)
            zero = middle - scale * q.mean(-1, keepdim=True)
            scale, zero = scale.nan_to_num(0.0), torch.where(scale.isfinite(), zero, middle)  # all of a group equal
        scale, zero = scale.bfloat16(), zero.bfloat16()
        q = (rounded(groups, scale.float(), zero.float()) + 8).flatten(1).byte()
        return q[:, 0::2] | q[:, 1::2] << 4, scale.squeeze(-1), zero.squeeze(-1)

    def pack(self) -> None:
        if self.int4.device.type != "cpu" or self.int4.shape[0] % 64 or block_width() is None:
            return
        self.width = block_width()
        self.packed = torch._convert_weight_to_int4pack_for_cpu(self.halves().int(), 1)
        self.scale_and_zero = torch.stack((self.scale.T, self.zero.T), dim=-1).contiguous()  # (K / GROUP, N, 2)
        del self.int4, self.scale, self.zero

    def halves(self, rows: slice = slice(None)) -> Tensor:
        """q of the matrix that is not packed, (N, K) uint8."""
        return torch.stack((self.int4[rows] & 15, self.int4[rows] >> 4), dim=-1).flatten(1)

    def has_kernel(self, x: Tensor) -> bool:
        return super().has_kernel(x) and self.packed is not None

    def kernel(self, x: Tensor) -> Tensor:
        return torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.packed, GROUP, self.scale_and_zero)

    def dequantized(self, dtype: torch.dtype = torch.float32, rows: slice = slice(None)) -> Tensor:
        if self.packed is None:
            q, scale, zero = self.halves(rows), self.scale[rows], self.zero[rows]
        else:
            q, (scale, zero) = unpacked(self.packed[rows], self.width), self.scale_and_zero[:, rows].permute(2, 1, 0)
        groups = q.to(dtype).sub_(8).unflatten(1, (-1, GROUP))
        return groups.mul_(scale.to(dtype).unsqueeze(-1)).add_(zero.to(dtype).unsqueeze(-1)).flatten(1)


def rounded(groups: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """q - 8 of each number, -8 to 7, in float32."""
    return ((groups - zero) / scale.where(scale != 0, 1.0)).round_().clamp_(-8, 7)


def unpacked(packed: Tensor, width: int) -> Tensor:
    """(N, K) uint8 of torch's layout: for each block of 2 `width` rows, column after column, two rows share a byte."""
    blocks = packed.view(-1, 2 * packed.shape[1], width)  # (N / 2 width, K, width)
    return torch.cat((blocks & 15, blocks >> 4), dim=-1).transpose(1, 2).flatten(0, 1)


@functools.cache
def block_width() -> int | None:
    """The width of the blocks that torch's layout has on this processor, found out by packing known numbers."""
    known = torch.arange(64 * GROUP, dtype=torch.int32, device="cpu").mul_(40503).view(64, GROUP) >> 7 & 15
    packed = torch._convert_weight_to_int4pack_for_cpu(known, 1)
    return next((width for width in (32, 16) if torch.equal(unpacked(packed, width).int(), known)), None)


FORMATS = {"int8": Int8, "int4": Int4}
BYTES = {"int8": 1.0, "int4": 0.5 + 4 / GROUP}  # of a number, its share of scale and zero included


def quantized(layer: nn.Module, kind: str) -> Quantized | None:
    """An empty matrix of that kind in the shape of a linear layer's weight; None for other modules."""
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
