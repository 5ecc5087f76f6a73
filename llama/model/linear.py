"""y = x Wᵀ: the one operation in which nearly all weights and nearly all time are spent.

`Linear` keeps W as it is, in float32, bfloat16 or float16, and may be differentiated. `PackedLinear` keeps it in one of
`llama.model.formats` on the CPU, `DeviceLinear` (`llama.model.device_linear`) on a GPU. All have the same interface;
the model does not know which it has.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.model.device_linear import DeviceLinear
from llama.model.formats import BLOCK_ROWS, DEVICE_FORMATS, FORMATS, Format, fits
from llama.model.kernels import gpu, native
from llama.model.memory import huge_pages

# Rows of every product in deterministic mode: as many as a decode can bear.
TILE_ROWS = 32
# Rows of W that the definition unpacks at a time, where there are no kernels: few enough for the processor's cache.
_PIECE_ROWS = 1024


class Linear(nn.Module):
    """A matrix [out_features, in_features] in float32, bfloat16 or float16, without bias.

    Created uninitialised: the loader, or a training tool, fills `weight`. Several matrices that read the same
    input lie in one, their rows one below the other (q over k over v, gate over up).

    deterministic: multiply TILE_ROWS rows at a time, whatever there are. A library chooses its way of summing by
    the shape of the product; with one shape there is one way, so that a row's result is the same bits in any
    company.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.deterministic = False

    @property
    def num_bytes(self) -> int:
        """What W takes."""
        return self.weight.nbytes

    def forward(self, x: Tensor, wide: bool = False) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features], in the dtype of the weight, or in float32 if `wide`."""
        if gpu.serves(x) and (self.deterministic or len(x) <= gpu.FEW_ROWS):
            from llama.model.kernels import products  # needs Triton

            return products.float_product(x, self.weight, torch.float32 if wide else x.dtype, fixed=self.deterministic)
        y = self._by_tiles(x) if self.deterministic else F.linear(x, self.weight)
        return y.float() if wide else y

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, as an embedding looks them up: ids [tokens] -> [tokens, in_features]."""
        return F.embedding(ids, self.weight)

    def store(self, first_row: int, weight: Tensor) -> None:
        """Set rows from `first_row` on."""
        self.weight.data[first_row:first_row + len(weight)].copy_(weight)

    def _by_tiles(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, -len(x) % TILE_ROWS))
        return torch.cat([F.linear(tile, self.weight) for tile in padded.split(TILE_ROWS)])[:len(x)]


class PackedLinear(nn.Module):
    """A matrix [out_features, in_features] in a format of `llama.model.formats`, on the CPU.

    dtype: of x and y, bfloat16 or float32. A row of y is the same bits whatever other rows come with it. Where gradients
    of x are wanted, the product is that with the unpacked weights: x is not rounded, for rounding has no slope.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, fmt: Format):
        super().__init__()
        self.shape = out_features, in_features
        self.format = fmt
        self.dtype = dtype
        blocks = torch.empty(out_features // BLOCK_ROWS, fmt.block_bytes(in_features), dtype=torch.uint8)
        self.register_buffer("blocks", huge_pages(blocks))
        self.register_buffer("scale", torch.empty(out_features) if fmt.has_scale else None)

    @property
    def num_bytes(self) -> int:
        """What W takes."""
        return self.blocks.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def forward(self, x: Tensor, wide: bool = False) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features], in x's dtype, or in float32 if `wide`."""
        if x.requires_grad and torch.is_grad_enabled():
            y = F.linear(x, self.format.unpack(self.blocks, self.scale).to(x.dtype))
            return y.float() if wide else y
        if native.library() is not None:
            return native.product(x, self.blocks, self.scale, self.format, wide=wide)
        step = _PIECE_ROWS // BLOCK_ROWS
        pieces = (self.format.multiply(x, self.blocks[first:first + step], self._scales(first, step))
                  for first in range(0, len(self.blocks), step))
        y = torch.cat(list(pieces), dim=1)
        return y if wide else y.to(x.dtype)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, as an embedding looks them up: ids [tokens] -> [tokens, in_features]."""
        scale = None if self.scale is None else self.scale.view(-1, BLOCK_ROWS)[ids // BLOCK_ROWS].flatten()
        weight = self.format.unpack(self.blocks[ids // BLOCK_ROWS], scale)  # [16 tokens, in_features]
        return weight.view(len(ids), BLOCK_ROWS, -1)[torch.arange(len(ids)), ids % BLOCK_ROWS].to(self.dtype)

    def store(self, first_row: int, weight: Tensor) -> None:
        """Set rows from `first_row` on: whole blocks, in any float dtype."""
        num_rows, first = len(weight), first_row // BLOCK_ROWS
        blocks = self.blocks[first:first + num_rows // BLOCK_ROWS]
        scale = None if self.scale is None else self.scale[first_row:first_row + num_rows]
        if native.library() is not None:
            native.pack(weight, self.format, blocks, scale)
            return
        packed, row_scale = self.format.pack(weight)
        blocks.copy_(packed)
        if scale is not None:
            scale.copy_(row_scale)

    def _scales(self, first: int, count: int) -> Tensor | None:
        return None if self.scale is None else self.scale[first * BLOCK_ROWS:(first + count) * BLOCK_ROWS]


def make_linear(in_features: int, *out_features: int, dtype: torch.dtype, device: torch.device | str,
                fmt: str | None = None) -> Linear | PackedLinear | DeviceLinear:
    """A matrix in the format of that name; None, or a shape that cannot lie in blocks: as it is, in `dtype`.

    out_features: rows of each of the matrices that lie in it. They are stored one by one, so that each has to be whole
    blocks.
    """
    if fmt is None or not all(fits(rows, in_features) for rows in out_features):
        return Linear(in_features, sum(out_features), dtype, device)
    if in_blocks(device):
        return PackedLinear(in_features, sum(out_features), dtype, FORMATS[fmt])
    return DeviceLinear(in_features, sum(out_features), dtype, device, DEVICE_FORMATS[fmt])


def in_blocks(device: torch.device | str) -> bool:
    """Whether packed matrices lie in blocks there: on a CPU. Elsewhere they lie row by row."""
    return torch.device(device).type == "cpu"
