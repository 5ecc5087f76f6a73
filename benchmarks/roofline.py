"""What the machine allows: bytes per second, and arithmetic per second, on all threads or on a GPU.

    python -m benchmarks.roofline [--device cuda] [--threads N] [--json]

Each ceiling is the best that any of several kernels reached in any repeat: no faster one may exist unnoticed, and
a benchmark's share of it is not flattered by a slow minute. Of a GPU's memory it is that of a copy of 4 GB on the device,
bytes read and bytes written; of its arithmetic that of products of 8192 × 8192 × 8192, of random numbers.
"""

import argparse
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.common import begin, finish, interleaved, seconds, show, spread, summary
from llama.model.memory import huge_pages

ROWS, WIDTH, DEPTH = 512, 8192, 4096  # of the products: a prompt's rows in a layer's shape
COPY_BYTES, SQUARE = 4 << 30, 8192  # of what is copied and multiplied on a GPU
CALLS = 5  # on a GPU, between two looks at the clock


def main() -> None:
    """Measure and print both."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    args, machine = begin(parser, on_gpu=True)
    results: dict[str, Any] = {"machine": machine}
    on_gpu = args.device == "cuda"
    memory = copy_rates(args.repeats) if on_gpu else read_rates(repeats=args.repeats)
    arithmetic = gpu_matrix_rates(args.repeats) if on_gpu else matrix_rates(args.repeats)
    for title, unit, measured in (("Reading memory", "GB/s", memory), ("Arithmetic", "GFLOP/s", arithmetic)):
        results[title] = {name: summary([value / 1e9 for value in values]) for name, values in measured.items()}
        show(title, ["kernel", unit], [[name, spread(values)] for name, values in results[title].items()])
    results["read_bandwidth"] = max(values["max"] for values in results["Reading memory"].values()) * 1e9
    print(f"\n{'copy' if on_gpu else 'read'} bandwidth: {results['read_bandwidth'] / 1e9:.1f} GB/s")
    finish(results, args.json)


def bandwidth_of(device: str) -> float:
    """Bytes per second that the memory of a device gives: what is read on a CPU, what a copy moves on a GPU."""
    return read_bandwidth() if device == "cpu" else max(copy_rates()["copy"])


def best_products(device: str) -> dict[str, float]:
    """The best rate of products, by the kind of numbers."""
    return {name: max(values) for name, values in (matrix_rates() if device == "cpu" else gpu_matrix_rates()).items()}


def copy_rates(repeats: int = 5) -> dict[str, list[float]]:
    """Bytes per second, read and written, of a copy on the GPU that no cache holds."""
    source = torch.empty(COPY_BYTES // 4, device="cuda").normal_()
    target = torch.empty_like(source)
    try:
        return _gpu_rates({"copy": lambda: target.copy_(source)}, 2 * COPY_BYTES, repeats)
    finally:
        del source, target
        torch.cuda.empty_cache()  # other processes want the room


def gpu_matrix_rates(repeats: int = 5) -> dict[str, list[float]]:
    """Operations per second of a product of two random matrices, [SQUARE, SQUARE] each."""
    x, w = (torch.empty(SQUARE, SQUARE, device="cuda", dtype=torch.bfloat16).normal_() for _ in range(2))
    kernels: dict[str, Callable[[], Any]] = {"bfloat16": lambda: torch.nn.functional.linear(x, w)}
    if torch.cuda.get_device_capability() >= (8, 9):
        x8, w8 = x.to(torch.float8_e4m3fn), w.to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        kernels["fp8 × fp8"] = lambda: torch._scaled_mm(x8, w8.t(), one, one, out_dtype=torch.bfloat16)
    return _gpu_rates(kernels, 2 * SQUARE**3, repeats)


def _gpu_rates(kernels: dict[str, Callable[[], Any]], amount: int, repeats: int) -> dict[str, list[float]]:
    def several(kernel: Callable[[], Any]) -> None:
        for _ in range(CALLS):
            kernel()

    for kernel in kernels.values():
        several(kernel)
    contestants = {name: lambda kernel=kernel: CALLS * amount / seconds(lambda: several(kernel), "cuda")
                   for name, kernel in kernels.items()}
    return interleaved(contestants, repeats)


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
