"""From a checkpoint's directory to a model: everything checked first, then one pass over the files.

Tensors are read straight into their rows of the joined weights, or through a small buffer where the dtype or
the device differs. Nothing is memory-mapped: mapped pages would count as the process's memory next to the
weights, and a file that is cut short meanwhile would be a bus error. No pickle is ever opened.
"""

import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import torch
from torch import Tensor

from llama.checkpoint.layout import Place, match
from llama.checkpoint.safetensors import CheckpointError, StoredTensor, quoted, read_stored
from llama.config import DTYPE_BYTES, LlamaConfig
from llama.model.transformer import Llama
from llama.progress import ProgressBar, describe_bytes
from llama.strict_json import ConfigError

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# What is read at a time. Small enough to convert within the processor's cache, and to be nothing beside the
# weights; large enough that neither the system call nor Python counts.
_PIECE_BYTES = 8 << 20


@dataclass(frozen=True)
class _Piece:
    """Consecutive rows of a stored tensor, from byte `offset` of its file, and the rows that they become."""

    stored: StoredTensor
    offset: int
    num_bytes: int
    target: Tensor


def load_model(directory: str | Path, *, dtype: str | None = None, device: torch.device | str = "cpu",
               progress: bool | None = None) -> Llama:
    """Read the checkpoint in `directory` (Hugging Face's layout, safetensors) into a new model.

    dtype: "float32", "bfloat16" or "float16", to which the tensors are rounded; None is the one that the
    configuration names. progress: whether to draw a bar on stderr; None does so if that is a terminal.
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
    model = Llama(config, getattr(torch, name), device)
    _fill(model, stored, placed, progress)
    return model


def _fill(model: Llama, stored: Mapping[str, StoredTensor], placed: Mapping[str, Place],
          progress: bool | None) -> None:
    """Read every placed tensor into its rows of the model's parameters."""
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    # In the order of the files, which is the order in which disks are fast.
    order = sorted(placed, key=lambda name: (str(stored[name].path), stored[name].offset))
    pieces = [piece for name in order
              for piece in _cut(stored[name], placed[name], parameters[placed[name].parameter])]
    num_readers = min(8, os.cpu_count() or 1)
    # Made once: buffers that come and go leave the allocator with many times their size.
    buffers: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(num_readers):
        buffers.put(torch.empty(max(piece.num_bytes for piece in pieces), dtype=torch.uint8))
    total_bytes = sum(piece.num_bytes for piece in pieces)
    with (ProgressBar("loading", total_bytes, describe_bytes, shown=progress) as bar,
          ThreadPoolExecutor(num_readers) as pool):
        for num_bytes in pool.map(partial(_read_piece, buffers=buffers), pieces):
            bar.add(num_bytes)


def _cut(stored: StoredTensor, place: Place, parameter: Tensor) -> Iterator[_Piece]:
    """A tensor as pieces of whole rows."""
    num_rows = place.shape[0]
    row_bytes = stored.num_bytes // num_rows
    step = max(1, _PIECE_BYTES // row_bytes)
    rows = parameter[place.first_row : place.first_row + num_rows]
    for first in range(0, num_rows, step):
        target = rows[first : first + step]
        yield _Piece(stored, stored.offset + first * row_bytes, len(target) * row_bytes, target)


def _read_piece(piece: _Piece, buffers: SimpleQueue[Tensor]) -> int:
    """Read one piece to where it belongs; returns its bytes. Safe in as many threads as there are buffers."""
    dtype = _TORCH_DTYPES[piece.stored.dtype]
    if piece.target.dtype == dtype and piece.target.device.type == "cpu":
        _read_into(piece, piece.target.view(-1).view(torch.uint8))
        return piece.num_bytes
    buffer = buffers.get()
    try:
        part = buffer[: piece.num_bytes]
        _read_into(piece, part)
        piece.target.copy_(part.view(dtype).view(piece.target.shape))
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
