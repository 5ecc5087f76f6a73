"""Latency and throughput as clients see them, and how much of both the server itself costs.

    python -m benchmarks.serving [--model DIR] [--threads N] [--only one,closed,rate] [--json]

The same conversations reach the same engine in three ways, in turns:

    engine   in this process, stepped as fast as it goes: the ceiling
    pipe     in a process of its own, behind server.supervisor
    http     `python -m server`, with everything that a client of it waits for

under three loads: one conversation at a time, a constant number of them (closed loop), and arrivals at a
constant mean rate that wait for nobody (Poisson). In the closed loop as many wait as run, so that in every way the
engine has the next one at hand where one has ended. Times count from when a request was due, so that a late server
is not spared. Answers are greedy, their lengths fixed beforehand and different, so that requests do not march in
step. Every turn has new prompts, the same in every way, which share their template's beginning. Random weights will
do, with a tokenizer:

    python -m tools.make_checkpoint DIR --shape 1b --vocab-size 1280 --tokenizer llama/demo
    python -m benchmarks.weights /dev/shm/8b --random 8b --device cuda                       in seconds, for --device cuda
"""

import argparse
import random
import statistics
from collections.abc import Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from benchmarks.common import begin, finish, ratios, show, spread, summary
from benchmarks.ways import Ask, Load, OnEngine, OverHttp, OverPipe, Record, Way
from llama.checkpoint.pull import resolve
from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer
from server.wire import EngineSpec

CONTEXT = 2048
KV_CACHE_BYTES = {"cpu": 512 * 2**20, "cuda": 16 * 2**30}
SHARE = 0.7  # of what the engine manages: the rate at which requests arrive, unless --rate says another


def main() -> None:
    """Run the chosen loads and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="a checkpoint with a tokenizer; default: the demo")
    parser.add_argument("--only", default=",".join(LOADS), help="loads, separated by commas")
    parser.add_argument("--ways", default=",".join(WAYS), help="ways; the others are compared to the first")
    parser.add_argument("--turns", type=int, default=5, help="of each measurement")
    parser.add_argument("--requests", type=int, default=24, help="in each turn")
    parser.add_argument("--together", type=int, default=8, help="most that run together; in the closed loop, as many wait")
    parser.add_argument("--rate", type=float, help=f"requests/s; default: {SHARE} of what the engine manages")
    parser.add_argument("--prompt-tokens", type=int, default=96)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--ttft-goal", type=float, default=1.0, help="seconds (default %(default)s)")
    parser.add_argument("--tpot-goal", type=float, default=0.2, help="seconds (default %(default)s)")
    args, machine = begin(parser, on_gpu=True)
    print(f"{args.model or 'the demo model'}; prompts of about {args.prompt_tokens} tokens, "
          f"{args.new_tokens} new ones on average, {args.requests} requests a turn, {args.turns} turns")
    prompts = Prompts(resolve(args.model and str(args.model)), args.prompt_tokens, args.new_tokens)
    results: dict[str, Any] = {"machine": machine}
    with ExitStack() as stack:
        ways = {name: stack.enter_context(closing(WAYS[name](args))) for name in args.ways.split(",")}
        for way in ways.values():
            way.run(Load(prompts.some(2), together=2))
        if args.rate is None and "rate" in args.only:
            args.rate = SHARE * _capacity(next(iter(ways.values())), prompts, args)
        for name in args.only.split(","):
            results[name] = measure(name, LOADS[name], ways, prompts, args)
    finish(results | {"arguments": {**vars(args), "model": str(args.model)}}, args.json)


class Prompts:
    """Conversations of one message, of random numbers."""

    def __init__(self, directory: Path, num_tokens: int, num_new: int):
        self._tokenizer = Tokenizer.from_directory(directory)
        self._template = ChatTemplate.from_directory(directory)
        if self._template is None:
            raise SystemExit(f"{directory} has no chat template; make_checkpoint's --tokenizer adds one")
        self._num_tokens, self._num_new = num_tokens, num_new
        self._random = random.Random(0)

    def some(self, count: int) -> list[Ask]:
        """So many new ones."""
        return [self._one() for _ in range(count)]

    def _one(self) -> Ask:
        words: list[str] = []
        ids: list[int] = []
        while len(ids) < self._num_tokens:
            words += (str(self._random.randrange(1000)) for _ in range(2))
            messages = [{"role": "user", "content": " ".join(words)}]
            ids = self._template.encode(self._tokenizer, messages)
        num_new = self._random.randint(max(self._num_new // 2, 2), max(self._num_new * 3 // 2, 2))
        return Ask(messages, tuple(ids), num_new)


# ---- loads and ways -------------------------------------------------------------------------------------


def one_at_a_time(asks: Sequence[Ask], args: argparse.Namespace) -> Load:
    """The next when the last has its answer."""
    return Load(asks, together=1)


def closed_loop(asks: Sequence[Ask], args: argparse.Namespace) -> Load:
    """So many run at any time, and as many wait."""
    return Load(asks, together=2 * args.together)


def constant_rate(asks: Sequence[Ask], args: argparse.Namespace) -> Load:
    """Poisson arrivals; another schedule each turn, the same in every way."""
    chance = random.Random(asks[0].messages[0]["content"])
    due = [0.0]
    while len(due) < len(asks):
        due.append(due[-1] + chance.expovariate(args.rate))
    return Load(asks, together=len(asks), due=due)


LOADS = {"one": one_at_a_time, "closed": closed_loop, "rate": constant_rate}


def spec(args: argparse.Namespace) -> EngineSpec:
    """The engine that `flags` make the server load."""
    options = {"max_context": CONTEXT, "kv_cache_bytes": KV_CACHE_BYTES[args.device], "device": args.device,
               "progress": False,
               "limits": {"max_running": args.together}}
    return EngineSpec(args.model and str(args.model), options, args.threads)


def flags(args: argparse.Namespace) -> list[str]:
    """The server's flags."""
    model = [] if args.model is None else ["--model", str(args.model)]
    return [*model, "--threads", str(args.threads), "--device", args.device, "--context", str(CONTEXT),
            "--kv-cache", str(KV_CACHE_BYTES[args.device]), "--max-running", str(args.together)]


