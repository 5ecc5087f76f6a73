"""The weight formats in which this runtime is measured."""

from typing import Any

from benchmarks.contest import Entry
from benchmarks.contestants import Ours
from benchmarks.weights import Source

# How a checkpoint is loaded for each, and the bits that a weight then takes at most.
FORMATS: dict[str, tuple[dict[str, Any], float]] = {
    "float32": ({"dtype": "float32"}, 32), "bf16": ({"dtype": "bfloat16"}, 16),
    "int8": ({"dtype": "bfloat16", "quantize": "int8"}, 9), "int4": ({"dtype": "bfloat16", "quantize": "int4"}, 6),
    "fp8": ({"dtype": "bfloat16", "quantize": "fp8"}, 9)}

# Tokens of a prompt that one step takes where nobody decodes: what keeps the arithmetic of each device busy.
STEP_TOKENS = {"cpu": 512, "cuda": 8192}


def ours(source: Source, name: str, context: int, device: str = "cpu", reads: bool = False) -> Entry:
    """This runtime's entry in a contest, in one of FORMATS; the arguments of `Ours`."""
    options, bits = FORMATS[name]
    num_bytes = int(source.config.num_parameters * bits / 8)
    num_bytes += context * source.config.kv_bytes_per_token("bfloat16")
    return Entry(Ours, (source, options, context, device, STEP_TOKENS[device], reads), num_bytes)
