"""As many requests at once as pay: output tokens per second of prompts of 1,000 tokens with 1,000 new ones each.

    python -m benchmarks.offline --random 8b --device cuda [--formats bf16,fp8] [--running 64,128,256] [--json]

Every measurement is one batch from its first prompt to its last token: so many requests are submitted at once, and all
run at once. What the hardware allows is the time to multiply the prompts at the best rate of products, and to read, in each
of the steps that follow, the weights once and every sequence's keys and values, at the measured bandwidth.
"""

import argparse
from typing import Any

import torch

from benchmarks.common import begin, finish, show, step_bytes
from benchmarks.formats import FORMATS, STEP_TOKENS
from benchmarks.prefill import allowed, operations
from benchmarks.roofline import bandwidth_of, best_products
from benchmarks.throughput import prompts, run, with_tokens
from benchmarks.weights import add_source, source_of
from llama.config import LlamaConfig
from llama.engine.engine import BLOCK_SIZE, Engine
from llama.engine.limits import Limits
from llama.engine.request import Request, TokenEvent
from llama.model.transformer import Llama


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--formats", default="bf16", help="separated by commas (default %(default)s)")
    parser.add_argument("--running", default="64,128,256", help="requests at once, separated by commas")
    parser.add_argument("--prompt", type=int, default=1000, help="tokens (default %(default)s)")
    parser.add_argument("--new", type=int, default=1000, help="tokens (default %(default)s)")
    args, machine = begin(parser, on_gpu=True)
    source = source_of(args)
    bandwidth, best = bandwidth_of(args.device), best_products(args.device)
    results: dict[str, Any] = {"machine": machine, "model": str(source), "prompt": args.prompt, "new": args.new,
                               "bandwidth": bandwidth, "arithmetic": best, "formats": {}}
    rows = []
    for name in args.formats.split(","):
        model = source.model(**FORMATS[name][0], device=args.device)
        results["formats"][name] = {}
        for running in map(int, args.running.split(",")):
            rate, steps = output_rate(model, running, args.prompt, args.new, args.device)
            seconds = least_seconds(source.config, step_bytes(model), running, args.prompt, args.new, bandwidth,
                                    allowed(name, best, args.device))
            ceiling = running * args.new / seconds
            results["formats"][name][running] = {"tokens_per_second": rate, "steps": steps, "ceiling": ceiling,
                                                 "share": rate / ceiling}
            rows.append([name, running, rate, steps, ceiling, f"{rate / ceiling:.0%}"])
        del model  # before the next format's
    show(f"Output tokens/s, prompts of {args.prompt}, {args.new} new tokens each",
         ["format", "at once", "tokens/s", "steps", "hardware allows", "share"], rows)
    finish(results, args.json)


def output_rate(model: Llama, running: int, prompt_len: int, num_new: int, device: str) -> tuple[float, int]:
    """New tokens per second of one batch, and how many steps it took."""
    num_blocks = running * (-(-(prompt_len + num_new) // BLOCK_SIZE) + 1)
    # Prompts come in by large chunks even while others decode: here nobody waits for a next token.
    limits = Limits(max_context=prompt_len + num_new + 1, max_running=running, step_tokens=STEP_TOKENS[device],
                    mixed_step_tokens=STEP_TOKENS[device])
    engine = Engine(model, limits, num_blocks, prefix_sharing=False)
    practice = prompts(model, running, 8, seed=1)  # captures the graph of the full batch, and those on the way down
    run(engine, [Request(f"p{i}", ids, with_tokens(4)) for i, ids in enumerate(practice)])
    requests = [Request(str(i), ids, with_tokens(num_new)) for i, ids in enumerate(prompts(model, running, prompt_len))]
    taken, events = run(engine, requests)
    tokens = [at for at, event in events if isinstance(event, TokenEvent)]
    assert len(tokens) == running * num_new, f"{len(tokens)} tokens came of {running * num_new}"
    return len(tokens) / taken, len(set(tokens))


def least_seconds(config: LlamaConfig, weight_bytes: int, running: int, prompt_len: int, num_new: int,
                  bandwidth: float, products: float) -> float:
    """What the hardware would need: the prompts' arithmetic, then a step for each further token."""
    prefill = running * operations(config, prompt_len) / products
    contexts = running * (prompt_len + num_new / 2) * config.kv_bytes_per_token("bfloat16")
    return prefill + (num_new - 1) * (weight_bytes + contexts) / bandwidth


if __name__ == "__main__":
    with torch.inference_mode():
        main()
