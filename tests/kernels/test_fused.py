"""The element-wise kernels in Triton: against float64, against each other, and compiled for the GPU that they are for."""

import os
import subprocess
import sys

import pytest
import torch

from llama.config import LlamaConfig
from llama.model import elementwise
from llama.model.ragged import RaggedBatch
from llama.model.tap import UNTOUCHED, Tap
from llama.model.transformer import Llama

fused = pytest.importorskip("llama.model.kernels.fused", exc_type=ImportError)

EPS = 1e-5
DTYPES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 0.02}
SHAPES = [(1, 64), (3, 96), (16, 160), (2, 2048), (1, 4096), (1, 8192)]
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)


@pytest.fixture
def random(device):
    """Makes fresh numbers."""
    return lambda *shape, dtype=torch.float32: (3 * torch.randn(shape)).to(device, dtype)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What a kernel does not write is no number."""
    for name in ("empty", "empty_like"):
        original = getattr(torch, name)
        monkeypatch.setattr(fused.torch, name, lambda *args, _original=original, **options:
                            _original(*args, **options).fill_(torch.nan))


def exact_norm(x, weight):
    x = x.double()
    return x / (x.square().mean(dim=-1, keepdim=True) + EPS).sqrt() * weight.double()


def assert_close(found, expected, dtype):
    assert torch.allclose(found.double(), expected, rtol=DTYPES[dtype], atol=1e-5)


@each_dtype
@each_shape
def test_norms_are_the_equations(random, shape, dtype):
    x, delta, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(shape[1], dtype=dtype)
    x[0] *= 1e-3  # so small that eps counts
    scale = elementwise.norm_scale(x, EPS)
    assert scale.dtype == torch.float32 and scale.shape == (shape[0], 1)
    assert torch.allclose(scale.double(), 1 / (x.double().square().mean(-1, keepdim=True) + EPS).sqrt(), rtol=1e-6)
    y = elementwise.rms_norm(x, weight, EPS)
    assert y.dtype == dtype
    assert_close(y, exact_norm(x, weight), dtype)
    before = x.clone()
    total, y = elementwise.add_norm(x, delta, weight, EPS)
    assert total.dtype == y.dtype == dtype and torch.equal(x, before)
    assert_close(total, x.double() + delta.double(), dtype)
    assert_close(y, exact_norm(total, weight), dtype)


def same_roundings(dtype):
    """Whether the kernels round as PyTorch does: Triton's interpreter cuts bfloat16 off."""
    return dtype != torch.bfloat16 or not os.environ.get("TRITON_INTERPRET")


@each_dtype
@each_shape
def test_in_one_kernel_or_in_steps_the_bits_are_the_same(random, shape, dtype):
    """The steps are what a plan looks between."""
    if not same_roundings(dtype):
        pytest.skip("Triton's interpreter does not round to bfloat16")
    x, delta, weight = random(*shape, dtype=dtype), random(*shape, dtype=dtype), random(shape[1], dtype=dtype)
    total = x + delta
    expected = elementwise.normalise(total, elementwise.norm_scale(total, EPS), weight)
    assert torch.equal(elementwise.rms_norm(total, weight, EPS), expected)
    found = elementwise.add_norm(x, delta, weight, EPS)
    assert torch.equal(found[0], total) and torch.equal(found[1], expected)


@each_dtype
@pytest.mark.parametrize("shape", [(1, 64), (3, 96), (17, 160), (2, 1024), (1, 3000)], ids=str)
def test_swiglu_is_the_equation_on_the_two_halves_of_a_product(random, shape, dtype):
    tokens, size = shape
    gate, up = random(tokens, 2 * size, dtype=dtype).chunk(2, dim=-1)
    gate[0, :2] = torch.tensor([300.0, -300.0])
    found = elementwise.swiglu(gate, up)
    assert found.dtype == dtype and found.is_contiguous()
    wide = gate.double()
    assert_close(found, wide / (1 + (-wide).exp()) * up.double(), dtype)
    assert torch.equal(elementwise.swiglu(gate.contiguous(), up), found)  # one of them edited
    assert torch.equal(elementwise.swiglu(gate, up.T.contiguous().T), found)


@each_dtype
def test_a_row_is_the_same_bits_in_any_company(random, dtype):
    x, delta, weight = random(9, 160, dtype=dtype), random(9, 160, dtype=dtype), random(160, dtype=dtype)
    compute = [lambda rows: elementwise.norm_scale(x[rows], EPS), lambda rows: elementwise.rms_norm(x[rows], weight, EPS),
               lambda rows: elementwise.add_norm(x[rows], delta[rows], weight, EPS)[1],
               lambda rows: elementwise.swiglu(x[rows], delta[rows])]
    for one in compute:
        together = one(slice(None))
        assert torch.equal(together, torch.cat([one(slice(row, row + 1)) for row in range(9)]))


def test_no_rows_are_no_rows(random):
    x, weight = random(0, 64), random(64)
    assert [y.shape for y in elementwise.add_norm(x, x, weight, EPS)] == [(0, 64)] * 2
    assert elementwise.swiglu(x, x).shape == elementwise.rms_norm(x, weight, EPS).shape == (0, 64)
    assert elementwise.norm_scale(x, EPS).shape == (0, 1)


def test_where_gradients_are_wanted_the_definitions_compute(random):
    x, delta, weight = random(3, 64), random(3, 64).requires_grad_(), random(64)
    elementwise.add_norm(x, delta, weight, EPS)[1].sum().backward()
    assert delta.grad.abs().sum() > 0


class Onlooker(Tap):
    """Touches nothing, and sees all."""

    def __init__(self):
        self.seen = []

    def __call__(self, site, value, *made_from):
        self.seen.append(site)
        return value


class InSome(Onlooker):
    """The same in every second layer."""

    def layer(self, layer):
        return self if layer % 2 else UNTOUCHED


@pytest.mark.parametrize("tap", [Onlooker, InSome])
def test_a_model_computes_the_same_bits_whether_somebody_looks_or_not(device, tap, monkeypatch):
    config = LlamaConfig(128, 64, 96, 3, 4, 2, 16, 64, 10000.0, None, EPS, False)
    model = Llama(config, device=device)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.3)
    calls = []
    monkeypatch.setattr(fused, "add_norm", lambda *args, _original=fused.add_norm: calls.append(1) or _original(*args))
    batch = RaggedBatch.whole(torch.tensor([3, 1, 4, 1, 5], device=device))
    looked = tap()
    assert torch.equal(model(batch, None, looked), model(batch))
    assert len(calls) == {Onlooker: 0, InSome: 2}[tap] + 2 * 3 - 1, "every sum but the first is in a norm's kernel"


def test_they_compile_for_hopper():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-m", "tests.kernels.fused_on_hopper"], env=environment, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
