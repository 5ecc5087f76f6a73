"""Attention's Triton kernels against the equations in float64: decodes and chunks, by tables and by slots."""

import dataclasses
import math
import os
import subprocess
import sys

import pytest
import torch

from llama.config import LlamaConfig
from llama.model import attention
from llama.model.attention import ragged_attention
from llama.model.cache import KVCache
from llama.model.kernels import paged as kernels
from llama.model.ragged import PagedQueries, RaggedBatch, Segment
from tests import reference
from tests.model.pairs import runs_of

BLOCK = 16
LONGEST = 4  # of the segments that are decodes here
SHAPES = [(4, 1, 64), (2, 2, 64), (4, 2, 128), (7, 1, 32)]
CONTEXTS = [1, 15, 16, 17, 63, 64, 65, 300]
# Of the largest value: rounding of the result and of the softmax's weights (which the interpreter truncates), and of the cache.
BOUNDS = {None: 0.02, "int8": 0.04, "fp8": 0.1}


class Step:
    """Sequences whose last tokens are computed in one step, their blocks scattered over a cache that is NaN elsewhere."""

    def __init__(self, device, shape, contexts, lengths=None, quantised=None, dtype=torch.bfloat16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        heads, kv_heads, head_dim = shape
        config = LlamaConfig(1, 1, 1, 2, heads, kv_heads, head_dim, 1, 1e4, None, 1e-5, False)
        needed = [-(-context // BLOCK) for context in contexts]
        self.cache = KVCache(config, sum(needed) + 3, BLOCK, dtype, device, quantised)
        for tensor in (self.cache.keys, self.cache.values, self.cache.key_scales, self.cache.value_scales):
            if tensor is not None and tensor.dtype != torch.int8:
                tensor.copy_(torch.full(tensor.shape, math.nan).to(tensor.dtype))
        order = torch.randperm(self.cache.num_blocks, generator=generator).split([*needed, 3])
        self.tables, self.kept, self.segments = order[:-1], [], []
        for context, length, table in zip(contexts, lengths or [1] * len(contexts), self.tables):
            k, v = torch.randn(2, context, kv_heads, head_dim, generator=generator).to(dtype)
            slots = (table[:, None] * BLOCK + torch.arange(BLOCK)).flatten()[:context]
            self.cache.write(1, slots.to(device), k.to(device), v.to(device))
            self.kept.append((k, v))
            self.segments.append(Segment(context - length, length, runs_of(slots.tolist())))
        tokens = sum(segment.length for segment in self.segments)
        self.q = (2 * torch.randn(tokens, heads, head_dim, generator=generator)).to(device, dtype)

    def batch(self, which=None):
        """All sequences, or some."""
        device = self.q.device
        which = range(len(self.segments)) if which is None else which
        rows, tables, lengths, first = [], [], [], 0
        for one in which:
            segment = self.segments[one]
            if segment.length <= LONGEST:
                rows += range(first, first + segment.length)
                tables += [self.tables[one].int()] * segment.length
                lengths += range(segment.start + 1, segment.end + 1)
            first += segment.length
        paged = None
        if rows:
            table = torch.nn.utils.rnn.pad_sequence(tables, batch_first=True, padding_value=1 << 30)  # not to be looked at
            paged = PagedQueries(torch.tensor(rows, dtype=torch.int32, device=device), table.to(device),
                                 torch.tensor(lengths, dtype=torch.int32, device=device), BLOCK, LONGEST)
        empty = torch.empty(0, device=device)
        return RaggedBatch(empty, empty, tuple(self.segments[one] for one in which), paged=paged)

    def rows(self, one):
        first = sum(segment.length for segment in self.segments[:one])
        return slice(first, first + self.segments[one].length)

    def attended(self, which=None, deterministic=False):
        which = range(len(self.segments)) if which is None else which
        q = torch.cat([self.q[self.rows(one)] for one in which])
        own = [torch.cat([self.kept[one][side][self.segments[one].start:] for one in which]).to(q.device) for side in (0, 1)]
        return ragged_attention(q, *own, self.batch(which), self.cache, 1, deterministic)

    def exact(self, one):
        segment, (k, v) = self.segments[one], self.kept[one]
        q = self.q[self.rows(one)].cpu()
        padded = torch.cat([q.new_zeros(segment.start, *q.shape[1:]), q])
        return reference.attention(padded.double(), k.double(), v.double())[segment.start:]


def check(step, deterministic=False):
    found = step.attended(deterministic=deterministic).cpu()
    for one in range(len(step.segments)):
        exact = step.exact(one)
        bound = BOUNDS[step.cache.quantised] if step.q.dtype == torch.bfloat16 else 1e-5
        assert (found[step.rows(one)] - exact).abs().max() < bound * max(exact.abs().max(), 1)


@pytest.mark.parametrize("quantised", [None, "int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_decodes_are_those_of_the_equations(device, shape, quantised):
    check(Step(device, shape, CONTEXTS, quantised=quantised))


@pytest.mark.parametrize("quantised", [None, "int8", "fp8"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_chunks_are_those_of_the_equations(device, shape, quantised):
    check(Step(device, shape, [40, 150, 70, 33, 9], lengths=[40, 20, 5, 1, 4], quantised=quantised))


@pytest.mark.parametrize("deterministic", [False, True])
def test_float32_is_multiplied_as_float32(device, deterministic):
    check(Step(device, (4, 2, 64), [17, 130, 90], lengths=[1, 100, 3], dtype=torch.float32), deterministic)


def test_a_query_that_sees_nothing_gets_zeros_and_spare_rows_are_left_alone(device):
    step = Step(device, (4, 2, 64), [20, 1])
    cache, asked = step.cache, step.batch().paged
    lengths = torch.tensor([0, 1], dtype=torch.int32, device=device)
    table = torch.full((2, 2), cache.num_blocks, dtype=torch.int32, device=device)  # the spare block
    cache.keys[1, cache.spare_slot], cache.values[1, cache.spare_slot] = 1, 2
    for deterministic in (False, True):
        out = torch.full_like(step.q, math.nan)
        kernels.attend(step.q, out, cache, 1, PagedQueries(asked.rows, table, lengths, BLOCK, LONGEST), deterministic)
        assert (out[0] == 0).all() and (out[1] == 2).all()


@pytest.mark.parametrize("quantised", [None, "int8", "fp8"])
def test_in_deterministic_mode_a_query_has_the_same_bits_in_any_chunk_and_any_company(device, quantised, monkeypatch):
    monkeypatch.setattr(kernels, "PART", 64)  # several parts, and joins here and there
    # In company there are programs enough, and alone there are not.
    monkeypatch.setattr(kernels, "_DETERMINISTIC", dataclasses.replace(kernels._DETERMINISTIC, programs=8))
    contexts, lengths = [170, 40, 20], [40, 40, 1]
    together = Step(device, (4, 2, 64), contexts, lengths, quantised)
    check(together, deterministic=True)
    found = together.attended(deterministic=True)
    assert torch.equal(together.attended([2], True), found[together.rows(2)])
    for one in (0, 1):
        assert torch.equal(together.attended([one], True), found[together.rows(one)])
        for end in (contexts[one] - 39, contexts[one] - 17, contexts[one]):  # decoded alone, from the same cache
            row = together.rows(one).stop - 1 - (contexts[one] - end)
            alone = PagedQueries(torch.zeros(1, dtype=torch.int32, device=device), together.tables[one].int()[None].to(device),
                                 torch.tensor([end], dtype=torch.int32, device=device), BLOCK, LONGEST)
            out = torch.empty_like(found[:1])
            kernels.attend(together.q[row:row + 1].contiguous(), out, together.cache, 1, alone, True)
            assert torch.equal(out[0], found[row])


def test_parts_are_joined_wherever_they_are_joined(device, monkeypatch):
    """A long context in one program, and in many."""
    step = Step(device, (4, 2, 64), [300])
    outs = []
    for programs in (1, 6, 1000):
        cut = dataclasses.replace(kernels._DETERMINISTIC, programs=programs)
        monkeypatch.setattr(kernels, "_DETERMINISTIC", cut)
        monkeypatch.setattr(kernels, "_DECODES", dataclasses.replace(kernels._DECODES, programs=programs))
        monkeypatch.setattr(kernels, "PART", 64)
        outs.append(step.attended(deterministic=True))
        check(step)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


def test_long_chunks_go_to_cudnn_in_pieces_of_few_lengths(device, monkeypatch):
    """Its call stood in for by the equations, where there is no such library."""
    monkeypatch.setattr(attention, "CUDNN_PIECE", 16)
    asked = []

    def stand_in(q, k, v, causal=False):
        asked.append((len(q), len(k), causal))
        k, v = (tensor.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for tensor in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q.double(), k) / math.sqrt(q.shape[2])
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1), -math.inf)
        out = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v)
        return out.to(q.dtype), scores.logsumexp(-1).T.float()

    monkeypatch.setattr(attention, "can_use_cudnn_attention", lambda params: True)
    if device.type == "cpu":
        monkeypatch.setattr(attention, "_cudnn", stand_in)
    check(Step(device, (4, 2, 64), [16 * 14, 32], lengths=[48, 32]))
    assert device.type == "cuda" or asked == [(48, 48, True), (48, 128, False), (48, 32, False), (48, 16, False), (32, 32, True)]
    asked.clear()
    check(Step(device, (4, 2, 64), [16 * 14, 33], lengths=[48, 33]))
    step = Step(device, (4, 2, 64), [32], lengths=[32])
    step.attended(deterministic=True)
    assert not asked


def test_kernels_compile_for_hopper_without_spills_and_as_they_are_meant_to():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-m", "tests.kernels.paged_on_hopper"], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
