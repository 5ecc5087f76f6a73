"""Requests through a real engine on a tiny model, and what must come out by transformers' logits alone."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
import transformers
from torch import Tensor

from llama.engine.engine import Engine
from llama.engine.limits import Limits
from llama.engine.request import PromptEvent, Request, TokenEvent, TokenLogprob
from llama.engine.sampler import SampleRow
from llama.model.transformer import Llama
from tests.engine.processors import expected_adjustment, kept_distribution
from tests.model.pairs import SHAPES, rope

EOS = (1,)

# 1:1, 4:1 and 8:1 heads, as small as can be; scaled rotary positions from 64 on.
TINY = {
    f"{heads}:{kv_heads}": SHAPES["4:1 of 128, as 8B"] | {
        "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": 16, "max_position_embeddings": 512,
        "rope_parameters": rope(8.0) | {"original_max_position_embeddings": 64}}
    for heads, kv_heads in ((3, 3), (8, 2), (8, 1))}


@dataclass
class Run:
    """What requests brought: per sample its tokens (ids with log probabilities) and why it ended, per request
    the scores of its prompt; and how often things happened: cached, preempted, accepted, steps."""

    samples: dict[tuple[str, int], list[TokenLogprob]] = field(default_factory=lambda: defaultdict(list))
    reasons: dict[tuple[str, int], tuple[str, int | None]] = field(default_factory=dict)
    prompts: dict[str, list[TokenLogprob]] = field(default_factory=lambda: defaultdict(list))
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def ids(self) -> dict[tuple[str, int], list[int]]:
        """The tokens alone."""
        return {key: [token.token_id for token in tokens] for key, tokens in self.samples.items()}

    def values(self) -> list[float]:
        """Every log probability there is, in one order."""
        lists = [tokens for _, tokens in (*sorted(self.samples.items()), *sorted(self.prompts.items()))]
        return [value for tokens in lists for token in tokens if token.logprob is not None
                for value in (token.logprob, *(alternative for _, alternative in token.top))]


def engine_of(model: Llama, limits: Limits, num_blocks: int, **chosen) -> Engine:
    """An engine whose slots hold NaN until they are written, so that reading one shows."""
    engine = Engine(model, limits, num_blocks, EOS, **chosen)
    engine.cache.keys.fill_(torch.nan)
    engine.cache.values.fill_(torch.nan)
    return engine


def run(engine: Engine, requests: Iterable[Request], every: int = 0,
        cancel: Mapping[str, int] | None = None) -> Run:
    """All requests to their ends: submitted together, or one each `every` steps; `cancel` those named after
    so many steps."""
    result, upcoming = Run(), list(requests)
    while upcoming or engine.has_work:
        arriving = len(upcoming) if not every else result.counts["steps"] % every == 0
        for request in upcoming[:arriving]:
            engine.submit(request)
        del upcoming[:arriving]
        before = list(engine.scheduler.running)
        events = engine.step()
        result.counts["preempted"] += sum(sequence in engine.scheduler.waiting for sequence in before)
        result.counts["steps"] += 1
        _receive(result, events)
        engine.check()
        for name, step in (cancel or {}).items():
            if step == result.counts["steps"]:
                engine.cancel(name)
    assert engine.scheduler.pool.num_held == 0
    return result


def _receive(result: Run, events: list) -> None:
    tokens = Counter((event.request_id, event.index) for event in events if isinstance(event, TokenEvent))
    result.counts["accepted"] += sum(count - 1 for count in tokens.values())
    for event in events:
        if isinstance(event, PromptEvent):
            result.prompts[event.request_id] += event.logprobs
            result.counts["cached"] += event.num_cached
        else:
            key = event.request_id, event.index
            assert key not in result.reasons
            result.samples[key].append(event.logprob)
            assert event.logprob.token_id == event.token_id
            if event.finish_reason:
                result.reasons[key] = event.finish_reason, event.stop_reason


def alone(model: Llama, requests: Iterable[Request]) -> Run:
    """Each request in an engine of its own, where nothing is shared, nothing guessed, and no room short."""
    merged = Run()
    for request in requests:
        engine = engine_of(model, Limits(max_context=512), 32 * request.params.n, prefix_sharing=False)
        one = run(engine, [request])
        merged.samples |= one.samples
        merged.reasons |= one.reasons
        merged.prompts |= one.prompts
    return merged


# ---- transformers ------------------------------------------------------------------------------------------


@torch.no_grad()
def logits(oracle: transformers.LlamaForCausalLM, ids: list[int]) -> Tensor:
    """After each of `ids`: [len(ids), vocab], float32."""
    return oracle(torch.tensor([ids])).logits[0]


def expected_ids(oracle: transformers.LlamaForCausalLM, request: Request, index: int) -> list[int]:
    """The request's sample by transformers' logits and processors: argmax, or the inverse transform in numpy,
    over the ids in their order, or over the kept ones from the likeliest on."""
    wanted, ids, prompt = request.params, list(request.prompt_ids), len(request.prompt_ids)
    key = np.array([wanted.seed % 2**64, index], dtype=np.uint64)
    while len(ids) - prompt < wanted.max_tokens:
        banned = (*EOS, *wanted.stop_token_ids) if len(ids) - prompt < wanted.min_tokens else ()
        counts = Counter(ids[prompt:])
        row = SampleRow(wanted, wanted.seed, index, len(ids), request.prompt_ids, counts, banned)
        scores = expected_adjustment(logits(oracle, ids)[-1], row)
        if wanted.temperature == 0:
            ids.append(int(scores.argmax()))
        else:
            likely = kept_distribution(scores, wanted)
            is_filtered = wanted.top_k > 0 or wanted.top_p < 1 or wanted.min_p > 0
            order = np.argsort(-likely, kind="stable") if is_filtered else np.arange(len(likely))
            share = np.random.Generator(np.random.Philox(key=key, counter=len(ids))).random()
            ids.append(int(order[np.searchsorted(np.cumsum(likely[order]), share, side="right")]))
        if ids[-1] in wanted.stop_token_ids or (ids[-1] in EOS and not wanted.ignore_eos):
            break
    return ids[prompt:]
