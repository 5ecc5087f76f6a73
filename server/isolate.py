"""A step that raised: which request is the cause, so that it alone ends and all others go on.

The engine's promise is that nothing is kept of a step that ended in StepError, and that step(only=...) may
try again for some of those whom it was for. Draws depend on seed, sample and position alone, so whoever is
tried twice gets the same tokens. Any other exception means that the engine's books cannot be trusted any
more; it is not caught here.
"""

import sys
import traceback
from collections.abc import Sequence as Ordered
from typing import Any

from llama.engine.request import Event, Request, SamplingParams, StepError

PROBE = Request("probe", (0,), SamplingParams(max_tokens=1, temperature=0.0, top_p=1.0, top_k=-1,
                                              repetition_penalty=1.0))


class BrokenEngineError(RuntimeError):
    """The engine fails whatever it is given."""


def is_ours(error: BaseException) -> bool:
    """Whether the error was thought of, so that its words say all."""
    return type(error).__module__.startswith(("llama.", "server."))


def sentence(error: BaseException) -> str:
    """What an error says to people: its own words if it is one of ours, otherwise also of what kind it is."""
    return str(error) if is_ours(error) else f"{type(error).__name__}: {error}".removesuffix(": ")


def step(engine: Any) -> tuple[list[Event], dict[str, str]]:
    """One step, or the same in parts: the events, and why for each request that cannot go on.

    The engine has forgotten those requests. Raises BrokenEngineError if not even a request without fault can
    be computed; AssertionError if the engine's books do not agree afterwards.
    """
    events, failure = _try(engine, None)
    if failure is None:
        return events, {}
    culprits: dict[str, str] = {}
    events = _try_halves(engine, *failure, culprits)
    if len(culprits) == len(failure[0]):
        _probe(engine, failure[1])
    engine.check()
    return events, culprits


def _try(engine: Any, only: frozenset[str] | None) -> tuple[list[Event], tuple[Ordered[str], str] | None]:
    """A step's events; or whom it failed for, and why. The tensors that the exception holds are let go."""
    try:
        return engine.step(only), None
    except StepError as error:
        if only is None:
            traceback.print_exc(file=sys.stderr)
        return [], (error.request_ids, sentence(error.__cause__ or error))


def _try_halves(engine: Any, request_ids: Ordered[str], why: str, culprits: dict[str, str]) -> list[Event]:
    """Steps for either half of a group that failed as one; who fails alone is forgotten, and entered."""
    if len(request_ids) == 1:
        culprits[request_ids[0]] = why
        engine.cancel(request_ids[0])
        return []
    events, middle = [], len(request_ids) // 2
    for half in (request_ids[:middle], request_ids[middle:]):
        brought, failure = _try(engine, frozenset(half))
        events += brought if failure is None else _try_halves(engine, *failure, culprits)
    return events


def _probe(engine: Any, why: str) -> None:
    """Nobody got through. Whether that was their fault shows a request that cannot be at fault."""
    engine.submit(PROBE)
    _, failure = _try(engine, frozenset({PROBE.id}))
    engine.cancel(PROBE.id)
    if failure is not None:
        raise BrokenEngineError(f"the engine cannot compute anything any more: {why}")
