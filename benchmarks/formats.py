"""The weight formats in which this runtime is measured."""

from pathlib import Path
from typing import Any

from benchmarks.contest import Entry
from benchmarks.contestants import Ours
from llama.config import LlamaConfig

# How a checkpoint is loaded for each, and the bits that a weight then takes at most.
FORMATS: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"dtype": "float32"}, 32), "bf16": ({"dtype": "bfloat16"}, 16),
    "int8": ({"dtype": "bfloat16", "quantize": "int8"}, 9), "int4": ({"dtype": "bfloat16", "quantize": "int4"}, 6)}


def ours(directory: Path, name: str, context: int, reads: bool = False) -> Entry:
    """This runtime's entry in a contest, in one of FORMATS; the arguments of `Ours`."""
    options, bits = FORMATS[name]
    num_bytes = int(LlamaConfig.from_directory(directory).num_parameters * bits / 8)
    return Entry(Ours, (directory, options, context, reads), num_bytes)
