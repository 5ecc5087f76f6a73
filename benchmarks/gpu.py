"""Everything that is to be measured on one lent GPU, in the order of its worth, and the table of what was reached.

    python -m benchmarks.gpu --out gpu.jsonl [--only decode,prefill] [--budget 580]     on the machine with the GPU
    python -m benchmarks.gpu --table gpu.jsonl [MORE.jsonl ...]                         anywhere, afterwards

Every step is a command of its own with a time limit of its own; its line is in the file as soon as it has ended, however
it ended, so that a run that is cut short loses nothing. What no time was left for is named at the end, as the --only of
the next run.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CHECKPOINT = Path("/dev/shm/llama-8b")
LEAST_SECONDS = 30  # what a step has to have left to be begun
TAIL = 4000  # characters of what a step printed, kept beside its result


@dataclass(frozen=True)
class Step:
    """A command: `python -m` and these arguments. limit: seconds. reads: whether it needs CHECKPOINT."""

    name: str
    arguments: tuple[str, ...]
    limit: float
    reads: bool = False


def _step(name: str, command: str, limit: float, reads: bool = False) -> Step:
    return Step(name, tuple(command.split()), limit, reads)


ON_GPU = "--random 8b --device cuda --json"
FROM_FILES = f"--model {CHECKPOINT} --device cuda --json"
WRITE = _step("write", f"benchmarks.weights {CHECKPOINT} --random 8b --device cuda", 120)
STEPS = [
    _step("tests", "pytest tests/gpu tests/kernels -q -x", 240),
    _step("roofline", "benchmarks.roofline --device cuda --json", 60),
    _step("decode", f"benchmarks.decode --formats bf16,int8,int4,fp8 --new 256 --turns 3 {ON_GPU}", 180),
    _step("prefill", f"benchmarks.prefill --formats bf16,fp8 --lengths 8192 --turns 3 {ON_GPU}", 120),
    _step("offline", f"benchmarks.offline --formats bf16 --running 128,256 {ON_GPU}", 200),
    _step("offline-fp8", f"benchmarks.offline --formats fp8 --running 256,512 {ON_GPU}", 200),
    _step("compare", f"benchmarks.compare --groups bf16 --turns 3 {ON_GPU}", 200),
    _step("long", f"benchmarks.decode --formats bf16 --prompt 130000 --new 64 --turns 2 {ON_GPU}", 180),
    _step("deterministic", f"benchmarks.throughput --only deterministic --no-peers {ON_GPU}", 120),
    _step("loading", f"benchmarks.memory --formats bf16 --warm --turns 3 {FROM_FILES}", 120, reads=True),
    _step("serving", "benchmarks.serving --only closed --ways engine,http --turns 2 --requests 192 --together 64 "
                     f"--prompt-tokens 200 --new-tokens 200 {FROM_FILES}", 200, reads=True),
    _step("trace", f"benchmarks.trace --tokens 16 --positions 8 --layers 4 {ON_GPU}", 120),
    _step("kernels", "benchmarks.kernels --shape 8b --device cuda --json", 240),
]


# ---- running --------------------------------------------------------------------------------------------------------


def run_all(steps: Sequence[Step], out: Path, budget: float, write: Step = WRITE) -> list[str]:
    """Each step in turn, as long as there is time; the names of those for which there was none."""
    ends = time.monotonic() + budget
    for number, step in enumerate(steps):
        left = ends - time.monotonic()
        if left < LEAST_SECONDS:
            return [each.name for each in steps[number:]]
        if step.reads and not CHECKPOINT.exists():
            note(out, run(write, left))
            left = ends - time.monotonic()
        note(out, run(step, left))
    return []


def run(step: Step, left: float) -> dict[str, Any]:
    """One step, at most its limit and what is left: how it ended, and the JSON of its last line if it has one."""
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", *step.arguments], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                               text=True, start_new_session=True)
    try:
        printed, code = process.communicate(timeout=min(step.limit, max(left, 1)))[0], process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the contestants too
        printed, code = process.communicate()[0], 124
    return {"step": step.name, "rc": code, "seconds": time.monotonic() - began, "result": last_json(printed),
            "tail": printed[-TAIL:]}


def last_json(printed: str) -> dict[str, Any] | None:
    """What a benchmark's --json ends with."""
    last = printed.strip().rpartition("\n")[2]
    try:
        return json.loads(last) if last.startswith("{") else None
    except json.JSONDecodeError:
        return None


