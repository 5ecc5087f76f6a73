"""The engine: requests in, tokens out, one step at a time.

    plan    whose tokens are computed next, and where their keys and values go     (scheduler)
    guess   what comes after those, where somebody can                              (propose, draft)
    run     the model on all of them at once, then the sampler                      (model, sampler)
    commit  append what was drawn, end what has ended, report                       (scheduler)

A GPU runs behind: `run` only enqueues there, and before what it draws is waited for and committed, the step after it is
planned and enqueued too, where that can be foreseen.
"""

from collections.abc import Container, Iterable

import numpy as np
import torch
from torch import Tensor

from llama.engine.batch import ragged_batch, sample_rows
from llama.engine.blocks import BlockPool
from llama.engine.constraint import PATIENCE_SECONDS, Compilation, Compiler, ConstraintError
from llama.engine.device import Device, device_of
from llama.engine.flight import Flight
from llama.engine.graphs import DecodeGraphs
from llama.engine.limits import Limits
from llama.engine.propose import Proposer
from llama.engine.request import Event, Request, RequestError, StepError, TokenEvent, TokenLogprob
from llama.engine.sampler import Draw, draw
from llama.engine.scheduler import Scheduler
from llama.engine.scores import log_probabilities
from llama.engine.sequence import Sequence
from llama.engine.step import Plan
from llama.engine.tracing import bound_plan, caught, look_at_logits, step_tap
from llama.engine.upload import upload
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
    values so. device: where to compute; that of the model's weights.
    """

    def __init__(self, model: Llama, limits: Limits, num_blocks: int, eos_token_ids: Iterable[int] = (),
                 proposer: Proposer | None = None, prefix_sharing: bool = True, compiler: Compiler | None = None,
                 kv_cache_dtype: str | None = None, device: Device | None = None):
        self.model = model
        self._device = device_of(model.device) if device is None else device
        self.cache = KVCache(model.config, num_blocks, BLOCK_SIZE, model.dtype, model.device, kv_cache_dtype)
        pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(limits, pool, tuple(eos_token_ids), proposer, prefix_sharing)
        self._compilation = None if compiler is None else Compilation(compiler)
        room = min(limits.max_context, num_blocks * BLOCK_SIZE)
        self._graphs = DecodeGraphs(model, self.cache, self._device, limits.max_running, room) \
            if self._device.captures else None
        self._flight: Flight | None = None  # what was enqueued and has not landed
        self._unreported: list[Event] = []  # what has happened and was not reported yet

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work or bool(self._unreported) or self._flight is not None

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
        if self._flight is not None and only is not None:
            self._unreported += self._land()  # it was for others too
        if self._flight is None:
            plan = self.scheduler.plan(only)
            if not plan.scheduled:
                self._take_constraints(PATIENCE_SECONDS)
                return self._take_unreported()
            try:
                self.scheduler.guess(plan)
                self._flight = self._run(plan)
            except ConstraintError as error:
                self._refuse(error.sequence, str(error))
                return self._take_unreported()
            except Exception as error:
                raise StepError(plan.request_ids) from error
        events = self._land(self._run_ahead() if only is None else None)
        events = [*self._take_unreported(), *events]
        if not self.has_work:
            self.check()
        return events

    def _run_ahead(self) -> Flight | None:
        """Enqueue the step after the one in flight, if that can be foreseen."""
        plan = self.scheduler.plan_ahead(self._flight.plan) if self._graphs is not None else None
        if plan is None:
            return None
        try:
            return self._run(plan)
        except Exception:
            return None  # not yet: whoever is at fault is told when this step is the next one, and is made anew

    def _land(self, ahead: Flight | None = None) -> list[Event]:
        """Wait for the step in flight, commit and report it. ahead: the one that is in flight after it.

        Whoever has left since a step was launched, having ended or been cancelled, is dropped from it here, though the
        device still computes its token, in blocks that may be another's by now. That does no harm: such a token writes
        only the key and value of its own position, into a block that nobody shared and nobody could find by its content,
        for it was not full; and what the block's new holder computes, or a copy made of it, is enqueued after this step
        and so comes after it.
        """
        flight, self._flight = self._flight, None
        alive = set(self.scheduler.running)
        try:
            landing = flight.land(alive)
        except Exception as error:
            raise StepError(flight.plan.request_ids) from error
        events = [*landing.captured, *self.scheduler.commit(landing.plan, landing.outcomes)]
        if ahead is not None and not landing.is_amended:
            alive = set(self.scheduler.running)
            self._flight = ahead if any(item.sequence in alive for item in ahead.plan.scheduled) else None
        return events

    def _take_constraints(self, patience: float = 0.0) -> None:
        """Hand out the constraints that are compiled by now, having waited so many seconds for one."""
        for sequence, why in self._compilation.finish(patience) if self._compilation else ():
            self._refuse(sequence, why)

    def _refuse(self, sequence: Sequence, why: str) -> None:
        """End a sequence that cannot follow its grammar, with the samples that would have split off from it."""
        request_id = sequence.request.id
        self._unreported += [TokenEvent(request_id, index, None, finish_reason="error", error=why, field="grammar")
                             for index in sequence.samples if self.scheduler.cancel(request_id, index)]

    def _take_unreported(self) -> list[Event]:
        """The events to report; a step that fails leaves them to the next."""
        unreported, self._unreported = self._unreported, []
        return unreported

    def _run(self, plan: Plan) -> Flight:
        """Enqueue a step: the copies that it needs, the model, the draws."""
        while plan.copies:
            self.cache.copy_block(*plan.copies[0])
            del plan.copies[0]
        before = None if plan.follows is None else self._flight.draw.ids
        replayed = None if self._graphs is None else self._graphs.run(plan, before)
        if replayed is not None:
            logits, found = replayed
            return Flight(self._device, plan, self._draw(plan, logits), [()] * len(plan.scheduled), found)
        batch = ragged_batch(plan.scheduled, BLOCK_SIZE, self.model.device)
        at = step_tap(plan.scheduled, batch, self.model, self.cache)
        hidden = self.model.hidden(batch, self.cache, at)
        drawn = None
        if len(batch.logit_rows):
            drawn = self._draw(plan, self.model.logits(hidden[batch.logit_rows], at.rows(batch.logit_rows)))
        scores = self._score_prompts(plan, hidden, at)
        look_at_logits(self.model, hidden, batch, at)
        return Flight(self._device, plan, drawn, scores, caught(plan.scheduled, at))

    def _draw(self, plan: Plan, logits: Tensor) -> Draw:
        """Begin to draw the next tokens of everyone who has come to the end of what is known. logits: [rows, vocab]."""
        places, rows = sample_rows(plan.scheduled, self.scheduler.eos_token_ids)
        if len(places) > len(logits):  # several samples of one prompt
            logits = logits[upload(logits.device, np.array(places))[0]]
        return draw(logits, rows)

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
        """Raise AssertionError unless the books agree with each other, and with what is in flight."""
        alive = set(self.scheduler.running)
        for item in () if self._flight is None else self._flight.plan.scheduled:
            assert item.sequence not in alive or item.start + item.length <= len(item.sequence.table) * BLOCK_SIZE, \
                "somebody in flight has no room for its next position"
        self.scheduler.check()
