"""From a model to a checkpoint in Hugging Face's layout: config.json, and safetensors cut into shards.

Every file is written under another name first, so that a checkpoint is complete or is refused: shards take
their names before the index that vouches for them does. One tensor's piece is in memory at a time.
"""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.layout import places
from llama.checkpoint.safetensors import (INDEX_NAME, SINGLE_NAME, CheckpointError, encode_header,
                                          tensor_bytes)
from llama.model.device_linear import DeviceLinear
from llama.model.formats import BLOCK_ROWS
from llama.model.linear import PackedLinear
from llama.model.transformer import Llama
from llama.progress import ProgressBar, describe_bytes

# Safetensors' names of a configuration's dtypes.
STORED_DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
# That of the published checkpoints.
MAX_SHARD_BYTES = 5_000_000_000
# What is fetched at a time from a model that is on another device.
_PIECE_BYTES = 64 << 20


def save_model(model: Llama, directory: str | Path, *, max_shard_bytes: int = MAX_SHARD_BYTES,
               progress: bool | None = None) -> None:
    """Write the model's weights, in their dtype and format, and its configuration.

    A checkpoint that already lies in `directory` in files of the same names is replaced. progress: whether to draw a bar
    on stderr; None does so if that is a terminal. Raises CheckpointError.
    """
    if any(isinstance(module, DeviceLinear) for module in model.modules()):
        raise CheckpointError("weights quantised on a GPU lie there as no checkpoint has them; load the model on the CPU to "
                              "save it, or use llama quantize")
    config = dataclasses.replace(model.config, dtype=str(model.dtype).removeprefix("torch."))
    placed = places(config)

    def pieces(name: str) -> Iterator[Tensor]:
        for piece in cut(name):
            yield piece
            bar.add(piece.nbytes)

    def cut(name: str) -> Iterator[Tensor]:
        """A stored tensor, a few rows at a time: of packed weights, what they stand for."""
        place = placed[name]
        module = model.get_submodule(place.module)
        if isinstance(module, PackedLinear) and place.attribute == "weight":
            rows = torch.arange(place.first_row, place.first_row + place.shape[0])
            return (module.rows(piece) for piece in rows.split(max(1, _PIECE_BYTES // (2 * place.shape[1]))))
        first = place.first_row // (BLOCK_ROWS if place.attribute == "blocks" else 1)
        own = getattr(module, place.attribute).detach()[first:first + place.shape[0]]
        return (piece.cpu() for piece in own.split(max(1, _PIECE_BYTES // own[0].nbytes)))

    shapes = {name: place.shape for name, place in placed.items()}
    dtypes = {name: place.dtype for name, place in placed.items() if place.dtype is not None}
    with ProgressBar("writing", model.num_bytes, describe_bytes, shown=progress) as bar:
        write_checkpoint(directory, config.to_dict(), shapes, config.dtype, pieces, dtypes=dtypes,
                         max_shard_bytes=max_shard_bytes)


def write_checkpoint(directory: str | Path, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]],
                     dtype: str, pieces: Callable[[str], Iterable[Tensor]], *, dtypes: Mapping[str, str] = {},
                     max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write tensors of one dtype ("bfloat16", ...), in the order of `shapes`, and `config` as config.json.

    pieces(name): the tensor, in consecutive CPU tensors of that dtype. dtypes: safetensors' names of others' dtypes.
    Raises CheckpointError, after which what was there before is still there.
    """
    directory = Path(directory)
    tensors = {name: (dtypes.get(name, STORED_DTYPES[dtype]), shape) for name, shape in shapes.items()}
    sizes = {name: tensor_bytes(*tensor) for name, tensor in tensors.items()}
    shards = _name_shards(_plan_shards(sizes, max_shard_bytes))
    try:
        directory.mkdir(parents=True, exist_ok=True)
        _check_room(directory, shards, sum(sizes.values()))
        with _replacing(directory) as replace:
            for shard, names in shards.items():
                header = encode_header({name: tensors[name] for name in names})
                _write(replace(shard), header, (piece for name in names for piece in pieces(name)))
            replace("config.json").write_text(_as_json(config))
            if len(shards) > 1:
                index = {"metadata": {"total_size": sum(sizes.values())},
                         "weight_map": {name: shard for shard, names in shards.items() for name in names}}
                replace(INDEX_NAME).write_text(_as_json(index))
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory} cannot be written: {error.strerror}") from None


def _plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Tensors in order, as many to a shard as fit; one that is larger than a shard has one of its own."""
    shards: list[list[str]] = []
    room = -1
    for name, size in sizes.items():
        if size > room:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= size
    return shards


def _name_shards(shards: list[list[str]]) -> dict[str, list[str]]:
    """The names of the files, as Hugging Face gives them."""
    if len(shards) == 1:
        return {SINGLE_NAME: shards[0]}
    return {f"model-{number:05}-of-{len(shards):05}.safetensors": names
            for number, names in enumerate(shards, start=1)}


def _check_room(directory: Path, shards: Mapping[str, Any], num_bytes: int) -> None:
    """Refuse to begin where another checkpoint would get mixed with this one, or the disk is too small."""
    for path in sorted(directory.glob("*.safetensors")):
        if path.name not in shards:
            raise CheckpointError(f"{path} lies in the way: it is no part of the checkpoint that is to be "
                                  "written there; choose an empty directory or remove it")
    free = shutil.disk_usage(directory).free
    if free < num_bytes:
        raise CheckpointError(f"{directory} has {free / 1e9:.1f} GB free, but the weights take "
                              f"{num_bytes / 1e9:.1f} GB; choose another disk")


@contextlib.contextmanager
def _replacing(directory: Path) -> Iterator[Callable[[str], Path]]:
    """Gives where to write each file. At the end they take their names, in order; after an error they go.

    An index that is already there goes first: between then and the end the directory is refused, not misread.
    """
    partial: dict[Path, Path] = {}

    def replace(name: str) -> Path:
        return partial.setdefault(directory / name, directory / f"{name}.partial")

    try:
        yield replace
        (directory / INDEX_NAME).unlink(missing_ok=True)
        for target, path in partial.items():
            path.replace(target)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)


def _write(path: Path, header: bytes, pieces: Iterable[Tensor]) -> None:
    """One safetensors file."""
    with path.open("wb") as file:
        file.write(header)
        for piece in pieces:
            file.write(piece.view(-1).view(torch.uint8).numpy())


def _as_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=2) + "\n"
