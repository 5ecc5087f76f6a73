"""y = x Wᵀ on a GPU, of W in floats, int8, fp8 and int4 (definitions: `llama.model.formats`, `llama.model.device_linear`).

W lies row by row. A program takes some rows of W and of x and goes through a part of the columns. With few rows of x, W is
what has to be read, once. One row is multiplied without matrix instructions; more are, with W as the left side, for that is
the one which must be 64 high. Where W has too few rows to keep all multiprocessors busy, its columns are cut into parts, which
a second kernel adds from the first to the last. Many rows of x are a library's work, except those of int4, which it lacks.

In deterministic mode tiles have one shape and parts one length, and are added in one order, whether by one program or by the
second kernel: a row's bits are those of x and W. int8 needs none of that: its sums are exact.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.model.formats import GROUP
from llama.model.kernels.gpu import FEW_ROWS

# Programs that keep an H200 busy: two for each of its 132 multiprocessors.
_ENOUGH_PROGRAMS = 264
# Columns of a part in deterministic mode: 28672 × 4096 gives 896 programs, 4096 × 4096 gives 128.
_PART = 1024


@dataclass(frozen=True)
class Tiles:
    """What a program takes: rows of x, rows of W, and columns at a time (of a "one" in words of 32 bits, if of integers).
    warps, stages: as Triton has them."""

    rows: int
    outs: int
    columns: int
    warps: int
    stages: int


# None was tuned on a GPU yet; tune in this order. "one": bytes of W under way. A thread asks for 64 bytes before it waits
# (8 KB a program), and about eight programs fit a multiprocessor: twice what covers the latency of 4.8 TB/s. "few": 64 rows of
# W are the least for wgmma, and four stages of 8 to 16 KB are the same bytes under way through shared memory. The others
# compute: the larger the tile the better, as far as sums fit registers (64 to 128 a thread).
TILES = {
    "float one": Tiles(1, 8, 512, 4, 1),
    "float few": Tiles(16, 64, 128, 4, 4),
    "float fixed": Tiles(64, 128, 64, 8, 4),
    "int8 one": Tiles(1, 8, 256, 4, 1),
    "int8 few": Tiles(16, 64, 256, 4, 4),
    "fp8 one": Tiles(1, 8, 1024, 4, 1),
    "fp8 few": Tiles(16, 64, 256, 4, 4),
    "fp8 fixed": Tiles(64, 128, 128, 8, 4),
    "int4 one": Tiles(1, 8, 256, 4, 1),
    "int4 few": Tiles(16, 128, 32, 4, 8),
    "int4 many": Tiles(64, 128, 32, 8, 6),
}


def float_product(x: Tensor, weight: Tensor, dtype: torch.dtype, fixed: bool = False) -> Tensor:
    """[rows, ins] and W [outs, ins], of one dtype -> [rows, outs] in `dtype`, summed in float32.

    fixed: one way of summing for any number of rows, so that a row's result is the same bits in any company.
    """
    return _launch("float", "fixed" if fixed else _few(x), x, None, weight, None, None, dtype)


def int8_product(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, ins] in float, W [outs, ins], int8, and scale [outs] -> [rows, outs] in `dtype`; sums are exact."""
    x, x_scale = quantise(x, torch.int8, x.shape[1])
    if len(x) > FEW_ROWS and x.is_cuda:
        return _finish(torch._int_mm(x, weight.t())[None], x_scale, scale, dtype)
    return _launch("int8", _few(x), x, x_scale, weight, scale, None, dtype)


def fp8_product(x: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype, fixed: bool = False) -> Tensor:
    """[rows, ins] in float, W [outs, ins], float8_e4m3fn, and scale [outs] -> [rows, outs] in `dtype`. fixed: see above."""
    x, x_scale = quantise(x, torch.float8_e4m3fn, x.shape[1])
    if len(x) <= FEW_ROWS and not fixed:
        return _launch("fp8", _few(x), x, x_scale, weight, scale, None, dtype)
    if x.is_cuda and dtype == torch.bfloat16 and not fixed:
        # The tensor core's own sums have some 14 bits, a thousandth of what rounding x and W to 4 bits has cost; to add them up
        # in float32 besides would take a fifth of the speed.
        return torch._scaled_mm(x, weight.t(), scale_a=x_scale, scale_b=scale[None], out_dtype=dtype, use_fast_accum=True)
    return _launch("fp8", "fixed", x, x_scale, weight, scale, None, dtype)


