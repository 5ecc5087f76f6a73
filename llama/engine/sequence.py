"""One continuation under way: its ids, how far they are computed, and the blocks that hold them."""

from array import array
from collections import Counter
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from llama.engine.blocks import block_digest
from llama.engine.request import Request
from llama.model.plan import BoundPlan

if TYPE_CHECKING:
    from llama.engine.constraint import Constraint


@dataclass(eq=False)
class Sequence:
    """Sample `index` of a request. Everything else is derived from what stands here.

    ids: prompt and what was generated. num_computed: positions whose keys and values are in the blocks of
    `table`, the first num_published of which can be found by their content. num_prompt_scored: tokens of the
    prompt whose log probabilities were reported. forks: samples that split off when the prompt is computed.
    seed: with index and position, it fixes every draw. digests: the chain of full blocks' names, grown on demand
    from the request's root. counts: how often each id was generated. draft_success: recent share of guesses
    that came true. plan: the request's, for this model. constraint: where the reply is in the request's grammar, once
    that is compiled.
    """

    request: Request
    seed: int
    root: bytes
    index: int = 0
    forks: tuple[int, ...] = ()
    ids: array = field(default_factory=lambda: array("q"))
    num_computed: int = 0
    num_published: int = 0
    num_prompt_scored: int = 0
    table: list[int] = field(default_factory=list)
    digests: list[bytes] = field(default_factory=list)
    counts: Counter[int] = field(default_factory=Counter)
    draft_success: float = 1.0
    plan: BoundPlan | None = None
    constraint: "Constraint | None" = None

    def __post_init__(self) -> None:
        if not self.ids:
            self.ids = array("q", self.request.prompt_ids)

    @property
    def samples(self) -> tuple[int, ...]:
        """The samples whose tokens come out of this sequence: its own, and those that have not split off yet."""
        return (self.index, *self.forks)

    @property
    def num_prompt(self) -> int:
        """Tokens in the prompt."""
        return len(self.request.prompt_ids)

    @cached_property
    def distinct_prompt_ids(self) -> np.ndarray:
        """The ids that occur in the prompt, each once: [ids], int64."""
        return np.unique(np.frombuffer(self.ids, dtype=np.int64)[:self.num_prompt])

    @property
    def num_generated(self) -> int:
        """Tokens since the prompt."""
        return len(self.ids) - self.num_prompt

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed: 1 in decode, more in prefill."""
        return len(self.ids) - self.num_computed

    @property
    def num_ready(self) -> int:
        """Of these, how many can be computed now: without its constraint, no token can be drawn after the last."""
        is_compiling = self.request.params.grammar is not None and self.constraint is None
        return self.num_pending - is_compiling

    @property
    def is_decoding(self) -> bool:
        """Whether all but the token generated last is computed."""
        return self.num_pending == 1 and self.num_generated > 0

    @property
    def wants_prompt_scores(self) -> bool:
        """Whether log probabilities of the prompt are still to be reported, so that all of it must be computed."""
        return self.request.params.prompt_logprobs is not None and self.num_prompt_scored < self.num_prompt

    def is_foreseeable(self, position: int) -> bool:
        """Whether the token at a position can be computed, and the next one drawn, while nobody but the device knows it."""
        params = self.request.params
        is_plain = params.grammar is None and params.repetition_penalty in (None, 1) \
            and not (params.frequency_penalty or params.presence_penalty)
        return is_plain and not self.forks and (self.plan is None or self.plan.replayable(position) is not None)

    @property
    def first_looked_at(self) -> int:
        """The first position that must be computed, even if the pool has it, because the plan captures something there;
        the end, if there is none."""
        captured = None if self.plan is None else self.plan.first_captured
        return len(self.ids) if captured is None else captured

    def append(self, token_id: int) -> None:
        """Add a generated token."""
        self.ids.append(token_id)
        self.counts[token_id] += 1
        if self.constraint is not None:
            self.constraint.accept(token_id)

    def allowed(self, guesses: tuple[int, ...]) -> tuple[int, ...]:
        """The guesses up to the first that the constraint forbids."""
        return guesses if self.constraint is None else guesses[:self.constraint.num_allowed(guesses)]

    def learn(self, num_guessed: int, num_right: int) -> None:
        """Remember how well guesses did: a running mean over about the last four drafts."""
        self.draft_success += (num_right / num_guessed - self.draft_success) / 4

    def digest(self, block: int, block_size: int) -> bytes:
        """The name of the block-th full block of this sequence."""
        while len(self.digests) <= block:
            first = len(self.digests) * block_size
            parent = self.digests[-1] if self.digests else self.root
            self.digests.append(block_digest(parent, self.ids[first:first + block_size]))
        return self.digests[block]

    def fork(self, index: int) -> "Sequence":
        """Another sample of the same computed prompt; the caller counts its references to the blocks."""
        constraint = None if self.constraint is None else self.constraint.fork()
        return replace(self, index=index, forks=(), ids=self.ids[:], table=self.table[:],
                       digests=self.digests[:], counts=Counter(self.counts), constraint=constraint)
