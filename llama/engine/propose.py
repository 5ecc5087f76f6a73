"""Guesses for the tokens to come, which one step then verifies together (arXiv:2211.17192).

Every guess here is a single token with certainty, so that verifying is only comparing: what the sampler draws at
each place is what it would have drawn anyway, and a guess is right if it equals that. Nothing is lost, greedy or
sampled; what is won is that several tokens come out of one reading of the weights.
"""

from typing import Protocol

import numpy as np

from llama.engine.sequence import Sequence


# Text that only repeats itself agrees with itself at every length: looking further back decides nothing.
LONGEST_NGRAM = 32


class Proposer(Protocol):
    """Anything that guesses."""

    def propose(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """At most `most` ids that may come after the sequence's last one; none if nothing is worth a try."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence gives up its place: whatever is kept for it is not needed any more."""


class PromptLookup:
    """The text so far as its own draft model: where the last n-gram occurred before, what followed it there.

    min_ngram: how many ids must agree at least. max_draft: guesses at most. A sequence whose guesses fail gets
    shorter drafts, and below `give_up` only an occasional single guess, by which it can recover.
    """

    def __init__(self, min_ngram: int = 3, max_draft: int = 8, give_up: float = 0.2, retry_every: int = 16):
        self.min_ngram = min_ngram
        self.max_draft = max_draft
        self.give_up = give_up
        self.retry_every = retry_every

    def propose(self, sequence: Sequence, most: int) -> tuple[int, ...]:
        """See Proposer."""
        if sequence.draft_success < self.give_up:
            if len(sequence.ids) % self.retry_every:
                return ()
            most = min(most, 1)
        most = min(most, max(1, round(self.max_draft * sequence.draft_success)))
        ids = np.frombuffer(sequence.ids, dtype=np.int64)
        end = _longest_match(ids, self.min_ngram)
        return () if end is None else tuple(ids[end:end + most].tolist())

    def forget(self, sequence: Sequence) -> None:
        """Nothing is kept."""


def _longest_match(ids: np.ndarray, min_ngram: int) -> int | None:
    """The end of the earlier occurrence of the longest suffix of `ids`, up to LONGEST_NGRAM, the latest among
    equals; None if not even the last `min_ngram` ids occurred before."""
    length = len(ids)
    if length <= min_ngram:
        return None
    ends = np.flatnonzero(ids[min_ngram - 1:length - 1] == ids[-1]) + min_ngram  # candidates, all later ids free
    for back in range(2, min_ngram + 1):
        ends = ends[ids[ends - back] == ids[length - back]]
    if len(ends) == 0:
        return None
    back = min_ngram
    while len(ends) > 1 and back < LONGEST_NGRAM:
        back += 1
        longer = ends[ends >= back]
        longer = longer[ids[longer - back] == ids[length - back]]
        if len(longer) == 0:
            break
        ends = longer
    return int(ends[-1])
