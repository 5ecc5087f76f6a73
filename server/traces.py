"""`x_trace`: a plan in a request, what it caught in the reply; large catches wait to be fetched. Data, never code."""

import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from safetensors.numpy import save

from llama.engine.request import TraceEvent
from llama.internals.assemble import assembled
from llama.model.plan import TracePlan
from llama.model.positions import PlanError
from server.call import Call
from server.errors import ApiError
from server.logprobs import token_text
from server.served import Served

# Quotas: of one request; of what waits to be fetched, all together and in number; of numbers that stand in a reply.
MAX_BYTES = 16 << 20
KEPT_BYTES = 256 << 20
MAX_KEPT = 64
INLINE_NUMBERS = 4096


class TraceStore:
    """Captures too large for a reply, by ids that cannot be guessed. The oldest leave when there is no room."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, body: bytes) -> str:
        """Keep a file; the id to fetch it by."""
        name = f"trace-{secrets.token_hex(16)}"
        with self._lock:
            self._kept[name] = body
            while len(self._kept) > MAX_KEPT or sum(map(len, self._kept.values())) > KEPT_BYTES:
                self._kept.popitem(last=False)
        return name

    def fetch(self, name: str) -> bytes:
        """The file. Raises ApiError(404)."""
        with self._lock:
            body = self._kept.get(name)
        if body is None:
            raise ApiError(404, f"there is no trace {name[:64]!r} here, or not any more", code="not_found")
        return body


def with_plan(call: Call, raw: Mapping[str, Any] | None, served: Served) -> Call:
    """The call with the plan that came with it, if one did. Raises ApiError."""
    if raw is None:
        return call
    for name, is_wrong, what in (("stream", call.stream, "with stream"), ("n", call.params.n > 1, "of one sample"),
                                 ("prompt", len(call.prompts) > 1, "of one prompt")):
        if is_wrong:
            only = "a trace does not come" if name == "stream" else "a trace is"
            raise ApiError(400, f"{only} {what}; leave out x_trace, or change {name}", param=name, code="invalid_value")
    try:
        plan = TracePlan.from_json({"max_bytes": MAX_BYTES, **raw})
        if plan.max_bytes > MAX_BYTES:
            raise PlanError("max_bytes", f"at most {MAX_BYTES:,} bytes may be captured here")
        call = replace(call, trace=plan)
        plan.bind(served.config, *_sizes(call, served))
    except PlanError as error:
        raise ApiError(400, f"x_trace: {error}", param=f"x_trace.{error.field}", code="invalid_value") from None
    return call


def reply(call: Call, served: Served, events: Iterable[TraceEvent], num_generated: int, store: TraceStore
          ) -> dict[str, Any]:
    """What stands under `x_trace` in the answer: values if they are few, else the id of a safetensors file.

    Beside values with [top=N], which are pairs of id and number, stand their tokens' texts; null for an id without.
    Raises TraceError where the run did not bring what the plan asks for.
    """
    num_prompt, most = _sizes(call, served)
    bound = call.trace.bind(served.config, num_prompt, most)
    arrays, positions = assembled(events, bound, num_prompt + num_generated - 1)
    sites = {name: {"shape": list(array.shape), "positions": list(positions[name])} for name, array in arrays.items()}
    if sum(array.size for array in arrays.values()) > INLINE_NUMBERS:
        body = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        return {"id": store.keep(body), "bytes": len(body), "sites": sites}
    for name, array in arrays.items():
        sites[name]["values"] = np.where(np.isfinite(array), array, None).tolist()  # JSON has no infinity: null
    for name in {capture.place.label for capture in bound.captures if capture.place.top is not None}:
        sites[name]["tokens"] = [[_token(served, int(token_id)) for token_id in row] for row in arrays[name][..., 0]]
    return {"sites": sites}


def _token(served: Served, token_id: int) -> str | None:
    return token_text(served.tokenizer, token_id) if token_id < served.vocab_size else None


def _sizes(call: Call, served: Served) -> tuple[int, int]:
    """Tokens of the prompt, and positions that are computed at most."""
    num_prompt, new = len(call.prompts[0]), call.params.max_tokens
    most = served.max_context if new is None else min(num_prompt + new, served.max_context)
    return num_prompt, max(most - 1, num_prompt)
