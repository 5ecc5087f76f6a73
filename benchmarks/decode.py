"""One sequence, token by token: tokens per second in every weight format, beside what reading the weights allows.

    python -m benchmarks.decode --model DIR [--formats bf16,int8,int4] [--prompt 512] [--new 64] [--json]
    python -m benchmarks.decode --random 8b --device cuda [--prompt 131000]

The prompt is read first and not counted. A step reads all weights once, and the keys and values of all positions
before it; the ceiling is the measured bandwidth over these bytes. A machine's memory may be twice as fast in one second
as in the next, where others have their share of it: so between any two tokens other memory is read, and a turn's tokens
are compared with its own ceiling. A GPU is nobody else's, and has the next step in hand between two tokens: there it is
the bandwidth of a copy, before and after all turns. Formats take turns, each in a process of its own. With a long
--prompt, attention's share shows.
"""

import argparse
from typing import Any

from benchmarks.common import begin, finish, ratios, show, spread, summary
from benchmarks.contest import contest
from benchmarks.formats import ours
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
    source, on_cpu, context = source_of(args), args.device == "cpu", args.prompt + args.new + 1
    entries = {name: ours(source, name, context, args.device, reads=on_cpu) for name in args.formats.split(",")}
    copied = [] if on_cpu else [bandwidth_of(args.device)]
    outcomes = contest(entries, args.prompt, args.new, args.turns, source.config.vocab_size, args.threads, args.device)
    copied += [] if on_cpu else [bandwidth_of(args.device)]
    results: dict[str, Any] = {"machine": machine, "model": str(source), "prompt": args.prompt, "new": args.new,
                               "formats": {}}
    rows = []
    for name, outcome in outcomes.items():
        weight_bytes = outcome.facts["step_bytes"]
        num_bytes = weight_bytes + (args.prompt + args.new / 2) * outcome.facts["kv_bytes_per_token"]
        rates = outcome.rates(args.prompt, args.new)["decode"]
        ceilings = [turn.read_rate if on_cpu else max(copied) for turn in outcome.turns]
        found = {"tokens_per_second": summary(rates), "bandwidth": summary(ceilings),
                 "share": ratios([rate * num_bytes for rate in rates], ceilings),
                 "weights_share": ratios([rate * weight_bytes for rate in rates], ceilings),
                 "prompt_seconds": summary([turn.prefill for turn in outcome.turns])}
        results["formats"][name] = found | {"weight_bytes": weight_bytes, "bytes_per_token": num_bytes}
        rows.append([name, spread(found["tokens_per_second"]), f"{num_bytes / 1e9:.3f}",
                     spread({kind: value / 1e9 for kind, value in found["bandwidth"].items()}),
                     *(spread({kind: 100 * value for kind, value in found[share].items()}, "%")
                       for share in ("share", "weights_share"))])
    memory = "GB/s read between tokens" if on_cpu else "GB/s copied"
    show(f"Tokens/s after a prompt of {args.prompt}, {args.new} new ones, {args.turns} turns",
         ["format", "tokens/s", "GB a token", memory, "share", "of weights alone"], rows)
    finish(results, args.json)


if __name__ == "__main__":
    main()
