"""Compiled decode attention, and keys and values as int8, against the definition in float64."""

import pytest
import torch

from llama.config import LlamaConfig
from llama.engine.engine import BLOCK_SIZE, Engine
from llama.engine.limits import Limits
from llama.engine.request import Request, SamplingParams
from llama.model.attention import ragged_attention
from llama.model.cache import KVCache
from llama.model.kernels import native
from llama.model.ragged import RaggedBatch, Segment
from llama.runtime import Llama
from tests import reference
from tests.model.pairs import runs_of
from tests.needs import needs_kernels

pytestmark = needs_kernels

SHAPES = [(32, 8, 64), (32, 8, 128), (8, 1, 64), (6, 2, 32), (9, 3, 96), (4, 4, 160)]
CONTEXTS = [1, 5, 16, 17, 255, 256, 257, 600]  # around vectors and splits
BOUND = {False: 0.01, True: 0.03}  # of the largest value: bfloat16's rounding, and int8's besides


def step(shape, contexts, int8, lengths=None, scattered=True, seed=0):
    """Sequences with these contexts, the last `lengths` positions of each asked: q, cache, batch, and each one's k and v."""
    heads, kv_heads, head_dim = shape
    generator = torch.Generator().manual_seed(seed)
    config = LlamaConfig(1, 1, 1, 1, heads, kv_heads, head_dim, 1, 1e4, None, 1e-5, False)
    places = torch.randperm(sum(contexts), generator=generator) if scattered else torch.arange(sum(contexts))
    cache = KVCache(config, sum(contexts), 1, torch.bfloat16, quantised="int8" if int8 else None)
    segments, kept, first = [], [], 0
    for context, length in zip(contexts, lengths or [1] * len(contexts)):
        slots = places[first:first + context]
        k, v = torch.randn(2, context, kv_heads, head_dim, generator=generator).bfloat16()
        cache.write(0, slots, k, v)
        segments.append(Segment(context - length, length, runs_of(slots.tolist())))
        kept.append((k, v))
        first += context
    tokens = sum(segment.length for segment in segments)
    q = (2 * torch.randn(tokens, heads, head_dim, generator=generator)).bfloat16()
    return q, cache, RaggedBatch(torch.empty(0), torch.empty(0), tuple(segments)), kept


def attended(q, cache, batch, kept, deterministic=False):
    """What the model's attention makes of it."""
    this_step = [torch.cat([part[side][segment.start:] for part, segment in zip(kept, batch.segments)]) for side in (0, 1)]
    return ragged_attention(q, *this_step, batch, cache, 0, deterministic)


@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decodes_are_those_of_the_equations(shape, int8, monkeypatch):
    calls = []
    kernel = native.attention
    monkeypatch.setattr(native, "attention", lambda *args: calls.append(len(args[4].rows)) or kernel(*args))
    q, cache, batch, kept = step(shape, CONTEXTS, int8)
    found = attended(q, cache, batch, kept)
    assert calls == [len(CONTEXTS)]
    for row, (k, v) in enumerate(kept):
        padded = torch.cat([q[row:row + 1].expand(len(k) - 1, -1, -1), q[row:row + 1]])
        exact = reference.attention(padded.double(), k.double(), v.double())[-1]
        assert (found[row] - exact).abs().max() < BOUND[int8] * max(exact.abs().max(), 1)


@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16", "int8"])
def test_a_decode_is_the_same_bits_in_any_company_and_on_any_number_of_threads(int8):
    q, cache, batch, kept = step(SHAPES[0], CONTEXTS, int8)
    together = attended(q, cache, batch, kept)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            for row, segment in enumerate(batch.segments):
                alone = RaggedBatch(torch.empty(0), torch.empty(0), (segment,))
                assert torch.equal(attended(q[row:row + 1], cache, alone, kept[row:row + 1])[0], together[row])
    finally:
        torch.set_num_threads(before)


