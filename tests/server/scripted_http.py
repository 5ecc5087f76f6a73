"""The server in front of an engine without a model, to see what becomes of answers when things go wrong.

    python -m tests.server.scripted_http OPTIONS [the server's own flags]

is `python -m server` but for its engine; OPTIONS are SeededEngine's and fields of EngineSpec, in JSON. The
text side is the demo's. A request says by its seed what its tokens are, and whether something goes wrong with
it; by its max_tokens, how many there are: a chat without has no end.
"""

import argparse
import json
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from unittest import mock

from llama.engine.request import TokenEvent
from llama.text.tokenizer import Tokenizer
from server import serve
from server.flags import ABOUT, add_flags
from server.wire import Loaded
from tests.server.clients import ROOT, Server, serving
from tests.server.scripted import ScriptedEngine, spec

MODULE = "tests.server.scripted_http"
NUM_IDS = 90  # in the demo's vocabulary each of the first is one printable character


def token_id(seed: int | None, index: int, position: int) -> int:
    """Token `position` of sample `index`: no two requests have a text in common."""
    return zlib.crc32(b"%d/%d/%d" % (seed or 0, index, position)) % NUM_IDS


@cache
def alphabet() -> list[str]:
    """The text of each id."""
    tokenizer = Tokenizer.from_directory(ROOT / "llama" / "demo")
    return [tokenizer.decode([number]) for number in range(NUM_IDS)]


def pieces(seed: int, count: int, index: int = 0) -> list[str]:
    """The texts of a sample's first tokens."""
    return [alphabet()[token_id(seed, index, position)] for position in range(count)]


class SeededEngine(ScriptedEngine):
    """fault_of: seed -> a fault as ScriptedEngine has them. gather: it begins when so many have come."""

    def __init__(self, fault_of=None, gather=0, **options):
        super().__init__(**options)
        self.fault_of = fault_of or {}
        self.num_missing = gather

    def submit(self, request):
        super().submit(request)
        self.num_missing -= 1
        fault = self.fault_of.get(str(request.params.seed))
        if fault is not None:
            self.faults[request.id] = fault.split("@")

    def step(self, only=None):
        if self.num_missing > 0:
            time.sleep(0.005)
            return []
        return super().step(only)

    def _advance(self, one):
        for event in super()._advance(one):
            if isinstance(event, TokenEvent):
                position = one.samples[event.index]
                event = replace(event, token_id=token_id(one.request.params.seed, event.index, position))
            yield event


def load(made):
    """The factory that EngineSpec names."""
    engine = SeededEngine(**made.options)
    return engine, Loaded(engine.max_context, engine.max_running, {"dtype": "scripted"})


@contextmanager
def scripted(*flags: str, **options) -> Iterator[Server]:
    """A server in front of a SeededEngine with these options."""
    with serving(json.dumps(options), *flags, module=MODULE) as server:
        yield server


def main() -> int:
    """`python -m server`, but for the engine."""
    parser = argparse.ArgumentParser(description=ABOUT)
    parser.add_argument("options", type=json.loads)
    add_flags(parser)
    parser.add_argument("--debug", action="store_true")
    args = parser.parse_args()

    def scripted_spec(model, options, threads, **bounds):
        made = spec(**bounds, **options.get("limits", {}), **args.options)
        return replace(made, factory=f"{MODULE}:load")

    with mock.patch.object(serve, "EngineSpec", scripted_spec):
        return serve.run(args)


if __name__ == "__main__":
    sys.exit(main())
