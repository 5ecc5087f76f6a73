"""What every benchmark needs: the machine and its ceiling, repeated measurements, a table, a line of JSON."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def hardware() -> dict[str, Any]:
    """The machine, as far as it can be read off it, and the versions that ran."""
    fields = [line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines() if ":" in line]
    values = {name.strip(): value.strip() for name, value in fields}
    flags = values.get("flags", "").split()
    return {
        "processor": values.get("model name", platform.processor()),
        "features": [name for name in ("avx512_bf16", "avx512_vnni", "amx_bf16", "amx_int8") if name in flags],
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def read_bandwidth(num_bytes: int = 2**30, repeats: int = 5) -> float:
    """Bytes per second that all threads together read from memory: the best of several sums over a large tensor."""
    data = torch.ones(num_bytes // 4, dtype=torch.float32)
    vector = torch.ones(4096)
    matrix = data.view(-1, 4096)
    return max(num_bytes / seconds(lambda: torch.mv(matrix, vector)) for _ in range(repeats))


def seconds(work: Callable[[], Any]) -> float:
    """How long one call takes."""
    began = time.perf_counter()
    work()
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


def finish(results: dict[str, Any], as_json: bool) -> None:
    """The machine-readable line, last, where it was asked for."""
    if as_json:
        print(json.dumps(results))
