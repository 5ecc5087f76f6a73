"""Weight formats: what a matrix is rounded to, how that lies in memory, and what a product with it is, in plain PyTorch.

    bf16    the weights themselves
    int8    w = scale · q: 8 bits, one scale for each row of W; x is rounded to int8 with one scale for each token
    int4    w = scale · q + low: 4 bits, scale and low (float16) for each 32 columns of a row; x is rounded to int8 with
            one scale for each token and 32 columns
    fp8     w = scale · q: float8_e4m3fn, one scale for each row of W; x likewise, one for each token; on a GPU only

Products of integers are summed as integers, so that they are exact; everything else is float32. This is the definition:
`llama/model/kernels/linear.c` computes the same numbers, where the machine allows it.

On the CPU the first three lie in blocks of 16 rows, in which what is multiplied together lies together: a vector of 64
bytes is 16 rows × 4 bytes of columns. A block of W is the same bytes in memory and in a quantised checkpoint. On a GPU they
lie row by row (`llama.model.device_linear`), and `llama/model/kernels/products.py` computes the same numbers.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ROWS = 16
GROUP = 32  # columns of int4 that share scale and low
# What W must be to lie in blocks: the kernels take two blocks at a time, and 64 bytes of a row.
ROW_MULTIPLE, COLUMN_MULTIPLE = 2 * BLOCK_ROWS, 64
# Sums of so many products of int8 stay below 2**24, up to which float32 holds every integer.
_EXACT_COLUMNS = 1024
# The range of a group of int4 is narrowed to that of these shares which has the least square error.
_SHRINKS = (1.0, 0.95, 0.9, 0.85, 0.8)


@dataclass(frozen=True)
class Format:
    """One format. name: as flags and checkpoints say it. code: as linear.c says it, if it does. has_scale: whether there
    is a float32 for each row beside the blocks."""

    name: str
    code: int
    has_scale: bool

    def block_bytes(self, in_features: int) -> int:
        """Bytes of 16 rows of W."""
        if self is INT4:
            return in_features // GROUP * (BLOCK_ROWS * GROUP // 2 + 2 * 2 * BLOCK_ROWS)
        return BLOCK_ROWS * in_features * (2 if self is BF16 else 1)

    def pack(self, weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """Rows of W, [16 n, in_features] in any float dtype, as blocks [n, block_bytes], uint8, and scales [16 n],
        float32, if there are any."""
        if self is BF16:
            return _interleave(weight.bfloat16().contiguous().view(torch.uint8)), None
        if self is INT8:
            q, scale = quantise_int8(weight)
            return _interleave((q.view(torch.uint8) ^ 128)), scale  # q + 128: the processor multiplies unsigned by signed
        q, scale, low = quantise_int4(weight)
        groups = q.shape[1] // GROUP
        quads = q.view(-1, BLOCK_ROWS, groups, 2, 4, 4)  # [blocks, 16, groups, half, quad, column]
        nibbles = (quads[:, :, :, 0] | quads[:, :, :, 1] << 4).permute(0, 2, 3, 1, 4).flatten(2)  # [blocks, groups, 256]
        ends = [part.view(-1, BLOCK_ROWS, groups).transpose(1, 2).contiguous().view(torch.uint8) for part in (scale, low)]
        return torch.cat([nibbles, *ends], dim=2).flatten(1), None

    def unpack(self, blocks: Tensor, scale: Tensor | None) -> Tensor:
        """The weights that blocks [n, block_bytes] stand for: [16 n, in_features], float32."""
        if self is BF16:
            return _deinterleave(blocks).view(torch.bfloat16).float()
        if self is INT8:
            return (_deinterleave(blocks) ^ 128).view(torch.int8).float() * scale[:, None]
        q, scale, low = _split_int4(blocks)
        return (q.float() * scale + low).flatten(1)

    def parts(self, blocks: Tensor) -> tuple[Tensor, ...]:
        """What blocks of integers hold, row by row: q [16 n, in_features]; of int4 also scale and low, as `quantise_int4`."""
        if self is INT8:
            return ((_deinterleave(blocks) ^ 128).view(torch.int8),)
        q, scale, low = _split_int4(blocks)
        return q.flatten(1), scale[..., 0].half(), low[..., 0].half()

    def multiply(self, x: Tensor, blocks: Tensor, scale: Tensor | None) -> Tensor:
        """x Wᵀ: [tokens, in_features] -> [tokens, 16 n], float32."""
        if self is BF16:
            return F.linear(x.bfloat16().float(), self.unpack(blocks, None))
        if self is INT8:
            x_q, x_scale = quantise_int8(x)
            w_q = (_deinterleave(blocks) ^ 128).view(torch.int8)
            return exact_product(x_q, w_q) * x_scale[:, None] * scale
        x_q, x_scale = quantise_int8(x.unflatten(1, (-1, GROUP)))  # [tokens, groups, 32], [tokens, groups]
        return F.linear((x_q * x_scale[..., None]).flatten(1), self.unpack(blocks, None))


BF16 = Format("bf16", 0, False)
INT8 = Format("int8", 1, True)
INT4 = Format("int4", 2, False)
FORMATS = {each.name: each for each in (BF16, INT8, INT4)}  # that lie in blocks: on the CPU, and in checkpoints
FP8 = Format("fp8", 3, True)
DEVICE_FORMATS = {each.name: each for each in (INT8, FP8, INT4)}  # that lie row by row, on a GPU
QUANTISED = tuple(DEVICE_FORMATS)


def fits(out_features: int, in_features: int) -> bool:
    """Whether a matrix of this shape can lie in blocks."""
    return out_features % ROW_MULTIPLE == 0 and in_features % COLUMN_MULTIPLE == 0


def quantise_int8(values: Tensor) -> tuple[Tensor, Tensor]:
    """The last axis as int8 times one scale, so that its largest element is 127 or -127: values' shape, int8, and the
    same without the last axis, float32."""
    values = values.float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    factor = torch.where(largest > 0, torch.full_like(largest, 127) / largest, 0.0)  # 127 / x would round twice
    return (values * factor).round().to(torch.int8), (largest / 127).squeeze(-1)


def quantise_fp8(values: Tensor) -> tuple[Tensor, Tensor]:
    """The last axis as float8_e4m3fn times one scale, so that its largest element is 448 or -448, the format's largest."""
    values = values.float()
    largest = values.abs().amax(dim=-1, keepdim=True)
    factor = torch.where(largest > 0, torch.full_like(largest, 448) / largest, 0.0)
    return (values * factor).to(torch.float8_e4m3fn), (largest / 448).squeeze(-1)


