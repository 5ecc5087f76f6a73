"""The engine: requests in, tokens out, one step at a time.

    plan    whose tokens are computed next, and where their keys and values go     (scheduler)
    run     the model on all of them at once, then the sampler                      (model, sampler)
    commit  append what was drawn, end what has ended, report                       (scheduler)
"""

from collections.abc import Container, Iterable

import torch
from torch import Tensor

from llama.engine.batch import ragged_batch
from llama.engine.blocks import BlockPool
from llama.engine.propose import Proposer
from llama.engine.request import Event, Request, RequestError, StepError, TokenLogprob
from llama.engine.sampler import SampleRow, log_probabilities, sample
from llama.engine.scheduler import Limits, Outcome, Plan, Scheduled, Scheduler
from llama.engine.tracing import bound_plan, look_at_logits, step_tap, trace_events
from llama.model.cache import KVCache
from llama.model.plan import BoundPlan
from llama.model.tap import Tap
from llama.model.transformer import Llama

BLOCK_SIZE = 16

# Rows of logits that are in memory at once while a prompt is scored: at 128,256 ids, 66 MB in float32.
SCORED_ROWS = 128


class Engine:
    """One model, one cache, any number of requests. Not thread-safe: one caller submits, cancels and steps.

    num_blocks: size of the KV cache, in blocks of BLOCK_SIZE positions. eos_token_ids: what ends a turn.
    """

    def __init__(self, model: Llama, limits: Limits, num_blocks: int, eos_token_ids: Iterable[int] = (),
                 proposer: Proposer | None = None, prefix_sharing: bool = True):
        self.model = model
        self.cache = KVCache(model.config, num_blocks, BLOCK_SIZE, model.dtype, model.device)
        pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(limits, pool, tuple(eos_token_ids), proposer, prefix_sharing)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    @property
    def cache_usage(self) -> float:
        """The share of the KV cache's blocks that sequences hold, 0 to 1."""
        pool = self.scheduler.pool
        return pool.num_held / pool.num_blocks

    def submit(self, request: Request) -> None:
        """Queue a request whose params have no default left open.

        Raises RequestError, which names the field, if it can never be served; QueueFullError if it cannot now.
        """
        vocab_size = self.model.config.vocab_size
        named = {"prompt": request.prompt_ids, "logit_bias": request.params.logit_bias,
                 "stop_token_ids": request.params.stop_token_ids}
        for field, ids in named.items():
            for token_id in ids:
                if not 0 <= token_id < vocab_size:
                    raise RequestError(field, f"{field} has the id {token_id}, which is outside the vocabulary of "
                                       f"{vocab_size} tokens")
        self.scheduler.add(request, None if request.trace is None else self.bound_plan(request))

    def bound_plan(self, request: Request) -> BoundPlan:
        """What a request's trace plan comes to on this model. Raises RequestError, whose field is `trace`."""
        return bound_plan(request, self.model.config, self.scheduler.max_ids(request))

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """Forget a request, or one of its samples, whatever it is doing; its blocks are free at once.

        False if there is none of that name any more.
        """
        return self.scheduler.cancel(request_id, index)

    @torch.inference_mode()
    def step(self, only: Container[str] | None = None) -> list[Event]:
        """Compute one step and report what it brought; for these requests alone, if `only` is given.

        Raises StepError if it cannot be computed. All is then as if it had not been tried, so that it can be
        tried again for some of those requests, with the same draws.
        """
        plan = self.scheduler.plan(only)
        if not plan.scheduled:
            return []
        try:
            outcomes, events = self._run(plan)
        except Exception as error:
            names = dict.fromkeys(item.sequence.request.id for item in plan.scheduled)
            raise StepError(tuple(names)) from error
        events += self.scheduler.commit(plan, outcomes)
        if not self.has_work:
            self.check()
        return events

    def _run(self, plan: Plan) -> tuple[list[Outcome], list[Event]]:
        """The step's outcomes, and what trace plans captured in it."""
        while plan.copies:
            self.cache.copy_block(*plan.copies[0])
            del plan.copies[0]
        batch = ragged_batch(plan.scheduled, BLOCK_SIZE, self.model.device)
        at = step_tap(plan.scheduled, batch, self.cache)
        hidden = self.model.hidden(batch, self.cache, at)
        draws = self._draw(plan, hidden[batch.logit_rows], at.rows(batch.logit_rows))
        scores = self._score_prompts(plan, hidden, at)
        look_at_logits(self.model, hidden, batch, at)
        return [Outcome(draw, score) for draw, score in zip(draws, scores)], trace_events(plan.scheduled, at)

    def _draw(self, plan: Plan, hidden: Tensor, at: Tap) -> list[tuple[tuple[TokenLogprob, ...], ...]]:
        """The next tokens of everyone who has come to the end of what is known. hidden: [logit rows, hidden]."""
        if len(hidden) == 0:
            return [()] * len(plan.scheduled)
        logits = self.model.logits(hidden, at)
        places, rows = [], []
        first = 0
        for item in plan.scheduled:
            if item.samples:
                for index in item.sequence.samples:
                    rows += self._sample_rows(item, index)
                    places += range(first, first + 1 + len(item.draft))
                first += 1 + len(item.draft)
        drawn = iter(sample(logits if len(places) == len(logits) else logits[places], rows))
        return [tuple(tuple(next(drawn) for _ in range(1 + len(item.draft)))
                      for _ in item.sequence.samples) if item.samples else ()
                for item in plan.scheduled]

    def _sample_rows(self, item: Scheduled, index: int) -> list[SampleRow]:
        """One row for the token after the last known one, and one after each guess, as if those were known."""
        sequence, params = item.sequence, item.sequence.request.params
        rows, counts = [], sequence.counts
        for guessed in range(1 + len(item.draft)):
            if guessed:
                counts = counts.copy()
                counts[item.draft[guessed - 1]] += 1
            too_short = sequence.num_generated + guessed < params.min_tokens
            banned = (*self.scheduler.eos_token_ids, *params.stop_token_ids) if too_short else ()
            rows.append(SampleRow(params, sequence.seed, index, len(sequence.ids) + guessed,
                                  sequence.request.prompt_ids, counts, banned))
        return rows

    def _score_prompts(self, plan: Plan, hidden: Tensor, at: Tap) -> list[tuple[TokenLogprob, ...]]:
        """Log probabilities of the prompts that want them, a few rows of logits at a time."""
        results, first = [], 0
        for item in plan.scheduled:
            sequence = item.sequence
            scores: list[TokenLogprob] = []
            if sequence.wants_prompt_scores:
                ids = sequence.ids[item.start + 1:min(item.start + item.length + 1, sequence.num_prompt)].tolist()
                wanted = sequence.request.params.prompt_logprobs
                for done in range(0, len(ids), SCORED_ROWS):
                    piece = ids[done:done + SCORED_ROWS]
                    rows = range(first + done, first + done + len(piece))
                    scores += log_probabilities(self.model.logits(hidden[rows.start:rows.stop], at.rows(rows)), piece,
                                                [wanted] * len(piece))
            results.append(tuple(scores))
            first += item.length
        return results

    def check(self) -> None:
        """Raise AssertionError unless the books agree with each other."""
        self.scheduler.check()