WAYS = {"engine": lambda args: OnEngine(spec(args)), "pipe": lambda args: OverPipe(spec(args)),
        "http": lambda args: OverHttp(flags(args))}


# ---- figures --------------------------------------------------------------------------------------------


def measure(name: str, make: Any, ways: dict[str, Way], prompts: Prompts, args: argparse.Namespace
            ) -> dict[str, Any]:
    """All turns of one load, in every way, as two tables and as figures."""
    turns: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    for _ in range(args.turns):
        load = make(prompts.some(args.requests), args)
        for way, runner in ways.items():
            cpu = runner.cpu_seconds() if isinstance(runner, OverHttp) else 0.0
            records = runner.run(load)
            cpu = runner.cpu_seconds() - cpu if isinstance(runner, OverHttp) else 0.0
            turns[way].append(figures(load, records, args) | {"cpu": cpu})
    rate = f", {args.rate:.3g} requests/s" if make is constant_rate else ""
    title = make.__doc__.splitlines()[0].rstrip(".")
    results = {way: pooled(figures) for way, figures in turns.items()}
    show(f"{name}: {title}{rate}", ["way", "errors", "TTFT ms: median, p90, p99", "TPOT ms", "ITL ms",
                                     "tokens/s, median of turns", "within the goals"],
         [[way, each["errors"], *(quantiles(each[kind]) for kind in ("ttft", "tpot", "itl")),
           spread(each["rate"]), f"{each['goodput']:.0%}"] for way, each in results.items()])
    base, *others = turns
    results["cost"] = {way: cost(turns[base], turns[way]) for way in others}
    show(f"{name}: what each way adds to {base}, turn by turn",
         ["way", "TTFT ms, of medians", "ITL ms, of medians", "throughput", "µs of processor a token"],
         [[way, spread(each["ttft"]), spread(each["itl"]), spread(each["rate"]),
           spread(each["cpu"]) if way == "http" else ""] for way, each in results["cost"].items()])
    return results


def figures(load: Load, records: Sequence[Record], args: argparse.Namespace) -> dict[str, Any]:
    """One turn: milliseconds of each whole answer, tokens/s of all, the share that met the goals."""
    pairs = zip(load.asks, records, strict=True)
    whole = [(ask.num_tokens, record) for ask, record in pairs if record.error is None and len(record.came) > 1]
    first = [record.came[0] - record.due for _, record in whole]
    each = [(record.came[-1] - record.came[0]) / (count - 1) for count, record in whole]
    gaps = [after - before for _, record in whole for before, after in zip(record.came, record.came[1:])]
    seconds = max(record.came[-1] for _, record in whole) - min(record.due for record in records)
    good = sum(ttft <= args.ttft_goal and tpot <= args.tpot_goal for ttft, tpot in zip(first, each))
    tokens = sum(count for count, _ in whole)
    return {"errors": len(records) - len(whole), "ttft": [1000 * value for value in first],
            "tpot": [1000 * value for value in each], "itl": [1000 * value for value in gaps],
            "rate": tokens / seconds, "tokens": tokens, "goodput": good / len(records)}


def pooled(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The turns of one way together."""
    lists = {kind: [value for turn in turns for value in turn[kind]] for kind in ("ttft", "tpot", "itl")}
    return {**{kind: {"median": statistics.median(values), "p90": _quantile(values, 0.9),
                      "p99": _quantile(values, 0.99)} for kind, values in lists.items()},
            "errors": sum(turn["errors"] for turn in turns),
            "rate": summary([turn["rate"] for turn in turns]),
            "goodput": statistics.mean(turn["goodput"] for turn in turns)}


def cost(base: Sequence[dict[str, Any]], turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What a way adds: milliseconds at the median; share of the base's throughput; µs of its own work."""
    added = {kind: summary([statistics.median(theirs[kind]) - statistics.median(ours[kind])
                            for ours, theirs in zip(base, turns)]) for kind in ("ttft", "itl")}
    rate = ratios([turn["rate"] for turn in turns], [turn["rate"] for turn in base])
    return {**added, "rate": rate, "cpu": summary([1e6 * turn["cpu"] / turn["tokens"] for turn in turns])}


def quantiles(values: dict[str, float]) -> str:
    """A median and two high quantiles, for a table."""
    return ", ".join(f"{values[name]:.3g}" for name in ("median", "p90", "p99"))


def _quantile(values: Sequence[float], share: float) -> float:
    return sorted(values)[min(int(share * len(values)), len(values) - 1)]


def _capacity(way: Way, prompts: Prompts, args: argparse.Namespace) -> float:
    """Requests per second in the closed loop."""
    records = way.run(closed_loop(prompts.some(args.requests), args))
    return len(records) / max(record.came[-1] for record in records)


if __name__ == "__main__":
    main()
