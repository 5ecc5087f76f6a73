"""What every benchmark needs: the machine and its ceiling, repeated measurements, a table, a line of JSON."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llama.model.kernels import gpu
from llama.model.transformer import Llama


def hardware(device: str = "cpu") -> dict[str, Any]:
    """The machine, as far as it can be read off it, and the versions that ran."""
    fields = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    values = {name.strip(): value.strip() for name, value in fields}
    flags = values.get("flags", "").split()
    machine = {
        "processor": values.get("model name", platform.processor()),
        "features": [name for name in ("avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if name in flags],
        "onednn_max_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", "all"),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    return machine | graphics(device) if device == "cuda" else machine


def graphics(device: str) -> dict[str, Any]:
    """The GPU and what drives it."""
    properties = torch.cuda.get_device_properties(device)
    found = {"gpu": properties.name, "gpu_bytes": properties.total_memory,
             "multiprocessors": properties.multi_processor_count, "cuda": torch.version.cuda}
    return found | ({"triton": version("triton")} if gpu.why_not() is None else {"kernels": gpu.why_not()})


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights that a model, or a part of it, holds, in whatever format."""
    return sum({id(tensor): tensor.nbytes for tensor in (*model.parameters(), *model.buffers())}.values())


def step_bytes(model: Llama) -> int:
    """Bytes of weights that a decode reads: all, but of an embedding that is not the head too only a row."""
    return weight_bytes(model) - (0 if model.config.tie_word_embeddings else weight_bytes(model.embed))


def seconds(work: Callable[[], Any], device: str = "cpu") -> float:
    """How long one call takes; what a GPU was given to do, until it has done it."""
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def interleaved(contestants: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Each contestant's measurements, taken in turns so that a slow minute of the machine meets all of them."""
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats):
        for name, measure in contestants.items():
            results[name].append(measure())
    return results


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Median and spread of the ratios of measurements that were taken in the same turn."""
    return summary([a / b for a, b in zip(ours, theirs, strict=True)])


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a Markdown table."""
    cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row] for row in rows]
    print(f"\n{title}\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in cells:
        print("| " + " | ".join(row) + " |")


def spread(values: dict[str, float], unit: str = "") -> str:
    """A summary as `median (min to max) unit`."""
    return f"{values['median']:.3g} ({values['min']:.3g} to {values['max']:.3g}){unit}"


def begin(parser: argparse.ArgumentParser, on_gpu: bool = False) -> tuple[argparse.Namespace, dict[str, Any]]:
    """The flags, with those that every benchmark of speed has; --threads set; the machine, printed.

    on_gpu: whether it can measure a GPU, and takes --device.
    """
    if on_gpu:
        parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = args.device if on_gpu else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} finds no CUDA device here")
    machine = hardware(device)
    print(machine)
    return args, machine


def finish(results: dict[str, Any], as_json: bool) -> None:
    """The machine-readable line, last, where it was asked for."""
    if as_json:
        print(json.dumps(results))
