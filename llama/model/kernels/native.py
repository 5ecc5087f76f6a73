"""The kernels in C, compiled for this machine by its own compiler when they are first needed, and kept.

Without a compiler, or on a processor without the instructions, `library` gives None and `why_not` says why: the
definitions in PyTorch then do the work. LLAMA_KERNELS=torch in the environment asks for that, LLAMA_KERNELS=vectors for
kernels that leave the matrix unit alone, LLAMA_KERNELS=triton for those of `llama.model.kernels.gpu` instead.
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

from llama.model.cache import KVCache
from llama.model.formats import BLOCK_ROWS, INT4, Format
from llama.model.ragged import Queries

SOURCES = tuple(Path(__file__).with_name(f"{name}.c") for name in ("linear", "pack", "attention", "elementwise", "blocks"))
HEADERS = tuple(Path(__file__).with_name(f"{name}.h") for name in ("kernels", "vectors"))
REQUIRED = ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16")
# Without contraction: what a definition multiplies and then adds is rounded twice here too.
_FLAGS = ("-O3", "-march=native", "-ffp-contract=off", "-fopenmp", "-shared", "-fPIC")
VECTORS, TILES = 0, 1
_PACKED_KINDS = (torch.float32, torch.bfloat16, torch.float16)  # as pack.c counts them
LANES = 16
# From so many rows on, int4's tiles are ahead of its vectors (benchmarks/README.md); in the other formats they always are.
INT4_TILE_ROWS = 17


class _Product(ctypes.Structure):
    """As in kernels.h."""

    _fields_ = [("format", ctypes.c_int32), ("kernel", ctypes.c_int32), ("threads", ctypes.c_int32),
                ("x_wide", ctypes.c_int32), ("y_wide", ctypes.c_int32),
                ("rows", ctypes.c_int64), ("outs", ctypes.c_int64), ("ins", ctypes.c_int64),
                ("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("x", ctypes.c_void_p),
                ("y", ctypes.c_void_p), ("scratch", ctypes.c_void_p)]


class Attention(ctypes.Structure):
    """As in kernels.h."""

    _fields_ = [("kind", ctypes.c_int32), ("threads", ctypes.c_int32),
                *((name, ctypes.c_int64) for name in ("queries", "num_heads", "num_kv_heads", "head_dim")),
                *((name, ctypes.c_void_p) for name in ("q", "out", "keys", "values", "key_scale", "value_scale", "rows",
                                                       "first", "length", "slots", "scratch"))]


def attention(q: Tensor, out: Tensor, cache: KVCache, layer: int, queries: Queries) -> None:
    """`llama.model.attention.attend` of some tokens, each over its own context in the cache: q and out are [tokens,
    num_heads, head_dim], bfloat16, of which the rows of `queries` are read and written. Only where `library()` is not
    None, head_dim a multiple of 32."""
    q = q.contiguous()
    call = attention_call(cache, layer, queries, q.shape[1])
    call.q, call.out = q.data_ptr(), out.data_ptr()
    reference = ctypes.byref(call)
    scratch = torch.empty(library().attention_scratch(reference))
    call.scratch = scratch.data_ptr()
    library().attention(reference)


def attention_call(cache: KVCache, layer: int, queries: Queries, num_heads: int) -> Attention:
    """What is asked of `attention`, without where q lies, where the result goes, and the scratch memory."""
    keys, values = cache.keys[layer], cache.values[layer]
    scales = [None if all_scales is None else all_scales[layer].data_ptr()
              for all_scales in (cache.key_scales, cache.value_scales)]
    return Attention(int(keys.dtype == torch.int8), torch.get_num_threads(), len(queries.rows), num_heads, *keys.shape[1:],
                     None, None, keys.data_ptr(), values.data_ptr(), *scales, queries.rows.data_ptr(),
                     queries.first.data_ptr(), queries.length.data_ptr(), queries.slots.data_ptr(), None)


def product(x: Tensor, blocks: Tensor, scale: Tensor | None, fmt: Format, *, wide: bool = False) -> Tensor:
    """`Format.multiply` by the compiled kernels: [rows, in_features], bfloat16 or float32 -> [rows, out_features] in x's
    dtype, or in float32 if `wide`. Only where `library()` is not None."""
    rows, in_features = x.shape
    out_features = len(blocks) * BLOCK_ROWS
    x = x.contiguous()
    y = torch.empty(rows, out_features, dtype=torch.float32 if wide else x.dtype)
    if rows == 0:  # the matrix unit knows no empty tile
        return y
    call = _Product(fmt.code, kernel_for(fmt, rows), torch.get_num_threads(), x.dtype == torch.float32,
                    y.dtype == torch.float32, rows, out_features, in_features, blocks.data_ptr(),
                    None if scale is None else scale.data_ptr(), x.data_ptr(), y.data_ptr(), None)
    reference = ctypes.byref(call)
    scratch = torch.empty(library().scratch_bytes(reference), dtype=torch.uint8)
    call.scratch = scratch.data_ptr()
    library().product(reference)
    return y


def pack(weight: Tensor, fmt: Format, blocks: Tensor, scale: Tensor | None) -> None:
    """`Format.pack` by the compiled kernel, in the calling thread alone, into blocks [rows / 16, block_bytes], uint8, and
    scale [rows], float32. weight: [rows, columns], float32, bfloat16 or float16. Only where `library()` is not None."""
    weight = weight.contiguous()
    library().pack(fmt.code, _PACKED_KINDS.index(weight.dtype), weight.data_ptr(), *weight.shape, blocks.shape[1],
                   blocks.data_ptr(), None if scale is None else scale.data_ptr())


def serves(x: Tensor) -> bool:
    """Whether the element-wise kernels compute what is done to this: bfloat16 on the CPU, whole vectors, no gradient."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and x.shape[-1] % LANES == 0 \
        and not (x.requires_grad and torch.is_grad_enabled()) and library() is not None


