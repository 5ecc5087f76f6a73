"""Products in Triton's kernels against their definitions."""

import os
import subprocess
import sys

import pytest
import torch

from llama.model.device_linear import DeviceLinear
from llama.model.formats import GROUP, INT4, INT8, exact_product, quantise_int8
from llama.model.kernels import products
from llama.model.linear import Linear

SHAPES = ((64, 64), (96, 192), (160, 1088))  # outs, ins
ROWS = (1, 2, 3, 16, 17, 40)


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What `torch.empty` gives is NaN, or the largest integer: an element that no kernel writes is seen."""
    empty = torch.empty

    def poison(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else torch.iinfo(made.dtype).max)

    monkeypatch.setattr(torch, "empty", poison)


def quantised(fmt, outs: int, ins: int, device) -> DeviceLinear:
    linear = DeviceLinear(ins, outs, torch.float32, device, fmt)
    linear.store(0, torch.randn(outs, ins, device=device))
    return linear


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("fixed", (False, True))
def test_floats_are_multiplied_as_in_float64(device, shape, rows, fixed):
    w, x = torch.randn(shape, device=device).bfloat16(), torch.randn(rows, shape[1], device=device).bfloat16()
    y = products.float_product(x, w, torch.float32, fixed=fixed)
    torch.testing.assert_close(y.double(), x.double() @ w.double().t(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_int8_is_the_definition_bit_by_bit(device, shape, rows):
    linear, x = quantised(INT8, *shape, device), torch.randn(rows, shape[1], device=device)
    q, scale = quantise_int8(x)
    assert linear(x).equal(exact_product(q, linear.weight) * scale[:, None] * linear.scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
def test_int4_is_the_definition_to_rounding(device, shape, rows):
    linear, x = quantised(INT4, *shape, device), torch.randn(rows, shape[1], device=device)
    q, scale = quantise_int8(x.unflatten(1, (-1, GROUP)))
    expected = (q.double() * scale.double()[..., None]).flatten(1) @ linear.unpack(slice(None)).double().t()
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=2e-5)


def test_a_deterministic_row_is_the_same_bits_in_any_company(device):
    linear = Linear(1088, 160, torch.bfloat16, device)
    linear.store(0, torch.randn(160, 1088, device=device))
    linear.deterministic = True
    x = torch.randn(70, 1088, device=device).bfloat16()
    together = linear(x, wide=True)
    for some in (slice(0, 1), slice(3, 6), slice(60, 70)):
        assert linear(x[some], wide=True).equal(together[some])


@pytest.mark.parametrize("fmt", (INT8, INT4), ids=lambda fmt: fmt.name)
def test_blocks_of_a_checkpoint_are_the_same_weights_row_by_row(device, fmt):
    blocks, scale = fmt.pack(torch.randn(96, 192))
    linear = DeviceLinear(192, 96, torch.float32, device, fmt)
    linear.store_blocks(0, blocks.to(device))
    if scale is not None:
        linear.store_scale(0, scale.to(device))
    assert linear.unpack(slice(None)).cpu().equal(fmt.unpack(blocks, scale))
    ids = torch.tensor([3, 95, 3], device=device)
    assert linear.rows(ids).cpu().equal(fmt.unpack(blocks, scale)[ids.cpu()])


def test_kernels_compile_for_hopper_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-m", "tests.kernels.products_on_hopper"], env=environment, capture_output=True,
                         text=True)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
