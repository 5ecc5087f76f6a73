"""Rotation and the write into the cache in Triton, against `rotate` and `KVCache.write`."""

import math
import os
import subprocess
import sys

import pytest
import torch

from llama.config import LlamaConfig
from llama.model.attention import rotate_and_write
from llama.model.cache import KVCache
from llama.model.rope import rotate, rotation
from llama.model.tap import Tap


def made(device, tokens, heads, kv_heads, head_dim, dtype, quantised):
    """q, k and v as views of one product, cosines and sines, slots, and an empty cache."""
    generator = torch.Generator().manual_seed(0)
    sizes = (heads * head_dim, kv_heads * head_dim, kv_heads * head_dim)
    product = torch.randn(tokens, sum(sizes), generator=generator).to(dtype).to(device)
    product[0, -sizes[2]:] = 0  # a value without a scale
    qkv = [part.unflatten(-1, (-1, head_dim)) for part in product.split(sizes, dim=-1)]
    frequencies = 5e5 ** -(torch.arange(0, head_dim, 2) / head_dim)
    rotary = rotation(torch.randint(0, 100_000, (tokens,), generator=generator).to(device), frequencies.to(device))
    config = LlamaConfig(1, 1, 1, 2, heads, kv_heads, head_dim, 1, 1e4, None, 1e-5, False)
    caches = [KVCache(config, 3, 16, dtype, device, quantised) for _ in range(2)]
    for cache in caches:
        for tensor in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
            if tensor is not None:
                tensor.copy_(torch.full(tensor.shape, math.nan if tensor.dtype != torch.int8 else 1).to(tensor.dtype))
    return qkv, rotary, torch.randperm(48, generator=generator)[:tokens].to(device), caches


@pytest.mark.parametrize("quantised", [None, "int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 4, 1, 64), (5, 7, 1, 32), (3, 8, 2, 128), (17, 2, 2, 64)], ids=str)
def test_one_kernel_rotates_and_writes_what_the_definitions_do(device, shape, dtype, quantised):
    (q, k, v), rotary, slots, (cache, expected) = made(device, *shape, dtype, quantised)
    q_out, k_out = rotate_and_write(q, k, v, rotary, cache, 1, slots)
    exact = [rotate(x, *rotary) for x in (q, k)]
    expected.write(1, slots, k_out, v)
    # The interpreter truncates to bfloat16, where the device rounds.
    one_step = 0 if device.type == "cuda" or dtype == torch.float32 else 2 ** -7
    for found, one in zip((q_out, k_out), exact):
        assert ((found.float() - one.float()).abs() <= one_step * one.float().abs()).all()
    # Scales may differ in their last bit: how a library divides by a number is its own affair.
    near = 1e-6 if quantised else 0
    for found, one in zip(cache.gather(1, slots), expected.gather(1, slots)):
        assert ((found.float() - one.float()).abs() <= near * one.float().abs() + near / 400).all()
        assert (found != one).float().mean() <= (0.05 if near else 0)
    untouched = torch.ones(cache.keys.shape[1], dtype=torch.bool, device=device)
    untouched[slots] = False
    for found in (cache.keys, cache.values, cache.key_scales, cache.value_scales):
        if found is not None:
            before = found[1, untouched].float()
            assert (before == 1).all() if found.dtype == torch.int8 else before.isnan().all()


def test_a_tap_that_looks_sees_both_and_what_it_returns_is_kept(device):
    class Doubling(Tap):
        def __call__(self, site, value, *made_from):
            seen.append(site)
            return 2 * value

    seen = []
    (q, k, v), rotary, slots, (cache, _) = made(device, 3, 4, 2, 64, torch.float32, None)
    q_out, k_out = rotate_and_write(q, k, v, rotary, cache, 1, slots, Doubling())
    assert seen == ["attn.q_rot", "attn.k_rot"]
    assert torch.equal(k_out, 2 * rotate(k, *rotary)) and torch.equal(cache.keys[1, slots], k_out)


def test_the_kernel_compiles_for_hopper_without_spills_and_rounds_each_product():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-m", "tests.kernels.rotary_on_hopper"], env=environment, capture_output=True,
                         text=True)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
