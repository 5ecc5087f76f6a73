"""Token events to what a person asked for: deltas of text as they come, and the completion that they add up to.

The completion is the fold of the deltas; there is no second way to it. Free of torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from llama.engine.request import (Event, FinishReason, PromptEvent, SamplingParams, TokenEvent, TokenLogprob,
                                  TraceEvent)
from llama.text.certain import CertainCallStream, MoreArguments
from llama.text.stream import TextStream
from llama.text.tokenizer import Tokenizer
from llama.text.tools import ToolCall, ToolCallStream


class GenerationError(RuntimeError):
    """The engine could not go on with a request; the message says why. `field` names what must change in the
    request, if the fault lies there."""

    def __init__(self, message: str | None, field: str | None = None):
        super().__init__(message)
        self.field = field


@dataclass(frozen=True)
class Delta:
    """What became certain of one sample: text, and the tokens drawn since the delta before.

    The last delta of a sample has a finish_reason: "stop" (stop_reason None: the model ended its turn; a string or
    an id: that stop was met) or "length".
    """

    index: int
    text: str
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


@dataclass(frozen=True)
class Usage:
    """Tokens of a request: in its prompt (of these, found in the prefix cache) and generated."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and completion together."""
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True)
class Completion:
    """One sample of a finished request. logprobs and prompt_logprobs are None where they were not asked for; captured
    is what the request's trace plan caught, as it came. tool_calls: the calls in the reply, where there were tools;
    `text` is then without them."""

    text: str
    ids: tuple[int, ...]
    finish_reason: FinishReason
    stop_reason: int | str | None
    logprobs: tuple[TokenLogprob, ...] | None
    prompt_logprobs: tuple[TokenLogprob, ...] | None
    usage: Usage
    captured: tuple[TraceEvent, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()

    def with_calls(self, stream: ToolCallStream | CertainCallStream) -> "Completion":
        """The same, its text read by a new stream: what is a call becomes one."""
        is_cut = self.finish_reason != "stop" or isinstance(self.stop_reason, str)
        text, calls = "", []
        for found in [*stream.push(self.text, self.ids), *stream.finish(is_cut=is_cut)]:
            if isinstance(found, str):
                text += found
            elif isinstance(found, MoreArguments):
                calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + found.text)
            else:
                calls.append(found)
        return replace(self, text=text, tool_calls=tuple(calls))

    @classmethod
    def fold(cls, deltas: Sequence[Delta], params: SamplingParams, num_prompt_tokens: int, num_cached_tokens: int = 0,
             prompt_logprobs: tuple[TokenLogprob, ...] = (), captured: tuple[TraceEvent, ...] = ()) -> "Completion":
        """What all deltas of one sample add up to."""
        ids = tuple(token_id for delta in deltas for token_id in delta.ids)
        logprobs = tuple(logprob for delta in deltas for logprob in delta.logprobs)
        return cls("".join(delta.text for delta in deltas), ids, deltas[-1].finish_reason, deltas[-1].stop_reason,
                   None if params.logprobs is None else logprobs,
                   None if params.prompt_logprobs is None else prompt_logprobs,
                   Usage(num_prompt_tokens, len(ids), num_cached_tokens), captured)


class SampleReader:
    """Reads the token events of one sample as text, to the end that the model, a stop string or a limit sets."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, index: int):
        self._params = params
        self._index = index
        self._stream = TextStream(tokenizer, stop=params.stop, include_stop=params.include_stop_str_in_output,
                                  skip_special_tokens=params.skip_special_tokens)
        self._num_tokens = 0
        self.is_done = False

    def read(self, event: TokenEvent) -> Delta:
        """The delta of one event. Raises GenerationError if the event is one. After the end there is none to read."""
        assert not self.is_done, "the sample has ended"
        if event.finish_reason == "error":
            raise GenerationError(event.error, event.field)
        reason, stop_reason = event.finish_reason, event.stop_reason
        text = ""
        self._num_tokens += 1
        if reason != "stop" or (stop_reason is not None and self._params.include_stop_str_in_output):
            may_stop = self._num_tokens > self._params.min_tokens or self._params.min_tokens == 0
            text = self._stream.push(event.token_id, may_stop=may_stop)
        if reason is not None:
            text += self._stream.finish()
        if self._stream.stop_match is not None:
            reason, stop_reason = "stop", self._stream.stop_match
        self.is_done = reason is not None
        logprobs = () if event.logprob is None else (event.logprob,)
        return Delta(self._index, text, (event.token_id,), logprobs, reason, stop_reason)


@dataclass
class RequestReader:
    """Reads all events of one request. A sample whose delta names a stop string has ended here, not in the engine:
    whoever drives the engine cancels it there."""

    tokenizer: Tokenizer
    params: SamplingParams
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    captured: list[TraceEvent] = field(default_factory=list)
    _samples: dict[int, SampleReader] = field(default_factory=dict)
    _deltas: dict[int, list[Delta]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for index in range(self.params.n):
            self._samples[index] = SampleReader(self.tokenizer, self.params, index)
            self._deltas[index] = []

    @property
    def is_done(self) -> bool:
        """Whether every sample has ended."""
        return all(sample.is_done for sample in self._samples.values())

    def read(self, event: Event) -> Delta | None:
        """The delta that an event brings, if it brings one. Events of samples that have ended bring none."""
        if isinstance(event, PromptEvent):
            self.num_cached_tokens = max(self.num_cached_tokens, event.num_cached)
            self.prompt_logprobs += event.logprobs
            return None
        if isinstance(event, TraceEvent):
            self.captured.append(event)
            return None
        sample = self._samples[event.index]
        if sample.is_done:
            return None
        delta = sample.read(event)
        self._deltas[event.index].append(delta)
        return delta

    def completions(self) -> list[Completion]:
        """The samples, folded; to be asked when all are done."""
        return [Completion.fold(deltas, self.params, self.num_prompt_tokens, self.num_cached_tokens,
                                tuple(self.prompt_logprobs), tuple(self.captured))
                for deltas in self._deltas.values()]
