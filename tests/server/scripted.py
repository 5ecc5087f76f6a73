"""An engine without a model: its tokens are known beforehand, its steps take their time, and it can go wrong.

`load` is a factory for EngineSpec; its options are the arguments of ScriptedEngine, and
    load_seconds   how long loading takes
    load_error     the sentence of the ConfigError with which it refuses
    load_kill      a file; while it is there, loading ends in SIGKILL
A fault belongs to a request's name: "raise@3" happens in the step that would bring its token 3 (from 0).
"""

import os
import signal
import time

from llama.config import ConfigError
from llama.engine.request import (PromptEvent, QueueFullError, Request, RequestError, SamplingParams,
                                  StepError, TokenEvent)
from server.wire import EngineSpec, Loaded

FACTORY = "tests.server.scripted:load"


def load(spec):
    options = dict(spec.options)
    time.sleep(options.pop("load_seconds", 0))
    if os.path.exists(options.pop("load_kill", "")):
        os.kill(os.getpid(), signal.SIGKILL)
    error = options.pop("load_error", None)
    if error is not None:
        raise ConfigError(error)
    engine = ScriptedEngine(**options)
    return engine, Loaded(engine.max_context, engine.max_running, {"model": "scripted"})


def spec(**options):
    """What makes a Supervisor start a ScriptedEngine. Fields of EngineSpec are taken out of the options."""
    fields = {name: options.pop(name) for name in EngineSpec.__dataclass_fields__ if name in options}
    return EngineSpec(factory=FACTORY, options=options, **fields)


def request(name, max_tokens=5, prompt=(1, 2, 3), **params):
    """A request with every default filled."""
    defaults = SamplingParams(temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0)
    params = SamplingParams(max_tokens=max_tokens, **params).with_defaults(defaults)
    return Request(name, tuple(prompt), params)


def token(request, index, position):
    """Token `position` of sample `index`."""
    return (sum(request.prompt_ids) * 31 + index * 1009 + position * 7) % 128_000


def expected(request):
    """All events of a request that goes well, in each sample's own order."""
    def of_sample(index):
        *ids, last = [token(request, index, position) for position in range(request.params.max_tokens)]
        return [*(TokenEvent(request.id, index, token_id) for token_id in ids),
                TokenEvent(request.id, index, last, finish_reason="length")]

    return [PromptEvent(request.id)], {index: of_sample(index) for index in range(request.params.n)}


class Running:
    def __init__(self, request):
        self.request = request
        self.samples = dict.fromkeys(range(request.params.n), 0)  # how many tokens each has
        self.is_new = True

    @property
    def position(self):
        return max(self.samples.values())


class ScriptedEngine:
    """A token a step for every sample that runs; first come, first served.

    pace: seconds that a step takes. faults: request name -> "raise", "kill", "hang" or "defect", "@" and a
    position. broken_after: from that step on every step fails, whomever it is for.
    """

    def __init__(self, pace=0.0, max_running=64, max_context=1 << 17, faults=None, broken_after=None,
                 refuse=()):
        self.pace = pace
        self.max_running = max_running
        self.max_context = max_context
        self.faults = {name: fault.split("@") for name, fault in (faults or {}).items()}
        self.broken_after = broken_after
        self.refuse = refuse
        self.waiting = []
        self.running = []
        self.num_steps = 0
        self.cancelled = []

    @property
    def has_work(self):
        return bool(self.waiting or self.running)

    @property
    def cache_usage(self):
        return len(self.running) / self.max_running

    def submit(self, request):
        if request.id in self.refuse:
            raise RequestError("prompt", f"{request.id} is refused")
        if request.id.startswith("too-many"):
            raise QueueFullError("too much waits")
        self.waiting.append(Running(request))

    def cancel(self, request_id, index=None):
        self.cancelled.append((request_id, index))
        found = [one for one in (*self.waiting, *self.running) if one.request.id == request_id]
        for one in found:
            one.samples = {} if index is None else {key: n for key, n in one.samples.items() if key != index}
        self._drop_ended()
        return bool(found)

    def step(self, only=None):
        if self.pace:
            time.sleep(self.pace)
        self.num_steps += 1
        wanted = [one for one in self.waiting if only is None or one.request.id in only]
        for one in wanted[:self.max_running - len(self.running)]:
            self.waiting.remove(one)
            self.running.append(one)
        scheduled = [one for one in self.running if only is None or one.request.id in only]
        names = tuple(one.request.id for one in scheduled)
        if self.broken_after is not None and self.num_steps > self.broken_after:
            raise StepError(names) from RuntimeError("the device is gone")
        for one in scheduled:
            self._go_wrong(one, names)
        return [event for one in scheduled for event in self._advance(one)]

    def _go_wrong(self, one, names):
        fault, position = self.faults.get(one.request.id, ("none", "-1"))
        if one.position != int(position):
            return
        if fault == "raise":
            raise StepError(names) from RuntimeError(f"{one.request.id} cannot be computed")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(3600)
        if fault == "defect":
            raise ZeroDivisionError("the books are wrong")

    def _advance(self, one):
        if one.is_new:
            one.is_new = False
            yield PromptEvent(one.request.id)
        for index, position in list(one.samples.items()):
            is_last = position + 1 == one.request.params.max_tokens
            yield TokenEvent(one.request.id, index, token(one.request, index, position),
                             finish_reason="length" if is_last else None)
            one.samples[index] += 1
            if is_last:
                del one.samples[index]
        self._drop_ended()

    def _drop_ended(self):
        self.waiting = [one for one in self.waiting if one.samples]
        self.running = [one for one in self.running if one.samples]

    def check(self):
        assert not any(one in self.running for one in self.waiting)
