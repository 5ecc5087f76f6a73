"""The kernels in C, compiled for this machine by its own compiler when they are first needed, and kept.

Without a compiler, or on a processor without the instructions, `library` gives None and `why_not` says why: the
definitions in PyTorch then do the work. LLAMA_KERNELS=torch in the environment asks for that, LLAMA_KERNELS=vectors for
kernels that leave the matrix unit alone.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from llama.model.formats import BLOCK_ROWS, INT4, Format

SOURCES = tuple(Path(__file__).with_name(name) for name in ("linear.c", "pack.c"))
REQUIRED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16")
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
VECTORS, TILES = 0, 1
# From so many rows on, int4's tiles are ahead of its vectors (benchmarks/README.md); in the other formats they always are.
INT4_TILE_ROWS = 17


class _Product(ctypes.Structure):
    """As in linear.c."""

    _fields_ = [("format", ctypes.c_int32), ("kernel", ctypes.c_int32), ("threads", ctypes.c_int32),
                ("x_wide", ctypes.c_int32), ("y_wide", ctypes.c_int32),
                ("rows", ctypes.c_int64), ("outs", ctypes.c_int64), ("ins", ctypes.c_int64),
                ("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("x", ctypes.c_void_p),
                ("y", ctypes.c_void_p), ("scratch", ctypes.c_void_p)]


def product(x: Tensor, blocks: Tensor, scale: Tensor | None, fmt: Format, *, wide: bool = False) -> Tensor:
    """`Format.multiply` by the compiled kernels: [rows, in_features], bfloat16 or float32 -> [rows, out_features] in x's
    dtype, or in float32 if `wide`. Only where `library()` is not None."""
    rows, in_features = x.shape
    out_features = len(blocks) * BLOCK_ROWS
    x = x.contiguous()
    y = torch.empty(rows, out_features, dtype=torch.float32 if wide else x.dtype)
    call = _Product(fmt.code, kernel_for(fmt, rows), torch.get_num_threads(), x.dtype == torch.float32,
                    y.dtype == torch.float32, rows, out_features, in_features, blocks.data_ptr(),
                    None if scale is None else scale.data_ptr(), x.data_ptr(), y.data_ptr(), None)
    reference = ctypes.byref(call)
    scratch = torch.empty(library().scratch_bytes(reference), dtype=torch.uint8)
    call.scratch = scratch.data_ptr()
    library().product(reference)
    return y


def pack(weight: Tensor, fmt: Format) -> tuple[Tensor, Tensor | None]:
    """`Format.pack` by the compiled kernel, in the calling thread alone. Only where `library()` is not None."""
    rows, columns = weight.shape
    weight = weight.float().contiguous()
    blocks = torch.empty(rows // BLOCK_ROWS, fmt.block_bytes(columns), dtype=torch.uint8)
    scale = torch.empty(rows) if fmt.has_scale else None
    pointer, size = ctypes.c_void_p, ctypes.c_int64
    library().pack(fmt.code, pointer(weight.data_ptr()), size(rows), size(columns), size(blocks.shape[1]),
                   pointer(blocks.data_ptr()), pointer(None if scale is None else scale.data_ptr()))
    return blocks, scale


def kernel_for(fmt: Format, rows: int) -> int:
    """Which kernel is the fastest for so many rows of x."""
    if not has_tiles() or (fmt is INT4 and rows < INT4_TILE_ROWS):
        return VECTORS
    return TILES


@functools.cache
def has_tiles() -> bool:
    """Whether there is a matrix unit (AMX), and this process may use it."""
    wanted = os.environ.get("LLAMA_KERNELS") != "vectors"
    return wanted and library() is not None and bool(library().tiles_allowed())


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none."""
    if why_not() is not None:
        return None
    loaded = ctypes.CDLL(str(_build()))  # with the OpenMP that torch has loaded: one pool of threads
    loaded.scratch_bytes.restype = ctypes.c_int64
    loaded.product.restype = loaded.pack.restype = None
    return loaded


@functools.cache
def why_not() -> str | None:
    """Why there are no compiled kernels; None if there are."""
    if os.environ.get("LLAMA_KERNELS") == "torch":
        return "LLAMA_KERNELS=torch asks for none"
    missing = [name for name in REQUIRED if name not in _processor().split()]
    if platform.machine() != "x86_64" or missing:
        return f"the processor lacks {', '.join(missing) or 'x86-64'}"
    if _compiler() is None:
        return "no C compiler is installed (gcc, clang or cc)"
    try:
        _build()
    except (subprocess.CalledProcessError, OSError) as error:
        return f"the C compiler failed: {(getattr(error, 'stderr', None) or str(error)).strip()[:300]}"
    return None


def _build() -> Path:
    """The shared library for this source, compiler and processor, compiled if it is not in the cache."""
    parts = (*(source.read_text() for source in SOURCES), _compiler() or "", " ".join(_FLAGS), _processor(), torch.__version__)
    name = f"kernels-{hashlib.sha256(chr(0).join(parts).encode()).hexdigest()[:16]}.so"
    target = _cache() / name
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=target.parent) as directory:
            built = Path(directory) / name
            subprocess.run([_compiler(), *_FLAGS, *map(str, SOURCES), "-o", str(built)], check=True, capture_output=True,
                           text=True)
            built.replace(target)  # whole or not at all, whoever else compiles
    return target


def _cache() -> Path:
    """Where compiled kernels are kept: the user's own cache, or a directory for this process if that cannot be written."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-runtime"
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(cache, os.W_OK) and cache.stat().st_uid == os.getuid():
            return cache
    except OSError:
        pass
    return _own_directory()


@functools.cache
def _own_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="llama-kernels-"))


def _compiler() -> str | None:
    return next((found for name in ("gcc", "cc", "clang") if (found := shutil.which(name))), None)


@functools.cache
def _processor() -> str:
    """The processor's flags, as Linux tells them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2] for line in lines if line.startswith("flags")), "")
