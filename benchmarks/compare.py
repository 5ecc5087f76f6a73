"""This runtime, llama.cpp and transformers on the same weights, in turns: decode and prefill, and the ratios.

    python -m benchmarks.compare --model DIR [--groups bf16,int8,int4] [--gguf FOLDER] [--json]
    python -m benchmarks.compare --random 8b --device cuda

A turn is a prompt of 512 tokens and 64 new ones, greedy, on all threads. Every contestant is a process of its own and
meets every turn's prompt, so that a ratio is taken within a minute of the machine; medians and ranges are over the
turns. Against int8 stands llama.cpp's Q8_0, against int4 its Q4_0, against both and bf16 transformers in bfloat16.
That all compute the same model is part of the run: the distributions after a prompt are compared. Needs the `bench`
extra; the GGUF files are written from the checkpoint, once. On a GPU the rivals are transformers as it is and transformers
compiled, with a static cache.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import begin, finish, ratios, show, spread, summary
from benchmarks.contest import Entry, Outcome, contest
from benchmarks.contestants import CompiledTransformers, LlamaCpp, Transformers
from benchmarks.formats import ours
from benchmarks.gguf_file import gguf_files
from benchmarks.weights import Source, add_source, source_of

# llama.cpp's format at the same bits, by ours.
RIVALS = {"bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}
HUGGING_FACE, COMPILED = "transformers bf16", "transformers bf16, compiled"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--groups", default="bf16,int8,int4", help="our formats, each with its rival")
    parser.add_argument("--no-transformers", action="store_true", help="leave it out")
    parser.add_argument("--gguf", type=Path, help="where the GGUF files are, or are put; default: beside the model")
    parser.add_argument("--prompt", type=int, default=512, help="tokens (default %(default)s)")
    parser.add_argument("--new", type=int, default=64, help="tokens that are counted (default %(default)s)")
    parser.add_argument("--turns", type=int, default=5)
    args, machine = begin(parser, on_gpu=True)
    source, groups = source_of(args), args.groups.split(",")
    if args.device == "cpu" and source.directory is None:
        parser.error("llama.cpp wants files: give --model a checkpoint that tools.make_checkpoint wrote")
    outcomes = contest(_entries(source, args, groups), args.prompt, args.new, args.turns, source.config.vocab_size,
                       args.threads, args.device)
    print(f"{source}: a prompt of {args.prompt} tokens, {args.new} new ones, {args.turns} turns")
    results: dict[str, Any] = {"machine": machine, "model": str(source), "prompt": args.prompt, "new": args.new,
                               "facts": {name: outcome.facts for name, outcome in outcomes.items()}}
    measured = {name: outcome.rates(args.prompt, args.new) for name, outcome in outcomes.items()}
    for kind in ("prefill", "decode"):
        results[kind] = _results({name: each[kind] for name, each in measured.items()}, groups)
        _show(kind, results[kind], groups)
    results["agreement"] = agreement(outcomes)
    show("The same model: KL of the distribution after a prompt from the first one's; new tokens of the first turn "
         "until one differs", ["contestant", "KL", "tokens"],
         [[name, *values.values()] for name, values in results["agreement"].items()])
    finish(results, args.json)


def _entries(source: Source, args: argparse.Namespace, groups: Sequence[str]) -> dict[str, Entry]:
    context = args.prompt + args.new + 1
    on_cpu, entries = args.device == "cpu", {}
    if not args.no_transformers:
        num_bytes = source.config.num_weight_bytes("bfloat16")
        entries[HUGGING_FACE] = Entry(Transformers, (source, context, args.device), num_bytes)
        if not on_cpu:
            entries[COMPILED] = Entry(CompiledTransformers, (source, context, args.device), num_bytes)
    folder = args.gguf or (args.model or Path()) / "gguf"
    files = gguf_files(args.model, folder, [RIVALS[name] for name in groups]) if on_cpu else {}
    for name in groups:
        if on_cpu:
            path = files[RIVALS[name]]
            entries[f"llama.cpp {RIVALS[name]}"] = Entry(LlamaCpp, (path, context), path.stat().st_size)
        entries[f"ours {name}"] = ours(source, name, context, args.device)
    return entries


def _results(measured: Mapping[str, Sequence[float]], groups: Sequence[str]) -> dict[str, Any]:
    """Tokens per second of all; ours against each rival, turn by turn."""
    against: dict[str, dict[str, Any]] = {}
    for name in groups:
        rivals = [rival for rival in (f"llama.cpp {RIVALS.get(name)}", HUGGING_FACE, COMPILED) if rival in measured]
        against[name] = {rival: ratios(measured[f"ours {name}"], measured[rival]) for rival in rivals}
    return {"tokens_per_second": {name: summary(values) for name, values in measured.items()}, "ratios": against}


def _show(kind: str, result: dict[str, Any], groups: Sequence[str]) -> None:
    found = result["tokens_per_second"]
    rows = []
    for name in groups:
        rows.append([name, spread(found[f"ours {name}"]), *(f"{spread(found[rival])}; ours {spread(ratio)} ×"
                                                            for rival, ratio in result["ratios"][name].items())])
    rivals = ["llama.cpp at the same bits" if rival.startswith("llama.cpp") else rival
              for rival in result["ratios"][groups[0]]]
    show(f"{kind.capitalize()}, tokens/s", ["format", "this runtime", *rivals], rows)


def agreement(outcomes: Mapping[str, Outcome]) -> dict[str, dict[str, Any]]:
    """Of each but the first contestant: KL(first || it) in nats, of the distribution after the prompt that all were
    asked; and how many new tokens of the first turn are the same until one differs."""
    (_, first), *others = outcomes.items()
    results = {}
    for name, other in others:
        expected, found = (torch.from_numpy(one.logits).double().log_softmax(0) for one in (first, other))
        pairs = list(zip(first.turns[0].ids, other.turns[0].ids, strict=True))
        same = next((place for place, (theirs, its) in enumerate(pairs) if theirs != its), len(pairs))
        results[name] = {"kl": (expected.exp() * (expected - found)).sum().item(), "same_tokens": same}
    return results


if __name__ == "__main__":
    main()
