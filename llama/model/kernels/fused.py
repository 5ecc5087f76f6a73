"""What lies between the products, in Triton: each computes what `llama.model.elementwise` defines, in one pass.

A row of a norm is one program, which has it in registers from the first load to the last store: at one row a step it is
latency that counts, and memory is not read twice. All in float32, rounded to the dtype where the definition is. How many
threads share a row follows from its size alone, and so its sum is added up in one order: a row's bits depend on the row
alone, and `norm_scale` by itself gives the bits that are within `rms_norm` and `add_norm`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A thread's share of a row of SwiGLU: 8 elements, which in two bytes each are one load.
_SWIGLU_BLOCK = 1024
_SWIGLU_WARPS = _SWIGLU_BLOCK // 8 // 32


def norm_scale(x: Tensor, eps: float) -> Tensor:
    """`llama.model.elementwise.norm_scale`: [tokens, hidden] -> [tokens, 1], float32."""
    x = x.contiguous()
    scale = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    if len(x):
        _norm_scale[len(x),](x, scale, eps, **row_options(x.shape[1]))
    return scale


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`llama.model.elementwise.rms_norm`: [tokens, hidden] -> [tokens, hidden]."""
    x = x.contiguous()
    y = torch.empty_like(x)
    if len(x):
        _rms_norm[len(x),](x, weight, y, eps, **row_options(x.shape[1]))
    return y


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`llama.model.elementwise.add_norm`: x + delta, and its norm, each [tokens, hidden]."""
    x, delta = x.contiguous(), delta.contiguous()
    total, y = torch.empty_like(x), torch.empty_like(x)
    if len(x):
        _add_norm[len(x),](x, delta, weight, total, y, eps, **row_options(x.shape[1]))
    return total, y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`llama.model.elementwise.swiglu`: rows [tokens, intermediate] of each, wherever in memory -> [tokens, intermediate]."""
    tokens, size = gate.shape
    gate, up = (x if x.stride(1) == 1 else x.contiguous() for x in (gate, up))
    y = torch.empty(tokens, size, dtype=gate.dtype, device=gate.device)
    if tokens:
        _swiglu[tokens, triton.cdiv(size, _SWIGLU_BLOCK)](gate, up, y, gate.stride(0), up.stride(0), size, _SWIGLU_BLOCK,
                                                          num_warps=_SWIGLU_WARPS)
    return y


def row_options(size: int) -> dict[str, int | bool]:
    """How a row of a norm is shared out: a load of 8 elements for each thread, and more of them for one of more than 4,096.

    Without fusion, multiplying and then adding is rounded twice in every kernel, however the compiler arranges them.
    """
    block = triton.next_power_of_2(size)
    return {"size": size, "block": block, "num_warps": min(max(block // 8 // 32, 1), 16), "enable_fp_fusion": False}


@triton.jit
def _scale_of(row, eps, size: tl.constexpr):
    """1 / sqrt(mean(row²) + eps); row: float32, beyond its size 0."""
    return tl.rsqrt(tl.sum(row * row, axis=0) / size + eps)


@triton.jit
def _store_normalised(y, cells, row, scale, weight, here, dtype: tl.constexpr):
    """y = weight · (row · scale), the product with the scale rounded."""
    scaled = (row * scale).to(dtype).to(tl.float32)
    tl.store(y + cells, (weight.to(tl.float32) * scaled).to(dtype), here)


@triton.jit
def _norm_scale(x, scale, eps, size: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, block)
    row = tl.load(x + place * size + columns, columns < size, other=0.0).to(tl.float32)
    tl.store(scale + place, _scale_of(row, eps, size))


@triton.jit
def _rms_norm(x, weight, y, eps, size: tl.constexpr, block: tl.constexpr):
    columns = tl.arange(0, block)
    here = columns < size
    cells = tl.program_id(0).to(tl.int64) * size + columns
    row = tl.load(x + cells, here, other=0.0).to(tl.float32)
    weights = tl.load(weight + columns, here, other=0.0)
    _store_normalised(y, cells, row, _scale_of(row, eps, size), weights, here, y.dtype.element_ty)


@triton.jit
def _add_norm(x, delta, weight, total, y, eps, size: tl.constexpr, block: tl.constexpr):
    columns = tl.arange(0, block)
    here = columns < size
    cells = tl.program_id(0).to(tl.int64) * size + columns
    dtype = y.dtype.element_ty
    added = tl.load(x + cells, here, other=0.0).to(tl.float32) + tl.load(delta + cells, here, other=0.0).to(tl.float32)
    weights = tl.load(weight + columns, here, other=0.0)
    tl.store(total + cells, added.to(dtype), here)
    row = added.to(dtype).to(tl.float32)
    _store_normalised(y, cells, row, _scale_of(row, eps, size), weights, here, dtype)


@triton.jit
def _swiglu(gate, up, y, gate_stride, up_stride, size: tl.constexpr, block: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    here = columns < size
    dtype = y.dtype.element_ty
    g = tl.load(gate + place * gate_stride + columns, here, other=0.0).to(tl.float32)
    u = tl.load(up + place * up_stride + columns, here, other=0.0).to(tl.float32)
    silu = (g / (1 + tl.exp(-g))).to(dtype).to(tl.float32)
    tl.store(y + place * size + columns, (silu * u).to(dtype), here)
