"""Products in Triton's kernels against their definitions."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from llama.model.device_linear import DeviceLinear
from llama.model.formats import DEVICE_FORMATS, FP8, GROUP, INT4, INT8, exact_product, quantise_fp8, quantise_int8
from llama.model.kernels import gpu, products
from llama.model.linear import Linear

# outs, ins: less than a tile, several, no whole number of them; the last is cut into parts.
SHAPES = ((64, 64), (96, 256), (272, 320), (160, 2112))
ROWS = (1, 2, 3, 16, 17, 40)
EACH = pytest.mark.parametrize("fmt", DEVICE_FORMATS.values(), ids=DEVICE_FORMATS.keys())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """What `torch.empty` gives is NaN, or the largest integer: an element that no kernel writes is seen."""
    empty = torch.empty

    def poison(*args, **kwargs):
        made = empty(*args, **kwargs)
        if made.dtype == torch.float8_e4m3fn:
            made.view(torch.uint8).fill_(127)  # its NaN
            return made
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
@pytest.mark.parametrize("fixed", (False, True))
def test_int4_is_the_definition_to_rounding(device, shape, rows, fixed):
    linear, x = quantised(INT4, *shape, device), torch.randn(rows, shape[1], device=device)
    linear.deterministic = fixed
    q, scale = quantise_int8(x.unflatten(1, (-1, GROUP)))
    expected = (q.double() * scale.double()[..., None]).flatten(1) @ linear.unpack(slice(None)).double().t()
    torch.testing.assert_close(linear(x).double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("fixed", (False, True))
def test_fp8_is_the_definition_to_rounding(device, shape, rows, fixed):
    """A tensor core's own sums have some 14 bits."""
    linear, x = quantised(FP8, *shape, device), torch.randn(rows, shape[1], device=device)
    linear.deterministic = fixed
    q, scale = quantise_fp8(x)
    expected = q.double() @ linear.weight.double().t() * scale.double()[:, None] * linear.scale.double()
    assert (linear(x) - expected).norm() < (1e-3 if x.is_cuda else 1e-5) * expected.norm()


@pytest.mark.parametrize("group", (GROUP, 320))
def test_rounding_to_int8_is_the_definition_bit_by_bit(device, group):
    x = torch.randn(5, 320, device=device)
    x[1], x[2, 7], x[3] = 0, 1e4, x[3] * 1e-6
    q, scale = products.quantise(x, torch.int8, group)
    expected, expected_scale = quantise_int8(x.unflatten(1, (-1, group)))
    assert q.equal(expected.flatten(1)) and scale.equal(expected_scale)


def test_rounding_to_fp8_is_the_definition_bit_by_bit(device):
    x = torch.randn(5, 320, device=device)
    x[1], x[2, 7], x[3] = 0, 1e4, x[3] * 1e-6
    q, scale = products.quantise(x, torch.float8_e4m3fn, 320)
    expected, expected_scale = quantise_fp8(x)
    assert scale[:, 0].equal(expected_scale)
    assert q.view(torch.uint8).equal(expected.view(torch.uint8))


@EACH
@pytest.mark.parametrize("rows", (1, 5))
def test_without_kernels_the_definition_multiplies(device, fmt, rows, monkeypatch):
    linear, x = quantised(fmt, 96, 256, device), torch.randn(rows, 256, device=device)
    found = linear(x)
    monkeypatch.setattr(gpu, "serves", lambda x: False)
    expected = F.linear(x, linear.unpack(slice(None)))
    assert 0 < (linear(x) - expected).norm() < 0.05 * expected.norm()  # x is rounded as well
    assert (linear(x) - found).norm() < (1e-3 if x.is_cuda else 1e-5) * expected.norm()


@pytest.mark.parametrize("kind", ("bf16", *DEVICE_FORMATS))
def test_a_deterministic_row_is_the_same_bits_in_any_company(device, kind):
    if kind == "bf16":
        linear = Linear(2112, 160, torch.bfloat16, device)
        linear.store(0, torch.randn(160, 2112, device=device))
    else:
        linear = quantised(DEVICE_FORMATS[kind], 160, 2112, device)
    linear.deterministic = True
    x = torch.randn(40, 2112, device=device).bfloat16()
    together = linear(x, wide=True)
    for some in (slice(0, 1), slice(3, 6), slice(20, 36)):
        assert linear(x[some], wide=True).equal(together[some])


@EACH
def test_y_is_in_the_dtype_of_x_or_wide(device, fmt):
    linear, x = quantised(fmt, 96, 256, device), torch.randn(3, 256, device=device).bfloat16()
    assert (linear(x).dtype, linear(x, wide=True).dtype) == (torch.bfloat16, torch.float32)
    assert (linear(x).float() - linear(x, wide=True)).abs().max() < 0.01 * linear(x, wide=True).abs().max()
    assert linear(x[:0]).shape == (0, 96)


@EACH
def test_gradients_of_x_are_those_of_the_rounded_weights(device, fmt):
    linear = quantised(fmt, 96, 256, device)
    x = torch.randn(5, 256, device=device, requires_grad=True)
    linear(x).sum().backward()
    torch.testing.assert_close(x.grad, linear.unpack(slice(None)).sum(dim=0).expand(5, -1), rtol=1e-4, atol=1e-4)


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


def test_fp8_rows_are_the_nearest_of_its_values(device):
    w = torch.randn(96, 192, device=device)
    linear = DeviceLinear(192, 96, torch.float32, device, FP8)
    linear.store(32, w[32:])
    linear.store(0, w[:32])
    found = linear.rows(torch.arange(96, device=device))
    assert ((found - w).abs() <= w.abs() / 16 + w.abs().amax(dim=1, keepdim=True) / 448 * 2**-10).all()
    assert linear.num_bytes == 96 * 192 + 96 * 4


def test_kernels_compile_for_hopper_without_spills():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    ran = subprocess.run([sys.executable, "-m", "tests.kernels.products_on_hopper"], env=environment, capture_output=True,
                         text=True)
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
