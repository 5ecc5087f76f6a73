"""From a checkpoint's directory to a model: everything checked first, then one pass over the files.

Tensors are read straight into their rows of the joined weights, or through a small buffer where the dtype, the
device or the format differs: so weights are packed and quantised while they are read. Nothing is memory-mapped:
mapped pages would count as the process's memory next to the weights, and a file that is cut short meanwhile would be a
bus error. No pickle is ever opened.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor, nn

from llama.checkpoint.layout import Place, match
from llama.checkpoint.safetensors import CheckpointError, StoredTensor, quoted, read_stored, tensor_bytes
from llama.config import DTYPE_BYTES, LlamaConfig
from llama.model.formats import BLOCK_ROWS, QUANTISED
from llama.model.kernels import native
from llama.model.device_linear import DeviceLinear
from llama.model.linear import PackedLinear, in_blocks
from llama.model.transformer import Llama
from llama.progress import ProgressBar, describe_bytes
from llama.strict_json import ConfigError

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
# What is read at a time. Small enough to be nothing beside the weights; large enough that neither the system call nor
# Python counts.
_PIECE_BYTES = 2 << 20
# The same where what is read is packed: within the processor's cache.
_PACKED_BYTES = 1 << 19
# As many pieces are read at once. More than processors: while some wait for the disk, others are packed.
_NUM_READERS = 8


@dataclass(frozen=True)
class _Piece:
    """Consecutive rows of a stored tensor, from byte `offset` of its file.

    target: the rows that they become; or, where those are packed, store: what takes [rows, columns].
    """

    stored: StoredTensor
    offset: int
    shape: tuple[int, ...]
    target: Tensor | None
    store: Callable[[Tensor], Any]

    @property
    def num_bytes(self) -> int:
        """What is read."""
        return tensor_bytes(self.stored.dtype, self.shape)


@dataclass(frozen=True)
class _Buffer:
    """Memory to read into, on its way to `device`: for a GPU pinned, with a stream of its own, so that one piece is
    copied and quantised there while others are read."""

    space: Tensor
    device: torch.device
    stream: torch.cuda.Stream | None

    @torch.no_grad()
    def hand_over(self, part: Tensor, store: Callable[[Tensor], Any]) -> None:
        """Store what was read; the buffer is free afterwards."""
        if self.stream is None:
            store(part)
            return
        with torch.cuda.stream(self.stream):
            store(part.to(self.device, non_blocking=True))
        self.stream.synchronize()


def load_model(directory: str | Path, *, dtype: str | None = None, device: torch.device | str = "cpu",
               weights: str | None = None, progress: bool | None = None) -> Llama:
    """Read the checkpoint in `directory` (Hugging Face's layout, safetensors) into a new model.

    dtype: "float32", "bfloat16" or "float16", to which the tensors are rounded; None is the one that the
    configuration names. weights: the format of `llama.model.formats` that the matrices take; "fastest": that in which
    they are multiplied fastest on this machine without being rounded further; None leaves them as they are. What is
    stored quantised stays so. progress: whether to draw a bar on stderr; None does so if that is a terminal.
    Takes hardly more memory than the weights have in `dtype`. Raises CheckpointError, before anything is
    allocated unless a file cannot be read or shrinks meanwhile.
    """
    directory = Path(directory)
    if not directory.is_dir():
        problem = "is not a directory" if directory.exists() else "does not exist"
        raise CheckpointError(f"{directory} {problem}; name the directory of a checkpoint")
    try:
        config = LlamaConfig.from_directory(directory)
        stored = read_stored(directory)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory} cannot be read: {error.strerror}") from None
    placed = match(config, stored)
    name = config.dtype if dtype is None else dtype
    if name not in DTYPE_BYTES:
        raise CheckpointError(f"dtype {quoted(name)} is not supported; use one of {', '.join(DTYPE_BYTES)}")
    if weights == "fastest":
        weights = fastest_weights(name, device)
    _check_weights(directory, config, weights, name, device)
    if weights in QUANTISED:
        config = dataclasses.replace(config, quantization=weights)
    model = Llama(config, getattr(torch, name), device, config.quantization or weights)
    _fill(model, stored, placed, progress)
    return model


def fastest_weights(dtype: str, device: torch.device | str) -> str | None:
    """The format in which weights of this dtype are multiplied fastest here without being rounded further."""
    packs = dtype == "bfloat16" and torch.device(device).type == "cpu" and native.library() is not None
    return "bf16" if packs else None


def _check_weights(directory: Path, config: LlamaConfig, weights: str | None, dtype: str, device: torch.device | str
                   ) -> None:
    """Refuse a format that is not the checkpoint's, or not for this dtype or device. Raises CheckpointError."""
    has, wants = config.quantization, weights if weights in QUANTISED else None
    if has is not None and wants not in (None, has):
        raise CheckpointError(f"{directory} is quantised to {has} already; {wants} can be made only of the weights as "
                              "they were trained")
    chosen = has or weights
    if chosen == "bf16" and not in_blocks(device):
        raise CheckpointError(f"bf16 is a format of the CPU; on {device} give bfloat16 as the dtype instead")
    if chosen is not None and dtype == "float16":
        raise CheckpointError(f"{chosen} weights compute in bfloat16 or float32; give one of them as the dtype")


def _fill(model: Llama, stored: Mapping[str, StoredTensor], placed: Mapping[str, Place],
          progress: bool | None) -> None:
    """Read every placed tensor into its rows of the model's weights."""
    # In the order of the files, which is the order in which disks are fast.
    order = sorted(placed, key=lambda name: (str(stored[name].path), stored[name].offset))
    pieces = [piece for name in order
              for piece in _cut(stored[name], placed[name], model.get_submodule(placed[name].module))]
    # Made once: buffers that come and go leave the allocator with many times their size.
    on_gpu = model.device.type == "cuda"
    buffers: SimpleQueue[_Buffer] = SimpleQueue()
    for _ in range(_NUM_READERS):
        space = torch.empty(max(piece.num_bytes for piece in pieces), dtype=torch.uint8, pin_memory=on_gpu)
        buffers.put(_Buffer(space, model.device, torch.cuda.Stream(model.device) if on_gpu else None))
    total_bytes = sum(piece.num_bytes for piece in pieces)
    with (ProgressBar("loading", total_bytes, describe_bytes, shown=progress) as bar,
          ThreadPoolExecutor(_NUM_READERS) as pool):
        for num_bytes in pool.map(partial(_read_piece, buffers=buffers), pieces):
            bar.add(num_bytes)


def _cut(stored: StoredTensor, place: Place, module: nn.Module) -> Iterator[_Piece]:
    """A tensor as pieces of whole rows; of a matrix that is packed on the way, of whole blocks."""
    num_rows, *columns = place.shape
    row_bytes = stored.num_bytes // num_rows
    if isinstance(module, DeviceLinear):
        yield from _cut_for_device(stored, place, module, row_bytes)
        return
    packs = isinstance(module, PackedLinear) and place.attribute == "weight"
    if packs:
        step = max(1, _PACKED_BYTES // row_bytes // BLOCK_ROWS) * BLOCK_ROWS
    else:
        step = max(1, _PIECE_BYTES // row_bytes)
        own = getattr(module, place.attribute).detach()
        first_row = place.first_row // (BLOCK_ROWS if place.attribute == "blocks" else 1)
    for first in range(0, num_rows, step):
        shape = (min(step, num_rows - first), *columns)
        target = None if packs else own[first_row + first:first_row + first + shape[0]]
        store = partial(module.store, place.first_row + first) if packs else target.copy_
        yield _Piece(stored, stored.offset + first * row_bytes, shape, target, store)


def _cut_for_device(stored: StoredTensor, place: Place, module: DeviceLinear, row_bytes: int) -> Iterator[_Piece]:
    """A tensor of a quantised matrix that lies row by row: floats, or blocks and their scales."""
    store = {"weight": module.store, "blocks": module.store_blocks, "scale": module.store_scale}[place.attribute]
    rows_each = BLOCK_ROWS if place.attribute == "blocks" else 1
    num_rows, *columns = place.shape
    step = max(1, _PIECE_BYTES // row_bytes)
    for first in range(0, num_rows, step):
        shape = (min(step, num_rows - first), *columns)
        yield _Piece(stored, stored.offset + first * row_bytes, shape, None,
                     partial(store, place.first_row + first * rows_each))


def _read_piece(piece: _Piece, buffers: "SimpleQueue[_Buffer]") -> int:
    """Read one piece to where it belongs; returns its bytes. Safe in as many threads as there are buffers."""
    dtype, target = _TORCH_DTYPES[piece.stored.dtype], piece.target
    if target is not None and target.dtype == dtype and target.device.type == "cpu":
        _read_into(piece, target.view(-1).view(torch.uint8))
        return piece.num_bytes
    buffer = buffers.get()
    try:
        part = buffer.space[:piece.num_bytes]
        _read_into(piece, part)
        buffer.hand_over(part.view(dtype).view(piece.shape), piece.store)
    finally:
        buffers.put(buffer)
    return piece.num_bytes


def _read_into(piece: _Piece, target: Tensor) -> None:
    """Fill `target` [bytes] from the file."""
    space = memoryview(target.numpy())
    try:
        with open(piece.stored.path, "rb", buffering=0) as file:
            file.seek(piece.offset)
            num_read = 0
            while num_read < piece.num_bytes:
                received = file.readinto(space[num_read:])
                if not received:
                    raise CheckpointError(f"{piece.stored.path} became shorter while tensor "
                                          f"{quoted(piece.stored.name)} was read from it; try again")
                num_read += received
    except OSError as error:
        raise CheckpointError(f"{piece.stored.path}: tensor {quoted(piece.stored.name)} cannot be read: "
                              f"{error.strerror}") from None
