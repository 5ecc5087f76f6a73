"""What lies between the products: the norm's two steps and SwiGLU's one, each an equation in plain PyTorch.

On a CPU and in bfloat16, where there are compiled kernels (`llama/model/kernels/elementwise.c`), they compute the same in
one pass over each row: at one row a step, what counts is the number of operations, not their size. So do those for a
GPU (`llama/model/kernels/fused.py`).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from llama.model.kernels import gpu, native


def norm_scale(x: Tensor, eps: float) -> Tensor:
    """1 / sqrt(mean(x²) + eps), in float32: [tokens, hidden] -> [tokens, 1] (arXiv:1910.07467)."""
    if native.serves(x):
        return native.norm_scale(x, eps)
    if gpu.serves(x):
        from llama.model.kernels import fused  # needs Triton
        return fused.norm_scale(x, eps)
    return torch.rsqrt(x.float().square().mean(dim=-1, keepdim=True) + eps)


def normalise(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """weight · (x · scale), the product with the scale in float32 and rounded: [tokens, hidden] -> [tokens, hidden]."""
    if native.serves(x):
        return native.normalise(x, scale, weight)
    return weight * (x.float() * scale).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Both steps: [tokens, hidden] -> [tokens, hidden]."""
    if gpu.serves(x):
        from llama.model.kernels import fused  # needs Triton
        return fused.rms_norm(x, weight, eps)
    return normalise(x, norm_scale(x, eps), weight)


def add_norm(x: Tensor, delta: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + delta, and the norm of that: each [tokens, hidden]."""
    if gpu.serves(x) and gpu.serves(delta):
        from llama.model.kernels import fused  # needs Triton
        return fused.add_norm(x, delta, weight, eps)
    x = x + delta
    return x, rms_norm(x, weight, eps)


def swiglu(gate: Tensor, up: Tensor, row_by_row: bool = False) -> Tensor:
    """silu(gate) · up (arXiv:2002.05202): [tokens, intermediate] of each -> the same.

    row_by_row: where a thread's share ends amid a vector, torch computes the last elements in another way, an ulp apart;
    a row that is a call by itself is shared out the same in any company.
    """
    if native.serves(gate):
        return native.swiglu(gate, up)
    if gpu.serves(gate) and gpu.serves(up):
        from llama.model.kernels import fused  # needs Triton
        return fused.swiglu(gate, up)
    silu = torch.cat([F.silu(row) for row in gate.split(1)]) if row_by_row else F.silu(gate)
    return silu * up
