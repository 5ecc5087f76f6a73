"""One sequence, token by token: tokens per second in every weight format, beside what reading the weights allows.

    python -m benchmarks.decode --model DIR [--formats bf16,int8,int4] [--prompt 512] [--new 64] [--json]
    python -m benchmarks.decode --random 8b --device cuda [--prompt 131000]

The prompt is read first and not counted. A step reads all weights once, and the keys and values of all positions
before it; the ceiling is the measured bandwidth, of reads or on a GPU of a copy, over these bytes. Formats take turns, each in a process of its
own. With a long --prompt, attention's share shows.
"""

import argparse
from typing import Any

from benchmarks.common import begin, finish, show, spread, summary
from benchmarks.contest import contest
from benchmarks.formats import STEP_TOKENS, ours
from benchmarks.roofline import bandwidth_of
from benchmarks.weights import add_source, source_of


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--formats", default="bf16,int8,int4", help="separated by commas (default %(default)s)")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens that are counted (default %(default)s)")
    parser.add_argument("--turns", type=int, default=5)
    args, machine = begin(parser, on_gpu=True)
    source = source_of(args)
    bandwidth = bandwidth_of(args.device)
    entries = {name: ours(source, name, args.prompt + args.new + 1, args.device, STEP_TOKENS[args.device])
               for name in args.formats.split(",")}
    outcomes = contest(entries, args.prompt, args.new, args.turns, source.config.vocab_size, args.threads, args.device)
    bandwidth = max(bandwidth, bandwidth_of(args.device))
    results: dict[str, Any] = {"machine": machine, "model": str(source), "prompt": args.prompt, "new": args.new,
                               "bandwidth": bandwidth, "formats": {}}
    rows = []
    for name, outcome in outcomes.items():
        weight_bytes = outcome.facts["step_bytes"]
        num_bytes = weight_bytes + (args.prompt + args.new / 2) * outcome.facts["kv_bytes_per_token"]
        found = summary(outcome.rates(args.prompt, args.new)["decode"])
        share = found["median"] * num_bytes / bandwidth
        results["formats"][name] = {"tokens_per_second": found, "weight_bytes": weight_bytes,
                                    "bytes_per_token": num_bytes, "ceiling": bandwidth / num_bytes, "share": share,
                                    "weights_share": found["median"] * weight_bytes / bandwidth,
                                    "prompt_seconds": summary([turn.prefill for turn in outcome.turns])}
        rows.append([name, spread(found), f"{num_bytes / 1e9:.3f}", bandwidth / num_bytes, f"{share:.0%}",
                     f"{results['formats'][name]['weights_share']:.0%}"])
    print(f"\n{'read' if args.device == 'cpu' else 'copy'} bandwidth {bandwidth / 1e9:.1f} GB/s")
    show(f"Tokens/s after a prompt of {args.prompt}, {args.new} new ones, {args.turns} turns",
         ["format", "tokens/s", "GB a token", "bandwidth allows", "share", "of weights alone"], rows)
    finish(results, args.json)


if __name__ == "__main__":
    main()