def int4_product(x: Tensor, weight: Tensor, scale: Tensor, low: Tensor, dtype: torch.dtype, fixed: bool = False) -> Tensor:
    """[rows, ins] in float, W [outs, ins / 2], uint8, scale and low [outs, ins / 32] -> [rows, outs] in `dtype`."""
    x, x_scale = quantise(x, torch.int8, GROUP)
    tiles = "many" if fixed or len(x) > FEW_ROWS else _few(x)
    return _launch("int4", tiles, x, x_scale, weight, scale, low, dtype)


def quantise(x: Tensor, dtype: torch.dtype, group: int) -> tuple[Tensor, Tensor]:
    """`formats.quantise_int8` or `quantise_fp8` of each `group` columns: [rows, ins] in dtype, and [rows, ins / group],
    float32."""
    x = x.contiguous()
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(len(x), x.shape[1] // group, dtype=torch.float32, device=x.device)
    if len(x):
        groups = 32 if group == GROUP else 1  # of a program
        largest = 127.0 if dtype == torch.int8 else 448.0
        _quantise[(triton.cdiv(scale.numel(), groups),)](
            x, q, scale, scale.numel(), group, GROUPS=groups, BLOCK=triton.next_power_of_2(group), LARGEST=largest,
            num_warps=4 if group <= 4096 else 8,
            enable_fp_fusion=False)  # one rounding for product and sum would not be the definition's two
    return q, scale


def _few(x: Tensor) -> str:
    return "one" if len(x) == 1 else "few"


def _part(outs: int, ins: int, tiles: Tiles) -> int:
    """Columns of a part, whole tiles: of W's shape alone, for the number of rows must not change how a graph's step sums."""
    parts = 1
    while triton.cdiv(outs, tiles.outs) * parts < _ENOUGH_PROGRAMS and ins >= 4 * parts * tiles.columns:
        parts *= 2
    return triton.cdiv(triton.cdiv(ins, parts), tiles.columns) * tiles.columns


def _launch(kind: str, how: str, x: Tensor, x_scale: Tensor | None, weight: Tensor, scale: Tensor | None, low: Tensor | None,
            dtype: torch.dtype) -> Tensor:
    tiles = TILES[f"{kind} {how}"]
    x = x.contiguous()
    rows, outs, is_int4 = len(x), len(weight), kind == "int4"
    y = torch.empty(rows, outs, dtype=dtype, device=x.device)
    if not rows:
        return y
    if how == "one" and kind in ("int8", "int4"):
        x, weight = x.view(torch.int32), weight.view(torch.int32)
    ins = x.shape[1]
    part = _PART if how in ("fixed", "many") else _part(outs, ins, tiles)
    splits = triton.cdiv(ins, part)
    if how in ("fixed", "many") and rows > FEW_ROWS:
        splits = 1  # a program takes all parts
    sums = y if splits == 1 else torch.empty(splits, rows, outs, device=x.device,
                                             dtype=torch.int32 if kind == "int8" else torch.float32)
    scales = (x_scale, scale, low) if is_int4 else (x_scale, scale) if splits == 1 else (None, None)
    kernel = _int4_products if is_int4 else _products
    kernel[triton.cdiv(outs, tiles.outs), triton.cdiv(rows, tiles.rows), splits](
        x, weight, *scales, sums, rows, outs, ins, part, ROWS=tiles.rows, OUTS=tiles.outs, COLUMNS=tiles.columns,
        DP4A=x.is_cuda, num_warps=tiles.warps, num_stages=tiles.stages)
    if splits == 1:
        return y
    return _finish(sums, None if is_int4 else x_scale, None if is_int4 else scale, dtype)


def _finish(parts: Tensor, x_scale: Tensor | None, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Parts [parts, rows, outs] added in order, times both scales if there are any: [rows, outs] in `dtype`."""
    count, rows, outs = parts.shape
    y = torch.empty(rows, outs, dtype=dtype, device=parts.device)
    _add[(rows, triton.cdiv(outs, 1024))](parts, x_scale, scale, y, rows, outs, COUNT=count, BLOCK=1024)
    return y


@triton.jit(do_not_specialize=("rows",))
def _products(x, w, x_scale, scale, out, rows, outs, ins, part, ROWS: tl.constexpr, OUTS: tl.constexpr,
              COLUMNS: tl.constexpr, DP4A: tl.constexpr):
    """OUTS × ROWS sums over a part of the columns, or over all parts where this is the only program for them. Exact of
    int8, which comes as words of four where there is one row."""
    line = tl.program_id(0).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    sum_type: tl.constexpr = tl.int32 if w.dtype.element_ty.is_int() else tl.float32
    total = tl.zeros((OUTS, ROWS), dtype=sum_type)
    for begin in range(tl.program_id(2) * part, ins, tl.num_programs(2) * part):
        end = tl.minimum(begin + part, ins)
        held = tl.zeros((OUTS, COLUMNS if ROWS == 1 else ROWS), dtype=sum_type)
        for start in range(begin, end, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            some_w = tl.load(w + line[:, None] * ins + column, mask=(line < outs)[:, None] & (column < end), other=0.0)
            if ROWS == 1:
                some_x = tl.load(x + column, mask=column < end, other=0.0)[None, :]
                if some_w.dtype == tl.int32:
                    held = _dot4(some_w, some_x, held, DP4A)
                else:
                    held += some_w.to(tl.float32) * some_x.to(tl.float32)
            else:
                at = row[None, :].to(tl.int64) * ins + column[:, None]
                some_x = tl.load(x + at, mask=(row < rows)[None, :] & (column < end)[:, None], other=0.0)
                if some_w.dtype == tl.float8e4nv:  # no more of the tensor core's short sums than a tile's
                    held += tl.dot(some_w, some_x, out_dtype=sum_type)
                else:
                    held = tl.dot(some_w, some_x, held, out_dtype=sum_type, input_precision="ieee")
        total += tl.sum(held, axis=1)[:, None] if ROWS == 1 else held
    if scale is not None:
        scales = tl.load(scale + line, mask=line < outs, other=0.0)[:, None]
        total = total.to(tl.float32) * tl.load(x_scale + row, mask=row < rows, other=0.0)[None, :] * scales
    _store(total, out, line, row, rows, outs)


@triton.jit(do_not_specialize=("rows",))
def _int4_products(x, w, x_scale, scale, low, out, rows, outs, ins, part, ROWS: tl.constexpr, OUTS: tl.constexpr,
                   COLUMNS: tl.constexpr, DP4A: tl.constexpr):
    """The same of int4, group by group: x_scale · (scale · Σ x q + low · Σ x), each Σ in integers. Of one row, x and w come
    as words, COLUMNS, ins and part count words of x."""
    line = tl.program_id(0).to(tl.int64) * OUTS + tl.arange(0, OUTS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    there = line < outs
    groups = ins // (8 if ROWS == 1 else 32)
    total = tl.zeros((OUTS, ROWS), dtype=tl.float32)
    for begin in range(tl.program_id(2) * part, ins, tl.num_programs(2) * part):
        end = tl.minimum(begin + part, ins)
        held = tl.zeros((OUTS, COLUMNS // 8 if ROWS == 1 else ROWS), dtype=tl.float32)
        for start in range(begin, end, COLUMNS):
            if ROWS == 1:
                group = start // 8 + tl.arange(0, COLUMNS // 8)
                inside = group < end // 8
                word = group[:, None] * 4 + tl.arange(0, 4)[None, :]  # 16 bytes of W are a group
                some_w = tl.load(w + line[:, None, None] * (groups * 4) + word, mask=there[:, None, None] & inside[:, None],
                                 other=0)  # [OUTS, groups, 4]
                at = word + group[:, None] * 4
                first = tl.load(x + at, mask=inside[:, None], other=0)
                second = tl.load(x + at + 4, mask=inside[:, None], other=0)
                none = tl.zeros_like(some_w)
                dots = _dot4(some_w & 0x0F0F0F0F, first[None], none, DP4A)
                dots = tl.sum(_dot4((some_w >> 4) & 0x0F0F0F0F, second[None], dots, DP4A), axis=2)  # [OUTS, groups]
                ones = tl.full(first.shape, 0x01010101, tl.int32)
                x_sums = tl.sum(_dot4(second, ones, _dot4(first, ones, tl.zeros_like(first), DP4A), DP4A), axis=1)[None, :]
                at = line[:, None] * groups + group
                is_there = there[:, None] & inside
                x_scales = tl.load(x_scale + group, mask=inside, other=0)[None, :]
            else:
                byte, column, group = tl.arange(0, 16), start + tl.arange(0, 32), start // 32
                pairs = tl.load(w + (line[:, None] * groups + group) * 16 + byte, mask=there[:, None], other=0)  # [OUTS, 16]
                halves = tl.join((pairs & 15).to(tl.int8), (pairs >> 4).to(tl.int8))  # [OUTS, 16, 2]
                some_w = tl.reshape(tl.permute(halves, (0, 2, 1)), (OUTS, 32))
                some_x = tl.load(x + row[None, :].to(tl.int64) * ins + column[:, None], mask=(row < rows)[None, :], other=0)
                dots = tl.dot(some_w, some_x, out_dtype=tl.int32)  # [OUTS, ROWS]
                x_sums = tl.sum(some_x.to(tl.int32), axis=0)[None, :]
                at, is_there = line[:, None] * groups + group, there[:, None]
                x_scales = tl.load(x_scale + row * groups + group, mask=row < rows, other=0)[None, :]
            scales = tl.load(scale + at, mask=is_there, other=0).to(tl.float32)
            lows = tl.load(low + at, mask=is_there, other=0).to(tl.float32)
            # Rounded alike in every variant of this kernel, which a compiler that fuses as it likes does not promise.
            sums = tl.fma(scales, dots.to(tl.float32), lows * x_sums.to(tl.float32))
            held = tl.fma(sums, tl.broadcast_to(x_scales, sums.shape), held)
        total += tl.sum(held, axis=1)[:, None] if ROWS == 1 else held
    _store(total, out, line, row, rows, outs)


@triton.jit
def _dot4(a, b, c, DP4A: tl.constexpr):
    """c and the four products of words of int8: one instruction, or spelt out for the interpreter."""
    a, b = tl.broadcast(a, b)
    if DP4A:
        return tl.inline_asm_elementwise("dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, c], dtype=tl.int32, is_pure=True,
                                         pack=1)
    for shift in tl.static_range(0, 32, 8):
        c += ((a << 24 - shift) >> 24) * ((b << 24 - shift) >> 24)
    return c


@triton.jit
def _store(total, out, line, row, rows, outs):
    """[OUTS, ROWS] to [rows, outs], of this program's part."""
    at = (tl.program_id(2).to(tl.int64) * rows + row)[None, :] * outs + line[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=(row < rows)[None, :] & (line < outs)[:, None])


@triton.jit(do_not_specialize=("rows",))
def _add(parts, x_scale, scale, y, rows, outs, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """One row's parts, from the first to the last."""
    row = tl.program_id(0).to(tl.int64)
    line = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), dtype=parts.dtype.element_ty)
    for part in tl.static_range(COUNT):
        total += tl.load(parts + (part * rows + row) * outs + line, mask=line < outs, other=0)
    if scale is not None:
        total = total.to(tl.float32) * tl.load(x_scale + row) * tl.load(scale + line, mask=line < outs, other=0)
    tl.store(y + row * outs + line, total.to(y.dtype.element_ty), mask=line < outs)


@triton.jit(do_not_specialize=("num_groups",))
def _quantise(x, q, scale, num_groups, size, GROUPS: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr):
    """Each group by its largest: rounded to even, as PyTorch rounds."""
    group = tl.program_id(0) * GROUPS + tl.arange(0, GROUPS)
    column = tl.arange(0, BLOCK)
    is_there = (group < num_groups)[:, None] & (column < size)[None, :]
    at = group[:, None].to(tl.int64) * size + column[None, :]
    values = tl.load(x + at, mask=is_there, other=0).to(tl.float32)
    largest = tl.max(tl.abs(values), axis=1)
    ends = tl.full(largest.shape, LARGEST, tl.float32)
    factor = tl.where(largest > 0, tl.div_rn(ends, tl.where(largest > 0, largest, 1.0)), 0.0)
    scaled = values * factor[:, None]
    if q.dtype.element_ty == tl.int8:  # adding 1.5 · 2**23 leaves no room for a fraction
        scaled = (scaled + 12582912.0) - 12582912.0
    tl.store(q + at, scaled.to(q.dtype.element_ty), mask=is_there)
    tl.store(scale + group, tl.div_rn(largest, ends), mask=group < num_groups)