def norm_scale(x: Tensor, eps: float) -> Tensor:
    """`llama.model.elementwise.norm_scale`, where `serves(x)`."""
    rows, size = x.shape
    x, scale = x.contiguous(), torch.empty(rows, 1)
    library().norm_scale(x.data_ptr(), scale.data_ptr(), rows, size, eps, torch.get_num_threads())
    return scale


def normalise(x: Tensor, scale: Tensor, weight: Tensor) -> Tensor:
    """`llama.model.elementwise.normalise`, where `serves(x)`."""
    x, scale, y = x.contiguous(), scale.contiguous(), torch.empty(x.shape, dtype=x.dtype)
    library().normalise(x.data_ptr(), scale.data_ptr(), weight.data_ptr(), y.data_ptr(), *x.shape, torch.get_num_threads())
    return y


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`llama.model.elementwise.swiglu`, where `serves(gate)`."""
    if gate.stride() != up.stride() or gate.stride(1) != 1:
        gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty(gate.shape, dtype=gate.dtype)
    library().swiglu(gate.data_ptr(), up.data_ptr(), y.data_ptr(), *gate.shape, gate.stride(0), torch.get_num_threads())
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """`llama.model.rope.rotate`, where `serves(x)` and head_dim is a multiple of 32."""
    rows, heads, head_dim = x.shape
    if x.stride()[1:] != (head_dim, 1):
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype)
    library().rotate(x.data_ptr(), cos.data_ptr(), sin.data_ptr(), y.data_ptr(), rows, heads, head_dim // 2, x.stride(0),
                     torch.get_num_threads())
    return y


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


def library() -> ctypes.CDLL | None:
    """The compiled kernels; None where there are none."""
    return _loaded()[0]


def why_not() -> str | None:
    """Why there are no compiled kernels, and what would change that; None if there are."""
    return _loaded()[1]


@functools.cache
def _loaded() -> tuple[ctypes.CDLL | None, str | None]:
    """The compiled kernels, or why there are none."""
    if (wanted := os.environ.get("LLAMA_KERNELS")) in ("torch", "triton"):
        return None, f"LLAMA_KERNELS={wanted} in the environment asks for none"
    missing = [name for name in REQUIRED if name not in _processor().split()]
    if platform.machine() != "x86_64" or missing:
        return None, f"the processor lacks {', '.join(missing) or 'x86-64'}"
    if _compiler() is None:
        return None, "no C compiler is installed; install gcc or clang"
    try:
        loaded = ctypes.CDLL(str(_build()))  # with the OpenMP that torch has loaded: one pool of threads
    except subprocess.CalledProcessError as error:
        return None, f"{_compiler()} failed: {' '.join(error.stderr.split())[:300]}"
    except OSError as error:
        return None, f"what {_compiler()} makes cannot be kept or loaded: {error}"
    pointer, size, threads = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32
    for name, types in {"pack": (ctypes.c_int32, ctypes.c_int32, pointer, size, size, size, pointer, pointer),
                        "norm_scale": (pointer, pointer, size, size, ctypes.c_float, threads),
                        "normalise": (pointer, pointer, pointer, pointer, size, size, threads),
                        "swiglu": (pointer, pointer, pointer, size, size, size, threads),
                        "rotate": (pointer, pointer, pointer, pointer, size, size, size, size, threads)}.items():
        getattr(loaded, name).argtypes = types
    for name in ("pack", "product", "attention", "norm_scale", "normalise", "swiglu", "rotate", "blocks"):
        getattr(loaded, name).restype = None
    loaded.scratch_bytes.restype = loaded.attention_scratch.restype = loaded.blocks_scratch.restype = size
    return loaded, None


def _build() -> Path:
    """The shared library for this source, compiler and processor, compiled if it is not in the cache."""
    parts = (*(source.read_text() for source in (*SOURCES, *HEADERS)), _compiler() or "", " ".join(_FLAGS), _processor(),
             torch.__version__)
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
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-runtime"
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.access(cache, os.W_OK) and cache.stat().st_uid == os.getuid():
            return cache
    except (OSError, RuntimeError):  # RuntimeError: a user without a home
        pass
    return Path(_own_directory().name)


@functools.cache
def _own_directory() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="llama-kernels-")


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