def quantise_int4(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [rows, columns], uint8 from 0 to 15, and scale and low, each [rows, groups], float16: w ≈ scale · q + low.

    Each group's range is as wide as it is, or a little narrower where that has the smaller square error.
    """
    groups = weight.float().unflatten(1, (-1, GROUP))  # [rows, groups, 32]
    least, most = groups.amin(dim=-1, keepdim=True), groups.amax(dim=-1, keepdim=True)
    best_error = torch.full_like(least, torch.inf)
    best = [torch.empty_like(groups), torch.empty_like(least), torch.empty_like(least)]
    for share in _SHRINKS:
        low = (least + (1 - share) / 2 * (most - least)).half().float()
        scale = ((most - least) * share / 15).half().float()
        q = torch.where(scale > 0, (groups - low) / scale, 0.0).round_().clamp_(0, 15)
        error = torch.addcmul(low - groups, q, scale).square_().sum(dim=-1, keepdim=True)
        better = error < best_error
        best = [torch.where(better, new, old) for new, old in zip((q, scale, low), best)]
        best_error = torch.minimum(error, best_error)
    q, scale, low = best
    return q.to(torch.uint8).flatten(1), scale[..., 0].half(), low[..., 0].half()


def exact_product(x: Tensor, w: Tensor) -> Tensor:
    """x wᵀ of integers, [m, k] and [n, k] of int8, as float32 [m, n]: rounded once, at the end."""
    pieces = (F.linear(some_x.float(), some_w.float()).double()
              for some_x, some_w in zip(x.split(_EXACT_COLUMNS, dim=1), w.split(_EXACT_COLUMNS, dim=1)))
    return sum(pieces).float()


def _interleave(rows: Tensor) -> Tensor:
    """[16 n, bytes] -> [n, 16 bytes]: four bytes of each row of a block, then the next four of each."""
    return rows.unflatten(0, (-1, BLOCK_ROWS)).unflatten(2, (-1, 4)).transpose(1, 2).flatten(1)


def _deinterleave(blocks: Tensor) -> Tensor:
    """The other way."""
    return blocks.unflatten(1, (-1, BLOCK_ROWS, 4)).transpose(1, 2).reshape(len(blocks) * BLOCK_ROWS, -1)


def _split_int4(blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q [rows, groups, 32], uint8, and scale and low [rows, groups, 1], float32."""
    parts = blocks.unflatten(1, (-1, GROUP * BLOCK_ROWS // 2 + 4 * BLOCK_ROWS))  # [n, groups, 320]
    nibbles = parts[..., :256].unflatten(2, (4, BLOCK_ROWS, 4))  # [n, groups, quad, 16, column]
    q = torch.stack([nibbles & 15, nibbles >> 4], dim=2)  # [n, groups, half, quad, 16, column]
    q = q.permute(0, 4, 1, 2, 3, 5).flatten(3).flatten(0, 1)  # [rows, groups, 32]
    ends = parts[..., 256:].contiguous().view(torch.float16).unflatten(2, (2, BLOCK_ROWS))  # [n, groups, 2, 16]
    scale, low = ends.permute(2, 0, 3, 1).flatten(1, 2).float()[..., None]  # each [rows, groups, 1]
    return q, scale, low
