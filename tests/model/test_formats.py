"""The weight formats: their numbers in float64, written anew here; their bytes, one by one; what fits them at all."""

import pytest
import torch
from torch import Tensor

from llama.model.formats import BF16, FORMATS, INT4, INT8, exact_product, fits
from llama.model.linear import Linear, PackedLinear, make_linear

EVERY = pytest.mark.parametrize("fmt", FORMATS.values(), ids=FORMATS.keys())
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def weights(rows: int = 64, columns: int = 128, seed: int = 0) -> Tensor:
    """Rows of every kind: ordinary, of zeros, of one value, with an outlier, tiny, huge, and of one sign."""
    w = torch.randn(rows, columns, generator=generator(seed)) * columns ** -0.5
    w[1] = 0
    w[2] = 0.375
    w[3] = -0.1
    w[4, 7] = 40.0
    w[5] *= 1e-6
    w[6] *= 2e3
    w[7] = w[7].abs() + 1
    w[8, :32] = 0  # one group of a row
    return w


def packed(fmt, w: Tensor) -> Tensor:
    """The weights after rounding, float64."""
    return fmt.unpack(*fmt.pack(w)).double()


# ---- what the weights become ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bf16_is_the_weights_rounded_to_nearest(dtype):
    w = weights().to(dtype)
    assert packed(BF16, w).equal(w.bfloat16().double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_is_the_nearest_of_255_steps_that_end_at_the_rows_largest(dtype):
    w = weights().to(dtype)
    exact = w.double()
    step = exact.abs().amax(dim=1, keepdim=True) / 127
    found = packed(INT8, w)
    assert ((found - exact).abs() <= step * 0.50001).all()
    multiples = found / torch.where(step > 0, step, 1)
    assert (multiples - multiples.round()).abs().max() < 1e-4
    assert multiples.round().abs().amax(dim=1).tolist() == [0 if row == 1 else 127 for row in range(len(w))]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int4_is_the_nearest_of_16_values_of_each_group(dtype):
    w = weights().to(dtype)
    groups, found = w.double().unflatten(1, (-1, 32)), packed(INT4, w).unflatten(1, (-1, 32))
    assert found.isfinite().all()
    assert max(len(group.unique()) for group in found.flatten(0, 1)) == 16
    least, most = groups.amin(dim=2, keepdim=True), groups.amax(dim=2, keepdim=True)
    # float16 holds the ends to 11 bits, or to 6e-8 near zero. A range is narrowed by a tenth at either end at most.
    slack = torch.maximum(least.abs(), most.abs()) * 2**-10 + 1e-6
    inside = (groups > least + 0.1 * (most - least)) & (groups < most - 0.1 * (most - least))
    assert (((found - groups).abs() <= (most - least) / 30 + slack) | ~inside).all()
    assert ((found - groups).abs() <= 0.1 * (most - least) + (most - least) / 30 + slack).all()


def test_int4_has_the_least_square_error_of_the_ranges_that_it_may_choose():
    groups = weights(64, 256, seed=1).double().view(-1, 32)
    found = packed(INT4, groups.view(64, 256)).view(-1, 32)
    error = (found - groups).square().sum(dim=1)
    least, most = groups.amin(dim=1, keepdim=True), groups.amax(dim=1, keepdim=True)
    errors = []
    for share in (1.0, 0.95, 0.9, 0.85, 0.8):
        scale = ((most - least) * share / 15).half().double()
        low = (least + (most - least) * (1 - share) / 2).half().double()
        steps = ((groups - low) / torch.where(scale > 0, scale, 1)).round().clamp(0, 15)
        errors.append((steps * scale + low - groups).square().sum(dim=1))
    best = torch.stack(errors).amin(dim=0)
    assert torch.allclose(error, best, rtol=1e-3, atol=1e-12)
    assert (error < errors[0] * 0.95).sum() > len(groups) / 4  # where the whole range would have been worse


@EVERY
def test_constant_rows_and_zeros_are_kept(fmt):
    found = packed(fmt, weights())
    assert (found[1] == 0).all()
    assert torch.equal(found[2], torch.full_like(found[2], 0.375))
    assert ((found[3] + 0.1).abs() < 2e-4).all()
    if fmt is INT4:
        assert (found[8, :32] == 0).all()


def test_an_outlier_costs_int4_its_own_group_and_int8_the_row():
    w = weights()
    plain, exact = torch.cat([w[4, :32], w[4, 32:]]), w[4].double()
    for fmt, others in ((INT4, slice(32, None)), (INT8, slice(0, None))):
        error = (packed(fmt, w)[4] - exact).abs()
        assert (error[7] < 4.2) and (error[others].max() < 0.02) == (fmt is INT4), fmt.name
    assert plain.abs().max() == 40


def test_rounding_again_what_was_rounded_changes_no_bf16_and_no_int8():
    for fmt in (BF16, INT8):
        once = packed(fmt, weights())
        assert torch.allclose(packed(fmt, once.float()), once, rtol=1e-6, atol=0), fmt.name


# ---- how they lie --------------------------------------------------------------------------------------------------


def test_bf16_blocks_byte_by_byte():
    """16 rows × 2 columns are 64 bytes."""
    w = torch.arange(32 * 64).view(32, 64).remainder(251).float()
    blocks, scale = BF16.pack(w)
    assert scale is None and blocks.shape == (2, 16 * 64 * 2) and blocks.dtype == torch.uint8
    for block, column, row in ((0, 0, 0), (0, 1, 0), (0, 0, 1), (1, 63, 15), (1, 34, 6)):
        at = (column // 2) * 64 + row * 4 + column % 2 * 2
        expected = w[block * 16 + row, column].bfloat16().view(torch.int16).item()
        assert int.from_bytes(bytes(blocks[block, at:at + 2].tolist()), "little") == expected


def test_int8_blocks_byte_by_byte():
    """16 rows × 4 columns are 64 bytes, each the weight plus 128."""
    w = torch.randint(-127, 128, (32, 64), generator=generator(0)).float()
    w[:, 5] = 127  # so that every scale is 1 and the numbers are the weights
    blocks, scale = INT8.pack(w)
    assert blocks.shape == (2, 16 * 64) and scale.equal(torch.ones(32))
    expected = bytearray(2 * 16 * 64)
    for row in range(32):
        for column in range(64):
            expected[row // 16 * 1024 + column // 4 * 64 + row % 16 * 4 + column % 4] = int(w[row, column]) + 128
    assert bytes(blocks.flatten().tolist()) == expected


def test_int4_blocks_byte_by_byte():
    """A group of 16 rows × 32 columns: 256 bytes of nibbles, columns 0 to 15 low and 16 to 31 high; 16 scales; 16 lows."""
    q = torch.randint(0, 16, (32, 64), generator=generator(0))
    q[:, 0::32], q[:, 1::32] = 0, 15  # so that the range is the whole one
    low = torch.arange(64).view(32, 2) / 4 - 3.0
    scale = torch.where(torch.arange(64).view(32, 2) % 3 == 0, 0.5, 2.0)
    w = (q.view(32, 2, 32) * scale[..., None] + low[..., None]).flatten(1)
    blocks, none = INT4.pack(w)
    assert none is None and blocks.shape == (2, 2 * 320)
    expected = bytearray(2 * 2 * 320)
    for row in range(32):
        for group in range(2):
            at = row // 16 * 640 + group * 320
            for column in range(16):
                place = at + column // 4 * 64 + row % 16 * 4 + column % 4
                expected[place] = int(q[row, group * 32 + column]) | int(q[row, group * 32 + 16 + column]) << 4
            for base, value in ((256, scale), (288, low)):
                half = value[row, group].half().view(torch.int16).item() & 0xFFFF
                expected[at + base + row % 16 * 2:at + base + row % 16 * 2 + 2] = half.to_bytes(2, "little")
    assert bytes(blocks.flatten().tolist()) == expected
    assert INT4.unpack(blocks, None).equal(w)


@EVERY
def test_blocks_are_of_the_size_that_is_said_and_may_be_packed_one_by_one(fmt):
    w = weights(96, 192)
    blocks, scale = fmt.pack(w)
    assert blocks.shape == (6, fmt.block_bytes(192)) and (scale is not None) == fmt.has_scale
    parts = [fmt.pack(rows) for rows in w.split(16)]
    assert torch.cat([part for part, _ in parts]).equal(blocks)
    assert scale is None or torch.cat([part for _, part in parts]).equal(scale)
    bits = {"bf16": 16, "int8": 8, "int4": 5}[fmt.name]
    assert blocks.nbytes == w.numel() * bits / 8


# ---- what a product is ---------------------------------------------------------------------------------------------


def rounded_x(fmt, x: Tensor) -> Tensor:
    """x as the format rounds it, [tokens, in_features], float64. What lies amid two steps goes where 127 / largest,
    rounded to float32, sends it."""
    if fmt is BF16:
        return x.bfloat16().double()
    groups = x.float().unflatten(1, (-1, 32 if fmt is INT4 else x.shape[1]))
    largest = groups.abs().amax(dim=2, keepdim=True)
    steps = (groups * (127 / largest.double()).float()).nan_to_num(0).round()
    assert steps.abs().amax() == 127
    return (steps.double() * largest.double() / 127).flatten(1)


def inputs(tokens: int, columns: int) -> Tensor:
    x = torch.randn(tokens, columns, generator=generator(2))
    x[0] = 0
    x[1, 3] = 500.0
    x[2] *= 1e-4
    return x


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_product_is_that_of_the_rounded_numbers(fmt, dtype):
    w, x = weights(96, 192), inputs(21, 192).to(dtype)
    found = fmt.multiply(x, *fmt.pack(w))
    assert (found.shape, found.dtype) == ((21, 96), torch.float32)
    expected = rounded_x(fmt, x) @ packed(fmt, w).T
    size = rounded_x(fmt, x).abs() @ packed(fmt, w).abs().T
    assert ((found - expected).abs() <= 1e-5 * size).all()


def test_integer_sums_are_exact_where_float32_would_round():
    x = torch.full((1, 4096), 127, dtype=torch.int8)
    w = torch.full((1, 4096), 127, dtype=torch.int8)
    w[0, -1] = 126
    assert exact_product(x, w).item() == torch.tensor(127 * (4095 * 127 + 126)).float().item()
    assert exact_product(x[:, :1040], w[:, :1040]).item() == 1040 * 127 * 127
    g = generator(4)
    x, w = (torch.randint(90, 128, (40, 3000), generator=g, dtype=torch.int8) for _ in range(2))
    assert exact_product(x, w).equal((x.long() @ w.long().T).float())


# ---- what fits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, columns, is_packed", [
    (32, 64, True), (96, 192, True), (128256, 4096, True), (16, 64, False), (48, 64, False), (33, 64, False),
    (32, 32, False), (32, 96, False), (32, 65, False)])
def test_a_matrix_that_is_not_whole_blocks_is_kept_as_it_is(rows, columns, is_packed):
    assert fits(rows, columns) == is_packed
    if rows < 1000:
        linear = make_linear(columns, rows, dtype=torch.bfloat16, device="cpu", fmt="int8")
        assert isinstance(linear, PackedLinear if is_packed else Linear)
        assert linear.num_bytes == (rows * columns + 4 * rows if is_packed else 2 * rows * columns)


def test_joined_matrices_are_packed_only_if_each_is_whole_blocks():
    for parts, kind in (((16, 8, 8), Linear), ((32, 32), PackedLinear), ((48, 48), Linear)):
        assert isinstance(make_linear(64, *parts, dtype=torch.float32, device="cpu", fmt="bf16"), kind), parts
