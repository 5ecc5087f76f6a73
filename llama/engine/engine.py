"""The engine: requests in, tokens out, one step at a time.

    plan    whose tokens are computed next, and where their keys and values go     (scheduler)
    guess   what comes after those, where somebody can                              (propose, draft)
    run     the model on all of them at once, then the sampler                      (model, sampler)
    commit  append what was drawn, end what has ended, report                       (scheduler)
"""

from collections.abc import Container, Iterable, Sequence as Ordered

import numpy as np
import torch
from torch import Tensor

from llama.engine.batch import ragged_batch
from llama.engine.blocks import BlockPool
from llama.engine.constraint import PATIENCE_SECONDS, Compilation, Compiler, ConstraintError
from llama.engine.limits import Limits
from llama.engine.propose import Proposer
from llama.engine.request import Event, Request, RequestError, StepError, TokenEvent, TokenLogprob
from llama.engine.sampler import SampleRow, log_probabilities, sample
from llama.engine.scheduler import Scheduler
from llama.engine.sequence import Sequence
from llama.engine.step import Outcome, Plan, Scheduled
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
    compiler: of grammars; without one, requests must have none. kv_cache_dtype: "int8" or "fp8" keeps keys and
    values so.
    """

    def __init__(self, model: Llama, limits: Limits, num_blocks: int, eos_token_ids: Iterable[int] = (),
                 proposer: Proposer | None = None, prefix_sharing: bool = True, compiler: Compiler | None = None,
                 kv_cache_dtype: str | None = None):
        self.model = model
        self.cache = KVCache(model.config, num_blocks, BLOCK_SIZE, model.dtype, model.device, kv_cache_dtype)
        pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(limits, pool, tuple(eos_token_ids), proposer, prefix_sharing)
        self._compilation = None if compiler is None else Compilation(compiler)
        self._refusals: list[Event] = []  # the ends of sequences that were not reported yet

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work or bool(self._refusals)

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
        if request.params.grammar is not None and self._compilation is None:
            raise RequestError("grammar", "this engine takes no grammars: it was made without a compiler for them")
        sequence = self.scheduler.add(request, None if request.trace is None else self.bound_plan(request))
        if request.params.grammar is not None:
            self._compilation.begin(sequence)

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
        self._take_constraints()
        plan = self.scheduler.plan(only)
        if not plan.scheduled:
            self._take_constraints(PATIENCE_SECONDS)
            return self._take_refusals()
        try:
            self.scheduler.guess(plan)
            outcomes, captured = self._run(plan)
        except ConstraintError as error:
            self._refuse(error.sequence, str(error))
            return self._take_refusals()
        except Exception as error:
            names = dict.fromkeys(item.sequence.request.id for item in plan.scheduled)
            raise StepError(tuple(names)) from error
        events = [*self._take_refusals(), *captured, *self.scheduler.commit(plan, outcomes)]
        if not self.has_work:
            self.check()
        return events

    def _take_constraints(self, patience: float = 0.0) -> None:
        """Hand out the constraints that are compiled by now, having waited so many seconds for one."""
        for sequence, why in self._compilation.finish(patience) if self._compilation else ():
            self._refuse(sequence, why)

    def _refuse(self, sequence: Sequence, why: str) -> None:
        """End a sequence that cannot follow its grammar, with the samples that would have split off from it."""
        request_id = sequence.request.id
        self._refusals += [TokenEvent(request_id, index, None, finish_reason="error", error=why, field="grammar")
                           for index in sequence.samples if self.scheduler.cancel(request_id, index)]

    def _take_refusals(self) -> list[Event]:
        """The ends to report; a step that fails leaves them to the next."""
        refusals, self._refusals = self._refusals, []
        return refusals

    def _run(self, plan: Plan) -> tuple[list[Outcome], list[Event]]:
        """The step's outcomes, and what trace plans captured in it."""
        while plan.copies:
            self.cache.copy_block(*plan.copies[0])
            del plan.copies[0]
        batch = ragged_batch(plan.scheduled, BLOCK_SIZE, self.model.device)
        at = step_tap(plan.scheduled, batch, self.model, self.cache)
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
                masks = _masks(item)
                for index in item.sequence.samples:
                    rows += self._sample_rows(item, index, masks)
                    places += range(first, first + 1 + len(item.draft))
                first += 1 + len(item.draft)
        drawn = iter(sample(logits if len(places) == len(logits) else logits[places], rows))
        return [tuple(tuple(next(drawn) for _ in range(1 + len(item.draft)))
                      for _ in item.sequence.samples) if item.samples else ()
                for item in plan.scheduled]

    def _sample_rows(self, item: Scheduled, index: int, masks: Ordered[np.ndarray | None]) -> list[SampleRow]:
        """One row for the token after the last known one, and one after each guess, as if those were known."""
        sequence, params = item.sequence, item.sequence.request.params
        rows, counts = [], sequence.counts
        prompt_ids = () if params.repetition_penalty == 1 else sequence.distinct_prompt_ids
        for guessed in range(1 + len(item.draft)):
            if guessed:
                counts = counts.copy()
                counts[item.draft[guessed - 1]] += 1
            mask, banned = masks[guessed], ()
            too_short = sequence.num_generated + guessed < params.min_tokens
            if too_short:
                banned = (*self.scheduler.eos_token_ids, *params.stop_token_ids)
                if mask is not None and not _leaves_any(mask, banned):
                    banned = ()  # the text is whole: its grammar has nothing more to say
            rows.append(SampleRow(params, sequence.seed, index, len(sequence.ids) + guessed,
                                  prompt_ids, counts, banned, mask))
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


def _masks(item: Scheduled) -> Ordered[np.ndarray | None]:
    """What the grammar allows in each of a sequence's rows, if it has one. Raises ConstraintError."""
    constraint = item.sequence.constraint
    if constraint is None:
        return [None] * (1 + len(item.draft))
    try:
        return constraint.masks(item.draft)
    except ValueError as error:
        raise ConstraintError(item.sequence, str(error)) from error


def _leaves_any(mask: np.ndarray, banned: Iterable[int]) -> bool:
    """Whether a mask ([bytes], a bit an id) allows anything but these ids."""
    left = mask.copy()
    for token_id in banned:
        left[token_id // 8:token_id // 8 + 1] &= 255 ^ 1 << token_id % 8  # none there: a row without an id
    return bool(left.any())
