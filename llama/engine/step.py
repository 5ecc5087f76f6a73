"""One step: what is planned, and what comes out of it. No torch."""

from dataclasses import dataclass, field

from llama.engine.request import TokenLogprob
from llama.engine.sequence import Sequence


@dataclass(frozen=True)
class Scheduled:
    """`length` tokens of a sequence, from position `start` on, the last of them guesses (`draft`)."""

    sequence: Sequence
    start: int
    length: int
    draft: tuple[int, ...] = ()

    @property
    def ids(self) -> list[int]:
        """The tokens themselves."""
        return [*self.sequence.ids[self.start:self.start + self.length - len(self.draft)], *self.draft]

    @property
    def num_known(self) -> int:
        """Tokens of the sequence up to the last of these that is no guess; in a step ahead, one more than it has yet."""
        return self.start + self.length - len(self.draft)

    @property
    def samples(self) -> bool:
        """Whether this reaches the end of what is known, so that the next token can be drawn."""
        return self.num_known >= len(self.sequence.ids)

    @property
    def is_decode(self) -> bool:
        """Whether a token is drawn after each of these."""
        return self.samples and self.length == 1 + len(self.draft)


@dataclass
class Plan:
    """One step: what is computed, after copying blocks that are about to diverge, as (source, target).

    Whoever has made a copy strikes it off: those of a step that failed before are left to the next.

    follows: of a step ahead, whose tokens are being drawn while it is planned: which item of the step before draws the
    token of each. None: all tokens are known.
    """

    scheduled: list[Scheduled] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    follows: list[int] | None = None

    @property
    def request_ids(self) -> tuple[str, ...]:
        """Whom the step is for."""
        return tuple(dict.fromkeys(item.sequence.request.id for item in self.scheduled))


@dataclass(frozen=True)
class Outcome:
    """What came out for one Scheduled.

    draws: per sample (one, or all n of a request right after its prompt), the tokens drawn one after another:
    one for each of the draft's tokens and one more. prompt: log probabilities of the prompt's tokens from
    position start + 1 on, as far as this chunk knows them; empty where none are wanted.
    """

    draws: tuple[tuple[TokenLogprob, ...], ...] = ()
    prompt: tuple[TokenLogprob, ...] = ()
