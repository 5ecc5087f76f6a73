"""A step between its launch and its landing: enqueued on the device, and not yet known to the host."""

from collections.abc import Container, Sequence as Ordered
from dataclasses import dataclass

from llama.engine.device import Device
from llama.engine.request import Event, TokenLogprob, TraceEvent
from llama.engine.sampler import Draw
from llama.engine.sequence import Sequence
from llama.engine.step import Outcome, Plan
from llama.engine.tracing import Caught


@dataclass(frozen=True)
class Landing:
    """What a step brought for those who are still there: their part of the plan, an outcome for each, and what their trace
    plans captured. is_amended: somebody's token is not the one that the device knows."""

    plan: Plan
    outcomes: list[Outcome]
    captured: list[Event]
    is_amended: bool


class Flight:
    """A step that the device is computing, or has computed.

    draw: None if no token is drawn. scores: of each item of the plan, as in Outcome. caught: on the device.
    """

    def __init__(self, device: Device, plan: Plan, draw: Draw | None, scores: Ordered[tuple[TokenLogprob, ...]],
                 caught: Ordered[Caught]):
        self.plan = plan
        self.draw = draw
        self._scores = scores
        self._caught = caught
        self._arrive = device.download((*(() if draw is None else draw.parts), *(one.value.float() for one in caught)))

    def land(self, alive: Container[Sequence]) -> Landing:
        """Wait for the step. Raises what the device raises."""
        arrived = self._arrive()
        parts, values = arrived[:len(arrived) - len(self._caught)], arrived[len(arrived) - len(self._caught):]
        tokens = iter(() if self.draw is None else self.draw.tokens(parts))
        landing = Landing(Plan(), [], [], self.draw is not None and self.draw.amended(parts))
        for item, score in zip(self.plan.scheduled, self._scores, strict=True):
            samples = item.sequence.samples if item.samples else ()
            draws = tuple(tuple(next(tokens) for _ in range(1 + len(item.draft))) for _ in samples)
            if item.sequence in alive:
                landing.plan.scheduled.append(item)
                landing.outcomes.append(Outcome(draws, score))
        for one, value in zip(self._caught, values):
            if one.sequence in alive:
                event = TraceEvent(one.sequence.request.id, one.label, one.positions, value.numpy())
                landing.captured.append(event)
        return landing