def note(out: Path, line: Mapping[str, Any]) -> None:
    """Append to the file and tell the terminal."""
    with out.open("a") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(f"== {line['step']}: exit code {line['rc']} after {line['seconds']:.0f} s\n{line['tail']}", flush=True)


# ---- the table ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """A line of the table. read: from a step's result, what was reached, in words, and whether that is enough."""

    what: str
    goal: str
    step: str
    read: Callable[[Mapping[str, Any]], tuple[str, bool]]


def _stream(fmt: str, least: float) -> Callable[[Mapping[str, Any]], tuple[str, bool]]:
    def read(result: Mapping[str, Any]) -> tuple[str, bool]:
        found = result["formats"][fmt]
        return (f"{found['share']['median']:.0%} of {found['bandwidth']['median'] / 1e12:.2f} TB/s, "
                f"{found['tokens_per_second']['median']:.0f} tokens/s"), found["share"]["median"] >= least

    return read


def _rival(name: str, least: float) -> Callable[[Mapping[str, Any]], tuple[str, bool]]:
    def read(result: Mapping[str, Any]) -> tuple[str, bool]:
        gain = result["decode"]["ratios"]["bf16"][name]
        return f"{gain['median']:.2f} × ({gain['min']:.2f} to {gain['max']:.2f})", gain["median"] >= least

    return read


def _prefill(result: Mapping[str, Any]) -> tuple[str, bool]:
    found = result["lengths"]["8192"]["bf16"]
    return (f"{found['share']:.0%} of {result['arithmetic']['bfloat16'] / 1e12:.0f} TFLOP/s, "
            f"{found['tokens_per_second']['median']:.0f} tokens/s"), found["share"] >= 0.65


def _long_prompt(result: Mapping[str, Any]) -> tuple[str, bool]:
    taken = result["formats"]["bf16"]["prompt_seconds"]["median"]
    return f"{taken:.1f} s for {result['prompt']:,} tokens", taken <= 12


def _offline(fmt: str, least: float) -> Callable[[Mapping[str, Any]], tuple[str, bool]]:
    def read(result: Mapping[str, Any]) -> tuple[str, bool]:
        running, found = max(result["formats"][fmt].items(), key=lambda item: item[1]["tokens_per_second"])
        return (f"{found['tokens_per_second']:,.0f} tokens/s, {running} at once, {found['share']:.0%} of what the "
                "hardware allows"), found["tokens_per_second"] >= least

    return read


def _served(result: Mapping[str, Any]) -> tuple[str, bool]:
    rate = result["closed"]["cost"]["http"]["rate"]
    return f"{rate['median']:.1%} ({rate['min']:.1%} to {rate['max']:.1%})", rate["median"] >= 0.95


def _deterministic(result: Mapping[str, Any]) -> tuple[str, bool]:
    costs = {work: found["median"] for work, found in result["deterministic"].items()}
    return ", ".join(f"{work}: {cost:.2f} × the time" for work, cost in costs.items()), max(costs.values()) <= 1.25


def _loading(result: Mapping[str, Any]) -> tuple[str, bool]:
    total = result["formats"]["bf16"]["total"]
    return f"{total['median']:.1f} s ({total['min']:.1f} to {total['max']:.1f})", total["median"] <= 5


