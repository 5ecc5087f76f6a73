"""y = x Wᵀ on a GPU: of bfloat16, float16, float32 and int8 in one kernel, of int4 in another (definitions: `llama.model.formats`).

W lies row by row. A program takes BLOCK_OUTS rows of W and some rows of x and goes through a share of the columns: W is
what has to be read, and each of its bytes is read once. One row of x is multiplied without matrix instructions; more are,
with W as the left side, for that is the one which must be 64 high. Shares of the columns, where W has too few rows to keep
all multiprocessors busy, are added in order by a second kernel, so that timing decides nothing.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

GROUP = tl.constexpr(32)  # columns of int4 that share scale and low
# Programs that keep an H200 busy: two for each of its 132 multiprocessors.
_ENOUGH_PROGRAMS = 264


@dataclass(frozen=True)
class Tiles:
    """What a program takes: rows of x, rows of W, and columns at a time."""

    rows: int
    outs: int
    columns: int
    warps: int
    stages: int


# None was tuned on a GPU yet. In the order in which tuning pays: outs and columns of one row (bytes in flight), warps,
# stages of "fixed" (prefill in deterministic mode). A float row's 8 × 512 are 32 values a thread, as loads of 16 bytes.
TILES = {
    "float one": Tiles(1, 8, 512, 4, 1),
    "float few": Tiles(16, 64, 128, 4, 4),
    "float fixed": Tiles(64, 128, 64, 4, 4),
    "int8 one": Tiles(1, 8, 1024, 4, 1),
    "int8 few": Tiles(16, 64, 128, 4, 4),
    "int4 one": Tiles(1, 8, 1024, 4, 1),
    "int4 few": Tiles(16, 64, 32, 4, 4),
}


def float_product(x: Tensor, weight: Tensor, dtype: torch.dtype, fixed: bool = False) -> Tensor:
    """[rows, ins] and W [outs, ins], of one dtype -> [rows, outs] in `dtype`, summed in float32.

    fixed: one way of summing for any number of rows, so that a row's result is the same bits in any company.
    """
    tiles = TILES["float fixed" if fixed else _few("float", x)]
    return _launch(_dots, x, None, (weight, weight, weight), dtype, tiles)


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, ins] in float, W [outs, ins], int8, and scale [outs] -> [rows, outs] in `dtype`; sums are exact."""
    x, x_scale = quantise(x, x.shape[1])
    if len(x) > 16 and x.is_cuda:
        return _combine(torch._int_mm(x, weight.t())[None], x_scale, scale, dtype)
    return _launch(_dots, x, x_scale, (weight, scale, scale), dtype, TILES[_few("int8", x)])


def int4_product(x: Tensor, weight: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, ins] in float, W [outs, ins / 2], uint8, scale and low [outs, ins / 32] -> [rows, outs] in `dtype`."""
    x, x_scale = quantise(x, GROUP.value)
    return _launch(_int4_dots, x, x_scale, (weight, scale, low), dtype, TILES[_few("int4", x)])


def quantise(x: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """`formats.quantise_int8` of each `group` columns: [rows, ins], int8, and [rows, ins / group], float32."""
    x = x.contiguous()
    q = torch.empty_like(x, dtype=torch.int8)
    scale = torch.empty(len(x), x.shape[1] // group, dtype=torch.float32, device=x.device)
    if len(x):
        # Small groups: 32 in one program.
        block = triton.next_power_of_2(group)
        groups = 32 if block <= 64 else 1
        # Without fusion: one rounding for product and sum would not be the definition's two.
        _quantise[(triton.cdiv(scale.numel(), groups),)](x, q, scale, scale.numel(), group, groups, block,
                                                         enable_fp_fusion=False)
    return q, scale


def splits(outs: int, ins: int, tiles: Tiles) -> int:
    """Into how many shares the columns of W are cut. Of W's shape alone: the number of rows must not change the sum."""
    shares = 1
    while triton.cdiv(outs, tiles.outs) * shares < _ENOUGH_PROGRAMS and ins >= 4 * shares * tiles.columns:
        shares *= 2
    return shares


def _few(kind: str, x: Tensor) -> str:
    return f"{kind} one" if len(x) == 1 else f"{kind} few"


