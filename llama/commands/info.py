"""`llama info`: what a checkpoint is, what it needs, what fits here, and what it took to load it.

It is all gathered as one object, which --json prints as it is.
"""

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from llama.checkpoint.layout import match
from llama.checkpoint.pull import resolve
from llama.checkpoint.safetensors import CheckpointError, read_stored
from llama.commands.loading import prepare_torch
from llama.commands.report import as_text, kernels_as_text, loaded_as_text, size
from llama.config import DTYPE_BYTES, QUANTISED_BITS, LlamaConfig
from llama.engine.request import Request, SamplingParams
from llama.machine import available_memory, peak_memory
from llama.terminal import note

# Python, torch and the activations of one step, beside weights and KV cache.
OVERHEAD_BYTES = 512 << 20
# What loading and generating may take at the peak, Python and torch included, in sizes of the weights. Of
# weights that are small beside Python and torch it says nothing.
PEAK_BOUND = 1.15
BOUNDED_BYTES = 2 << 30

_CONTEXTS = (8_192, 32_768, 131_072)
_NUM_TOKENS = 16
# Up to so many rows of x the choice of a kernel is looked at; beyond, it is that of as many.
_MANY_ROWS = 1024


def run(args: argparse.Namespace) -> int:
    """Print what is known. Then, if the weights are not as they should be, raises CheckpointError."""
    directory = resolve(args.model)
    config = LlamaConfig.from_directory(directory)
    facts = describe(directory, config, args)
    problem = None
    try:
        facts["stored"] = _stored(directory, config)
    except CheckpointError as error:
        problem = error
    wanted = facts["fits"] if args.load is None else args.load
    if not args.json:
        print(as_text(facts), flush=True)
    if args.device == "cpu" and args.load is not False:  # it takes torch, and perhaps the compiler
        facts["kernels"] = kernels()
        if not args.json:
            print(kernels_as_text(facts["kernels"]), flush=True)
    if problem is None and wanted:
        facts["loaded"] = load_and_generate(directory, args)
        if not args.json:
            print(loaded_as_text(facts["loaded"]))
    elif problem is None and args.load is None:
        note(f"not loaded: it takes {size(facts['needed_bytes'])} and {size(facts['free_bytes'])} are free; "
             "--load tries it all the same")
    if args.json:
        print(json.dumps(facts, indent=2))
    if problem is not None:
        raise problem
    return 0


def describe(directory: Path, config: LlamaConfig, args: argparse.Namespace) -> dict[str, Any]:
    """What follows from the configuration and the machine. Sizes are in bytes, contexts in tokens."""
    context = config.context_length(args.context)
    dtype = args.dtype or config.dtype
    free = _free_memory(args)
    kv_bytes = config.kv_bytes_per_token(args.kv_cache_dtype or dtype)
    quantize = config.quantization or args.quantize
    needed = config.num_weight_bytes(dtype, quantize) + OVERHEAD_BYTES
    contexts = sorted({length for length in _CONTEXTS if length < config.max_position_embeddings}
                      | {context, config.max_position_embeddings})
    left = max(free - needed, 0) // kv_bytes
    return {
        "model": args.model or "the demo model",
        "directory": str(directory.resolve()),
        "architecture": dataclasses.asdict(config),
        "parameters": config.num_parameters,
        "weight_bytes": {name: config.num_weight_bytes(name) for name in DTYPE_BYTES} | {
            name: config.num_weight_bytes(dtype, name) for name in QUANTISED_BITS},
        "stored": None,
        "dtype": dtype,
        "weights": quantize or dtype,
        "kv_bytes_per_token": kv_bytes,
        "overhead_bytes": OVERHEAD_BYTES,
        "needed_bytes": needed,
        "device": args.device,
        "free_bytes": free,
        "fits": free >= needed,
        "contexts": [{"tokens": length, "kv_bytes": length * kv_bytes,
                      "needed_bytes": needed + length * kv_bytes, "fits": length <= left}
                     for length in contexts],
        "max_context": min(left, context),
        "default_context": min(left // 2, context),  # Llama.load leaves half of what is free alone
        "kernels": None,
        "loaded": None,
    }


def kernels() -> dict[str, Any]:
    """What multiplies by W on this CPU: for each format, the kernel from so many rows of x on, up to the next.

    why_not: why there are no compiled kernels; None if there are. matrix_unit: whether they use one.
    """
    from llama.model.formats import FORMATS
    from llama.model.kernels import native

    names = {native.VECTORS: "vectors", native.TILES: "matrix unit"}
    table = {}
    for name, fmt in FORMATS.items():
        chosen = [native.kernel_for(fmt, rows) for rows in range(1, _MANY_ROWS + 1)]
        table[name] = [{"from_rows": row + 1, "kernel": "torch" if native.library() is None else names[kernel]}
                       for row, kernel in enumerate(chosen) if row == 0 or kernel != chosen[row - 1]]
    return {"why_not": native.why_not(), "matrix_unit": native.has_tiles(), "formats": table}


def _stored(directory: Path, config: LlamaConfig) -> dict[str, Any]:
    """What the files hold, from their headers."""
    stored = read_stored(directory)
    match(config, stored)
    return {"files": len({tensor.path for tensor in stored.values()}),
            "bytes": sum(tensor.num_bytes for tensor in stored.values()),
            "dtypes": sorted({tensor.dtype for tensor in stored.values()})}


def _free_memory(args: argparse.Namespace) -> int:
    if args.device == "cpu":
        return available_memory()
    prepare_torch(args)
    import torch

    return torch.cuda.mem_get_info(args.device)[0]


def load_and_generate(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Load the weights and generate a few tokens after id 0; no tokenizer is needed.

    peak_bytes: the most that this process ever held; on a GPU, that torch held there.
    """
    prepare_torch(args)
    import torch

    from llama.checkpoint.load import load_model
    from llama.engine.engine import BLOCK_SIZE, Engine
    from llama.engine.limits import Limits

    before_bytes = peak_memory() if args.device == "cpu" else 0
    began = time.perf_counter()
    model = load_model(directory, dtype=args.dtype, device=args.device, weights=args.quantize or "fastest")
    loaded = time.perf_counter()
    num_tokens = min(_NUM_TOKENS, model.config.max_position_embeddings - 1)
    engine = Engine(model, Limits(max_context=num_tokens + 1, max_running=1), num_tokens // BLOCK_SIZE + 1)
    greedy = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0,
                            max_tokens=num_tokens)
    engine.submit(Request("info", (0,), greedy))
    arrivals = []
    while engine.has_work:
        engine.step()
        arrivals.append(time.perf_counter())
    peak = peak_memory() if args.device == "cpu" else torch.cuda.max_memory_allocated(args.device)
    weights = model.num_bytes
    return {"seconds": loaded - began, "weight_bytes": weights, "before_bytes": before_bytes,
            "peak_bytes": peak, "peak_ratio": peak / weights, "bound": PEAK_BOUND,
            "within_bound": peak <= PEAK_BOUND * weights if weights >= BOUNDED_BYTES else None,
            "generated": len(arrivals),
            "first_token_seconds": arrivals[0] - loaded,
            "tokens_per_second": (len(arrivals) - 1) / max(arrivals[-1] - arrivals[0], 1e-9)}