def _captures(result: Mapping[str, Any]) -> tuple[str, bool]:
    costs = {name: found["cost"] for name, found in result["captures"].items() if name != "no plan"}
    said = ", ".join(f"{name}: {cost:.3f} × a step" for name, cost in costs.items())
    return said, costs["one site"] <= 1.01 and costs["all resid_post"] <= 1.05


GOALS = [
    Goal("one stream, bf16", "≥ 85% of the copy bandwidth", "decode", _stream("bf16", 0.85)),
    Goal("one stream, int8 weights", "≥ 75%", "decode", _stream("int8", 0.75)),
    Goal("one stream, int4 weights", "≥ 55%", "decode", _stream("int4", 0.55)),
    Goal("against transformers, eager, one stream", "≥ 4 ×", "compare", _rival("transformers bf16", 4)),
    Goal("against transformers, compiled, static cache", "none set", "compare", _rival("transformers bf16, compiled", 0)),
    Goal("decode at 128k tokens of context", "≥ 80% of its bound", "long", _stream("bf16", 0.8)),
    Goal("prefill of 8,192 tokens", "≥ 65% of the matrix rate", "prefill", _prefill),
    Goal("prefill of 128k tokens", "≤ 12 s", "long", _long_prompt),
    Goal("1,000 in, 1,000 out, bf16", "≥ 9,000 output tokens/s", "offline", _offline("bf16", 9000)),
    Goal("1,000 in, 1,000 out, fp8", "≥ 14,000 output tokens/s", "offline-fp8", _offline("fp8", 14000)),
    Goal("through the server, of offline", "≥ 95%", "serving", _served),
    Goal("deterministic mode", "≤ 1.25 × the time", "deterministic", _deterministic),
    Goal("files in the page cache to the first token", "≤ 5 s", "loading", _loading),
    Goal("captures under a trace plan", "one site ≤ 1.01, all resid_post ≤ 1.05", "trace", _captures),
]


def table(lines: Iterable[Mapping[str, Any]]) -> str:
    """The goals as Markdown, each with what the last line of its step says; and how every step ended."""
    latest = {line["step"]: line for line in lines}
    out = ["| | goal | measured | met |", "|---|---|---|---|"]
    for goal in GOALS:
        line = latest.get(goal.step)
        if line is None:
            measured, met = "not yet measured", ""
        elif line["result"] is None or line["rc"] != 0:
            measured, met = f"not yet measured: the step ended with {line['rc']}", ""
        else:
            measured, is_met = goal.read(line["result"])
            met = "yes" if is_met else "no"
        out.append(f"| {goal.what} | {goal.goal} | {measured} | {met} |")
    machines = [(line["result"] or {}).get("machine", {}) for line in latest.values()]
    cards = {machine["gpu"] for machine in machines if "gpu" in machine}
    ended = ", ".join(f"{name} {line['rc']}" for name, line in latest.items())
    return "\n".join([*out, "", f"Measured on: {', '.join(sorted(cards)) or 'nothing yet'}. Exit codes: {ended or 'none'}."])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--out", type=Path, help="where a line for each step is appended")
    kind.add_argument("--table", type=Path, nargs="+", metavar="FILE", help="print what these files hold, the last counting")
    parser.add_argument("--only", help=f"steps, separated by commas: {','.join(step.name for step in STEPS)}")
    parser.add_argument("--budget", type=float, default=580, help="seconds in all (default %(default)s)")
    args = parser.parse_args(arguments)
    if args.table:
        print(table(json.loads(line) for path in args.table for line in path.read_text().splitlines()))
        return
    wanted = None if args.only is None else args.only.split(",")
    for name in wanted or ():
        if name not in {step.name for step in STEPS}:
            parser.error(f"there is no step {name!r}")
    left = run_all([step for step in STEPS if wanted is None or step.name in wanted], args.out, args.budget)
    print(table(json.loads(line) for line in args.out.read_text().splitlines()))
    if left:
        print(f"\nNo time was left for: --only {','.join(left)}")


if __name__ == "__main__":
    main()
