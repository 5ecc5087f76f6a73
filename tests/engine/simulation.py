"""The scheduler with a model that is none: every right answer is known beforehand, and every slot's content.

What the fake draws is a function of all ids so far, the seed and the sample. What it writes into a slot of
the cache is a name for everything up to that position, beginning with the salt; what a token looks back at
must bear the names of its own past. So a block that is freed, shared, copied or found wrongly shows in the very
step that reads it.
"""

import zlib
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from llama.engine.blocks import BlockPool
from llama.engine.limits import Limits
from llama.engine.propose import Proposer
from llama.engine.request import Event, PromptEvent, Request, SamplingParams, TokenLogprob
from llama.engine.scheduler import Scheduler
from llama.engine.step import Outcome, Plan, Scheduled

VOCAB = 7
EOS = 6
BLOCK_SIZE = 4

Draw = Callable[[list[int], int, int], int]  # ids so far, seed, sample -> the next id


def params(**chosen) -> SamplingParams:
    """Every default filled, so that an engine takes them as they are."""
    defaults = {"temperature": 0.0, "top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0, "seed": 0}
    return SamplingParams(**{**defaults, **chosen})


def request(name: str, prompt, salt: str = "", **chosen) -> Request:
    """A request with params(**chosen)."""
    return Request(name, tuple(prompt), params(**chosen), salt)


def next_id(ids: list[int], seed: int, index: int) -> int:
    """Of all ids so far; three times in four what stood three places ago, so that guesses come true."""
    number = zlib.crc32(array("q", [*ids, seed, index]).tobytes())
    return ids[-3] if number % 4 and len(ids) >= 3 else number // 4 % VOCAB


@dataclass
class Answer:
    """What one sample brought, or should bring."""

    ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | None = None


def right_answer(request: Request, index: int, most_ids: int, draw: Draw = next_id) -> Answer:
    """The known answer of a sample that may become `most_ids` long."""
    wanted, ids, answer = request.params, list(request.prompt_ids), Answer()
    while answer.finish_reason is None:
        drawn = draw(ids, wanted.seed, index)
        ids.append(drawn)
        answer.ids.append(drawn)
        early = len(answer.ids) <= wanted.min_tokens
        if drawn in wanted.stop_token_ids and not early:
            answer.finish_reason, answer.stop_reason = "stop", drawn
        elif drawn == EOS and not wanted.ignore_eos and not early:
            answer.finish_reason = "stop"
        elif len(ids) == most_ids or len(answer.ids) == wanted.max_tokens:
            answer.finish_reason = "length"
    return answer


@dataclass
class Computed:
    """A step that the fake has computed, and the scheduler has not committed."""

    plan: Plan
    outcomes: list[Outcome]


class Simulation:
    """A scheduler over the fake, all that must hold in every step asserted in every step."""

    def __init__(self, limits: Limits, num_blocks: int, proposer: Proposer | None = None,
                 prefix_sharing: bool = True, draw: Draw = next_id, ahead: bool = False):
        pool = BlockPool(num_blocks, BLOCK_SIZE)
        self.scheduler = Scheduler(limits, pool, (EOS,), proposer, prefix_sharing)
        self.draw = draw
        self.ahead = ahead
        self.in_flight: Computed | None = None
        self.requests: dict[str, Request] = {}
        self.answers: dict[tuple[str, int], Answer] = {}
        self.prompts: dict[str, list[PromptEvent]] = defaultdict(list)
        self.cancelled: set[tuple[str, int]] = set()
        self.counts: Counter[str] = Counter()
        self._cache: dict[int, int] = {}
        self._arrival: dict[str, int] = {}
        self._ends_by: dict[str, int] = {}  # the step by which each open request must have been answered

    # ---- what a caller does --------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """Queue a request, and fix the step by which it must be answered: each step brings the oldest
        sequence a position further, and that one is never made to give its blocks back."""
        self.scheduler.add(request)
        self.requests[request.id] = request
        self._arrival[request.id] = len(self._arrival)
        for index in range(request.params.n):
            self.answers[request.id, index] = Answer()
        ahead = (self.requests[name] for name in (*self._ends_by, request.id))
        work = sum(one.params.n * self._most_ids(one) for one in ahead)
        self._ends_by[request.id] = self.counts["steps"] + work

    def cancel(self, name: str, index: int | None = None) -> bool:
        """Cancel, and expect exactly what is still unanswered to be found."""
        indices = range(self.requests[name].params.n) if index is None else [index]
        pending = {(name, i) for i in indices if not self._has_ended(name, i)}
        found = self.scheduler.cancel(name, index)
        assert found == bool(pending), f"cancel of {name} {index} says {found}"
        self.cancelled |= pending
        self.scheduler.check()
        return found

    def is_answered(self, name: str) -> bool:
        """Whether every sample has ended or was cancelled."""
        return all(self._has_ended(name, index) for index in range(self.requests[name].params.n))

    def drain(self) -> None:
        """Step to the end; then every answer must be the right one, and every block must be back."""
        while self.scheduler.has_work or self.in_flight:
            self.step()
        for (name, index), answer in self.answers.items():
            right = right_answer(self.requests[name], index, self._most_ids(self.requests[name]), self.draw)
            if (name, index) in self.cancelled:
                assert answer.finish_reason is None and right.ids[:len(answer.ids)] == answer.ids
            else:
                assert answer == right, f"{name} sample {index}"
        for name in {name for name, _ in self.answers.keys() - self.cancelled}:
            self._check_prompt(self.requests[name])
        assert self.scheduler.pool.num_held == 0, "blocks are lost"

    def step(self) -> list[Event]:
        """Plan and run the fake, if nothing is in flight; with `ahead`, also the step after it, if that can be foreseen;
        then commit the first."""
        scheduler = self.scheduler
        self.counts["steps"] += 1
        computed = self.in_flight or self._compute(self._plan(), [])
        after = scheduler.plan_ahead(computed.plan) if self.ahead else None
        self.in_flight = None if after is None else self._compute(after, computed.outcomes)
        self.counts["ahead"] += after is not None
        alive = [place for place, item in enumerate(computed.plan.scheduled) if item.sequence in scheduler.running]
        self.counts["dropped"] += len(computed.outcomes) - len(alive)
        events = scheduler.commit(Plan([computed.plan.scheduled[place] for place in alive]),
                                  [computed.outcomes[place] for place in alive])
        for event in events:
            self._receive(event)
        scheduler.check()
        self._check_order()
        self._ends_by = {name: last for name, last in self._ends_by.items() if not self.is_answered(name)}
        late = [name for name, last in self._ends_by.items() if self.counts["steps"] > last]
        assert not late, f"still unanswered: {late}"
        return events

    def _plan(self) -> Plan:
        scheduler = self.scheduler
        before = list(scheduler.running)
        decoding = [sequence for sequence in before if sequence.is_decoding]
        plan = scheduler.plan()
        self.counts["preempted"] += sum(sequence in scheduler.waiting for sequence in before)
        scheduler.guess(plan)
        self._check_plan(plan, decoding)
        return plan

    def fail(self, is_computed: bool) -> None:
        """A step that comes to nothing, before or after the model has computed it; so does one that is in flight."""
        self.in_flight = None
        plan = self.scheduler.plan()
        if is_computed:
            self.scheduler.guess(plan)
            self._compute(plan, [])
        self.scheduler.check()

    # ---- what the fake does --------------------------------------------------------------------------------

    def _compute(self, plan: Plan, before: list[Outcome]) -> "Computed":
        """before: of the step that this one follows, if it is ahead; the drawn tokens are known to the fake alone."""
        while plan.copies:
            source, target = plan.copies.pop(0)
            for offset in range(BLOCK_SIZE):
                self._cache[target * BLOCK_SIZE + offset] = self._cache.get(source * BLOCK_SIZE + offset)
            self.counts["copies"] += 1
        ids = [list(item.sequence.ids) for item in plan.scheduled]
        for known, place in zip(ids, plan.follows or ()):
            known.append(before[place].draws[0][0].token_id)
        names = [self._names(item, known) for item, known in zip(plan.scheduled, ids)]
        written: set[int] = set()
        for item, own in zip(plan.scheduled, names):
            for position in range(item.start, item.start + item.length):
                slot = _slot(item, position)
                assert slot not in written, "two tokens of a step are written into one slot"
                written.add(slot)
                self._cache[slot] = own[position]
        for item, own in zip(plan.scheduled, names):
            for position, name in enumerate(own):
                assert self._cache.get(_slot(item, position)) == name, (
                    f"{item.sequence.request.id} reads what is not its own at position {position}")
        return Computed(plan, [self._outcome(item, known) for item, known in zip(plan.scheduled, ids)])

    @staticmethod
    def _names(item: Scheduled, ids: list[int]) -> list[int]:
        """What must stand at each position that the scheduled tokens see."""
        name, names = hash(item.sequence.request.salt), []
        for token_id in [*ids[:item.num_known], *item.draft]:
            name = hash((name, token_id))
            names.append(name)
        assert len(names) == item.start + item.length, "past what is known"
        return names

    def _outcome(self, item: Scheduled, ids: list[int]) -> Outcome:
        sequence = item.sequence
        seed = sequence.request.params.seed
        draws = tuple(tuple(TokenLogprob(self.draw([*ids, *item.draft[:guessed]], seed, index), 0.0)
                            for guessed in range(1 + len(item.draft)))
                      for index in sequence.samples) if item.samples else ()
        scored = range(item.start + 1, min(item.start + item.length + 1, sequence.num_prompt))
        return Outcome(draws, tuple(TokenLogprob(ids[position], -float(position)) for position in scored)
                       if sequence.wants_prompt_scores else ())

    def _receive(self, event: Event) -> None:
        if isinstance(event, PromptEvent):
            self.prompts[event.request_id].append(event)
            self.counts["cached"] += event.num_cached
            return
        assert self.prompts[event.request_id], "a token before its prompt"
        answer = self.answers[event.request_id, event.index]
        assert not self._has_ended(event.request_id, event.index), "a token after the end"
        answer.ids.append(event.token_id)
        answer.finish_reason, answer.stop_reason = event.finish_reason, event.stop_reason

    # ---- what must hold ------------------------------------------------------------------------------------

    def _check_plan(self, plan: Plan, decoding: list) -> None:
        scheduler, limits = self.scheduler, self.scheduler.limits
        assert plan.scheduled, "something waits, and nothing is done"
        scheduled = [item.sequence for item in plan.scheduled]
        assert len(set(map(id, scheduled))) == len(scheduled), "a sequence stands twice in a plan"
        waiting = [sequence for sequence in decoding if sequence not in scheduled]
        assert not set(waiting) & set(scheduler.running), "somebody who decodes was passed over"
        limit = limits.mixed_step_tokens if decoding else limits.step_tokens
        tokens = sum(item.length for item in plan.scheduled)
        assert tokens <= max(limit, len(decoding) + max(limit // 4, 1)), f"{tokens} tokens in a step of {limit}"
        assert sum(len(sequence.samples) for sequence in scheduler.running) <= limits.max_running
        for item in plan.scheduled:
            sequence, end = item.sequence, item.start + item.length
            assert sequence in scheduler.running and item.length - len(item.draft) >= 1
            assert item.start == sequence.num_computed and end <= len(sequence.table) * BLOCK_SIZE
            assert end - len(item.draft) <= len(sequence.ids), "past what is known"
            assert end < self._most_ids(sequence.request) or not item.draft, "guesses past the end"
            self.counts["guessed"] += len(item.draft)

    def _check_order(self) -> None:
        """First come, first served: who came earlier runs before anybody who came later does."""
        order = [(self._arrival[sequence.request.id], sequence.index)
                 for sequence in (*self.scheduler.running, *self.scheduler.waiting)]
        assert order == sorted(set(order)), f"out of turn: {order}"
        for sequence in self.scheduler.waiting:
            assert not sequence.table and sequence.num_computed == sequence.num_published == 0

    def _check_prompt(self, request: Request) -> None:
        events = self.prompts[request.id]
        scores = [score for event in events for score in event.logprobs]
        if request.params.prompt_logprobs is None:
            assert scores == [] and len(events) == 1
        else:
            assert [score.token_id for score in scores] == list(request.prompt_ids)
            assert [score.logprob for score in scores] == [None, *(-float(p) for p in range(1, len(scores)))]
            assert not any(event.num_cached for event in events)

    def _has_ended(self, name: str, index: int) -> bool:
        return self.answers[name, index].finish_reason is not None or (name, index) in self.cancelled

    def _most_ids(self, request: Request) -> int:
        most = min(self.scheduler.limits.max_context, self.scheduler.pool.num_blocks * BLOCK_SIZE)
        if request.params.max_tokens is None:
            return most
        return min(most, len(request.prompt_ids) + request.params.max_tokens)


def _slot(item: Scheduled, position: int) -> int:
    return item.sequence.table[position // BLOCK_SIZE] * BLOCK_SIZE + position % BLOCK_SIZE
