"""From a checkpoint's directory to a model: everything checked first, then one pass over the files.

Tensors are read straight into their rows of the joined weights, or through a small buffer (`llama.checkpoint.lanes`)
where the dtype, the device or the format differs: so weights are packed and quantised while they are read. Nothing is
memory-mapped: mapped pages would count as the process's memory next to the weights, and a file that is cut short
meanwhile would be a bus error. No pickle is ever opened.
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

from llama.checkpoint.lanes import CudaLane, HostLane, Lane
from llama.checkpoint.layout import Place, match
from llama.checkpoint.safetensors import CheckpointError, StoredTensor, quoted, read_stored, tensor_bytes
from llama.config import DTYPE_BYTES, LlamaConfig
from llama.model.device_linear import DeviceLinear
from llama.model.formats import BLOCK_ROWS, QUANTISED
from llama.model.kernels import native
from llama.model.linear import PackedLinear, in_blocks
from llama.model.transformer import Llama
from llama.progress import ProgressBar, describe_bytes
from llama.strict_json import ConfigError

_TORCH_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "U8": torch.uint8}
# As many pieces are read at once. More than processors: while some wait for the disk, others are packed.
_NUM_READERS = 8


@dataclass(frozen=True)
class _Piece:
    """Consecutive rows of a stored tensor, from byte `offset` of its file.

    target: the rows that they become; None where those lie otherwise. store: what brings [rows, columns] there, on the
    device, without waiting for it.
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
    if chosen == "fp8" and in_blocks(device):
        raise CheckpointError(f"fp8 weights are for a GPU; on {device} give int8 or int4, or cuda as the device")
    if chosen is not None and dtype == "float16":
        raise CheckpointError(f"{chosen} weights compute in bfloat16 or float32; give one of them as the dtype")


def _fill(model: Llama, stored: Mapping[str, StoredTensor], placed: Mapping[str, Place],
          progress: bool | None) -> None:
    """Read every placed tensor into its rows of the model's weights."""
    kind = CudaLane if model.device.type == "cuda" else HostLane
    # In the order of the files, which is the order in which disks are fast.
    order = sorted(placed, key=lambda name: (str(stored[name].path), stored[name].offset))
    pieces = [piece for name in order
              for piece in _cut(stored[name], placed[name], model.get_submodule(placed[name].module), kind, model.device)]
    # Made once: buffers that come and go leave the allocator with many times their size.
    lanes: SimpleQueue[Lane] = SimpleQueue()
    for _ in range(_NUM_READERS):
        lanes.put(kind(max(piece.num_bytes for piece in pieces), model.device))
    total_bytes = sum(piece.num_bytes for piece in pieces)
    with (ProgressBar("loading", total_bytes, describe_bytes, shown=progress) as bar,
          ThreadPoolExecutor(_NUM_READERS) as pool):
        for num_bytes in pool.map(partial(_read_piece, lanes=lanes), pieces):
            bar.add(num_bytes)
    if kind is CudaLane:
        torch.cuda.empty_cache()  # what packing took on a lane's stream would be kept for that stream


def _cut(stored: StoredTensor, place: Place, module: nn.Module, kind: type[Lane], device: torch.device
         ) -> Iterator[_Piece]:
    """A tensor as pieces of whole rows, as large as the lanes like them; of a matrix that is packed on the way, of whole
    blocks."""
    num_rows, *columns = place.shape
    row_bytes = stored.num_bytes // num_rows
    store = _stores(module).get(place.attribute)
    rows_each = BLOCK_ROWS if place.attribute == "blocks" else 1
    if store is not None:
        step = max(1, kind.packed_bytes // row_bytes // BLOCK_ROWS) * BLOCK_ROWS
    else:
        step = max(1, kind.piece_bytes // row_bytes)
        own = getattr(module, place.attribute).detach()[place.first_row // rows_each:]
    for first in range(0, num_rows, step):
        shape = (min(step, num_rows - first), *columns)
        if store is not None:
            target, bring = None, partial(_pack, store, place.first_row + first * rows_each, device)
        else:
            target = own[first:first + shape[0]]
            bring = partial(target.copy_, non_blocking=True)
        yield _Piece(stored, stored.offset + first * row_bytes, shape, target, bring)


def _stores(module: nn.Module) -> Mapping[str, Callable[[int, Tensor], None]]:
    """By the attribute that a tensor is stored as: what sets the rows from one on, where they do not lie as they are."""
    if isinstance(module, DeviceLinear):
        return {"weight": module.store, "blocks": module.store_blocks, "scale": module.store_scale}
    return {"weight": module.store} if isinstance(module, PackedLinear) else {}


@torch.no_grad()
def _pack(store: Callable[[int, Tensor], None], first_row: int, device: torch.device, rows: Tensor) -> None:
    """Have rows stored from `first_row` on by the device itself: a GPU packs them faster than they come to it."""
    store(first_row, rows.to(device, non_blocking=True))


def _read_piece(piece: _Piece, lanes: SimpleQueue[Lane]) -> int:
    """Read one piece to where it belongs; returns its bytes. Safe in as many threads as there are lanes."""
    dtype, target = _TORCH_DTYPES[piece.stored.dtype], piece.target
    lane = lanes.get()
    try:
        if lane.direct and target is not None and target.dtype == dtype:
            _read_into(piece, target.view(-1).view(torch.uint8))
        else:
            part = lane.buffer[:piece.num_bytes]
            _read_into(piece, part)
            lane.enqueue(piece.store, part.view(dtype).view(piece.shape))
            lane.wait()
    finally:
        lanes.put(lane)
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
