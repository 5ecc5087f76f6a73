"""A from-scratch runtime for Llama 3.1.

The public names are resolved when first used, so that importing a part that needs no torch does not load it.
"""

import importlib
from typing import Any

_HOMES = {
    "Llama": "llama.runtime",
    "Completion": "llama.completion",
    "SamplingParams": "llama.engine.request",
    "LlamaConfig": "llama.config",
    **dict.fromkeys(("Add", "Replace", "Zero", "Scale"), "llama.model.edits"),
    "Patch": "llama.internals.trace",
    "Capture": "llama.model.plan",
    "TracePlan": "llama.model.plan",
}

__all__ = list(_HOMES)
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'llama' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
