"""Prompts of several lengths: tokens per second in every weight format, beside what the arithmetic allows.

    python -m benchmarks.prefill --model DIR [--formats bf16,int8,int4] [--lengths 128,512,2048] [--json]
    python -m benchmarks.prefill --random 8b --device cuda [--formats bf16,fp8] [--lengths 512,8192]

The ceiling of a format is the best measured rate of products that it may use: of bfloat16 weights, in bfloat16 or
float32; of quantised ones, in whatever is fastest (on a GPU only fp8: the others are multiplied in bfloat16). A token costs
two operations for each weight of the layers, and attention to those before it; the head is computed for the last alone.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from benchmarks.common import begin, finish, show, spread, summary
from benchmarks.contest import contest
from benchmarks.formats import ours
from benchmarks.roofline import best_products
from benchmarks.weights import add_source, source_of
from llama.config import LlamaConfig


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--formats", default="bf16,int8,int4", help="separated by commas (default %(default)s)")
    parser.add_argument("--lengths", default="128,512,2048", help="tokens, separated by commas")
    parser.add_argument("--turns", type=int, default=5)
    args, machine = begin(parser, on_gpu=True)
    source = source_of(args)
    config = source.config
    best = best_products(args.device)
    results: dict[str, Any] = {"machine": machine, "model": str(source), "arithmetic": best, "lengths": {}}
    print("\nbest products: " + ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in best.items()))
    names, rows = args.formats.split(","), []
    for length in map(int, args.lengths.split(",")):
        entries = {name: ours(source, name, length + 2, args.device) for name in names}
        outcomes = contest(entries, length, 1, args.turns, config.vocab_size, args.threads, args.device)
        results["lengths"][length] = {}
        for name, outcome in outcomes.items():
            ceiling = allowed(name, best, args.device) * length / operations(config, length)
            found = summary(outcome.rates(length, 1)["prefill"])
            results["lengths"][length][name] = {"tokens_per_second": found, "ceiling": ceiling,
                                                "share": found["median"] / ceiling}
            rows.append([length, name, spread(found), ceiling, f"{found['median'] / ceiling:.0%}"])
    show(f"Tokens/s of the prompt, {args.turns} turns",
         ["tokens", "format", "tokens/s", "arithmetic allows", "share"], rows)
    finish(results, args.json)


def allowed(name: str, best: Mapping[str, float], device: str) -> float:
    """The best measured rate of the products that a format may use."""
    quantised = name.startswith("int") if device == "cpu" else name == "fp8"
    return max(best.values()) if quantised else max(best.get("float32", 0), best["bfloat16"])


def operations(config: LlamaConfig, length: int) -> float:
    """Multiplications and additions of a prompt: each weight of the layers once a token, the head's once, and scores
    and sums over every position and those before it."""
    head = config.vocab_size * config.hidden_size
    layers = config.num_parameters - head * (1 if config.tie_word_embeddings else 2)
    attention = 4 * config.num_layers * config.q_size * length * (length + 1) / 2
    return 2 * (layers * length + head) + attention


if __name__ == "__main__":
    main()
