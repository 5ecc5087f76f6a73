"""What looking inside costs: captures in decode, and a patching sweep against the loop of separate runs.

    python -m benchmarks.trace --model DIR [--tokens N] [--positions N] [--layers N] [--repeats N] [--json]
    python -m benchmarks.trace --random 8b --device cuda

Decode is measured step by step in turns: a step without a plan, the same with one site captured, with every resid_post.
A sweep is measured beside one run of the whole prompt for each patch, of which only some are run and the rest counted.
"""

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch

from benchmarks.common import begin, finish, ratios, seconds, show, spread, summary
from benchmarks.throughput import make_engine, prompts, with_tokens
from benchmarks.weights import add_source, source_of
from llama.checkpoint.load import load_model
from llama.engine.request import Request
from llama.internals.direct import look
from llama.internals.patch import logit_difference, sweep
from llama.internals.trace import Replace, TracePlan
from llama.model.plan_tap import Part, PlanTap
from llama.model.ragged import RaggedBatch
from llama.model.transformer import Llama

PLANS = {"no plan": None, "one site": ("layers.3.resid_post",), "all resid_post": ("layers.*.resid_post",),
         "one pattern": ("layers.3.attn.pattern",)}
BURST = {"cpu": 1, "cuda": 16}  # steps between two looks at the clock
BOUNDS = {"one site": 1.01, "all resid_post": 1.05}


def main() -> None:
    """Run both and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--tokens", type=int, default=48, help="decode steps of each kind")
    parser.add_argument("--positions", type=int, default=32, help="positions of the sweep: the prompt's length")
    parser.add_argument("--layers", type=int, help="layers of the sweep; by default all")
    parser.add_argument("--repeats", type=int, default=2, help="turns of the sweep")
    parser.add_argument("--loop-runs", type=int, default=8, help="separate runs that are timed, of one for each patch")
    args, machine = begin(parser, on_gpu=True)
    model = load_model(args.model, device=args.device) if args.model else source_of(args).model(device=args.device)
    with torch.inference_mode():
        results = {"machine": machine, "captures": captures(model, args.tokens, args.device),
                   "sweep": patching(model, args)}
    finish(results, args.json)


def captures(model: Llama, num_tokens: int, device: str = "cpu") -> dict[str, Any]:
    """Seconds of a decode step with each plan, the kinds taken in turns, step by step; on a GPU, where a step may begin
    before the last one's end is seen, some steps at a time."""
    [ids] = prompts(model, 1, 64)
    burst = BURST[device]
    engines = {}
    for name, capture in PLANS.items():
        plan = None if capture is None else TracePlan(capture, slice(len(ids), None))
        engines[name] = make_engine(model)
        engines[name].submit(Request(name, ids, with_tokens(num_tokens * burst + 4), trace=plan))
        for _ in range(3):
            engines[name].step()
    taken: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for turn in range(num_tokens):
        for name in names[turn % len(names):] + names[:turn % len(names)]:  # nobody always comes first
            several = seconds(lambda: [engines[name].step() for _ in range(burst)], device)
            taken[name].append(several / burst)
    costs = {name: statistics.median(values) / statistics.median(taken["no plan"]) for name, values in taken.items()}
    show(f"A decode step, {num_tokens} of each, in turns ({model.dtype})",
         ["captured", "seconds", "times no plan", "allowed"],
         [[name, spread(summary(values)), f"{costs[name]:.4f}", BOUNDS.get(name, "")]
          for name, values in taken.items()])
    return {name: {"seconds": summary(values), "cost": costs[name]} for name, values in taken.items()}


def patching(model: Llama, args: argparse.Namespace) -> dict[str, Any]:
    """A sweep over positions and layers, and the loop of separate runs."""
    clean, corrupted = map(list, prompts(model, 2, args.positions))
    layers = range(args.layers or model.config.num_layers)
    metric = logit_difference(1, 2)
    num_patches = len(layers) * args.positions
    _, values = look(model, clean, TracePlan(("layers.*.resid_post",)))

    def loop() -> float:
        done = min(args.loop_runs, num_patches)

        def some() -> None:
            for place in range(done):
                layer, position = divmod(place * (num_patches // done), args.positions)
                name = f"layers.{layer}.resid_post"
                patched(model, corrupted, TracePlan(edits=(Replace(name, values[name][position], position),)))

        return seconds(some, args.device) / done * num_patches

    ours, theirs = [], []
    for _ in range(args.repeats):
        theirs.append(loop())
        ours.append(seconds(lambda: sweep(model, clean, corrupted, metric, layers=layers), args.device))
    gain = ratios(theirs, ours)
    show(f"Patching resid_post at {args.positions} positions × {len(layers)} layers",
         ["sweep", "loop of separate runs", "times as fast", "wanted"],
         [[spread(summary(ours), " s"), spread(summary(theirs), " s"), spread(gain), 3]])
    return {"sweep": summary(ours), "loop": summary(theirs), "gain": gain}


def patched(model: Llama, ids: list[int], plan: TracePlan) -> torch.Tensor:
    """One separate run: the whole prompt, of which only the last token's logits are computed."""
    every = range(len(ids))
    ids = torch.tensor(ids, device=model.device)
    batch = replace(RaggedBatch.whole(ids), logit_rows=torch.tensor([len(ids) - 1], device=model.device))
    part = Part(plan.bind(model.config, len(ids), len(ids)), batch.segments[0], every, every)
    return model(batch, None, PlanTap([part], None, model.logits))


if __name__ == "__main__":
    main()
