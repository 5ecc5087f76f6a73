"""y = x Wᵀ with quantised weights on a GPU, where W lies row by row and not in the CPU's blocks; the numbers are the same."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.model.formats import GROUP, INT8, Format, exact_product, quantise_int4, quantise_int8
from llama.model.kernels import gpu


class DeviceLinear(nn.Module):
    """A matrix [out_features, in_features] in int8 or int4 (`llama.model.formats`).

    int8: weight [out, in], int8, and scale [out], float32. int4: weight [out, in / 2], uint8, of which a byte holds an
    even column in its lower half and the next in its upper one, scale and low [out, in / 32], float16.
    dtype: of x and y. A row of y is exact sums scaled; in int4, float32 sums of exact ones.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str, fmt: Format):
        super().__init__()
        self.shape = out_features, in_features
        self.format, self.dtype = fmt, dtype
        if fmt is INT8:
            weight = torch.empty(out_features, in_features, dtype=torch.int8, device=device)
            scale, low = torch.empty(out_features, device=device), None
        else:
            weight = torch.empty(out_features, in_features // 2, dtype=torch.uint8, device=device)
            scale, low = torch.empty(2, out_features, in_features // GROUP, dtype=torch.float16, device=device)
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
        if gpu.serves(x):
            from llama.model.kernels import products  # needs Triton

            if self.format is INT8:
                return products.int8_product(x, self.weight, self.scale, dtype)
            return products.int4_product(x, self.weight, self.scale, self.low, dtype)
        if self.format is INT8:
            x_q, x_scale = quantise_int8(x)
            return (exact_product(x_q, self.weight) * x_scale[:, None] * self.scale).to(dtype)
        x_q, x_scale = quantise_int8(x.unflatten(1, (-1, GROUP)))
        return F.linear((x_q * x_scale[..., None]).flatten(1), self.unpack(slice(None))).to(dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, as an embedding looks them up: ids [tokens] -> [tokens, in_features]."""
        return self.unpack(ids).to(self.dtype)

    def unpack(self, rows: Tensor | slice) -> Tensor:
        """The weights that some rows stand for: [rows, in_features], float32."""
        if self.format is INT8:
            return self.weight[rows].float() * self.scale[rows][:, None]
        pairs = self.weight[rows]
        q = torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1).unflatten(1, (-1, GROUP))
        return (q.float() * self.scale[rows].float()[..., None] + self.low[rows].float()[..., None]).flatten(1)

    def store(self, first_row: int, weight: Tensor) -> None:
        """Set rows from `first_row` on, from floats."""
        self._set(first_row, *(quantise_int8 if self.format is INT8 else quantise_int4)(weight))

    def store_blocks(self, first_row: int, blocks: Tensor) -> None:
        """Set rows from blocks as a quantised checkpoint holds them; int8's scale lies beside them there."""
        self._set(first_row, *self.format.parts(blocks))

    def store_scale(self, first_row: int, scale: Tensor) -> None:
        """Set int8's scales from `first_row` on."""
        self.scale[first_row:first_row + len(scale)].copy_(scale)

    def _set(self, first_row: int, q: Tensor, scale: Tensor | None = None, low: Tensor | None = None) -> None:
        rows = slice(first_row, first_row + len(q))
        self.weight[rows] = q if self.format is INT8 else q[:, ::2] | q[:, 1::2] << 4
        if scale is not None:
            self.scale[rows] = scale
        if low is not None:
            self.low[rows] = low
