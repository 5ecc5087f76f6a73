"""The compiled kernels against the definitions: every format and kernel, any number of rows, the same bits in any company."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from llama.model.formats import BF16, FORMATS, INT4, INT8
from llama.model.kernels import native
from llama.model.linear import PackedLinear
from tests.model.test_formats import EVERY, generator, weights
from tests.needs import needs_kernels

ROWS = (1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 32, 33, 40, 64, 65, 130)
# out_features, in_features: the least, more blocks than a thread takes, an odd number of them, long rows.
SHAPES = ((32, 64), (320, 128), (608, 192), (64, 2112))
X_DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)

pytestmark = needs_kernels


@pytest.fixture(params=[native.VECTORS, native.TILES], ids=["vectors", "tiles"])
def kernel(request, monkeypatch):
    """Each kernel in turn, whatever would be chosen; on a machine without a matrix unit, the one that it has."""
    if request.param == native.TILES and not native.has_tiles():
        monkeypatch.setattr(native, "kernel_for", lambda fmt, rows: native.VECTORS)
    else:
        monkeypatch.setattr(native, "kernel_for", lambda fmt, rows: request.param)


def inputs(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of x: one with an outlier, one small, one of zeros if there are so many."""
    x = torch.randn(rows, columns, generator=generator(rows))
    x[0, 3] = 30.0
    x[1:2] *= 1e-4
    x[2:3] = 0
    return x.to(dtype)


