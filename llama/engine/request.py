"""The vocabulary between the engine and everything above it, defined once: what is asked, what comes back.

Free of torch, so that a server's front can speak it too.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from llama.model.plan import TracePlan

MAX_STOP_STRINGS = 16
MAX_SAMPLES = 16
MAX_LOGPROBS = 20

FinishReason = Literal["stop", "length", "error"]


class RequestError(ValueError):
    """A request that cannot be served as it stands. `field` names what to change."""

    def __init__(self, field: str, message: str):
        super().__init__(message)
        self.field = field


class QueueFullError(RuntimeError):
    """As many requests, or as many of their tokens, wait as are allowed; try again later."""


class StepError(RuntimeError):
    """A step that could not be computed, and of which nothing was kept. `request_ids`: whom it was for."""

    def __init__(self, request_ids: tuple[str, ...]):
        super().__init__(f"a step could not be computed, for the requests {', '.join(request_ids)}")
        self.request_ids = request_ids


@dataclass(frozen=True)
class SamplingParams:
    """How to continue one prompt. None stands for the default of the checkpoint's generation_config.json.

    max_tokens: at most this many new tokens; None for what is left of the context.
    temperature: 0 is greedy. top_p, top_k (-1: off), min_p: which tokens may be drawn, in that sense:
        the k likeliest; the likeliest that together reach top_p (arXiv:1904.09751); those at least min_p times
        as likely as the likeliest (arXiv:2407.01082).
    frequency_penalty, presence_penalty: subtracted from a logit for each time, or once, its token was generated.
    repetition_penalty: divides a positive logit, multiplies a negative one, of every token in prompt or output
        (arXiv:1909.05858).
    logit_bias: token id -> what to add to its logit.
    seed: makes the draws repeatable, alone or in company; None draws anew each time.
    stop: strings that end the text, which is cut before them (after, with include_stop_str_in_output).
    stop_token_ids: ids that end it, besides the model's own (which ignore_eos lets pass); none of them is drawn
        before min_tokens.
    n: how many continuations of the one prompt.
    logprobs, prompt_logprobs: None, or how many alternatives to report beside each token's log probability,
        taken from the raw logits: before penalties and temperature.
    grammar: what the text must be, as one of the functions of `llama.text.grammar` writes it; None for any text.
        It ends where the grammar leaves nothing else, also before min_tokens.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float | None = None
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str | None = None

    def __post_init__(self) -> None:
        for name in ("stop", "stop_token_ids"):
            value = getattr(self, name)
            if not isinstance(value, str | list | tuple):
                raise RequestError(name, f"{name} must be a list, not {value!r}")
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(name, f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError("logit_bias", f"logit_bias must map token ids to numbers, not be {self.logit_bias!r}")
        _check_whole(self, "max_tokens", 1)
        _check_range(self, "temperature", 0, 2)
        _check_range(self, "top_p", 0, 1, above_low=True)
        _check_whole(self, "top_k", -1)
        if self.top_k == 0:
            raise RequestError("top_k", "top_k must be -1 (off) or at least 1, not 0")
        _check_range(self, "min_p", 0, 1)
        _check_range(self, "frequency_penalty", -2, 2)
        _check_range(self, "presence_penalty", -2, 2)
        _check_range(self, "repetition_penalty", 0, 2, above_low=True)
        _check_whole(self, "seed", -(2**63), 2**64 - 1)
        _check_whole(self, "min_tokens", 0)
        _check_whole(self, "n", 1, MAX_SAMPLES)
        _check_whole(self, "logprobs", 0, MAX_LOGPROBS)
        _check_whole(self, "prompt_logprobs", 0, MAX_LOGPROBS)
        if len(self.stop) > MAX_STOP_STRINGS or not all(isinstance(text, str) and text for text in self.stop):
            raise RequestError("stop", f"stop must be at most {MAX_STOP_STRINGS} strings, none of them empty")
        for token_id in self.stop_token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise RequestError("stop_token_ids", f"stop_token_ids must hold token ids, not {token_id!r}")
        for token_id, bias in self.logit_bias.items():
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise RequestError("logit_bias", f"logit_bias must map token ids, not {token_id!r}")
            if not _is_number(bias) or not -100 <= bias <= 100:
                raise RequestError("logit_bias", f"logit_bias of {token_id} must be from -100 to 100, not {bias!r}")
        if not isinstance(self.grammar, str | None):
            raise RequestError("grammar", f"grammar must be one that llama.text.grammar wrote, not {self.grammar!r}")
        if self.grammar is not None and self.ignore_eos:
            raise RequestError("ignore_eos", "ignore_eos does not go with a grammar, which says where the text ends")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError("min_tokens", f"min_tokens {self.min_tokens} is more than max_tokens {self.max_tokens}")

    def with_defaults(self, defaults: "SamplingParams") -> "SamplingParams":
        """The same with every None that `defaults` can fill, filled."""
        names = ("max_tokens", "temperature", "top_p", "top_k", "repetition_penalty")
        missing = {name: getattr(defaults, name) for name in names if getattr(self, name) is None}
        return replace(self, **missing)


@dataclass(frozen=True)
class Request:
    """One prompt to continue. `salt` separates prefix caches that must not see each other. `trace`: what to capture and
    to change on the way."""

    id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    salt: str = ""
    trace: TracePlan | None = None


@dataclass(frozen=True)
class TokenLogprob:
    """A token's natural-log probability, and the likeliest alternatives as (id, log probability), best first.

    None for the first token of a prompt, which nothing precedes.
    """

    token_id: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """One new token of one of a request's `n` samples; the last one of a sample says why it ended.

    finish_reason "stop" without stop_reason: the model ended its turn; with it: that id of stop_token_ids. The
    token that stops is in token_id, as it was drawn. "error" ends a request that could not go on: token_id is
    None and `error` says why; `field` names what must change in the request, if the fault lies there.
    """

    request_id: str
    index: int
    token_id: int | None
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
    field: str | None = None


@dataclass(frozen=True)
class PromptEvent:
    """Log probabilities of a request's prompt, a piece at a time and in order, before its first token.

    num_cached: how many of the prompt's tokens came from the prefix cache.
    """

    request_id: str
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached: int = 0


@dataclass(frozen=True)
class TraceEvent:
    """What one capture of a request's plan brought in one step, before the tokens that the step brought.

    site: as `llama.model.selectors.Place.label` writes it. values: [positions, ...], a float32 numpy array. A position
    may come again, after a wrong guess or a preemption; what comes last is what counts.
    """

    request_id: str
    site: str
    positions: tuple[int, ...]
    values: Any


Event = TokenEvent | PromptEvent | TraceEvent


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _check_range(params: SamplingParams, name: str, low: float, high: float, above_low: bool = False) -> None:
    value = getattr(params, name)
    if value is None:
        return
    if not _is_number(value) or not low <= value <= high or (above_low and value == low):
        bound = f"above {low} and at most {high}" if above_low else f"from {low} to {high}"
        raise RequestError(name, f"{name} must be a number {bound}, not {value!r}")


def _check_whole(params: SamplingParams, name: str, low: int, high: int | None = None) -> None:
    value = getattr(params, name)
    if value is None and name not in ("min_tokens", "n"):
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"from {low} to {high}"
        raise RequestError(name, f"{name} must be an integer {bound}, not {value!r}")
