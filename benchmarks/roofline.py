"""What the machine allows: bytes read per second, and arithmetic per second, on all threads.

    python -m benchmarks.roofline [--threads N] [--json]

Each ceiling is the best that any of several kernels reached in any repeat: no faster one may exist unnoticed, and
a benchmark's share of it is not flattered by a slow minute.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import begin, finish, interleaved, seconds, show, spread, summary
from llama.model.memory import huge_pages

ROWS, WIDTH, DEPTH = 512, 8192, 4096  # of the products: a prompt's rows in a layer's shape


def main() -> None:
    """Measure and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args, machine = begin(parser)
    results: dict[str, Any] = {"machine": machine}
    for title, unit, measured in (("Reading memory", "GB/s", read_rates(repeats=args.repeats)),
                                  ("Arithmetic", "GFLOP/s", matrix_rates(args.repeats))):
        results[title] = {name: summary([value / 1e9 for value in values]) for name, values in measured.items()}
        show(title, ["kernel", unit], [[name, spread(values)] for name, values in results[title].items()])
    results["read_bandwidth"] = max(values["max"] for values in results["Reading memory"].values()) * 1e9
    print(f"\nread bandwidth: {results['read_bandwidth'] / 1e9:.1f} GB/s")
    finish(results, args.json)


def read_bandwidth(num_bytes: int = 2**30, repeats: int = 5) -> float:
    """Bytes per second that all threads together read from memory: the best of all kernels and repeats."""
    return max(max(values) for values in read_rates(num_bytes, repeats).values())


def read_rates(num_bytes: int = 2**30, repeats: int = 5) -> dict[str, list[float]]:
    """Bytes per second of each way to read a tensor that no cache holds."""
    data = huge_pages(torch.empty(num_bytes // 4, dtype=torch.float32)).fill_(1)  # as packed weights lie
    matrix, vector = data.view(-1, 4096), torch.ones(4096)
    half, half_vector = data.view(torch.bfloat16).view(-1, 4096), torch.ones(1, 4096, dtype=torch.bfloat16)
    packed = torch.ops.mkldnn._reorder_linear_weight(half, 1) if torch.backends.mkldnn.is_available() else None
    kernels: dict[str, Callable[[], Any]] = {
        "sum, float32": data.sum,
        "matrix times vector, float32": lambda: torch.mv(matrix, vector),
        "largest, int32": data.view(torch.int32).max,
    }
    if packed is not None:
        kernels["matrix times vector, bfloat16, prepacked"] = lambda: torch.ops.mkldnn._linear_pointwise(
            half_vector, packed, None, "none", [], "")
    return _rates(kernels, num_bytes, repeats)


def matrix_rates(repeats: int = 5) -> dict[str, list[float]]:
    """Operations per second of a product of [ROWS, DEPTH] and [DEPTH, WIDTH]: two for each multiplication."""
    kernels: dict[str, Callable[[], Any]] = {}
    for name in ("float32", "bfloat16"):
        dtype = getattr(torch, name)
        x, w = torch.ones(ROWS, DEPTH, dtype=dtype), torch.ones(WIDTH, DEPTH, dtype=dtype)
        kernels[name] = lambda x=x, w=w: torch.nn.functional.linear(x, w)
    whole, eight = torch.ones(ROWS, DEPTH), torch.ones(WIDTH, DEPTH)
    with warnings.catch_warnings():  # deprecated, with nothing yet in its place that makes a packed matrix
        warnings.simplefilter("ignore")
        quantised = torch.quantize_per_tensor(eight, 1 / 64, 0, torch.qint8)
    prepacked = torch.ops.quantized.linear_prepack(quantised, None)
    kernels["int8 × int8"] = lambda: torch.ops.quantized.linear_dynamic(whole, prepacked)
    return _rates(kernels, 2 * ROWS * WIDTH * DEPTH, repeats)


def _rates(kernels: dict[str, Callable[[], Any]], amount: int, repeats: int) -> dict[str, list[float]]:
    for kernel in kernels.values():
        kernel()
    contestants = {name: lambda kernel=kernel: amount / seconds(kernel) for name, kernel in kernels.items()}
    return interleaved(contestants, repeats)


if __name__ == "__main__":
    main()
