"""The safetensors files of a checkpoint: what they say they hold, believed only once it has been checked.

A file is eight bytes with the header's length, the header (JSON: name -> dtype, shape, data_offsets), and the
tensors' bytes; several files have an index beside them that says which tensor lies where. Here only the
descriptions are read: no number in them allocates anything, and none is used before it agrees with the length
of the file. The format is Hugging Face's (huggingface/safetensors, README). `llama.checkpoint.load` reads the
tensors themselves; this module needs neither torch nor the safetensors package, whose errors name no file.
"""

import json
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# Safetensors' names of the dtypes that are read, and their bytes an element.
DTYPE_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
FLOATS = ("F32", "BF16", "F16")
# The format's own limit, taken for the index too. 405B in one file would need a tenth of a megabyte.
MAX_HEADER_BYTES = 100_000_000
# A file of the directory itself, and no path that leads out of it.
_PLAIN_NAME = re.compile(r"\w[\w.-]{0,200}\.safetensors", re.ASCII)


class CheckpointError(ValueError):
    """A checkpoint cannot be read or written; the message names file and tensor and says what to do."""


@dataclass(frozen=True)
class StoredTensor:
    """Where one tensor lies: `num_bytes` bytes from `offset` (counted from the file's start), row by row."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


def quoted(value: Any) -> str:
    """Something from a file as an error shows it: escaped, and cut short where it is long."""
    short = reprlib.Repr()
    short.maxstring = 160
    return short.repr(value)


def read_stored(directory: str | Path) -> dict[str, StoredTensor]:
    """What the safetensors files of a directory hold, by tensor name.

    With an index, the files and tensors on disk must be exactly those that it names; its metadata is not
    read. Raises CheckpointError.
    """
    directory = Path(directory)
    # Names that begin with a dot are what macOS leaves beside files that it copies.
    on_disk = {path.name for path in directory.glob("*.safetensors") if not path.name.startswith(".")}
    index = directory / INDEX_NAME
    if index.is_symlink() or index.exists():
        return _read_sharded(directory, on_disk)
    if SINGLE_NAME not in on_disk:
        raise CheckpointError(_why_no_weights(directory, on_disk))
    for name in sorted(on_disk - {SINGLE_NAME}):
        raise CheckpointError(f"{directory / name} lies beside {SINGLE_NAME} without an index that names "
                              "both; remove the one that does not belong here")
    return read_header(_find_file(directory, SINGLE_NAME))


def read_header(path: Path) -> dict[str, StoredTensor]:
    """The tensors that one safetensors file holds, by name. Raises CheckpointError."""
    try:
        with path.open("rb") as file:
            file_bytes = file.seek(0, 2)
            file.seek(0)
            prefix = file.read(8)
            header_bytes = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise CheckpointError(f"{path} is {file_bytes} bytes long, too short for a safetensors file; "
                                      "download it again")
            if header_bytes > MAX_HEADER_BYTES:
                raise CheckpointError(f"{path} says that its header is {header_bytes} bytes long, more than "
                                      f"the format's {MAX_HEADER_BYTES}; it is no safetensors file, or "
                                      "damaged")
            if header_bytes > file_bytes - 8:
                raise CheckpointError(f"{path} is {file_bytes} bytes long and so cannot hold the header of "
                                      f"{header_bytes} bytes that it says it has; download it again")
            header = file.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if not header.startswith(b"{"):
        raise CheckpointError(f"{path}: the header does not begin with '{{'; it is no safetensors file")
    entries = _parse_object(header, f"{path}: the header")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must be an object of strings, not {quoted(metadata)}")
    first = 8 + header_bytes
    tensors = [_read_entry(path, name, entry, first, file_bytes) for name, entry in entries.items()]
    _check_contiguous(path, tensors, first, file_bytes)
    return {tensor.name: tensor for tensor in tensors}


def read_weight_map(index: Path) -> dict[str, str]:
    """The `weight_map` of an index: tensor name -> name of a file beside it. Raises CheckpointError."""
    try:
        with index.open("rb") as file:
            content = file.read(MAX_HEADER_BYTES + 1)
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}") from None
    if len(content) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{index} is longer than {MAX_HEADER_BYTES} bytes; it is no index, or damaged")
    weight_map = _parse_object(content, str(index)).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: weight_map must be an object that gives each tensor's file, "
                              f"not {quoted(weight_map)}; download it again")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _PLAIN_NAME.fullmatch(shard):
            raise CheckpointError(f"{index}: tensor {quoted(name)} is said to lie in {quoted(shard)}, which "
                                  "is not the name of a safetensors file in this directory; download it "
                                  "again")
    return weight_map


def encode_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """The first bytes of a file in which these tensors, (dtype, shape) by name, follow each other in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers insists on the format
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + tensor_bytes(dtype, shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the tensors are aligned in a memory map
    return len(header).to_bytes(8, "little") + header


def tensor_bytes(dtype: str, shape: Iterable[int]) -> int:
    """The size of a tensor on disk, in bytes."""
    size = DTYPE_BYTES[dtype]
    for length in shape:
        size *= length
    return size


def _read_sharded(directory: Path, on_disk: set[str]) -> dict[str, StoredTensor]:
    """The tensors of all shards, after the index and the disk have been compared in both directions."""
    index = _find_file(directory, INDEX_NAME)
    weight_map = read_weight_map(index)
    shards: dict[str, Path] = {}
    for name, shard in weight_map.items():
        if shard not in shards:
            shards[shard] = _find_file(directory, shard, f"; {INDEX_NAME} says that it holds {quoted(name)}")
    for name in sorted(on_disk - shards.keys()):
        raise CheckpointError(f"{directory / name} is not named in {INDEX_NAME}; remove the one that does "
                              "not belong here")
    stored: dict[str, StoredTensor] = {}
    for shard, path in sorted(shards.items()):
        for name, tensor in read_header(path).items():
            if name in stored:
                raise CheckpointError(f"tensor {quoted(name)} lies in two shards, {stored[name].path} and "
                                      f"{path}; download the checkpoint again")
            if weight_map.get(name) != shard:
                place = f"places in {quoted(weight_map[name])}" if name in weight_map else "does not name"
                raise CheckpointError(f"{path} holds tensor {quoted(name)}, which {INDEX_NAME} {place}; "
                                      "shards and index belong to different checkpoints")
            stored[name] = tensor
    for name, shard in weight_map.items():
        if name not in stored:
            raise CheckpointError(f"{shards[shard]} does not hold tensor {quoted(name)}, which {INDEX_NAME} "
                                  "places there; download the checkpoint again")
    return stored


def _find_file(directory: Path, name: str, because: str = "") -> Path:
    """The path of a file that exists, is a regular one, and lies where it may."""
    path = directory / name
    try:
        target = path.resolve(strict=True)
        kind = target.stat().st_mode
    except (OSError, RuntimeError):  # RuntimeError: a symbolic link to itself, before Python 3.13
        problem = "a symbolic link that leads nowhere" if path.is_symlink() else "missing"
        raise CheckpointError(f"{path} is {problem}{because}; download it again") from None
    if not stat.S_ISREG(kind):
        raise CheckpointError(f"{path} is not a regular file{because}; put the file itself in its place")
    home = directory.resolve()
    # Hugging Face's cache keeps REPOSITORY/snapshots/REVISION full of links to REPOSITORY/blobs.
    allowed = [home] + [home.parent.parent / "blobs"] * (home.parent.name == "snapshots")
    if not any(target.is_relative_to(root) for root in allowed):
        raise CheckpointError(f"{path} is a symbolic link out of its directory, to {target}; "
                              "put the file itself there if you trust it")
    return path


def _why_no_weights(directory: Path, on_disk: set[str]) -> str:
    """What to do about a directory without `model.safetensors` and without an index."""
    if on_disk:
        return (f"{directory} holds {min(on_disk)} but neither {SINGLE_NAME} nor {INDEX_NAME}; "
                "download the index as well")
    pickles = sorted(path.name for suffix in ("pth", "bin", "pt") for path in directory.glob(f"*.{suffix}"))
    if pickles:
        return (f"{directory} holds {pickles[0]} but no safetensors files; such a file is a pickle, which "
                "can run code and is never opened here: get the safetensors version of this checkpoint")
    return (f"{directory} holds neither {SINGLE_NAME} nor {INDEX_NAME}; "
            "name the directory of a checkpoint in Hugging Face's layout")


def _parse_object(content: bytes, what: str) -> dict[str, Any]:
    """JSON of which nothing is lost silently: an object, without any name twice."""
    try:
        value = json.loads(content.decode("utf-8"), object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not valid JSON: {error}; download it again") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} must be a JSON object, not a {type(value).__name__}; download it "
                              "again")
    return value


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        [(twice, _)] = Counter(name for name, _ in pairs).most_common(1)
        raise ValueError(f"{quoted(twice)} stands there twice")
    return found


def _read_entry(path: Path, name: str, entry: Any, first: int, file_bytes: int) -> StoredTensor:
    """One tensor of a file whose data begins at byte `first`, checked against itself and the file's size."""
    where = f"{path}: tensor {quoted(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} must have dtype, shape and data_offsets, not {quoted(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(f"{where} has dtype {quoted(dtype)}, which is not read; only "
                              f"{', '.join(FLOATS)} are, so get the checkpoint in one of these, not quantised by "
                              "others")
    if not _are_counts(shape):
        raise CheckpointError(f"{where} has shape {quoted(shape)}, which is no list of sizes")
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {quoted(offsets)}, which is no range of bytes")
    begin, end = offsets
    if end > file_bytes - first:
        raise CheckpointError(f"{where} ends at byte {quoted(end)} of the data, but the file has only "
                              f"{file_bytes - first}; it was cut short, download it again")
    if not _fills(shape, DTYPE_BYTES[dtype], end - begin):
        raise CheckpointError(f"{where} has {end - begin} bytes, which is not the size of {dtype} "
                              f"{quoted(shape)}")
    return StoredTensor(name, path, dtype, tuple(shape), first + begin, end - begin)


def _are_counts(value: Any) -> bool:
    """Whether this is a list of integers from 0 up. (To Python, true is an integer.)"""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _fills(shape: list[int], element_bytes: int, num_bytes: int) -> bool:
    """Whether a tensor has this size; the product is given up once too large: a length may be anything."""
    size = 0 if 0 in shape else element_bytes
    for length in shape:
        size *= length
        if size > num_bytes:
            return False
    return size == num_bytes


def _check_contiguous(path: Path, tensors: list[StoredTensor], first: int, file_bytes: int) -> None:
    """The tensors follow each other without a gap or an overlap, from the header to the end of the file."""
    end = first
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            problem = "overlaps the one before it" if tensor.offset < end else "leaves a gap before it"
            raise CheckpointError(f"{path}: tensor {quoted(tensor.name)} {problem}: it begins at byte "
                                  f"{tensor.offset - first} of the data and should begin at {end - first}")
        end += tensor.num_bytes
    if end != file_bytes:
        raise CheckpointError(f"{path} has {file_bytes - end} bytes more than its header accounts for; "
                              "download it again")
