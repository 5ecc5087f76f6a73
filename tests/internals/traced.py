"""Requests with plans through a real engine, and what their captures add up to."""

from collections.abc import Iterable

import torch
from torch import Tensor

from llama.engine.engine import Engine
from llama.engine.limits import Limits
from llama.engine.request import Request, SamplingParams, TokenEvent, TraceEvent
from llama.internals.trace import TracePlan, assemble
from llama.model.transformer import Llama
from tests.engine.running import engine_of

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0, ignore_eos=True)


def request(name: str, ids: list[int], plan: TracePlan | None, new_tokens: int = 1) -> Request:
    """Greedy, so many tokens."""
    return Request(name, tuple(ids), SamplingParams(**{**vars(GREEDY), "max_tokens": new_tokens}), trace=plan)


def small_engine(model: Llama, num_blocks: int = 40, step_tokens: int = 512, **chosen) -> Engine:
    """An engine with slots of NaN, and steps of so many tokens."""
    return engine_of(model, Limits(512, step_tokens=step_tokens, mixed_step_tokens=step_tokens), num_blocks, **chosen)


def run(engine: Engine, requests: Iterable[Request]) -> dict[str, tuple[list[int], dict[str, Tensor]]]:
    """All requests together to their ends: each one's generated ids, and its captures."""
    requests, events = list(requests), []
    bounds = {one.id: engine.bound_plan(one) for one in requests if one.trace is not None}
    for one in requests:
        engine.submit(one)
    while engine.has_work:
        events += engine.step()
        engine.check()
    results = {}
    for one in requests:
        mine = [event for event in events if event.request_id == one.id]
        ids = [event.token_id for event in mine if isinstance(event, TokenEvent)]
        captures = [event for event in mine if isinstance(event, TraceEvent)]
        values: dict[str, Tensor] = {}
        if one.id in bounds:
            values, _ = assemble(captures, bounds[one.id], len(one.prompt_ids) + len(ids) - 1)
        results[one.id] = ids, values
    return results


def logits_of(model: Llama, ids: list[int], edits: Iterable = ()) -> Tensor:
    """The logits of every token of a prompt under these edits: [tokens, vocab]."""
    _, values = run(small_engine(model), [request("x", ids, TracePlan(("logits",), edits=tuple(edits)))])["x"]
    return values["logits"]


def on_every_path(model: Llama, ids: list[int], num_prompt: int, plan: TracePlan) -> dict[str, dict[str, Tensor]]:
    """The same prompt and (greedy) continuation, computed in every way an engine may choose: captures by way."""
    new, prompt = len(ids) - num_prompt + 1, ids[:num_prompt]
    mine = request("mine", prompt, plan, new)
    others = [request(f"other {n}", ids[n:2 * n + 1], None, 3 * n) for n in (3, 5, 8)]
    warm = small_engine(model)
    run(warm, [request("earlier", prompt, None, new)])
    again = small_engine(model)
    run(again, [mine])
    ways = {"prefill": (small_engine(model), [mine]),
            "chunked": (small_engine(model, step_tokens=7), [mine]),
            "batched": (small_engine(model, step_tokens=24), [*others[:2], mine, others[2]]),
            "prefix-cached": (warm, [mine]),
            "cached by itself": (again, [mine]),
            "whole": (small_engine(model), [request("mine", ids, plan, 1)])}
    return {way: run(engine, requests)["mine"][1] for way, (engine, requests) in ways.items()}


def random_vector(size: int, seed: int = 0) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))
