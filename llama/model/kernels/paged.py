"""Attention over the paged cache in Triton: `llama.model.attention.attend` of decodes and of chunks, by one kernel.

A program takes some queries of one sequence with the heads of one group, as the rows of a tile, so that each key and value
is read once for all of them, and walks over the positions that they see, tile by tile, with a running softmax
(arXiv:2205.14135). Positions are found through the block table, or through a list of slots, which is the table of blocks of
one position. Where there are fewer programs than the device has room for, the positions are split into parts with a program
each (flash-decoding), which `_join` puts together. How many parts there may be follows from the number of sequences, so that
a captured graph has one grid; how long they are follows from the length, which is read on the device.

In deterministic mode a part is PART positions, counted from 0, whoever computes it, and parts are joined from the first to
the last, whether here or in `_join`. A position that a row does not see adds exactly nothing to it. So a row's bits are
those of its query, its keys and its values.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.model.cache import KVCache
from llama.model.ragged import Chunks, PagedQueries

# Positions of a part in deterministic mode: long enough that to store and join it costs little beside reading it.
PART = 1024


@dataclass(frozen=True)
class _Tiles:
    """How a call is cut. rows: of a tile, queries × heads of a group, at least; positions: of a tile; warps, stages: as Triton
    has them. programs: up to so many, positions are split."""

    rows: int
    positions: int
    warps: int
    stages: int
    programs: int


# A decode waits for memory only. 16 rows are the least that a tensor core multiplies. Two programs fit an SM of a Hopper GPU,
# each with two tiles of keys and values (64 KB in bfloat16) under way, where 26 KB an SM would cover the latency; 132 SMs
# with four programs each end evenly enough.
_DECODES = _Tiles(rows=16, positions=64, warps=4, stages=4, programs=528)
# A chunk computes: two groups of four warps share a tile of keys and values through wgmma, 64 rows each. Of 8 bits a tile is
# shorter, for they are widened in registers, of which there would be too few.
_CHUNKS = _Tiles(rows=128, positions=64, warps=8, stages=3, programs=132)
_CHUNKS_OF_8_BITS = _Tiles(rows=128, positions=32, warps=8, stages=4, programs=132)
# One shape for decodes and chunks alike. 64 rows are the least for wgmma; fewer than a chunk could have, more than a decode
# needs, and while it waits for memory there is time for them. Eight warps, for there are two sums of values to hold.
_DETERMINISTIC = _Tiles(rows=64, positions=64, warps=8, stages=3, programs=132)


def attend(q: Tensor, out: Tensor, cache: KVCache, layer: int, asked: PagedQueries | Chunks, deterministic: bool) -> None:
    """`attend` of some tokens, each over its own context in the cache: q and out are [tokens, num_heads, head_dim], contiguous,
    of which the rows of `asked` are read and written. A query that sees nothing gets zeros."""
    _, num_heads, head_dim = q.shape
    kv_heads, sequences = cache.keys.shape[2], len(asked.rows)
    group = num_heads // kv_heads
    is_decode = isinstance(asked, PagedQueries)
    cut = _DETERMINISTIC if deterministic else _DECODES if is_decode else _CHUNKS_OF_8_BITS if cache.quantised else _CHUNKS
    rows = max(cut.rows, triton.next_power_of_2(group))
    queries = rows // group  # of a tile
    tiles = 1 if is_decode else triton.cdiv(asked.longest, queries)
    longest = asked.tables.shape[1] * asked.block_size if is_decode else asked.most
    splits = max(1, min(64, cut.programs // (sequences * tiles * kv_heads), triton.cdiv(longest, cut.positions)))
    most_parts = triton.cdiv(longest, PART) if deterministic else splits
    where = (asked.rows, asked.lengths, *((None, None) if is_decode else (asked.counts, asked.first)))
    # A compiler that fuses a product with a sum rounds once where another place rounds twice.
    exactly = {"enable_fp_fusion": not deterministic}
    shape = {"GROUP": group, "QUERIES": queries, "TILE": cut.positions, "PART": PART if deterministic else 0}
    parts = sums = None
    if splits > 1:
        rows_of_parts = (sequences * tiles * (1 if is_decode else queries), most_parts, num_heads)
        parts = torch.empty(*rows_of_parts, head_dim, dtype=torch.float32, device=q.device)
        sums = torch.empty(*rows_of_parts, 2, dtype=torch.float32, device=q.device)
    scales = (None, None) if cache.quantised is None else (cache.key_scales[layer], cache.value_scales[layer])
    tables, stride, block_size = (asked.tables, asked.tables.shape[1], asked.block_size) if is_decode else (asked.slots, 0, 1)
    _attend[sequences * splits, kv_heads, tiles](
        q, out, parts, sums, cache.keys[layer], cache.values[layer], *scales, *where, tables, stride, splits, most_parts,
        math.log2(math.e) / math.sqrt(head_dim), **shape, KV_HEADS=kv_heads, HEAD_DIM=head_dim, ROWS=rows,
        BLOCK_SIZE=block_size, num_warps=cut.warps, num_stages=cut.stages, **exactly)
    if splits > 1:
        _join[sequences, num_heads, 1 if is_decode else asked.longest](
            out, parts, sums, *where[:3], splits, most_parts, tiles, **shape, HEADS=num_heads, HEAD_DIM=head_dim, num_warps=1,
            **exactly)


# Where Triton would otherwise compile anew for a table that begins elsewhere, or a number that is 1 or a multiple of 16.
_UNALIGNED = ("rows", "lengths", "counts", "first", "table")
_VARYING = ("table_stride", "splits", "most_parts")


@triton.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=_UNALIGNED)
def _attend(q, out, parts, sums, keys, values, key_scales, value_scales, rows, lengths, counts, first, table,
            table_stride, splits, most_parts, scale, GROUP: tl.constexpr, QUERIES: tl.constexpr, TILE: tl.constexpr,
            PART: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    """One tile of a sequence's queries (the last tile first: it sees the most) and the heads of one group, over every
    splits-th part of the positions."""
    sequence, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    tile = tl.num_programs(2) - 1 - tl.program_id(2)
    kv_head = tl.program_id(1)
    length, count, last = _extent(lengths, counts, sequence, tile, QUERIES)
    if count <= 0:
        return
    table += sequence.to(tl.int64) * table_stride if first is None else tl.load(first + sequence)
    row = tl.arange(0, ROWS)
    query = row // GROUP
    asked = query < count
    seen = tl.where(asked, length + query, 0)  # positions that each row sees
    dims = tl.arange(0, HEAD_DIM)
    heads = kv_head * GROUP + row % GROUP
    at = (tl.load(rows + sequence) + tile * QUERIES + query).to(tl.int64) * (KV_HEADS * GROUP) + heads
    x = tl.load(q + at[:, None] * HEAD_DIM + dims, mask=asked[:, None], other=0.0)  # [ROWS, HEAD_DIM]

    top, total, acc = _nothing(ROWS, HEAD_DIM)
    span = _span(last, splits, TILE, PART)
    for part in range(split, tl.cdiv(last, span), splits):
        begin = part * span
        end = tl.minimum(begin + span, last)
        whole = tl.maximum(begin, tl.minimum(end, length // TILE * TILE))  # up to here, every row sees every position
        a, b, c = _nothing(ROWS, HEAD_DIM)
        a, b, c = _walk(a, b, c, x, keys, values, key_scales, value_scales, table, seen, begin, whole, scale, kv_head,
                        False, TILE, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
        a, b, c = _walk(a, b, c, x, keys, values, key_scales, value_scales, table, seen, whole, end, scale, kv_head,
                        True, TILE, KV_HEADS, HEAD_DIM, BLOCK_SIZE)
        if parts is not None:
            line = (sequence * tl.num_programs(2) + tile) * (1 if counts is None else QUERIES) + query
            place = (line.to(tl.int64) * most_parts + part) * (KV_HEADS * GROUP) + heads
            tl.store(sums + place * 2, a, mask=asked)
            tl.store(sums + place * 2 + 1, b, mask=asked)
            tl.store(parts + place[:, None] * HEAD_DIM + dims, c, mask=asked[:, None])
        elif PART:
            top, total, acc = _joined(top, total, acc, a, b, c)
        else:  # there is only this one
            top, total, acc = a, b, c
    if parts is None:
        y = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out + at[:, None] * HEAD_DIM + dims, y.to(out.dtype.element_ty), mask=asked[:, None])


@triton.jit(do_not_specialize=("splits", "most_parts", "tiles"), do_not_specialize_on_alignment=_UNALIGNED)
def _join(out, parts, sums, rows, lengths, counts, splits, most_parts, tiles, GROUP: tl.constexpr, QUERIES: tl.constexpr,
          TILE: tl.constexpr, PART: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """One head of one query: its parts, from the first to the last, as one softmax."""
    sequence, head, place = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    tile, query = place // QUERIES, place % QUERIES
    _, count, last = _extent(lengths, counts, sequence, tile, QUERIES)
    if query >= count:
        return
    dims = tl.arange(0, HEAD_DIM)
    line = (sequence * tiles + tile) * (1 if counts is None else QUERIES) + query
    at = line.to(tl.int64) * most_parts * HEADS + head
    one = tl.arange(0, 1)
    top, total, acc = _nothing(1, HEAD_DIM)
    for _ in tl.range(0, tl.cdiv(last, _span(last, splits, TILE, PART)), num_stages=4):
        a, b = tl.load(sums + at * 2 + one), tl.load(sums + at * 2 + 1 + one)
        c = tl.load(parts + at * HEAD_DIM + dims)[None, :]
        top, total, acc = _joined(top, total, acc, a, b, c)
        at += HEADS
    y = acc / tl.where(total > 0, total, 1.0)[:, None]
    token = (tl.load(rows + sequence) + place).to(tl.int64)
    tl.store(out + (token * HEADS + head) * HEAD_DIM + dims[None, :], y.to(out.dtype.element_ty))


@triton.jit
def _extent(lengths, counts, sequence, tile, QUERIES: tl.constexpr):
    """Positions that a tile's first query sees (each next one sees one more), its queries, and positions that its last sees."""
    length = tl.load(lengths + sequence) + tile * QUERIES
    count = 1 if counts is None else tl.minimum(tl.load(counts + sequence) - tile * QUERIES, QUERIES)
    return length, count, length + count - 1


