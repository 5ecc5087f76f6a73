"""What an engine takes on, and what it refuses because it never could. No torch: numbers only."""

from dataclasses import dataclass

from llama.config import ConfigError
from llama.engine.request import Request, RequestError


@dataclass(frozen=True)
class Limits:
    """What an engine takes on.

    max_context: positions of one sequence. max_running: sequences in one step. step_tokens: tokens of one step
    while nobody decodes; mixed_step_tokens: while somebody does, and would wait for a long chunk to end. However
    many decode, prompts have a quarter of these beside them. max_queued_requests, max_queued_tokens: what may wait
    to be started. All are at least 1.

    Raises ConfigError, which names the field.
    """

    max_context: int
    max_running: int = 64
    step_tokens: int = 512
    mixed_step_tokens: int = 64
    max_queued_requests: int = 1024
    max_queued_tokens: int = 4_000_000

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"the limit {name} must be an integer of at least 1, not {value!r}")

    def refuse_impossible(self, request: Request, room: int) -> None:
        """Raise RequestError, with the numbers, if a request can never run where the KV cache holds `room` tokens."""
        num_prompt, params = len(request.prompt_ids), request.params
        if num_prompt == 0:
            raise RequestError("prompt", "the prompt is empty; give at least one token")
        most = self.max_context - num_prompt
        if most < 1:
            raise RequestError("prompt", f"the prompt has {num_prompt} tokens, and the context is {self.max_context} "
                               "tokens; shorten the prompt")
        if params.max_tokens is not None and params.max_tokens > most:
            raise RequestError("max_tokens", f"the prompt's {num_prompt} tokens and max_tokens {params.max_tokens} "
                               f"together exceed the context of {self.max_context} tokens; lower max_tokens to "
                               f"at most {most}")
        if params.n > self.max_running:
            raise RequestError("n", f"n is {params.n}, but at most {self.max_running} sequences run at once")
        if params.max_tokens is None and num_prompt < room:
            return  # the answer ends where the room does
        needed = num_prompt + (most if params.max_tokens is None else params.max_tokens)
        if needed > room:
            raise RequestError("max_tokens", f"the prompt and its answer may take {needed} tokens, but the KV cache "
                               f"holds {room}; lower max_tokens or give the cache more memory")
