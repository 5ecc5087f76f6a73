"""y = x Wᵀ with quantised weights on a GPU, where W lies row by row and not in the CPU's blocks; the numbers are the same."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.model.formats import FP8, GROUP, INT4, INT8, Format, exact_product, quantise_fp8, quantise_int4, quantise_int8
from llama.model.kernels import gpu

_WEIGHT_DTYPES = {INT8: torch.int8, FP8: torch.float8_e4m3fn, INT4: torch.uint8}
# Rows of W that the definition unpacks at a time, where there are no kernels: 256 MB of the widest matrix.
_PIECE_ROWS = 4096


class DeviceLinear(nn.Module):
    """A matrix [out_features, in_features] in int8, fp8 or int4 (`llama.model.formats`).

    int8, fp8: weight [out, in] in that dtype, and scale [out], float32. int4: weight [out, in / 2], uint8, 16 bytes for a
    group of 32 columns, of which byte j holds column j in its lower half and column j + 16 in its upper one; scale and low
    [out, in / 32], float16.
    dtype: of x and y. Where gradients of x are wanted, the product is that with the unpacked weights, as on a CPU.
    deterministic: a row of y is the same bits whatever other rows come with it.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str, fmt: Format):
        super().__init__()
        self.shape = out_features, in_features
        self.format, self.dtype = fmt, dtype
        self.deterministic = False
        columns = in_features // 2 if fmt is INT4 else in_features
        weight = torch.empty(out_features, columns, dtype=_WEIGHT_DTYPES[fmt], device=device)
        if fmt is INT4:
            scale, low = torch.empty(2, out_features, in_features // GROUP, dtype=torch.float16, device=device)
        else:
            scale, low = torch.empty(out_features, dtype=torch.float32, device=device), None
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("low", low)

    @property
    def num_bytes(self) -> int:
        """What W takes."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def forward(self, x: Tensor, wide: bool = False) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features], in x's dtype, or in float32 if `wide`."""
        dtype = torch.float32 if wide else x.dtype
        if x.requires_grad and torch.is_grad_enabled():
            return F.linear(x, self.unpack(slice(None)).to(x.dtype)).to(dtype)
        if not gpu.serves(x):
            pieces = [self._multiply(x, slice(first, first + _PIECE_ROWS)) for first in range(0, self.shape[0], _PIECE_ROWS)]
            return torch.cat(pieces, dim=1).to(dtype)
        from llama.model.kernels import products  # needs Triton

        if self.format is INT8:
            return products.int8_product(x, self.weight, self.scale, dtype)
        if self.format is FP8:
            return products.fp8_product(x, self.weight, self.scale, dtype, fixed=self.deterministic)
        return products.int4_product(x, self.weight, self.scale, self.low, dtype, fixed=self.deterministic)

    def _multiply(self, x: Tensor, rows: slice) -> Tensor:
        """The definition, of some rows of W: [tokens, rows], float32."""
        if self.format is INT8:
            q, scale = quantise_int8(x)
            return exact_product(q, self.weight[rows]) * scale[:, None] * self.scale[rows]
        if self.format is FP8:
            q, scale = quantise_fp8(x)
            return F.linear(q.float(), self.weight[rows].float()) * scale[:, None] * self.scale[rows]
        q, scale = quantise_int8(x.unflatten(1, (-1, GROUP)))
        return F.linear((q * scale[..., None]).flatten(1), self.unpack(rows))

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, as an embedding looks them up: ids [tokens] -> [tokens, in_features]."""
        return self.unpack(ids).to(self.dtype)

    def unpack(self, rows: Tensor | slice) -> Tensor:
        """The weights that some rows stand for: [rows, in_features], float32."""
        q = self.weight.view(torch.uint8)[rows].view(self.weight.dtype)  # bytes, for PyTorch does not index all of fp8
        if self.format is not INT4:
            return q.float() * self.scale[rows][:, None]
        halves = q.unflatten(1, (-1, GROUP // 2))  # [rows, groups, 16]
        q = torch.cat([halves & 15, halves >> 4], dim=2).float()
        return (q * self.scale[rows].float()[..., None] + self.low[rows].float()[..., None]).flatten(1)

    def store(self, first_row: int, weight: Tensor) -> None:
        """Set rows from `first_row` on, from floats."""
        quantise = {INT8: quantise_int8, FP8: quantise_fp8, INT4: quantise_int4}[self.format]
        self._set(first_row, *quantise(weight))

    def store_blocks(self, first_row: int, blocks: Tensor) -> None:
        """Set rows from blocks as a quantised checkpoint holds them; int8's scale lies beside them there."""
        self._set(first_row, *self.format.parts(blocks))

    def store_scale(self, first_row: int, scale: Tensor) -> None:
        """Set int8's scales from `first_row` on."""
        self.scale[first_row:first_row + len(scale)].copy_(scale)

    def _set(self, first_row: int, q: Tensor, scale: Tensor | None = None, low: Tensor | None = None) -> None:
        rows = slice(first_row, first_row + len(q))
        if self.format is INT4:
            first, second = q.unflatten(1, (-1, 2, GROUP // 2)).unbind(2)  # each [rows, groups, 16]
            q = (first | second << 4).flatten(1)
        self.weight[rows].copy_(q)
        if scale is not None:
            self.scale[rows].copy_(scale)
        if low is not None:
            self.low[rows].copy_(low)
