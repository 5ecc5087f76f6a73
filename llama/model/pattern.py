"""What fused attention never has in memory, recomputed for a few rows: its scores and its pattern, checked."""

import math

import torch
from torch import Tensor

# How far a kernel's output may be from what the pattern says, as a share of the largest value: its own rounding.
_TOLERANCE = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2}


class PatternError(RuntimeError):
    """The attention kernel's output is not what its queries, keys and values say it should be."""


def attention_scores(q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
    """q kᵀ / sqrt(head_dim) of some queries over their sequence: [rows, num_heads, context], float32.

    q: [rows, num_heads, head_dim], which stand at positions [rows]; k: [context, num_kv_heads, head_dim], from position
    0 on. -inf where a key comes after its query.
    """
    rows, num_heads, head_dim = q.shape
    grouped = q.float().view(rows, k.shape[1], -1, head_dim)  # [rows, num_kv_heads, group, head_dim]
    scores = torch.einsum("rkgd,ckd->rkgc", grouped, k.float()).flatten(1, 2) / math.sqrt(head_dim)
    unseen = torch.arange(len(k), device=k.device) > positions[:, None]  # [rows, context]
    return scores.masked_fill(unseen[:, None], -math.inf)


def mix(pattern: Tensor, v: Tensor) -> Tensor:
    """pattern v, in float32: pattern [rows, num_heads, context], v [context, num_kv_heads, head_dim] -> [rows, num_heads,
    head_dim]."""
    grouped = pattern.unflatten(1, (v.shape[1], -1))  # [rows, num_kv_heads, group, context]
    return torch.einsum("rkgc,ckd->rkgd", grouped, v.float()).flatten(1, 2)


def check_pattern(pattern: Tensor, v: Tensor, heads: Tensor, name: str) -> None:
    """Raise PatternError unless the kernel's `heads` [rows, num_heads, head_dim] are pattern v, to its rounding."""
    error = (mix(pattern, v) - heads.float()).abs().max().item()
    allowed = _TOLERANCE[heads.dtype] * max(v.float().abs().max().item(), 1e-6)
    if not error <= allowed:
        raise PatternError(f"{name}: the attention kernel is {error:.2g} away from the recomputed pattern times the "
                           f"values, and {allowed:.2g} is its rounding; this should not happen")
