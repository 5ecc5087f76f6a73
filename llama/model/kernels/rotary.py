"""Rotation of queries and keys, and the write into the cache, as one Triton kernel: what lies between the product that makes
them and attention. The numbers are those of `llama.model.rope.rotate` and `KVCache.write`."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from llama.model.cache import KVCache

# By what `KVCache` keeps: the largest number of its format.
_LARGEST = {None: 0, "int8": 127, "fp8": 448}
# Each product is rounded, as in the definition.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": False}


def rotate_and_write(q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache, layer: int,
                     slots: Tensor) -> tuple[Tensor, Tensor]:
    """q and k, [tokens, heads, head_dim], rotated; k, so, and v are in the cache's slots. q, k, v may be views of one matrix;
    rotary: cosine and sine, each [tokens, 1, head_dim / 2]; slots: [tokens]."""
    tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    q, k, v = (x if x.stride()[1:] == (head_dim, 1) else x.contiguous() for x in (q, k, v))
    q_out, k_out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k))
    scales = (None, None) if cache.quantised is None else (cache.key_scales[layer], cache.value_scales[layer])
    group = heads // kv_heads
    _rotate_and_write[tokens, kv_heads](
        q, k, v, *rotary, q_out, k_out, cache.keys[layer], cache.values[layer], *scales, slots, q.stride(0), k.stride(0),
        v.stride(0), GROUP=group, GROUP_ROWS=triton.next_power_of_2(group), KV_HEADS=kv_heads, HALF=head_dim // 2,
        LARGEST=_LARGEST[cache.quantised], **OPTIONS)
    return q_out, k_out


@triton.jit(do_not_specialize_on_alignment=("slots",))
def _rotate_and_write(q, k, v, cos, sin, q_out, k_out, keys, values, key_scales, value_scales, slots, q_stride, k_stride,
                      v_stride, GROUP: tl.constexpr, GROUP_ROWS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
                      LARGEST: tl.constexpr):
    """One token, one key/value head, and the query heads of its group."""
    token, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    dims = tl.arange(0, HALF)
    c, s = tl.load(cos + token * HALF + dims), tl.load(sin + token * HALF + dims)
    row = tl.arange(0, GROUP_ROWS)[:, None]
    heads = (kv_head * GROUP + row) * (2 * HALF) + dims  # [GROUP_ROWS, HALF]
    there = row < GROUP
    one, two = _rotated(q + token * q_stride + heads, c, s, there, HALF)
    at = q_out + token * (KV_HEADS * GROUP * 2 * HALF) + heads
    tl.store(at, one, mask=there)
    tl.store(at + HALF, two, mask=there)

    head = kv_head * (2 * HALF) + dims
    one, two = _rotated(k + token * k_stride + head, c, s, dims >= 0, HALF)
    at = k_out + token * (KV_HEADS * 2 * HALF) + head
    tl.store(at, one)
    tl.store(at + HALF, two)
    place = tl.load(slots + token) * KV_HEADS + kv_head  # int64
    _write(keys, key_scales, place, one, two, HALF, LARGEST)
    one, two = tl.load(v + token * v_stride + head), tl.load(v + token * v_stride + head + HALF)
    _write(values, value_scales, place, one, two, HALF, LARGEST)


@triton.jit
def _rotated(x, c, s, there, HALF: tl.constexpr):
    """Both halves of heads, turned: in float32, then in x's dtype."""
    one = tl.load(x, mask=there, other=0.0).to(tl.float32)
    two = tl.load(x + HALF, mask=there, other=0.0).to(tl.float32)
    dtype = x.dtype.element_ty
    return (one * c - two * s).to(dtype), (two * c + one * s).to(dtype)


@triton.jit
def _write(kept, scales, place, one, two, HALF: tl.constexpr, LARGEST: tl.constexpr):
    """One head's two halves, at its place in the cache, as they are or at 8 bits with one scale."""
    at = kept + place * (2 * HALF) + tl.arange(0, HALF)
    if scales is not None:
        one, two = one.to(tl.float32), two.to(tl.float32)
        most = tl.max(tl.maximum(tl.abs(one), tl.abs(two)), 0)
        factor = tl.where(most > 0, tl.div_rn(tl.full([], LARGEST, tl.float32), most), 0.0)
        tl.store(scales + place, tl.div_rn(most, tl.full([], LARGEST, tl.float32)))
        one, two = one * factor, two * factor
        if LARGEST == 127:  # to the nearest, ties to even, as float32 rounds where its last digit is 1
            one, two = one + 12582912.0 - 12582912.0, two + 12582912.0 - 12582912.0
    tl.store(at, one.to(kept.dtype.element_ty))
    tl.store(at + HALF, two.to(kept.dtype.element_ty))