def _launch(kernel, x: Tensor, x_scale: Tensor | None, w: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype,
            tiles: Tiles) -> Tensor:
    x = x.contiguous()
    (rows, ins), outs = x.shape, len(w[0])
    shares = splits(outs, ins, tiles)
    columns = triton.cdiv(triton.cdiv(ins, shares), tiles.columns) * tiles.columns
    sums = torch.int32 if kernel is _dots and x.dtype == torch.int8 else torch.float32
    parts = torch.empty(shares, rows, outs, dtype=sums, device=x.device)
    if rows:
        grid = triton.cdiv(rows, tiles.rows), triton.cdiv(outs, tiles.outs), shares
        kernel[grid](x, x if x_scale is None else x_scale, *w, parts, rows, outs, ins, columns, tiles.rows, tiles.outs,
                     tiles.columns, num_warps=tiles.warps, num_stages=tiles.stages)
    by_row = sums == torch.int32
    return _combine(parts, x_scale if by_row else None, w[1] if by_row else None, dtype)


def _combine(parts: Tensor, x_scale: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Shares [shares, rows, outs] added in order, and scaled where they are integers: [rows, outs] in `dtype`."""
    shares, rows, outs = parts.shape
    if scale is None and shares == 1 and dtype == parts.dtype:
        return parts[0]
    y = torch.empty(rows, outs, dtype=dtype, device=parts.device)
    if rows:
        scaled = scale is not None
        _add_shares[(rows, triton.cdiv(outs, 1024))](parts, x_scale if scaled else parts, scale if scaled else parts, y,
                                                    rows, outs, shares, scaled, 1024)
    return y


@triton.jit(do_not_specialize=["rows"])
def _dots(x, x_scale, w, scale, low, parts, rows, outs, ins, share, ROWS: tl.constexpr, OUTS: tl.constexpr,
          COLUMNS: tl.constexpr):
    """One share of ROWS × OUTS sums: in int32 of int8, in float32 of floats. x_scale, scale and low are not used."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    first = tl.program_id(2) * share
    sums = parts.dtype.element_ty
    w_rows = w + out[:, None].to(tl.int64) * ins
    if ROWS == 1:
        held = tl.zeros((OUTS, COLUMNS), dtype=sums)
    else:
        held = tl.zeros((OUTS, ROWS), dtype=sums)
        x_rows = x + row[None, :].to(tl.int64) * ins
    for start in range(first, min(first + share, ins), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        some_w = tl.load(w_rows + column[None, :], mask=(out < outs)[:, None] & (column < ins)[None, :], other=0)
        if ROWS == 1:
            some_x = tl.load(x + column, mask=column < ins, other=0)
            held += some_w.to(sums) * some_x.to(sums)[None, :]
        else:
            some_x = tl.load(x_rows + column[:, None], mask=(row < rows)[None, :] & (column < ins)[:, None], other=0)
            held = tl.dot(some_w, some_x, held, out_dtype=sums, input_precision="ieee")
    _store_share(held, parts, row, out, rows, outs, ROWS)


@triton.jit(do_not_specialize=["rows"])
def _int4_dots(x, x_scale, w, scale, low, parts, rows, outs, ins, share, ROWS: tl.constexpr, OUTS: tl.constexpr,
               COLUMNS: tl.constexpr):
    """One share of ROWS × OUTS sums of int4, group by group: x_scale · (scale · Σ x q + low · Σ x), the Σ in integers."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    out = tl.program_id(1) * OUTS + tl.arange(0, OUTS)
    first = tl.program_id(2) * share
    groups = ins // 32
    is_out = out < outs
    if ROWS == 1:
        held = tl.zeros((OUTS, COLUMNS // 32), dtype=tl.float32)
    else:
        held = tl.zeros((OUTS, ROWS), dtype=tl.float32)
    for start in range(first, min(first + share, ins), COLUMNS):
        byte = start // 2 + tl.arange(0, COLUMNS // 2)
        pairs = tl.load(w + out[:, None].to(tl.int64) * (ins // 2) + byte[None, :],
                        mask=is_out[:, None] & (byte < ins // 2)[None, :], other=0)
        even, odd = (pairs & 15).to(tl.int8), (pairs >> 4).to(tl.int8)
        if ROWS == 1:
            column = start + tl.arange(0, COLUMNS)
            some_x = tl.load(x + column, mask=column < ins, other=0).to(tl.int32)
            x_even, x_odd = tl.split(tl.reshape(some_x, (COLUMNS // 2, 2)))
            products = even.to(tl.int32) * x_even[None, :] + odd.to(tl.int32) * x_odd[None, :]
            dots = tl.sum(tl.reshape(products, (OUTS, COLUMNS // 32, 16)), axis=2)
            x_sums = tl.sum(tl.reshape(some_x, (COLUMNS // 32, 32)), axis=1)
            group = start // 32 + tl.arange(0, COLUMNS // 32)
            at, is_there = out[:, None] * groups + group[None, :], is_out[:, None] & (group < groups)[None, :]
            x_scales = tl.load(x_scale + group, mask=group < groups, other=0)
            some_scale = tl.load(scale + at, mask=is_there, other=0).to(tl.float32)
            some_low = tl.load(low + at, mask=is_there, other=0).to(tl.float32)
            held += x_scales[None, :] * (some_scale * dots + some_low * x_sums[None, :])
        else:
            column, group = start + tl.arange(0, 32), start // 32
            some_w = tl.reshape(tl.join(even, odd), (OUTS, 32))
            some_x = tl.load(x + row[None, :].to(tl.int64) * ins + column[:, None], mask=(row < rows)[None, :], other=0)
            dots = tl.dot(some_w, some_x, out_dtype=tl.int32)
            x_sums = tl.sum(some_x.to(tl.int32), axis=0)
            x_scales = tl.load(x_scale + row * groups + group, mask=row < rows, other=0)
            some_scale = tl.load(scale + out * groups + group, mask=is_out, other=0).to(tl.float32)
            some_low = tl.load(low + out * groups + group, mask=is_out, other=0).to(tl.float32)
            held += x_scales[None, :] * (some_scale[:, None] * dots + some_low[:, None] * x_sums[None, :])
    _store_share(held, parts, row, out, rows, outs, ROWS)


@triton.jit
def _store_share(held, parts, row, out, rows, outs, ROWS: tl.constexpr):
    place = parts + tl.program_id(2).to(tl.int64) * rows * outs
    if ROWS == 1:
        tl.store(place + out, tl.sum(held, axis=1), mask=out < outs)
    else:
        tl.store(place + row[None, :].to(tl.int64) * outs + out[:, None], held,
                 mask=(row < rows)[None, :] & (out < outs)[:, None])


@triton.jit(do_not_specialize=["rows"])
def _add_shares(parts, x_scale, scale, y, rows, outs, shares, SCALED: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    out = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=parts.dtype.element_ty)
    for share in range(0, shares):
        total += tl.load(parts + (share * rows + row) * outs + out, mask=out < outs, other=0)
    if SCALED:
        total = total.to(tl.float32) * tl.load(x_scale + row) * tl.load(scale + out, mask=out < outs, other=0)
    tl.store(y + row * outs + out, total.to(y.dtype.element_ty), mask=out < outs)


@triton.jit(do_not_specialize=["num_groups"])
def _quantise(x, q, scale, num_groups, size, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """Each group by its largest: rounded to even, as PyTorch rounds."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, BLOCK)
    is_there = (group < num_groups)[:, None] & (column < size)[None, :]
    at = group[:, None].to(tl.int64) * size + column[None, :]
    values = tl.load(x + at, mask=is_there, other=0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1)
    factor = tl.where(largest > 0, tl.div_rn(127.0 + tl.zeros_like(largest), tl.where(largest > 0, largest, 1.0)), 0.0)
    scaled = values * factor[:, None]
    # Adding 1.5 · 2**23 leaves no room for a fraction.
    rounded = (scaled + 12582912.0) - 12582912.0
    tl.store(q + at, rounded.to(tl.int8), mask=is_there)
    tl.store(scale + group, tl.div_rn(largest, 127.0 + tl.zeros_like(largest)), mask=group < num_groups)
