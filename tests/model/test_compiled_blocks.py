"""The blocks of a decode in one compiled call: the same bits as block by block."""

import dataclasses

import pytest
import torch

from llama.config import LlamaConfig
from llama.model.cache import KVCache
from llama.model.kernels import blocks as compiled
from llama.model.ragged import RaggedBatch, Segment
from llama.model.tap import Tap
from llama.model.transformer import Llama
from tests.needs import needs_kernels

pytestmark = needs_kernels

CONFIG = LlamaConfig(vocab_size=64, hidden_size=128, intermediate_size=192, num_layers=3, num_heads=6, num_kv_heads=2,
                     head_dim=64, max_position_embeddings=512, rope_theta=1e4, rope_scaling=None, rms_norm_eps=1e-5,
                     tie_word_embeddings=False)
CONTEXTS = [1, 2, 5, 16, 40, 257, 300]


def model_of(weights: str) -> Llama:
    """Random, in bfloat16."""
    generator = torch.Generator().manual_seed(3)
    model = Llama(CONFIG, torch.bfloat16, weights=weights)
    for module in model.modules():
        if hasattr(module, "store"):
            rows, columns = module.shape if hasattr(module, "shape") else module.weight.shape
            module.store(0, torch.randn(rows, columns, generator=generator) / columns**0.5)
        elif hasattr(module, "site"):
            module.weight.data.copy_(1 + 0.1 * torch.randn(module.weight.shape, generator=generator))
    return model


def decode_of(contexts: list[int], int8: bool) -> tuple[RaggedBatch, KVCache]:
    """The last token of sequences with these contexts, scattered over a cache that holds what came before."""
    generator = torch.Generator().manual_seed(4)
    cache = KVCache(CONFIG, sum(contexts), 1, torch.bfloat16, quantised="int8" if int8 else None)
    places = torch.randperm(sum(contexts), generator=generator)
    segments, slots, first = [], [], 0
    for context in contexts:
        mine = places[first:first + context]
        for layer in range(CONFIG.num_layers):
            k, v = torch.randn(2, context, CONFIG.num_kv_heads, CONFIG.head_dim, generator=generator).bfloat16()
            cache.write(layer, mine, k, v)
        segments.append(Segment(context - 1, 1, tuple((slot, slot + 1) for slot in mine.tolist())))
        slots.append(mine[-1])
        first += context
    ids = torch.randint(CONFIG.vocab_size, (len(contexts),), generator=generator)
    return RaggedBatch(ids, torch.tensor(contexts) - 1, tuple(segments), torch.stack(slots)), cache


def both_ways(model: Llama, contexts: list[int], int8: bool):
    """Residual stream and cache, compiled and block by block, which any tap but the one that does nothing brings."""
    results = []
    for tap in ((), (Tap(),)):
        batch, cache = decode_of(contexts, int8)
        results.append((model.hidden(batch, cache, *tap), cache))
    return results


@pytest.fixture
def calls(monkeypatch):
    """How many tokens each compiled call was asked for."""
    seen, run = [], compiled.CompiledBlocks.run
    monkeypatch.setattr(compiled.CompiledBlocks, "run", lambda self, x, *rest: seen.append(len(x)) or run(self, x, *rest))
    return seen


@pytest.mark.parametrize("int8", [False, True], ids=["bfloat16 cache", "int8 cache"])
@pytest.mark.parametrize("weights", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("rows", [1, 3, 20])
@torch.inference_mode()
def test_decodes_are_the_same_bits_as_block_by_block(weights, int8, rows, calls):
    (one, one_cache), (other, other_cache) = both_ways(model_of(weights), (3 * CONTEXTS)[-rows:], int8)
    assert calls == [rows]
    assert torch.isfinite(one).all() and torch.equal(one, other)
    for name in ("keys", "values", "key_scales", "value_scales"):
        ours, theirs = getattr(one_cache, name), getattr(other_cache, name)
        room = one_cache.spare_slot
        assert ours is theirs is None or torch.equal(ours[:, :room], theirs[:, :room])


@torch.inference_mode()
def test_what_a_call_is_given_stays_as_it_was(calls):
    model = model_of("int8")
    batch, cache = decode_of([5], int8=False)
    x = model.embed.rows(batch.ids)
    kept = x.clone()
    rotary = (torch.ones(1, 1, CONFIG.head_dim // 2), torch.zeros(1, 1, CONFIG.head_dim // 2))
    compiled.CompiledBlocks(model.blocks).run(x, rotary, batch, cache)
    assert calls == [1] and torch.equal(x, kept)


@torch.inference_mode()
def test_other_steps_go_block_by_block(calls):
    batch, cache = decode_of([5, 9], int8=False)
    longer = dataclasses.replace(batch, segments=(Segment(4, 2, batch.segments[0].runs),), logit_rows=None)
    x = torch.zeros(2, 128).bfloat16()
    assert not compiled.serves(x, longer, cache)
    assert not compiled.serves(x.float(), batch, cache)
    assert not compiled.serves(x, batch, None)
    assert not compiled.serves(x, dataclasses.replace(batch, segments=()), cache)  # as a captured step's batch is
    assert compiled.serves(x, batch, cache)
    Llama(CONFIG, torch.bfloat16).hidden(batch, cache)  # nothing is packed
    assert calls == []


@torch.inference_mode()
def test_weights_that_were_moved_are_found_again(calls):
    model = model_of("int8")
    both_ways(model, [5], int8=False)
    model._apply(lambda tensor: tensor.clone())
    for block in model.blocks:
        block.attention_norm.weight.data.mul_(2)
    (one, _), (other, _) = both_ways(model, [5], int8=False)
    assert calls == [1, 1] and torch.equal(one, other)
