"""What lies between the products: the definitions against float64, the compiled kernels against the definitions."""

import pytest
import torch
import torch.nn.functional as F

from llama.model import elementwise, rope
from llama.model.kernels import native
from tests.needs import needs_kernels

ROWS = (1, 2, 9, 40)  # on one thread, and shared out


def random(*shape, scale=3.0):
    return (scale * torch.randn(shape, generator=torch.Generator().manual_seed(shape[0]))).bfloat16()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_definitions_are_the_equations(dtype):
    x, weight, up = random(5, 96).to(dtype), random(96).to(dtype), random(5, 96).to(dtype) + 1
    x[0] *= 1e-3  # so small that eps counts
    wide = x.double()
    scale = elementwise.norm_scale(x, 1e-5)
    exact = 1 / (wide.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()
    assert scale.dtype == torch.float32 and torch.allclose(scale.double(), exact, rtol=1e-6)
    tolerance = 1e-6 if dtype == torch.float32 else 0.01
    assert torch.allclose(elementwise.normalise(x, scale, weight).double(), wide * exact * weight.double(), rtol=tolerance)
    silu = wide / (1 + (-wide).exp())
    for row_by_row in (False, True):
        found = elementwise.swiglu(x, up, row_by_row)
        assert found.dtype == dtype and torch.allclose(found.double(), silu * up.double(), rtol=tolerance, atol=1e-6)


@needs_kernels
@pytest.mark.parametrize("rows", ROWS)
def test_the_kernels_give_the_definitions_bits(rows, monkeypatch):
    x, weight = random(rows, 256), random(256)
    x[0] *= 1e-3  # so small that eps counts
    gate, up = random(rows, 512, scale=20.0).chunk(2, dim=-1)  # scattered: rows are 512 apart
    heads = random(rows, 700)[:, :6 * 64].unflatten(1, (6, 64))
    angles = torch.randn(rows, 1, 32)
    assert native.serves(x)
    scale = elementwise.norm_scale(x, 1e-5)
    found = (elementwise.normalise(x, scale, weight), elementwise.swiglu(gate, up),
             rope.rotate(heads, angles.cos(), angles.sin()))
    monkeypatch.setattr(native, "serves", lambda x: False)
    assert torch.allclose(scale, elementwise.norm_scale(x, 1e-5), rtol=1e-6)
    expected = (elementwise.normalise(x, scale, weight), elementwise.swiglu(gate, up),
                rope.rotate(heads, angles.cos(), angles.sin()))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[2], expected[2])
    close = torch.isclose(found[1].float(), expected[1].float(), rtol=2**-7, atol=1e-30)  # a rounding apart, at the most
    assert close.all() and (found[1] != expected[1]).float().mean() < 0.01


@needs_kernels
def test_where_gradients_are_wanted_the_definitions_compute():
    x, weight = random(3, 64).requires_grad_(), random(64)
    elementwise.normalise(x, elementwise.norm_scale(x, 1e-5), weight).float().sum().backward()
    own = x.grad.clone()
    x.grad = None
    (F.rms_norm(x.float(), (64,), eps=1e-5) * weight.float()).sum().backward()
    assert torch.allclose(own.float(), x.grad.float(), atol=0.05)
    with torch.no_grad():
        assert native.serves(x)
