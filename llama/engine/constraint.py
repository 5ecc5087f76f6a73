"""What may come next, where a reply must have a form: the engine's side of constrained decoding.

The engine knows ids and no text. Whoever makes an engine hands it a Compiler, which turns the grammar of a
request into its Constraint; `llama.text.matcher` is one. It runs in a thread of its own, while the prompt is
being computed.
"""

from collections.abc import Callable, Sequence as Ordered
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Protocol

import numpy as np

from llama.engine.sequence import Sequence

# How long a step without other work waits for a grammar, before it looks whether there is other work now.
PATIENCE_SECONDS = 0.02


class Constraint(Protocol):
    """A grammar, and how far one reply has come in it.

    is_over: the reply has ended; nothing can follow.
    """

    is_over: bool

    def masks(self, guesses: Ordered[int]) -> np.ndarray:
        """Which ids may come next, and which after each of these guesses, all of which `num_allowed` let through:
        [1 + guesses, bytes], uint8, a bit for each id, beginning with the lowest of the first byte.

        Leaves the constraint as it is. Raises ValueError if the grammar takes more time or room than it may.
        """

    def num_allowed(self, guesses: Ordered[int]) -> int:
        """How many of these ids, one after another, may come next. What ends a reply counts as not allowed: nothing
        is to be guessed after it."""

    def accept(self, token_id: int) -> None:
        """Go on by an id that may come next."""

    def fork(self) -> "Constraint":
        """The same for another reply, which goes its own way from here."""


Compiler = Callable[[str], Constraint]


class Compilation:
    """The grammars that are on their way to constraints, and the sequences that wait for them."""

    def __init__(self, compiler: Compiler):
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(1, "grammars")
        self._waiting: dict[Future[Constraint], Sequence] = {}

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def begin(self, sequence: Sequence) -> None:
        """Compile a sequence's grammar. It takes part in steps meanwhile, but draws no token."""
        future = self._thread.submit(self._compiler, sequence.request.params.grammar)
        self._waiting[future] = sequence

    def finish(self, patience: float = 0.0) -> list[tuple[Sequence, str]]:
        """Give those constraints that are ready to their sequences, having waited so many seconds for the first.

        Returns those of which the grammar is none, each with what is wrong with it.
        """
        failed = []
        for future in wait(self._waiting, patience, FIRST_COMPLETED).done:
            sequence = self._waiting.pop(future)
            try:
                sequence.constraint = future.result()
            except ValueError as error:
                failed.append((sequence, str(error)))
        return failed


class ConstraintError(ValueError):
    """The grammar of one sequence of a step could not be followed any further."""

    def __init__(self, sequence: Sequence, why: str):
        super().__init__(why)
        self.sequence = sequence
