"""Who computes what in the next step, and what follows from what came out. No torch: numbers only.

A step serves everyone who waits for their next token, then, with what is left of the token budget, and at least a
quarter of it, prompts: those that have begun, oldest first, then new ones in order of arrival. When blocks run out,
the youngest running sequence gives all of its back and later resumes as if it had only just come; its ids are kept,
and so are the blocks, in the pool, for as long as nobody needs the room.
"""

import secrets
from collections import deque
from collections.abc import Container, Sequence as Ordered

from llama.engine.blocks import BlockPool, root_digest
from llama.engine.limits import Limits
from llama.engine.propose import Proposer
from llama.engine.request import Event, PromptEvent, QueueFullError, Request, TokenEvent, TokenLogprob
from llama.engine.sequence import Sequence
from llama.engine.step import Outcome, Plan, Scheduled
from llama.model.plan import BoundPlan


class Scheduler:
    """The queue, the running sequences and the blocks they hold."""

    def __init__(self, limits: Limits, pool: BlockPool, eos_token_ids: Ordered[int] = (),
                 proposer: Proposer | None = None, prefix_sharing: bool = True):
        self.limits = limits
        self.pool = pool
        self.eos_token_ids = frozenset(eos_token_ids)
        self.proposer = proposer
        self.prefix_sharing = prefix_sharing
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # in order of arrival
        self._copies: list[tuple[int, int]] = []  # planned and not made yet: the tables name the targets already

    @property
    def has_work(self) -> bool:
        """Whether anything waits or runs."""
        return bool(self.waiting or self.running)

    # ---- requests come and go -------------------------------------------------------------------------------

    def add(self, request: Request, plan: BoundPlan | None = None) -> Sequence:
        """Queue a request, with its trace plan if it has one. Raises RequestError if it can never run, QueueFullError
        if too much waits."""
        self.limits.refuse_impossible(request, self.pool.num_blocks * self.pool.block_size)
        queued_tokens = sum(len(sequence.ids) for sequence in self.waiting)
        if len(self.waiting) >= self.limits.max_queued_requests:
            raise QueueFullError(f"{len(self.waiting)} requests wait already; try again later")
        if self.waiting and queued_tokens + len(request.prompt_ids) > self.limits.max_queued_tokens:
            raise QueueFullError(f"prompts of {queued_tokens} tokens wait already; try again later")
        params = request.params
        seed = secrets.randbits(64) if params.seed is None else params.seed % 2**64
        root = root_digest(request.salt, "" if plan is None else plan.digest)
        sequence = Sequence(request, seed, root, forks=tuple(range(1, params.n)), plan=plan)
        self.waiting.append(sequence)
        return sequence

    def cancel(self, request_id: str, index: int | None = None) -> bool:
        """Forget a request, or its sample `index`, at once, wherever it is. False if there is none such."""
        found = [sequence for sequence in (*self.waiting, *self.running)
                 if sequence.request.id == request_id and (index is None or index in sequence.samples)]
        for sequence in found:
            left = () if index is None else tuple(other for other in sequence.samples if other != index)
            if left:
                sequence.index, sequence.forks = left[0], left[1:]
            else:
                self._remove(sequence)
        return bool(found)

    def _remove(self, sequence: Sequence) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.pool.release(sequence.table)
        sequence.table = []
        if self.proposer is not None:
            self.proposer.forget(sequence)

    # ---- plan -----------------------------------------------------------------------------------------------

    def plan(self, only: Container[str] | None = None) -> Plan:
        """Choose the next step's tokens and make room for them. An empty plan means that nothing is to do. If nothing
        comes of a plan, the next one is made as if this one had not been.

        only: ids of requests; whoever is not of them stays as it is.
        """
        plan = Plan(copies=self._copies)
        running = [sequence for sequence in self.running if only is None or sequence.request.id in only]
        num_decoding = sum(sequence.is_decoding for sequence in running)
        limit = self.limits.mixed_step_tokens if num_decoding else self.limits.step_tokens
        budget = max(limit - num_decoding, limit // 4, 1)  # for prompts; whoever decodes has its token in any case
        num_running = len(self.running)
        for sequence in running:
            if sequence not in self.running:
                continue  # gave its blocks to an older one just now
            length = 1 if sequence.is_decoding else min(sequence.num_ready, budget)
            if length and self._make_room(sequence, length, plan):
                plan.scheduled.append(Scheduled(sequence, sequence.num_computed, length))
                budget -= 0 if sequence.is_decoding else length
        preempted = len(self.running) < num_running
        while budget > 0 and not preempted:
            sequence = next((one for one in self.waiting if only is None or one.request.id in only), None)
            if sequence is None or not self._admit(sequence):
                break
            self.waiting.remove(sequence)
            self.running.append(sequence)
            length = min(sequence.num_ready, budget)
            budget -= length
            if length:
                self._make_room(sequence, length, plan)
                plan.scheduled.append(Scheduled(sequence, sequence.num_computed, length))
        return plan

    def guess(self, plan: Plan) -> None:
        """Let those who decode guess ahead, never past the end that they are allowed, with what is left of the step
        and of the pool: a guess takes no prompt's turn and nobody's blocks. Raises what the proposer raises."""
        if self.proposer is None:
            return
        block_size = self.pool.block_size
        budget = self.limits.mixed_step_tokens - sum(item.length for item in plan.scheduled)
        for place, item in enumerate(plan.scheduled):
            sequence = item.sequence
            room = (len(sequence.table) + self.pool.num_available) * block_size - item.start - item.length
            most = min(budget, room, self.max_ids(sequence.request) - len(sequence.ids) - 1)
            if sequence.is_decoding and most > 0:
                draft = sequence.allowed(self.proposer.propose(sequence, most))
                plan.scheduled[place] = Scheduled(sequence, item.start, item.length + len(draft), draft)
                self._make_room(sequence, item.length + len(draft), plan)
                budget -= len(draft)

    def plan_ahead(self, plan: Plan) -> Plan | None:
        """The step after `plan`, of which nothing has come out yet: everyone who goes on, one token further.

        None where that cannot be foreseen: somebody would begin, or give way, or is in the middle of a prompt; guesses
        need the ids; a draw depends on the token that is not known yet.
        """
        if self.proposer is not None:
            return None
        alive, block_size = set(self.running), self.pool.block_size
        ahead = Plan(follows=[])
        num_alive = num_missing = 0
        for place, item in enumerate(plan.scheduled):
            sequence, start = item.sequence, item.num_known
            if sequence not in alive:
                continue  # has ended, or was cancelled, since this was planned
            num_alive += 1
            if start + 1 >= self.max_ids(sequence.request):
                continue  # ends with the token that is being drawn
            block = start // block_size
            is_missing = block == len(sequence.table)
            if not (item.samples and sequence.is_foreseeable(start)) \
                    or not is_missing and self.pool.is_shared(sequence.table[block]):
                return None
            num_missing += is_missing
            ahead.scheduled.append(Scheduled(sequence, start, 1))
            ahead.follows.append(place)
        somebody_goes, somebody_is_left_out = len(ahead.scheduled) < len(plan.scheduled), num_alive < len(alive)
        somebody_comes = self.waiting and (somebody_goes or self._prefix(self.waiting[0]) is not None)
        if somebody_is_left_out or somebody_comes or not ahead.scheduled or num_missing > self.pool.num_available:
            return None
        for item in ahead.scheduled:
            table = item.sequence.table
            if item.start // block_size == len(table):
                table += self.pool.allocate(1, table[-1])
        return ahead

    def _admit(self, sequence: Sequence) -> bool:
        """Start a waiting sequence on the longest prefix that the pool still has, if all of it will fit."""
        shared = self._prefix(sequence)
        if shared is None:
            return False
        self.pool.hold(shared)
        sequence.table = list(shared)
        sequence.num_computed = len(shared) * self.pool.block_size
        sequence.num_published = len(shared)
        return True

    def _prefix(self, sequence: Sequence) -> list[int] | None:
        """The blocks of the longest prefix of a waiting sequence that the pool still has; None if it cannot begin now."""
        if sum(len(other.samples) for other in (*self.running, sequence)) > self.limits.max_running:
            return None
        block_size = self.pool.block_size
        shared: list[int] = []
        if self.prefix_sharing and not sequence.wants_prompt_scores:
            num_full = (len(sequence.ids) - 1) // block_size  # at least one token is computed, for its logits
            num_full = min(num_full, sequence.first_looked_at // block_size)
            shared = self.pool.match(sequence.digest(block, block_size) for block in range(num_full))
        needed = -(-len(sequence.ids) // block_size) - len(shared) + self.pool.num_kept(shared)
        owed = sum(max(-(-len(other.ids) // block_size) - len(other.table), 1) for other in self.running)
        return None if self.running and needed + owed > self.pool.num_available else shared

    def _make_room(self, sequence: Sequence, length: int, plan: Plan) -> bool:
        """Give the sequence blocks of its own for its next `length` positions, the youngest's if need be.

        False if the sequence itself was the youngest and had to give way.
        """
        block_size = self.pool.block_size
        first, end = sequence.num_computed, sequence.num_computed + length
        diverges = first < len(sequence.table) * block_size and self.pool.is_shared(sequence.table[first // block_size])
        missing = -(-end // block_size) - len(sequence.table)
        while max(missing, 0) + diverges > self.pool.num_available:
            youngest = self.running[-1]
            self._preempt(youngest)
            if youngest is sequence:
                return False
            diverges = diverges and self.pool.is_shared(sequence.table[first // block_size])
        if diverges:
            index = first // block_size
            source = sequence.table[index]
            before = sequence.table[index - 1] if index else None
            [sequence.table[index]] = self.pool.allocate(1, before)
            self.pool.release([source])
            plan.copies.append((source, sequence.table[index]))
        if missing > 0:
            sequence.table += self.pool.allocate(missing, sequence.table[-1] if sequence.table else None)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._remove(sequence)
        sequence.num_computed = sequence.num_published = 0
        self.waiting.appendleft(sequence)

    # ---- commit ---------------------------------------------------------------------------------------------

    def commit(self, plan: Plan, outcomes: Ordered[Outcome]) -> list[Event]:
        """Enter what a step brought, end what has ended, and report it."""
        events: list[Event] = []
        for scheduled, outcome in zip(plan.scheduled, outcomes, strict=True):
            sequence = scheduled.sequence
            events += self._score_prompt(scheduled, outcome)
            sequence.num_computed += scheduled.length - len(scheduled.draft)
            self._publish(sequence)
            samples = [sequence, *self._fork(sequence)] if outcome.draws else []
            for sample, draws in zip(samples, outcome.draws, strict=True):
                events += self._extend(sample, scheduled.draft, draws)
        return events

    def _score_prompt(self, scheduled: Scheduled, outcome: Outcome) -> list[PromptEvent]:
        """Report a prompt's first chunk, and the log probabilities that were not reported before a preemption."""
        sequence, request_id = scheduled.sequence, scheduled.sequence.request.id
        events = []
        if sequence.num_prompt_scored == 0:
            wanted = sequence.request.params.prompt_logprobs is not None
            first = (TokenLogprob(sequence.ids[0], None),) if wanted else ()
            events.append(PromptEvent(request_id, first, num_cached=scheduled.start))
            sequence.num_prompt_scored = 1
        known = sequence.num_prompt_scored - scheduled.start - 1  # of outcome.prompt, already reported
        if outcome.prompt[known:]:
            events.append(PromptEvent(request_id, outcome.prompt[known:]))
            sequence.num_prompt_scored += len(outcome.prompt) - known
        return events

    def _publish(self, sequence: Sequence) -> None:
        """Make the blocks that have become full findable by their content."""
        if not self.prefix_sharing:
            return
        block_size = self.pool.block_size
        while sequence.num_published < sequence.num_computed // block_size:
            block = sequence.num_published
            self.pool.publish(sequence.table[block], sequence.digest(block, block_size))
            sequence.num_published += 1

    def _fork(self, sequence: Sequence) -> list[Sequence]:
        """Split the other samples off a sequence whose prompt is computed."""
        forks = [sequence.fork(index) for index in sequence.forks]
        sequence.forks = ()
        place = self.running.index(sequence) + 1
        self.running[place:place] = forks
        for fork in forks:
            self.pool.hold(fork.table)
        return forks

    def _extend(self, sequence: Sequence, draft: tuple[int, ...], draws: tuple[TokenLogprob, ...]) -> list[TokenEvent]:
        """Append drawn tokens, as long as each guess before was what was drawn. Guesses that came true are
        computed already; what was drawn in place of a wrong one is exactly what would have been drawn without."""
        events = []
        for position, draw in enumerate(draws):
            sequence.append(draw.token_id)
            reason, stop_reason = self._finish(sequence)
            reported = draw if sequence.request.params.logprobs is not None else None
            events.append(TokenEvent(sequence.request.id, sequence.index, draw.token_id, reported, reason, stop_reason))
            if reason:
                self._remove(sequence)
                break
            if position == len(draft) or draft[position] != draw.token_id:
                break
            sequence.num_computed += 1
        if draft:
            sequence.learn(len(draft), len(events) - 1)
        if not reason:
            self._publish(sequence)
        return events

    def _finish(self, sequence: Sequence) -> tuple[str | None, int | None]:
        """Whether the token just appended is a sequence's last, and why."""
        params, token_id = sequence.request.params, sequence.ids[-1]
        if sequence.constraint is not None and sequence.constraint.is_over:
            return "stop", None
        if sequence.num_generated > params.min_tokens or params.min_tokens == 0:
            if token_id in params.stop_token_ids:
                return "stop", token_id
            if token_id in self.eos_token_ids and not params.ignore_eos:
                return "stop", None
        if len(sequence.ids) >= self.max_ids(sequence.request):
            return "length", None
        return None, None

    def max_ids(self, request: Request) -> int:
        """How long a request's sequences may become, prompt included."""
        most = min(self.limits.max_context, self.pool.num_blocks * self.pool.block_size)
        max_tokens = request.params.max_tokens
        return most if max_tokens is None else min(most, len(request.prompt_ids) + max_tokens)

    def check(self) -> None:
        """Raise AssertionError unless sequences and pool agree."""
        for sequence in self.running:
            assert len(sequence.table) * self.pool.block_size >= sequence.num_computed
        assert not any(sequence.table for sequence in self.waiting), "a waiting sequence holds blocks"
        self.pool.check(sequence.table for sequence in self.running)
