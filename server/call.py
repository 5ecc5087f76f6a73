"""A request for text, read and found good: what the engine is to do, and how the answer is to be written."""

from dataclasses import dataclass
from typing import Literal

from llama.engine.request import SamplingParams
from llama.model.plan import TracePlan
from server.constraints import Constraint


@dataclass(frozen=True)
class Call:
    """prompts: token ids of each, all to be continued by the same `params`, in which no default is left open
    but that of max_tokens: None is what the context has left.

    model: the name to answer by. echo_texts: for each prompt what its choices begin with; () if with nothing.
    prompt_logprobs: alternatives to report beside each token of the prompts, None for no report; `params` may
    ask the engine for more of them. is_scoring: nothing is wanted but the prompt (max_tokens 0); as an engine
    generates at least one token, params has max_tokens 1, and the token is dropped. tool_names: what a reply
    may call; () if replies are text. constraint: what the reply must be; `params` has its grammar. trace: what to
    capture and to change on the way.
    """

    kind: Literal["chat", "completion"]
    model: str
    prompts: tuple[tuple[int, ...], ...]
    params: SamplingParams
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    echo_texts: tuple[str, ...] = ()
    prompt_logprobs: int | None = None
    is_scoring: bool = False
    tool_names: tuple[str, ...] = ()
    constraint: Constraint = Constraint()
    trace: TracePlan | None = None

    @property
    def num_choices(self) -> int:
        """Replies in the answer, of all prompts together."""
        return len(self.prompts) * self.params.n

    @property
    def echoes_logprobs(self) -> bool:
        """Whether the prompt stands in the log probabilities too, as it does in the text."""
        return self.kind == "completion" and bool(self.echo_texts) and self.params.logprobs is not None
