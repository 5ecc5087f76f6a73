"""What is served: the facts about the loaded checkpoint by which requests are read and replies written."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from llama.config import LlamaConfig
from llama.engine.request import SamplingParams
from llama.text.chat import ChatTemplate
from llama.text.tokenizer import Tokenizer
from server.errors import ApiError
from server.objects import Object
from server.tables import chat_request, completion_request, detokenize_request, tokenize_request


@dataclass(frozen=True)
class Served:
    """names: what clients may call the model; the first is meant where they give none. root: what is really
    loaded. defaults: the checkpoint's, without a None but for max_tokens. max_context: positions of prompt
    and reply together. created: when serving began, in seconds of the epoch. has_traces: whether x_trace is
    taken."""

    names: tuple[str, ...]
    root: str
    tokenizer: Tokenizer
    template: ChatTemplate | None
    config: LlamaConfig
    defaults: SamplingParams
    eos_token_ids: tuple[int, ...]
    max_context: int
    created: int
    has_traces: bool = False

    @property
    def vocab_size(self) -> int:
        """Ids that have both a text and a row in the model."""
        return min(self.tokenizer.vocab_size, self.config.vocab_size)

    @cached_property
    def chat_request(self) -> Object:
        """The fields of /v1/chat/completions."""
        return chat_request(self.names[0], self.defaults, self.vocab_size, self.has_traces)

    @cached_property
    def completion_request(self) -> Object:
        """The fields of /v1/completions."""
        return completion_request(self.names[0], self.defaults, self.vocab_size, self.max_context, self.has_traces)

    @cached_property
    def tokenize_request(self) -> Object:
        """The fields of /tokenize."""
        return tokenize_request(self.names[0])

    @cached_property
    def detokenize_request(self) -> Object:
        """The fields of /detokenize."""
        return detokenize_request(self.names[0], self.vocab_size)

    def refuse_unknown(self, name: str) -> None:
        """Raises ApiError(404) unless the model is served under this name."""
        if name not in self.names:
            raise ApiError(404, f"the model {name[:256]!r} is not served here; use {' or '.join(self.names)}",
                           param="model", code="model_not_found")

    def model(self, name: str) -> dict[str, Any]:
        """The answer of /v1/models/{name}. Raises ApiError(404)."""
        self.refuse_unknown(name)
        return {"id": name, "object": "model", "created": self.created, "owned_by": "llama",
                "root": self.root, "parent": None, "max_model_len": self.max_context}

    def models(self) -> dict[str, Any]:
        """The answer of /v1/models."""
        return {"object": "list", "data": [self.model(name) for name in self.names]}
