"""Attention by itself: the definition against the equations, and the fused paths against the definition."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from llama.config import LlamaConfig
from llama.model.attention import attend, ragged_attention
from llama.model.cache import KVCache
from llama.model.ragged import RaggedBatch, Segment
from tests import reference
from tests.model.pairs import difference, runs_of

HEADS = [(4, 4), (6, 2), (8, 1), (16, 2)]


def random_qkv(queries, context, heads, kv_heads, head_dim=32, dtype=torch.float32):
    """Queries of the last positions, and keys and values of all."""
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(shape, generator=generator).to(dtype)
                 for shape in ((queries, heads, head_dim), (context, kv_heads, head_dim),
                               (context, kv_heads, head_dim)))


def cached(q, k, v, slots, deterministic=False):
    """The same attention from a paged cache: keys and values at the given slots, NaN in all others."""
    context, kv_heads, head_dim = k.shape
    config = LlamaConfig(1, 1, 1, 2, q.shape[1], kv_heads, head_dim, 1, 1e4, None, 1e-5, False)
    cache = KVCache(config, max(slots) + 1, 1, q.dtype)
    for tensor in (cache.keys, cache.values):
        tensor.fill_(math.nan)
    cache.write(1, torch.tensor(slots), k, v)
    start = context - len(q)
    batch = RaggedBatch(torch.empty(0), torch.empty(0), (Segment(start, len(q), runs_of(slots)),))
    return ragged_attention(q, k[start:], v[start:], batch, cache, 1, deterministic)


def whole(q, k, v):
    """The same attention without a cache."""
    batch = RaggedBatch(torch.empty(0), torch.empty(0), (Segment(0, len(q)),))
    return ragged_attention(q, k, v, batch, None, 0)


SLOTS = {"one run": lambda count: [*range(3, 3 + count)],
         "blocks of four, scattered": lambda count: [4 * (p // 4 * 5 % 29) + p % 4 for p in range(count)],
         "backwards": lambda count: [*range(count - 1, -1, -1)]}


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_the_definition_agrees_with_the_equations(heads, kv_heads):
    q, k, v = random_qkv(19, 19, heads, kv_heads)
    exact = reference.attention(q.double(), k.double(), v.double())
    assert difference(attend(q, k, v), exact) < 1e-5
    for queries in (1, 7):  # the last positions alone, as in a decode or a later chunk
        assert difference(attend(q[-queries:], k, v), exact[-queries:]) < 1e-5


@pytest.mark.parametrize("heads, kv_heads", HEADS)
@pytest.mark.parametrize("slots", SLOTS)
@pytest.mark.parametrize("queries, context", [(1, 1), (1, 2), (1, 40), (2, 2), (2, 40), (13, 40), (40, 40)])
def test_the_paged_path_agrees_with_the_definition(heads, kv_heads, slots, queries, context):
    q, k, v = random_qkv(queries, context, heads, kv_heads)
    assert difference(cached(q, k, v, SLOTS[slots](context)), attend(q, k, v)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_in_deterministic_mode_a_query_gives_the_same_bits_in_any_chunk_and_any_blocks(heads, kv_heads, dtype):
    q, k, v = random_qkv(40, 40, heads, kv_heads, dtype=dtype)
    every = cached(q, k, v, SLOTS["one run"](40), deterministic=True)
    assert difference(every, attend(q, k, v)) < (1e-5 if dtype == torch.float32 else 0.05)
    for queries, context in ((1, 40), (7, 40), (39, 40), (1, 1), (2, 30)):
        part = cached(q[context - queries:context], k[:context], v[:context],
                      SLOTS["blocks of four, scattered"](context), deterministic=True)
        assert torch.equal(part, every[context - queries:context])


@pytest.mark.parametrize("deterministic", [False, True])
def test_one_run_of_the_cache_is_read_where_it_lies(deterministic):
    """Every call on keys and values gets parts of the cache's own memory, or of the step's."""
    class Reads(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu:
                read.update(tensor.untyped_storage().data_ptr() for tensor in args[1:3])
            return function(*args, **(kwargs or {}))

    read = set()
    _, k, v = random_qkv(2, 40, 4, 2)
    cache = KVCache(LlamaConfig(1, 1, 1, 1, 4, 2, 32, 1, 1e4, None, 1e-5, False), 10, 4, torch.float32)
    cache.write(0, torch.arange(40), k, v)
    batch = RaggedBatch(torch.empty(0), torch.empty(0), (Segment(39, 1, ((0, 40),)),))
    with Reads():
        ragged_attention(torch.ones(1, 4, 32), k[39:], v[39:], batch, cache, 0, deterministic)
    assert read == {cache.keys.untyped_storage().data_ptr(), cache.values.untyped_storage().data_ptr()}


@pytest.mark.parametrize("heads, kv_heads", HEADS)
def test_the_path_without_a_cache_agrees_with_the_definition(heads, kv_heads):
    q, k, v = random_qkv(23, 23, heads, kv_heads)
    assert difference(whole(q, k, v), attend(q, k, v)) < 1e-5


@pytest.mark.parametrize("dtype, rounding", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)])
@pytest.mark.parametrize("queries", [1, 13, 40])
def test_half_precision_rounds_little_more_than_the_result(dtype, rounding, queries):
    q, k, v = random_qkv(queries, 40, 6, 2, dtype=dtype)
    wide = [tensor.float() for tensor in (q, k, v)]
    paths = [attend(q, k, v), cached(q, k, v, SLOTS["blocks of four, scattered"](40))]
    if queries == 40:
        paths.append(whole(q, k, v))
    for out in paths:
        assert out.dtype == dtype
        assert difference(out.float(), attend(*wide)) < 3 * rounding * v.float().abs().max()


def test_scores_are_divided_by_the_root_of_head_dim():
    # Two keys whose scores differ by 2 ln 3 before the division by sqrt(4): weights 3/4 and 1/4.
    q = torch.tensor([2 * math.log(3), 0, 0, 0]).expand(2, 2, 4)
    k = torch.tensor([[1.0, 0, 0, 0], [0.0, 0, 0, 0]])[:, None].repeat(1, 2, 1)
    v = torch.tensor([[1.0, 0, 0, 0], [0.0, 1, 0, 0]])[:, None].repeat(1, 2, 1)
    for out in (attend(q, k, v), whole(q, k, v), cached(q, k, v, [1, 0]), cached(q[1:], k, v, [1, 0])):
        assert out[-1].tolist() == [[pytest.approx(x) for x in (0.75, 0.25, 0, 0)]] * 2


def test_a_token_sees_itself_and_nothing_later():
    q, k, v = random_qkv(20, 20, 4, 2)
    later = (torch.cat((tensor[:12], tensor[12:] + 5)) for tensor in (k, v))
    k_later, v_later = later
    for run in (attend, whole, lambda *qkv: cached(*qkv, SLOTS["backwards"](20))):
        before, after = run(q, k, v), run(q, k_later, v_later)
        assert difference(before[:12], after[:12]) < 1e-6
        assert difference(before[12], after[12]) > 0.1  # token 12 sees its own key and value
        assert difference(run(q, k, v)[0], v[0].repeat_interleave(2, 0)) < 1e-6  # and the first only those


def test_each_group_of_query_heads_reads_its_own_key_value_head():
    q, k, v = random_qkv(9, 9, 6, 2)
    noise = torch.randn(9, 32, generator=torch.Generator().manual_seed(1))
    # By what is changed in which head: the query heads whose results change. Three share a key/value head.
    for which, head, affected in ((0, 4, [4]), (0, 1, [1]), (1, 1, [3, 4, 5]), (2, 0, [0, 1, 2])):
        changed = [tensor.clone() for tensor in (q, k, v)]
        changed[which][:, head] += noise
        for run in (attend, whole, lambda *qkv: cached(*qkv, [*range(9)]),
                    lambda q, k, v: cached(q[8:], k, v, [*range(9)])):
            change = (run(*changed) - run(q, k, v))[-1].abs().amax(-1)  # [heads], at the last position
            assert (change > 1e-3).nonzero().flatten().tolist() == affected
            assert (change > 0).nonzero().flatten().tolist() == affected


def test_large_scores_do_not_overflow():
    q, k, v = random_qkv(5, 40, 4, 2)
    k = 1000 * k
    exact = reference.attention(torch.cat((q.new_zeros(35, 4, 32), q)).double(), k.double(), v.double())[35:]
    for out in (attend(q, k, v), cached(q, k, v, SLOTS["backwards"](40))):
        assert difference(out, exact) < 1e-3