@triton.jit
def _span(last, splits, TILE: tl.constexpr, PART: tl.constexpr):
    """Positions of a part: as many as make no more than `splits` parts of whole tiles, or always PART."""
    return PART if PART else tl.maximum(tl.cdiv(tl.cdiv(last, splits), TILE), 1) * TILE


@triton.jit
def _nothing(ROWS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """The softmax over no positions: the largest score, in powers of two, the sum relative to it, and the sum of values."""
    return (tl.full([ROWS], -float("inf"), tl.float32), tl.zeros([ROWS], tl.float32),
            tl.zeros([ROWS, HEAD_DIM], tl.float32))


@triton.jit
def _walk(top, total, acc, x, keys, values, key_scales, value_scales, table, seen, begin, end, scale, kv_head,
          MASKED: tl.constexpr, TILE: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
          BLOCK_SIZE: tl.constexpr):
    """The softmax of before and positions begin .. end - 1. Without MASKED these are whole tiles that every row sees."""
    dims = tl.arange(0, HEAD_DIM)
    places = tl.arange(0, TILE)
    blocks = tl.load(table + (begin + places) // BLOCK_SIZE, mask=begin + places < end, other=0)
    for start in range(begin, end, TILE):
        positions = start + places
        there = positions < end if MASKED else tl.full([TILE], True, tl.int1)
        heads = (blocks.to(tl.int64) * BLOCK_SIZE + positions % BLOCK_SIZE) * KV_HEADS + kv_head
        # The next tile's blocks are known before its keys are asked for, so that these can be under way early.
        blocks = tl.load(table + (positions + TILE) // BLOCK_SIZE, mask=positions + TILE < end, other=0)
        at = heads[:, None] * HEAD_DIM + dims
        k = _as(tl.load(keys + at, mask=there[:, None], other=0.0), x.dtype)  # [TILE, HEAD_DIM]
        scores = tl.dot(x, tl.trans(k), input_precision="ieee")  # [ROWS, TILE], float32
        if key_scales is not None:
            scores *= tl.load(key_scales + heads, mask=there, other=0.0)
        if MASKED:
            scores = tl.where(positions < seen[:, None], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # a row that has seen nothing yet
        p = tl.exp2(scores * scale - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        if value_scales is not None:
            p *= tl.load(value_scales + heads, mask=there, other=0.0)
        v = _as(tl.load(values + at, mask=there[:, None], other=0.0), x.dtype)
        acc = tl.dot(p.to(x.dtype), v, acc * fade[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit
def _as(x, dtype: tl.constexpr):
    """What the cache holds, in the queries' dtype: 8 bits become 16 without rounding."""
    return x if x.dtype == dtype else x.to(tl.float32).to(dtype)


@triton.jit
def _joined(top, total, acc, new_top, new_total, new_acc):
    """One softmax of two, over different positions."""
    most = tl.maximum(top, new_top)
    base = tl.where(most == -float("inf"), 0.0, most)
    fade, share = tl.exp2(top - base), tl.exp2(new_top - base)
    return most, total * fade + new_total * share, acc * fade[:, None] + new_acc * share[:, None]
