"""Many requests on one engine: batch size, mixed load, shared prefixes, guessed tokens, determinism's cost.

    python -m benchmarks.throughput --model DIR [--only batch,mixed,prefix,speculation,deterministic] [--json]
    python -m benchmarks.throughput --random 8b --device cuda --only deterministic

Peers (the `bench` extra) run in turns with this runtime, on the same weights and the same prompts.
"""

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.common import begin, finish, interleaved, ratios, show, spread, step_bytes, summary
from benchmarks.contestants import peer
from benchmarks.formats import STEP_TOKENS
from benchmarks.roofline import bandwidth_of
from benchmarks.weights import Source, add_source, source_of
from llama.engine.engine import Engine
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from llama.engine.request import Event, Request, SamplingParams, TokenEvent
from llama.model.transformer import Llama

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0, ignore_eos=True)
NUM_BLOCKS = 1024  # of 16 positions


def main() -> None:
    """Run the chosen sections and print them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_source(parser)
    parser.add_argument("--quantize", choices=("int8", "int4", "fp8"), help="round the weights")
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--repeats", type=int, default=3, help="turns of each measurement")
    parser.add_argument("--no-peers", action="store_true", help="this runtime alone")
    args, machine = begin(parser, on_gpu=True)
    bandwidth = bandwidth_of(args.device)
    model = source_of(args).model(quantize=args.quantize, device=args.device)
    weight_bytes = step_bytes(model)
    print(f"bandwidth {bandwidth / 1e9:.1f} GB/s; a step reads {weight_bytes / 1e9:.2f} GB of weights: "
          f"at most {bandwidth / weight_bytes:.1f} steps/s")
    results: dict[str, Any] = {"machine": machine, "bandwidth": bandwidth, "weight_bytes": weight_bytes}
    for name in args.only.split(","):
        results[name] = SECTIONS[name](model, args, bandwidth / weight_bytes)
    finish(results, args.json)


def prompts(model: Llama, count: int, length: int, seed: int = 0) -> list[tuple[int, ...]]:
    """Random ids: nothing is shared, nothing repeats."""
    rng = random.Random(seed)
    return [tuple(rng.randrange(model.config.vocab_size // 2) for _ in range(length)) for _ in range(count)]


def run(engine: Engine, requests: Sequence[Request]) -> tuple[float, list[tuple[float, Event]]]:
    """All requests at once, to their ends: seconds, and every event with the time that it came at."""
    began = time.perf_counter()
    for request in requests:
        engine.submit(request)
    events = []
    while engine.has_work:
        step = engine.step()
        now = time.perf_counter() - began
        events += [(now, event) for event in step]
    return time.perf_counter() - began, events


def make_engine(model: Llama, **options: Any) -> Engine:
    """An engine with a cache of its own."""
    limits = Limits(max_context=8192, step_tokens=STEP_TOKENS[model.device.type])
    return Engine(model, limits, NUM_BLOCKS, **options)


def with_tokens(count: int) -> SamplingParams:
    """Greedy, exactly so many tokens."""
    return SamplingParams(**{**vars(GREEDY), "max_tokens": count})


# ---- sections -------------------------------------------------------------------------------------------------------


def batch(model: Llama, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """Tokens per second against the number of sequences, beside transformers."""
    prompt_len, new_tokens = 64, 32
    rows, results = [], {}
    peers = {} if args.no_peers else _transformers(source_of(args), args.device, new_tokens)
    for size in (1, 2, 4, 8, 16):
        texts = prompts(model, size, prompt_len, seed=size)

        def ours() -> float:
            requests = [Request(str(i), ids, with_tokens(new_tokens)) for i, ids in enumerate(texts)]
            taken, _ = run(make_engine(model), requests)
            return size * new_tokens / taken

        contestants: dict[str, Callable[[], float]] = {"this runtime": ours}
        for name, generate in peers.items():
            contestants[name] = lambda generate=generate: generate(texts)
        measured = interleaved(contestants, args.repeats)
        results[size] = {name: summary(values) for name, values in measured.items()}
        results[size]["decode only"] = summary([_decode_rate(model, texts, new_tokens) for _ in range(args.repeats)])
        gains = {name: ratios(measured["this runtime"], values) for name, values in measured.items()}
        rows.append([size, spread(results[size]["decode only"]), f"{ceiling:.1f} × {size}",
                     *(spread(results[size][name]) + (f"; ours {gains[name]['median']:.2f} ×" if name in peers else "")
                       for name in contestants)])
    show(f"Tokens/s, prompts of {prompt_len}, {new_tokens} new tokens each ({model.dtype})",
         ["sequences", "decode steps only", "bandwidth allows", *contestants], rows)
    gain = results[8]["decode only"]["median"] / results[1]["decode only"]["median"]
    print(f"\n8 sequences decode {gain:.2f} times as fast as one")
    return results


def mixed(model: Llama, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """Time between tokens of running requests while long prompts come in."""
    engine = make_engine(model)
    for i, ids in enumerate(prompts(model, 4, 32)):
        engine.submit(Request(f"decode-{i}", ids, with_tokens(96)))
    arrivals, longs = {8: 0, 32: 1, 56: 2}, prompts(model, 3, 512, seed=7)
    last: dict[str, float] = {}
    gaps, first_tokens, submitted = [], [], {}
    step = 0
    while engine.has_work:
        if step in arrivals:
            name = f"long-{arrivals[step]}"
            submitted[name] = time.perf_counter()
            engine.submit(Request(name, longs[arrivals[step]], with_tokens(8)))
        for event in engine.step():
            now, name = time.perf_counter(), event.request_id
            if not isinstance(event, TokenEvent):
                continue
            if name in last:
                gaps.append(now - last[name])
            elif name in submitted:
                first_tokens.append(now - submitted[name])
            last[name] = now
        step += 1
    gaps.sort()
    result = {"median": statistics.median(gaps), "p99": gaps[int(0.99 * len(gaps))], "max": gaps[-1],
              "ttft_of_512": statistics.median(first_tokens)}
    show("Four running requests, three prompts of 512 tokens come in: seconds between tokens",
         ["median", "p99", "p99 / median", "largest", "first token of a long prompt"],
         [[result["median"], result["p99"], result["p99"] / result["median"], result["max"], result["ttft_of_512"]]])
    return result


def prefix(model: Llama, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """A repeated prefix of 2,000 tokens, and a conversation of six turns, with sharing and without."""
    cold, warm = [], []
    for turn in range(args.repeats):
        engine = make_engine(model)
        [beginning] = prompts(model, 1, 2000, seed=100 + turn)
        for results, ending in ((cold, (1, 2, 3)), (warm, (4, 5, 6))):
            taken, _ = run(engine, [Request(f"{len(results)}", beginning + ending, with_tokens(1))])
            results.append(taken)
    turns: dict[bool, float] = {}
    computed: dict[bool, int] = {}
    for sharing in (False, True):
        engine = make_engine(model, prefix_sharing=sharing)
        history, turns[sharing], computed[sharing] = prompts(model, 1, 200)[0], 0.0, 0
        for turn in range(6):
            taken, events = run(engine, [Request(f"turn-{turn}", history, with_tokens(32))])
            cached = next(event.num_cached for _, event in events if not isinstance(event, TokenEvent))
            computed[sharing] += len(history) - cached
            turns[sharing] += taken
            answer = tuple(event.token_id for _, event in events if isinstance(event, TokenEvent))
            history += answer + prompts(model, 1, 50, seed=turn + 1)[0]
    faster = ratios(cold, warm)
    hit_rate = 1 - computed[True] / computed[False]
    show("Shared prefixes", ["first token, 2,000 tokens cold", "again", "times as fast", "six turns: hit rate",
                             "time without", "time with"],
         [[spread(summary(cold), " s"), spread(summary(warm), " s"), spread(faster), f"{hit_rate:.1%}",
           f"{turns[False]:.2f} s", f"{turns[True]:.2f} s"]])
    return {"cold": summary(cold), "warm": summary(warm), "faster": faster, "hit_rate": hit_rate,
            "turns_without": turns[False], "turns_with": turns[True]}


def speculation(model: Llama, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """Prompt lookup on text that copies itself and on text that does not.

    Random weights copy nothing by themselves: here every row of logits is replaced by one that favours the next
    token of a known text, so that the work is real and the text is chosen.
    """
    rng = random.Random(5)
    passage = [rng.randrange(1000) for _ in range(96)]
    texts = {"copy-heavy": passage * 3, "free": [rng.randrange(1000) for _ in range(288)]}
    results, rows = {}, []
    for name, text in texts.items():
        steered = _Steered(model, text)
        request = Request("s", tuple(text[:112]), with_tokens(160))

        def rate(proposer: PromptLookup | None) -> float:
            engine = make_engine(model, proposer=proposer, prefix_sharing=False)
            engine.model = steered
            taken, _ = run(engine, [request])
            return 160 / taken

        measured = interleaved({"plain": lambda: rate(None), "lookup": lambda: rate(PromptLookup())}, args.repeats)
        results[name] = {"gain": ratios(measured["lookup"], measured["plain"]),
                         **{kind: summary(values) for kind, values in measured.items()}}
        rows.append([name, spread(results[name]["plain"]), spread(results[name]["lookup"]),
                     spread(results[name]["gain"])])
    show("Prompt lookup, tokens/s of one sequence", ["text", "without", "with", "ratio"], rows)
    return results


def deterministic(model: Llama, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """What bitwise reproducibility costs, in prefill and in decode."""
    [long_prompt] = prompts(model, 1, 512)
    eight = prompts(model, 8, 32)
    work = {"prefill of 512": lambda: [Request("p", long_prompt, with_tokens(1))],
            "decode, 1 sequence": lambda: [Request("d", eight[0], with_tokens(24))],
            "decode, 8 sequences": lambda: [Request(str(i), ids, with_tokens(24)) for i, ids in enumerate(eight)]}
    results, rows = {}, []
    engines = {wanted: make_engine(model, prefix_sharing=False) for wanted in (False, True)}
    for name, requests in work.items():

        def taken(wanted: bool) -> float:
            model.set_deterministic(wanted)
            try:
                return run(engines[wanted], requests())[0]
            finally:
                model.set_deterministic(False)

        for wanted in engines:
            taken(wanted)  # practice: the first time kernels are compiled and graphs are captured
        measured = interleaved({"plain": lambda: taken(False), "same bits": lambda: taken(True)}, args.repeats)
        results[name] = ratios(measured["same bits"], measured["plain"])
        rows.append([name, *(spread(summary(values), " s") for values in measured.values()), spread(results[name])])
    show("Deterministic mode", ["work", "plain", "deterministic", "times the time"], rows)
    return results


SECTIONS = {"batch": batch, "mixed": mixed, "prefix": prefix, "speculation": speculation,
            "deterministic": deterministic}


# ---- helpers --------------------------------------------------------------------------------------------------------


class _Steered:
    """The model, computing all it computes, but saying a given text."""

    def __init__(self, model: Llama, text: Sequence[int]):
        self._model = model
        self._text = torch.tensor(text, device=model.device)
        self._positions = torch.tensor([0])

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def hidden(self, batch: Any, cache: Any, at: Any) -> torch.Tensor:
        self._positions = batch.positions[batch.logit_rows]
        return self._model.hidden(batch, cache, at)

    def logits(self, hidden: torch.Tensor, at: Any) -> torch.Tensor:
        logits = self._model.logits(hidden, at)
        following = self._text[(self._positions + 1).clamp(max=len(self._text) - 1)]
        return logits.scatter(1, following[:, None], 1e6)


def _decode_rate(model: Llama, texts: Sequence[tuple[int, ...]], new_tokens: int) -> float:
    """Tokens per second of the steps in which everyone decodes."""
    engine = make_engine(model)
    requests = [Request(str(i), ids, with_tokens(new_tokens)) for i, ids in enumerate(texts)]
    _, events = run(engine, requests)
    times = sorted({at for at, event in events if isinstance(event, TokenEvent)})
    steps = [later - earlier for earlier, later in zip(times[-new_tokens:], times[-new_tokens + 1:])]
    return len(texts) / statistics.median(steps)


def _transformers(source: Source, device: str, new_tokens: int
                  ) -> dict[str, Callable[[Sequence[tuple[int, ...]]], float]]:
    """transformers on the same weights, in tokens/s: plain batched generate, and its continuous batching."""
    from transformers import GenerationConfig

    theirs = peer(source, device)
    config = GenerationConfig(max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False, eos_token_id=-1,
                              pad_token_id=0)

    @torch.inference_mode()
    def generate(texts: Sequence[tuple[int, ...]]) -> float:
        began = time.perf_counter()
        out = theirs.generate(torch.tensor(texts, device=device), generation_config=config)
        return (out.shape[1] - len(texts[0])) * len(texts) / (time.perf_counter() - began)

    @torch.no_grad()  # not inference mode: its loop is a thread of its own, which would be outside
    def generate_batch(texts: Sequence[tuple[int, ...]]) -> float:
        began = time.perf_counter()
        out = theirs.generate_batch(inputs=[list(ids) for ids in texts], generation_config=config, progress_bar=False)
        return sum(len(one.generated_tokens) for one in out.values()) / (time.perf_counter() - began)

    return {"transformers generate": generate, "transformers generate_batch": generate_batch}


if __name__ == "__main__":
    main()
