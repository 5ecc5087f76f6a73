"""Servers in this process, each on a port of its own.

`listening` is HTTP alone, with whatever answers; `serving` a whole front, with an engine that spells the alphabet.
"""

import json
import os
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from llama.engine.request import TokenEvent
from server.errors import ApiError
from server.front import Front, Settings
from server.http import HttpLimits
from server.http.listener import Listener
from server.wire import Loaded
from tests.server.raw import PATIENCE, Client
from tests.server.samples import BOS, CONTEXT, EOT, NAME, TEMPLATE, VOCAB
from tests.server.scripted import ScriptedEngine, spec
from tests.text.samples import small_tokenizer

FIRST_LETTER = 67  # the id of "a"


def wait_until(condition):
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


# ---- HTTP alone ------------------------------------------------------------------------------------------


def tell(exchange):
    """Answers with what was understood."""
    head = exchange.head
    body = exchange.read_body().decode("latin-1")
    seen = {"method": head.method, "path": head.path, "query": head.query, "body": body}
    exchange.answer(200, json.dumps(seen).encode(), "application/json")


def refuse(exchange, error):
    fields = [] if error.retry_after is None else [("Retry-After", str(error.retry_after))]
    exchange.answer(error.status, json.dumps(error.body()).encode(), "application/json", fields)


class Site:
    """A Listener that has been started. connections: how many are open, as it tells."""

    def __init__(self, handle, limits, start):
        def answer(exchange):
            try:
                handle(exchange)
            except ApiError as error:
                refuse(exchange, error)

        self.connections = 0
        self._lock = threading.Lock()
        self.listener = Listener("127.0.0.1", 0, limits, answer, refuse, self._count)
        self.port = self.listener.port
        if start:
            self.listener.start()

    def _count(self, change):
        with self._lock:
            self.connections += change

    def open(self, room=None):
        return Client(self.port, room)

    def ask(self, *parts):
        with self.open() as client:
            return client.ask(*parts)


@contextmanager
def listening(handle=tell, start=True, **limits):
    """HTTP answered by `handle`, for as long as the context lasts. limits: of HttpLimits."""
    site = Site(handle, HttpLimits(**limits), start)
    try:
        yield site
    finally:
        site.listener.stop(0)


# ---- all of it -------------------------------------------------------------------------------------------


class SpellingEngine(ScriptedEngine):
    """Spells the alphabet, again and again. hold: a file; while it is there, a step goes on."""

    def __init__(self, hold="", **options):
        super().__init__(**options)
        self.hold = hold

    def step(self, only=None):
        while os.path.exists(self.hold):
            time.sleep(0.002)
        return super().step(only)

    def _advance(self, one):
        for event in super()._advance(one):
            if isinstance(event, TokenEvent):
                event = replace(event, token_id=FIRST_LETTER + one.samples[event.index] % 26)
            yield event


def load(engine_spec):
    options = dict(engine_spec.options)
    time.sleep(options.pop("load_seconds", 0))
    if "load_error" in options:
        raise ValueError(options["load_error"])
    engine = SpellingEngine(**options)
    return engine, Loaded(engine.max_context, engine.max_running, {"dtype": "scripted", "device": "cpu"})


def make_checkpoint(directory):
    """What a front reads of a checkpoint: the same as `samples.make_served`."""
    config = {"model_type": "llama", "vocab_size": VOCAB + 56, "hidden_size": 8, "intermediate_size": 8,
              "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 8,
              "max_position_embeddings": CONTEXT, "rope_theta": 1e4, "rms_norm_eps": 1e-5,
              "tie_word_embeddings": True, "bos_token_id": BOS, "eos_token_id": EOT}
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    small_tokenizer().save(str(directory / "tokenizer.json"))
    return directory


class Served:
    """A front that has been started."""

    def __init__(self, front):
        self.front = front
        self.supervisor = front.supervisor
        self.port = front.listener.port

    def open(self, room=None):
        return Client(self.port, room)

    def ask(self, *parts):
        with self.open() as client:
            return client.ask(*parts)

    def wait_for(self, **facts):
        """Until the supervisor's snapshot has these."""
        wait_until(lambda: self.supervisor.snapshot().items() >= facts.items())

    def metric(self, name, **labels):
        """A number of /metrics' own counters and gauges; 0 if it is not there."""
        lines = self.front.routes._metrics.render(self.supervisor.snapshot()).splitlines()
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        found = [line for line in lines if line.startswith(f"llama:{name}{{") and all(one in line for one in wanted)]
        return sum(float(line.rpartition(" ")[2]) for line in found)


@contextmanager
def serving(directory, state="ready", limits=None, engine=None, **settings: Any):
    """A front before a SpellingEngine, once it has that state. engine: its options, and fields of EngineSpec."""
    engine_spec = replace(spec(model=str(directory), **(engine or {})), factory="tests.server.live:load")
    front = Front(Settings(names=settings.pop("names", (NAME,)), spec=engine_spec,
                           limits=HttpLimits(**(limits or {})), **settings))
    try:
        front.start()
        wait_until(lambda: front.supervisor.state == state)
        yield Served(front)
    finally:
        front.stop(0)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """The directory of a checkpoint for `serving`."""
    return make_checkpoint(tmp_path_factory.mktemp("small"))
