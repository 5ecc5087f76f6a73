"""Traces in files: safetensors or npz, with a manifest, written whole or not at all."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from llama.internals.trace import Trace, TraceError
from llama.model.sites import FIRST, LAST, LAYER


def manifest(trace: Trace, model: str, model_hash: str, dtype: str) -> dict[str, Any]:
    """All that is needed to read the tensors, as an object of JSON."""
    meanings = {site.name: {"equation": site.equation, "axes": list(site.axes), "hugging_face": site.hugging_face}
                for site in (*FIRST, *LAYER, *LAST)}
    return {"model": model, "model_sha256": model_hash, "dtype": dtype, "ids": list(trace.ids),
            "tokens": list(trace.tokens), "num_prompt": trace.num_prompt, "plan": trace.plan.to_json(),
            "positions": {name: list(found) for name, found in trace.positions.items()}, "sites": meanings}


def save(trace: Trace, path: str | Path, facts: Mapping[str, Any]) -> None:
    """Write a trace as .safetensors (manifest in the header, under "manifest") or .npz (an array "manifest" of text).

    facts: as `manifest` gives them. Raises TraceError for another ending, OSError if it cannot be written.
    """
    path = Path(path)
    text = json.dumps(facts, ensure_ascii=False)
    if path.suffix == ".safetensors":
        write_safetensors(path, trace.values, {"manifest": text})
    elif path.suffix == ".npz":
        arrays = {name: value.numpy() for name, value in trace.values.items()}
        atomically(path, lambda partial: _write_npz(partial, arrays | {"manifest": np.array(text)}))
    else:
        raise TraceError(f"{path}: end the name in .safetensors or .npz")


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """One file, atomically."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    atomically(path, lambda partial: save_file(contiguous, partial, dict(metadata)))


def atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Write beside the path, then put it in place: whoever looks sees all of it or what was there before."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        partial.chmod(0o666 & ~_umask())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def model_hash(directory: Path) -> str:
    """One sha256 of the configuration and the weights' files."""
    whole = hashlib.sha256()
    for file in sorted([directory / "config.json", *directory.glob("*.safetensors")]):
        if file.is_file():
            with file.open("rb") as stream:
                whole.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return whole.hexdigest()


def _write_npz(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current