def definition(fmt, x: Tensor, blocks: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the format says, float32, and the sum of its terms' sizes, by which roundings are measured."""
    return fmt.multiply(x, blocks, scale), x.float().abs() @ fmt.unpack(blocks, scale).abs().T


# ---- products ------------------------------------------------------------------------------------------------------


@EVERY
@X_DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_product_is_that_of_the_definition(fmt, dtype, shape, kernel):
    blocks, scale = fmt.pack(weights(*shape))
    for rows in ROWS:
        x = inputs(rows, shape[1], dtype)
        expected, size = definition(fmt, x, blocks, scale)
        found = native.product(x, blocks, scale, fmt, wide=True)
        assert (found.shape, found.dtype) == ((rows, shape[0]), torch.float32)
        if fmt is INT8:
            assert found.equal(expected), rows
        else:
            assert ((found - expected).abs() <= 1e-5 * size).all(), rows
        assert native.product(x, blocks, scale, fmt).equal(found.to(dtype)), rows


@EVERY
def test_no_rows_are_no_product(fmt, kernel):
    blocks, scale = fmt.pack(weights())
    assert native.product(torch.empty(0, 128), blocks, scale, fmt).shape == (0, 64)


@EVERY
def test_x_may_lie_scattered_in_memory(fmt):
    blocks, scale = fmt.pack(weights())
    x = inputs(128, 9)
    assert not x.T.is_contiguous()
    assert native.product(x.T, blocks, scale, fmt).equal(native.product(x.T.contiguous(), blocks, scale, fmt))


@EVERY
@X_DTYPES
def test_a_row_is_the_same_bits_in_any_company_and_by_any_number_of_threads(fmt, dtype):
    blocks, scale = fmt.pack(weights(608, 192))
    x = inputs(130, 192, dtype)
    alone = [native.product(row, blocks, scale, fmt) for row in x.split(1)]
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for first, end in ((0, 130), (0, 2), (5, 21), (17, 34), (90, 130)):
                together = native.product(x[first:end], blocks, scale, fmt)
                assert together.equal(torch.cat(alone[first:end])), (count, first, end)
    finally:
        torch.set_num_threads(threads)


@EVERY
def test_packed_linear_is_the_kernels_product_with_all_its_rows(fmt):
    linear = PackedLinear(192, 608, torch.bfloat16, fmt)
    linear.store(0, weights(608, 192))
    x = inputs(40, 192, torch.bfloat16)
    blocks, scale = fmt.pack(weights(608, 192))
    assert linear(x, wide=True).equal(native.product(x, blocks, scale, fmt, wide=True))
    assert linear(x).equal(linear(x, wide=True).bfloat16())


# ---- packing -------------------------------------------------------------------------------------------------------


def packed(w, fmt):
    """Blocks and scales by the kernel."""
    blocks = torch.full((len(w) // 16, fmt.block_bytes(w.shape[1])), 77, dtype=torch.uint8)
    scale = torch.full((len(w),), torch.nan) if fmt.has_scale else None
    native.pack(w, fmt, blocks, scale)
    return blocks, scale


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packing_makes_the_bytes_of_the_definition(fmt, dtype):
    w = torch.cat([weights(512, 256, seed) * size for seed, size in enumerate((1e-4, 0.3, 5.0))]).to(dtype)
    expected, scales = fmt.pack(w)
    blocks, scale = packed(w, fmt)
    assert blocks.shape == expected.shape
    if fmt is not INT4:
        assert blocks.equal(expected) and (scale is None or scale.equal(scales))
        return
    # The kernel fuses multiplications and additions: an end of a range amid two float16 may be rounded the other way, and
    # of two ranges that are as good as each other the other be chosen.
    groups = w.float().view(-1, 32)
    found, wanted = (fmt.unpack(each, None).view(-1, 32) for each in (blocks, expected))
    errors = [(each - groups).double().square().sum(dim=1) for each in (found, wanted)]
    assert (found != wanted).any(dim=1).sum() <= len(groups) / 1000
    assert torch.allclose(*errors, rtol=0.1, atol=0)


def test_rows_are_stored_where_they_belong():
    w = weights(96, 64)
    for fmt in FORMATS.values():
        linear = PackedLinear(64, 96, torch.float32, fmt)
        for first in (64, 0, 32):
            linear.store(first, w[first:first + 32])
        blocks, scale = packed(w, fmt)
        assert linear.blocks.equal(blocks) and (scale is None or linear.scale.equal(scale))


# ---- which kernel --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("has_tiles", [False, True])
def test_the_matrix_unit_is_used_where_there_is_one_and_for_int4_from_many_rows_on(has_tiles, monkeypatch):
    monkeypatch.setattr(native, "has_tiles", lambda: has_tiles)
    for fmt in (BF16, INT8, INT4):
        for rows in (1, native.INT4_TILE_ROWS - 1, native.INT4_TILE_ROWS, 500):
            tiles = has_tiles and (fmt is not INT4 or rows >= native.INT4_TILE_ROWS)
            assert native.kernel_for(fmt, rows) == (native.TILES if tiles else native.VECTORS)


# ---- compiling, in processes of their own --------------------------------------------------------------------------

REPORT = "from llama.model.kernels import native; print(native.library() is not None, native.why_not())"


def start(script: str, **environment: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", script], env={**os.environ, **environment}, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def outcome(process: subprocess.Popen) -> str:
    out, err = process.communicate()
    assert process.returncode == 0, err
    return out.strip()


def test_two_processes_that_compile_at_once_keep_one_library(tmp_path):
    """While one compiles, what it has of the library is no library yet."""
    gcc = tmp_path / "gcc"
    gcc.write_text(f'#!/bin/sh\nfor last; do :; done\necho half > "$last"\nsleep 1\nexec {native._compiler()} "$@"')
    gcc.chmod(0o755)
    environment = {"XDG_CACHE_HOME": str(tmp_path), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    both = [start(REPORT, **environment) for _ in range(2)]
    assert [outcome(one) for one in both] == ["True None"] * 2
    [kept] = (tmp_path / "llama-runtime").iterdir()
    assert kept.name.startswith("kernels-") and kept.suffix == ".so"
    assert (tmp_path / "llama-runtime").stat().st_mode & 0o777 == 0o700
    made = kept.stat().st_mtime_ns
    assert outcome(start(REPORT, **environment)) == "True None"
    assert kept.stat().st_mtime_ns == made  # not compiled again


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "tmp").mkdir()
    process = start(REPORT, XDG_CACHE_HOME=str(tmp_path / "file"), TMPDIR=str(tmp_path / "tmp"))
    assert outcome(process) == "True None"
    assert not any((tmp_path / "tmp").iterdir())  # nothing is left behind


@pytest.mark.parametrize("compiler, reason", [
    (None, "False no C compiler is installed; install gcc or clang"),
    ("#!/bin/sh\necho 'no  room' >&2; exit 1", "False {gcc} failed: no room"),
    ("#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done; echo nothing > $1",
     "False what {gcc} makes cannot be kept or loaded: "),
])
def test_it_is_said_why_there_are_no_kernels(compiler, reason, tmp_path):
    gcc = tmp_path / "gcc"
    if compiler is not None:
        gcc.write_text(compiler)
        gcc.chmod(0o755)
    said = outcome(start(REPORT, PATH=str(tmp_path), XDG_CACHE_HOME=str(tmp_path / "cache")))
    assert said.startswith(reason.format(gcc=gcc)), said


def test_a_processor_without_the_instructions_has_none(monkeypatch):
    monkeypatch.setattr(native, "_processor", lambda: " ".join(native.REQUIRED[:-2]))
    assert native._loaded.__wrapped__() == (None, f"the processor lacks {', '.join(native.REQUIRED[-2:])}")


SAY = """
from llama import Llama, SamplingParams
from llama.model.kernels import native
llm = Llama.load(dtype="float32", quantize="FORMAT")
ids = llm.generate("The cat", SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)).ids
print(native.why_not(), *ids)
"""


@pytest.mark.parametrize("fmt", ["int8", "int4"])
def test_without_kernels_the_same_is_said(fmt):
    both = [start(SAY.replace("FORMAT", fmt)), start(SAY.replace("FORMAT", fmt), LLAMA_KERNELS="torch")]
    fast, plain = map(outcome, both)
    assert fast.startswith("None ") and fast.count(" ") == 24
    assert plain.removeprefix("LLAMA_KERNELS=torch in the environment asks for none ") == fast.removeprefix("None ")
