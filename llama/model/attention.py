"""Grouped-query attention of a ragged batch over the paged cache.

`attend` is the definition, as plain as the equation. `ragged_attention` is what the model calls: the same
numbers from fused kernels that read the cache in place and never repeat a key/value head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention

from llama.model.cache import KVCache
from llama.model.kernels import gpu, native
from llama.model.ragged import PagedQueries, RaggedBatch, Segment
from llama.model.rope import rotate
from llama.model.tap import UNTOUCHED, Tap

# cuDNN plans anew for every pair of lengths that it has not seen, which takes it a tenth of a second. So it gets only
# multiples of so many tokens, over this many keys times powers of two: a few dozen pairs.
CUDNN_PIECE = 2048


def rotate_and_write(q: Tensor, k: Tensor, v: Tensor, rotary: tuple[Tensor, Tensor], cache: KVCache | None, layer: int,
                     slots: Tensor | None, at: Tap = UNTOUCHED) -> tuple[Tensor, Tensor]:
    """q and k, each [tokens, heads, head_dim], rotated by their positions; k, so, and v enter the cache, if there is one."""
    if at is UNTOUCHED and _has_gpu_kernels(q, cache):
        from llama.model.kernels import rotary as kernel  # needs Triton

        return kernel.rotate_and_write(q, k, v, rotary, cache, layer, slots)
    q, k = at("attn.q_rot", rotate(q, *rotary)), at("attn.k_rot", rotate(k, *rotary))
    if cache is not None:
        cache.write(layer, slots, k, v)
    return q, k


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q kᵀ / sqrt(head_dim)) v, each query seeing the keys up to its own position.

    q: [queries, num_heads, head_dim], the last positions of the sequence. k, v: [context, num_kv_heads,
    head_dim], all of it. Returns q's shape and dtype; scores and softmax are float32.
    """
    queries, num_heads, head_dim = q.shape
    context, num_kv_heads, _ = k.shape
    grouped = q.view(queries, num_kv_heads, num_heads // num_kv_heads, head_dim).float()
    scores = torch.einsum("qkgd,ckd->kgqc", grouped, k.float()) / math.sqrt(head_dim)
    unseen = torch.ones(queries, context, dtype=torch.bool, device=q.device).triu(context - queries + 1)
    pattern = scores.masked_fill(unseen, -math.inf).softmax(dim=-1)  # [kv_heads, group, queries, context]
    return torch.einsum("kgqc,ckd->qkgd", pattern, v.float()).reshape(q.shape).to(q.dtype)


def paged_attend(q: Tensor, cache: KVCache, layer: int, paged: PagedQueries) -> Tensor:
    """`attend` of tokens that each have a context of their own: q [queries, num_heads, head_dim], those that `paged` names,
    over the cache by its tables. Returns q's shape and dtype; scores and softmax are float32."""
    positions = torch.arange(paged.tables.shape[1] * paged.block_size, device=q.device)
    slots = paged.tables[:, positions // paged.block_size] * paged.block_size + positions % paged.block_size
    k, v = (part.float() for part in cache.gather(layer, slots))  # [queries, positions, num_kv_heads, head_dim]
    grouped = q.unflatten(1, (k.shape[2], -1)).float()  # [queries, num_kv_heads, group, head_dim]
    unseen = positions >= paged.lengths[:, None]  # [queries, positions]
    scores = torch.einsum("qkgd,qpkd->qkgp", grouped, k) / math.sqrt(q.shape[2])
    pattern = scores.masked_fill(unseen[:, None, None], -math.inf).softmax(dim=-1).masked_fill(unseen[:, None, None], 0)
    v = v.masked_fill(unseen[..., None, None], 0)  # what nobody has written yet may be anything, and 0 · NaN is NaN
    return torch.einsum("qkgp,qpkd->qkgd", pattern, v).reshape(q.shape).to(q.dtype)


def ragged_attention(q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, cache: KVCache | None,
                     layer: int, deterministic: bool = False) -> Tensor:
    """Every segment's queries over its own context.

    q: [tokens, num_heads, head_dim]; k, v: [tokens, num_kv_heads, head_dim], this step's, already written to
    the cache where there is one. Returns q's shape. deterministic: a query's result depends on nothing but the
    query, its keys and its values, to the bit.
    """
    if cache is None:
        return _self_attention(q, k, v, batch)
    if _has_gpu_kernels(q, cache):
        return _on_gpu(q, k, v, batch, cache, layer, deterministic)
    out = torch.empty_like(q)
    longest = 0 if batch.paged is None else batch.paged.longest
    if batch.paged is not None:
        out[batch.paged.rows] = paged_attend(q[batch.paged.rows], cache, layer, batch.paged)
    decodes = (batch.each if deterministic else batch.decodes) if _has_kernel(q, cache) else None
    if decodes is not None:
        native.attention(q, out, cache, layer, decodes)
        if len(decodes.rows) == len(q):
            return out
    first = 0
    for segment in batch.segments:
        rows = slice(first, first + segment.length)
        first = rows.stop
        if segment.length <= longest or (decodes is not None and segment.length == 1):
            continue
        if deterministic or q.device.type != "cpu":
            context = [part[0] if len(part) == 1 else torch.cat(part)
                       for part in zip(*(cache.read(layer, run) for run in segment.runs))]
            one_way = _one_by_one if deterministic else attend
            out[rows] = one_way(q[rows], *context)
        else:
            out[rows] = _cached_attention(q[rows], k[rows], v[rows], segment, cache, layer)
    return out


def _on_gpu(q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, cache: KVCache, layer: int, deterministic: bool) -> Tensor:
    """Triton's kernels, but for steps of long chunks alone, which cuDNN multiplies faster. Nothing waits for the device."""
    from llama.model.kernels import paged  # needs Triton

    if not deterministic and batch.paged is None and _suit_cudnn(q, k, v, batch):
        return _by_cudnn(q, k, v, batch, cache, layer)
    q = q.contiguous()
    out = torch.empty_like(q)
    for asked in (batch.paged, batch.chunks):
        if asked is not None:
            paged.attend(q, out, cache, layer, asked, deterministic)
    return out


def _suit_cudnn(q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch) -> bool:
    """Whether all of a step's segments begin and end at whole pieces, and cuDNN takes such queries."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    return all(segment.start % CUDNN_PIECE == segment.length % CUDNN_PIECE == 0 for segment in batch.segments) \
        and can_use_cudnn_attention(SDPAParams(q, k, v, None, 0.0, True, True))


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch, cache: KVCache, layer: int) -> Tensor:
    """Each segment over the cache, in pieces of powers of two, and over itself, the parts joined by their softmax sums."""
    outs, first = [], 0
    for segment in batch.segments:
        own = [tensor[first:first + segment.length] for tensor in (q, k, v)]
        first += segment.length
        parts, place = [_cudnn(*own, causal=True)], 0
        past = [cache.read(layer, run) for run in _until(segment.runs, segment.start)]
        keys, values = (part[0] if len(part) == 1 else torch.cat(part) for part in zip(*past)) if past else (None, None)
        while place < segment.start:
            end = place + (1 << (segment.start - place).bit_length() - 1)  # the largest power of two that is left
            parts.append(_cudnn(own[0], keys[place:end], values[place:end]))
            place = end
        outs.append(_join(parts))
    return outs[0] if len(outs) == 1 else torch.cat(outs)


def _cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """As `_flash`, by cuDNN, which knows groups of heads."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))  # [1, heads, tokens, head_dim]
    out, log_sum, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal)
    return out[0].transpose(0, 1), log_sum.view(out.shape[1:3]).transpose(0, 1)


def _has_gpu_kernels(q: Tensor, cache: KVCache | None) -> bool:
    """Whether Triton's kernels compute attention over this cache, and what goes into it."""
    return cache is not None and gpu.serves(q) and q.dtype == cache.dtype and q.shape[2] in gpu.HEAD_DIMS


def _has_kernel(q: Tensor, cache: KVCache) -> bool:
    """Whether the compiled kernel computes decodes of this kind. It reads the cache once, as fast as memory gives it."""
    return q.device.type == "cpu" and q.dtype == cache.dtype == torch.bfloat16 and cache.quantised != "fp8" \
        and q.shape[2] % 32 == 0 and native.library() is not None


def _self_attention(q: Tensor, k: Tensor, v: Tensor, batch: RaggedBatch) -> Tensor:
    """Whole sequences without a cache. Those of one length are one call; differentiable."""
    lengths = [segment.length for segment in batch.segments]
    if len(set(lengths)) > 1:
        parts = (tensor.split(lengths) for tensor in (q, k, v))
        return torch.cat([_causal(*(part[None] for part in one))[0] for one in zip(*parts)])
    q, k, v = (tensor.unflatten(0, (len(lengths), -1)) for tensor in (q, k, v))
    return _causal(q, k, v).flatten(0, 1)


def _causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[sequences, tokens, heads, head_dim], each token seeing itself and what stands before it."""
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # [sequences, heads, tokens, head_dim]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def _cached_attention(q: Tensor, k: Tensor, v: Tensor, segment: Segment, cache: KVCache, layer: int) -> Tensor:
    """One segment on CPU: over each run of the cache where it lies, the parts joined by their softmax sums."""
    if segment.length == 1:
        grouped = _group(q, k.shape[1])
        parts = [_flash(grouped, *cache.read(layer, run)) for run in segment.runs]
        return _ungroup(_join(parts))
    parts = [_flash(q, *cache.read(layer, run)) for run in _until(segment.runs, segment.start)]
    parts.append(_flash(q, k, v, causal=True))
    return _join(parts)


def _one_by_one(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`attend`, each query as if it were being decoded: the same call whatever chunk it came in."""
    rows = []
    for row, end in zip(q.split(1), range(len(k) - len(q) + 1, len(k) + 1)):
        if q.device.type == "cpu":
            out, _ = _flash(_group(row, k.shape[1]), k[:end], v[:end])
            rows.append(_ungroup(out))
        else:
            rows.append(attend(row, k[:end], v[:end]))
    return torch.cat(rows)


def _group(q: Tensor, num_kv_heads: int) -> Tensor:
    """One query's heads, those of a group as rows that share a key head, so that each key is read once for all of
    them: [1, num_heads, head_dim] -> [group, num_kv_heads, head_dim]."""
    return q.view(num_kv_heads, -1, q.shape[2]).transpose(0, 1)


def _ungroup(out: Tensor) -> Tensor:
    """[group, num_kv_heads, head_dim] -> [1, num_heads, head_dim]."""
    return out.transpose(0, 1).reshape(1, -1, out.shape[2])


def _until(runs: tuple[tuple[int, int], ...], length: int) -> list[tuple[int, int]]:
    """The runs cut to their first `length` positions."""
    kept = []
    for first, last in runs:
        last = min(last, first + length)
        length -= last - first
        if last > first:
            kept.append((first, last))
    return kept


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> tuple[Tensor, Tensor]:
    """Attention over some of the keys: its result [queries, heads, head_dim] and the logarithm of the
    softmax's sum [queries, heads], with which parts over different keys can be joined."""
    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))  # [1, heads, tokens, head_dim]
    out, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal)
    return out[0].transpose(0, 1), log_sum[0].transpose(0, 1)


def _join(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax from its parts: each weighed by its share of the whole sum (arXiv:2205.14135)."""
    if len(parts) == 1:
        return parts[0][0]
    log_sums = torch.stack([log_sum for _, log_sum in parts])  # [parts, queries, heads]
    shares = log_sums.softmax(dim=0)[..., None]
    return sum(out.float() * share for (out, _), share in zip(parts, shares)).to(parts[0][0].dtype)