def test_in_deterministic_mode_a_chunk_is_its_decodes_to_the_bit():
    q, cache, batch, kept = step(SHAPES[0], [40, 300], False, lengths=[7, 20])
    chunk = attended(q, cache, batch, kept, deterministic=True)
    row = 0
    for segment, (k, v) in zip(batch.segments, kept):
        for position in range(segment.start, segment.end):
            runs = runs_of([slot for run in segment.runs for slot in range(*run)][:position + 1])
            one = RaggedBatch(torch.empty(0), torch.empty(0), (Segment(position, 1, runs),))
            own = [(k[:position + 1], v[:position + 1])]
            assert torch.equal(attended(q[row:row + 1], cache, one, own)[0], chunk[row])
            row += 1


def test_decodes_beside_a_chunk_are_put_in_their_rows():
    q, cache, batch, kept = step(SHAPES[0], [30, 50, 20, 64], False, lengths=[1, 9, 1, 33])
    found = attended(q, cache, batch, kept)
    first = 0
    for segment, one in zip(batch.segments, kept):
        rows = slice(first, first + segment.length)
        alone = RaggedBatch(torch.empty(0), torch.empty(0), (segment,))
        assert (found[rows] - attended(q[rows], cache, alone, [one])).abs().max() < 0.02
        first = rows.stop


# ---- keys and values at 8 bits ------------------------------------------------------------------------------


CONFIG = LlamaConfig(8, 24, 8, 3, 4, 2, 6, 64, 1e4, None, 1e-5, False)


@pytest.mark.parametrize("quantised, largest_error", [("int8", 0.51 / 127), ("fp8", 1 / 16)])
def test_quantised_keys_and_values_are_read_as_they_were_rounded_and_copied_whole(quantised, largest_error):
    cache = KVCache(CONFIG, 5, 4, torch.bfloat16, quantised=quantised)
    k, v = torch.randn(2, 4, 2, 6).bfloat16()
    k[1, 0] = 0
    cache.write(1, torch.arange(4, 8), k, v)
    cache.copy_block(1, 3)
    for first in (4, 12):
        for kept, exact in zip(cache.read(1, (first, first + 4)), (k, v)):
            assert kept.dtype == torch.bfloat16
            bound = largest_error * exact.float().abs().amax(dim=-1, keepdim=True) + exact.float().abs() / 256
            assert ((kept.float() - exact.float()).abs() <= bound).all()


@pytest.mark.parametrize("quantised", ["int8", "fp8"])
def test_quantised_they_take_the_bytes_that_the_configuration_says(quantised):
    cache = KVCache(CONFIG, 5, 4, torch.bfloat16, quantised=quantised)
    tensors = (cache.keys, cache.values, cache.key_scales, cache.value_scales)
    assert sum(tensor.nbytes for tensor in tensors) == (5 + 1) * 4 * CONFIG.kv_bytes_per_token(quantised)


@pytest.mark.parametrize("quantised, dtype", [("int8", torch.int8), ("fp8", torch.float8_e4m3fn)])
def test_the_demo_answers_from_quantised_keys_and_values_however_it_comes_by_them(quantised, dtype):
    llm = Llama.load(kv_cache_dtype=quantised)
    assert llm.engine.cache.keys.dtype == dtype
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    assert [llm.chat(messages).text for _ in range(2)] == ["17 + 25 = 42."] * 2  # the second time from the prefix cache
    ids = llm.encode_chat(messages)
    greedy = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0, max_tokens=12)
    engine = Engine(llm.model, Limits(max_context=256, step_tokens=7), 256 // BLOCK_SIZE, (), kv_cache_dtype=quantised)
    engine.submit(Request("chunks", tuple(ids), greedy))
    drawn = []
    while engine.has_work:
        drawn += [event.token_id for event in engine.step() if hasattr(event, "token_id")]
    assert llm.tokenizer.decode(drawn).startswith("17 + 25 = 42.")
