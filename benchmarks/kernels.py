"""Each piece of the model alone, at the real shapes, over what the hardware allows it: to find what is slow, and to tune.

    python -m benchmarks.kernels --shape 8b --device cuda [--only products,attention,elementwise] [--rows 1,4,16] [--json]

What is measured is what the model calls, whichever kernel stands behind it. A piece's floor is its bytes over the
measured bandwidth, or its operations over the best rate of products, whichever takes longer; the share is the floor over
the time. Calls go around as many copies of weights or cache as no cache of the processor holds. On a GPU they are
replayed from a CUDA graph, so that the time of their launches from Python is not in it.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.common import begin, finish, seconds, show
from benchmarks.prefill import allowed
from benchmarks.roofline import bandwidth_of, best_products
from benchmarks.weights import Source
from llama.config import LlamaConfig
from llama.engine.device import CudaDevice
from llama.model.attention import ragged_attention, rotate_and_write
from llama.model.cache import KVCache
from llama.model.elementwise import swiglu
from llama.model.linear import make_linear
from llama.model.ragged import PagedQueries, RaggedBatch, Segment
from llama.model.rope import inverse_frequencies, rotation
from llama.model.transformer import RMSNorm

BLOCK_SIZE = 16
COLD_BYTES = 512 << 20  # of copies: many times the L2 of a GPU
# Sequences and positions of each, all of which decode.
CONTEXTS = ((1, 1024), (1, 8192), (1, 131072), (16, 8192), (64, 1024), (256, 1024))


@dataclass(frozen=True)
class Piece:
    """Something to time. calls: the same work on other data each; bytes and operations: of one call, in a format."""

    name: str
    calls: Sequence[Callable[[], Any]]
    num_bytes: float
    operations: float = 0.0
    fmt: str = "bf16"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="8b", help="a published shape (default %(default)s)")
    parser.add_argument("--only", default=",".join(SUBJECTS), help="subjects, separated by commas")
    parser.add_argument("--formats", default="bf16,int8,int4,fp8", help="of products (default %(default)s)")
    parser.add_argument("--rows", default="1,4,16,512", help="tokens of a step (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5)
    args, machine = begin(parser, on_gpu=True)
    config = Source(None, args.shape).config
    bandwidth, best = bandwidth_of(args.device), best_products(args.device)
    results: dict[str, Any] = {"machine": machine, "shape": args.shape, "bandwidth": bandwidth, "arithmetic": best}
    for subject in args.only.split(","):
        rows, results[subject] = [], {}
        for piece in SUBJECTS[subject](config, args):
            taken = timed(piece.calls, args.device, args.repeats)
            floor = max(piece.num_bytes / bandwidth, piece.operations / allowed(piece.fmt, best, args.device))
            results[subject][piece.name] = {"microseconds": 1e6 * taken, "share": floor / taken,
                                            "gigabytes_per_second": piece.num_bytes / taken / 1e9}
            rows.append([piece.name, 1e6 * taken, piece.num_bytes / taken / 1e9, piece.operations / taken / 1e12,
                         f"{floor / taken:.0%}"])
        show(subject.capitalize(), ["what", "µs", "GB/s", "TFLOP/s", "of what is allowed"], rows)
    finish(results, args.json)


def timed(calls: Sequence[Callable[[], Any]], device: str, repeats: int) -> float:
    """Seconds of one call, at the median of all rounds."""
    def around() -> None:
        for call in calls:
            call()

    around()
    replay = around if device == "cpu" else CudaDevice().capture(around)[0]
    replay()
    return statistics.median(seconds(replay, device) for _ in range(repeats)) / len(calls)


# ---- subjects -------------------------------------------------------------------------------------------------------


def products(config: LlamaConfig, args: argparse.Namespace) -> Iterator[Piece]:
    """x Wᵀ, by shape, format and rows."""
    hidden, inner = config.hidden_size, config.intermediate_size
    shapes = {"qkv": (hidden, config.q_size, config.kv_size, config.kv_size), "out": (config.q_size, hidden),
              "gate_up": (hidden, inner, inner), "down": (inner, hidden), "head": (hidden, config.vocab_size)}
    for fmt in args.formats.split(","):
        for name, (columns, *rows_of) in shapes.items():
            def make() -> Any:
                linear = make_linear(columns, *rows_of, dtype=torch.bfloat16, device=args.device,
                                     fmt=None if fmt == "bf16" else fmt)
                linear.store(0, torch.empty(sum(rows_of), columns, device=args.device).normal_(std=columns**-0.5))
                return linear

            first = make()
            copies = [first, *(make() for _ in range(copies_of(first.num_bytes) - 1))]
            for count in map(int, args.rows.split(",")):
                x = torch.empty(count, columns, dtype=torch.bfloat16, device=args.device).normal_()
                moved = first.num_bytes + x.nbytes + 2 * count * sum(rows_of)
                calls = [lambda linear=linear, x=x: linear(x) for linear in copies]
                yield Piece(f"{fmt} {name}, {count} rows", calls, moved, 2.0 * count * columns * sum(rows_of), fmt)


def attention(config: LlamaConfig, args: argparse.Namespace) -> Iterator[Piece]:
    """One token of each sequence over its context, blocks in any order; and a prompt over itself."""
    for sequences, length in CONTEXTS:
        length = min(length, config.max_position_embeddings)
        per_sequence = -(-length // BLOCK_SIZE)
        num_blocks = sequences * per_sequence
        # a sequence's context of one layer, its keys and values and queries
        num_bytes = sequences * length * config.kv_bytes_per_token("bfloat16") / config.num_layers
        one = replace(config, num_layers=copies_of(num_bytes))
        cache = filled_cache(one, num_blocks, args.device)
        q = torch.empty(sequences, config.num_heads, config.head_dim, dtype=torch.bfloat16, device=args.device).normal_()
        k = torch.empty(sequences, config.num_kv_heads, config.head_dim, dtype=torch.bfloat16, device=args.device).normal_()
        tables = torch.randperm(num_blocks, device=args.device).view(sequences, per_sequence).int()
        lengths = torch.full((sequences,), length, dtype=torch.int32, device=args.device)
        rows = torch.arange(sequences, dtype=torch.int32, device=args.device)
        batch = RaggedBatch(rows.long(), lengths.long() - 1, (), paged=PagedQueries(rows, tables, lengths, BLOCK_SIZE, 1))
        calls = [lambda layer=layer: ragged_attention(q, k, k, batch, cache, layer) for layer in range(one.num_layers)]
        yield Piece(f"decode, {sequences} × {length}", calls, num_bytes + 2 * q.nbytes,
                    4.0 * sequences * length * config.q_size)
        del cache
    for length in (1024, 8192):
        length = min(length, config.max_position_embeddings)
        cache = filled_cache(replace(config, num_layers=1), -(-length // BLOCK_SIZE), args.device)
        q = torch.empty(length, config.num_heads, config.head_dim, dtype=torch.bfloat16, device=args.device).normal_()
        k, v = (part[0, :length] for part in (cache.keys, cache.values))
        ids = torch.arange(length, device=args.device)
        batch = RaggedBatch(ids, ids, (Segment(0, length, ((0, length),)),), ids)
        yield Piece(f"prompt of {length}", [lambda: ragged_attention(q, k, v, batch, cache, 0)],
                    2 * q.nbytes + k.nbytes + v.nbytes, 2.0 * length * (length + 1) * config.q_size)


def elementwise(config: LlamaConfig, args: argparse.Namespace) -> Iterator[Piece]:
    """What lies between the products: norm with the sum before it, rotation with the cache's write, SwiGLU."""
    device = args.device
    frequencies = inverse_frequencies(config).to(device)
    norm = RMSNorm(config.hidden_size, config.rms_norm_eps, torch.bfloat16, device)
    norm.weight.data.normal_(1, 0.05)
    for count in map(int, args.rows.split(",")):
        def random(*shape: int) -> torch.Tensor:
            return torch.empty(count, *shape, dtype=torch.bfloat16, device=device).normal_()

        x, gate, up = random(config.hidden_size), random(config.intermediate_size), random(config.intermediate_size)
        q, k = random(config.num_heads, config.head_dim), random(config.num_kv_heads, config.head_dim)
        slots = torch.arange(count, device=device)
        cache = filled_cache(replace(config, num_layers=1), -(-count // BLOCK_SIZE), device)
        rotary = rotation(slots, frequencies)

        def rope(q=q, k=k, slots=slots, cache=cache, rotary=rotary) -> None:
            rotate_and_write(q, k, k, rotary, cache, 0, slots)

        yield Piece(f"sum and norm, {count} rows", [lambda x=x: norm.add(x, x, "resid_mid")] * 20, 4 * x.nbytes)
        yield Piece(f"rotation and cache, {count} rows", [rope] * 20, 2 * q.nbytes + 4 * k.nbytes)
        yield Piece(f"SwiGLU, {count} rows", [lambda gate=gate, up=up: swiglu(gate, up)] * 20, 3 * gate.nbytes)


SUBJECTS = {"products": products, "attention": attention, "elementwise": elementwise}


def copies_of(num_bytes: float) -> int:
    """How many of that size no cache holds, at most 64."""
    return max(1, min(64, round(COLD_BYTES / num_bytes)))


def filled_cache(config: LlamaConfig, num_blocks: int, device: str) -> KVCache:
    """A cache of random keys and values."""
    cache = KVCache(config, num_blocks, BLOCK_SIZE, torch.bfloat16, device)
    cache.keys.normal_()
    cache.values.normal_()
    return cache


if __name__ == "__main__":
    with torch.inference_mode():
        main()
