"""The Python interface: a checkpoint directory to something that can be asked.

    llm = Llama.load()                                   the embedded demo model
    llm = Llama.load("meta-llama/Llama-3.1-8B-Instruct") a directory, or a hub id
    llm.chat([{"role": "user", "content": "Hello"}]).text
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.checkpoint.load import load_model
from llama.checkpoint.pull import resolve
from llama.completion import Completion, Delta
from llama.config import QUANTISED_KV, ConfigError, LlamaConfig
from llama.driver import Driver
from llama.engine.draft import DraftModel
from llama.engine.engine import BLOCK_SIZE, SCORED_ROWS, Engine
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from llama.engine.request import Request, RequestError, SamplingParams
from llama.generation_config import read_generation_config
from llama.internals.trace import Capture, Edit, Patch, Trace, assemble, expanded
from llama.machine import available_memory
from llama.model.cache import KVCache
from llama.model.plan import MAX_BYTES, TracePlan
from llama.model.positions import Positions
from llama.model.ragged import RaggedBatch, Segment
from llama.model.transformer import Llama as Transformer
from llama.progress import ProgressBar
from llama.text.chat import ChatTemplate
from llama.text.functions import tool_schema
from llama.text.matcher import GrammarCompiler
from llama.text.tokenizer import Tokenizer
from llama.toolbox import Toolbox

# What the KV cache leaves of a GPU's memory, beside a tenth: for the activations of the longest step and captured graphs.
GPU_RESERVE_BYTES = 3 << 30
# A GPU computes thousands of tokens in the time in which a CPU computes a few dozen. Not yet tuned on one.
GPU_LIMITS = {"max_running": 256, "step_tokens": 8192, "mixed_step_tokens": 1024}

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Tool = Callable[..., Any] | Mapping[str, Any]


class Llama:
    """A loaded checkpoint: model, tokenizer, chat template, and the engine that runs requests on them.

    May be used from several threads.
    """

    def __init__(self, model: Transformer, tokenizer: Tokenizer, template: ChatTemplate | None, engine: Engine,
                 defaults: SamplingParams, directory: Path, grammars: GrammarCompiler):
        self.model = model
        self.tokenizer = tokenizer
        self.template = template
        self.engine = engine
        self.defaults = defaults
        self.directory = directory
        self.grammars = grammars
        self._driver = Driver(engine, tokenizer)

    @classmethod
    def load(cls, name: str | Path | None = None, *, dtype: str | None = None, device: str = "cpu",
             quantize: str | None = None, max_context: int | None = None, kv_cache_bytes: int | None = None,
             kv_cache_dtype: str | None = None, prompt_lookup: bool = False, draft: str | Path | None = None,
             deterministic: bool = False, limits: Mapping[str, int] | None = None, progress: bool | None = None
             ) -> "Llama":
        """Load a checkpoint: a directory, or a hub id such as meta-llama/Llama-3.1-8B-Instruct; None: the demo.

        dtype: "float32", "bfloat16" or "float16"; by default the checkpoint's own. quantize: "int8", "int4" or, on a GPU,
        "fp8" rounds the weights while they are read (`llama.model.formats`). max_context: positions at most; by default
        what the model was made for. kv_cache_bytes: memory for keys and values; by default as much as the requests that
        may run together can use, but at most half of what is free (of a GPU, nearly all). kv_cache_dtype: "int8" or "fp8"
        keeps them in half of it. prompt_lookup: guess repeated text ahead (`llama.engine.propose`). draft: a smaller
        checkpoint with the same tokenizer that guesses instead (`llama.engine.draft`). deterministic: the same bits for a
        request whatever it shares the engine with, at some cost in speed. limits: fields of `llama.engine.limits.Limits`
        to set otherwise. progress: whether to show bars; by default on a terminal.

        Raises ConfigError, CheckpointError, TokenizerError, ChatError or PullError, each naming the file.
        """
        directory = resolve(name)
        if torch.device(device).type == "cuda":  # makes CUDA's context while the tokenizer is read; errors come up again
            ThreadPoolExecutor(1).submit(torch.empty, 1, device=device)
        tokenizer = Tokenizer.from_directory(directory)
        template = ChatTemplate.from_directory(directory)
        defaults, eos_token_ids = read_generation_config(directory)
        model = load_model(directory, dtype=dtype, device=device, weights=quantize or "fastest", progress=progress)
        model.set_deterministic(deterministic)
        config = model.config
        if tokenizer.vocab_size > config.vocab_size:
            raise ConfigError(f"{directory}: the tokenizer has {tokenizer.vocab_size} ids, the model "
                              f"{config.vocab_size}; they are not of one checkpoint")
        usual = GPU_LIMITS if model.device.type == "cuda" else {}
        limits = Limits(max_context=config.context_length(max_context), **usual | dict(limits or {}))
        if kv_cache_dtype not in (None, *QUANTISED_KV):
            raise ConfigError(f"kv_cache_dtype {kv_cache_dtype!r} is not supported; give \"int8\" or \"fp8\", or nothing for "
                              "the model's own")
        smaller = None if draft is None else _load_draft(draft, tokenizer, model, progress)
        num_blocks = _num_blocks(model, smaller, limits, kv_cache_bytes, kv_cache_dtype)
        proposer = PromptLookup() if prompt_lookup else None
        if smaller is not None:
            proposer = DraftModel(smaller, num_blocks, BLOCK_SIZE)
        eos_token_ids = eos_token_ids or config.eos_token_ids
        grammars = GrammarCompiler(tokenizer, eos_token_ids)
        engine = Engine(model, limits, num_blocks, eos_token_ids, proposer, compiler=grammars,
                        kv_cache_dtype=kv_cache_dtype)
        return cls(model, tokenizer, template, engine, defaults, directory, grammars)

    @property
    def config(self) -> LlamaConfig:
        """The model's shape."""
        return self.model.config

    # ---- asking ---------------------------------------------------------------------------------------------

    def generate(self, prompt: Prompt | Sequence[Prompt], params: SamplingParams | None = None
                 ) -> Completion | list[Any]:
        """Continue a text or token ids; or a list of those, all at once.

        Text gets the beginning-of-text token before it; ids are taken as they are. Returns a Completion, or with
        params.n > 1 a list of them; for a list of prompts a list of these. Raises RequestError, GenerationError.
        """
        prompts = [prompt] if _is_one_prompt(prompt) else prompt
        results = self._complete([self.encode(one) for one in prompts], params or SamplingParams())
        if prompts is not prompt:
            return results[0]
        return results

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None, *,
             tools: Sequence[Tool] | None = None, tool_choice: str = "auto", **template: Any
             ) -> Completion | list[Completion]:
        """Answer a conversation. `template` takes the options of `ChatTemplate.render`: date_string, ...

        tools: OpenAI's definitions, or functions, of which signature and docstring tell the same; the calls that the
        reply makes are in its tool_calls. tool_choice: "auto", "none", "required" (a call, whose arguments satisfy
        the schema), or the name of the tool that is to be called.
        Raises ChatError where the messages are malformed or the checkpoint has no template; RequestError;
        ToolError for a function that cannot be a tool; GrammarError for a schema that cannot be guaranteed.
        """
        toolbox = Toolbox(tools or (), tool_choice, template.get("builtin_tools") or ())
        ids = self.encode_chat(messages, tools=toolbox.definitions or None, **template)
        params = toolbox.constrain(params or SamplingParams())
        return toolbox.read(self.generate(ids, params), self.tokenizer)

    def stream(self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None, **template: Any
               ) -> Iterator[Delta]:
        """The same as `chat` for messages and `generate` for a prompt, delta by delta.

        There is one for each token; its text is "" while that may still become part of a character or a stop
        string. Before the first, while the prompt is computed, come deltas without ids. Closing the iterator cancels
        what is not yet generated.
        """
        is_chat = bool(prompt) and isinstance(prompt, Sequence) and isinstance(prompt[0], Mapping)
        ids = self.encode_chat(prompt, **template) if is_chat else self.encode(prompt)
        return self._driver.stream(ids, (params or SamplingParams()).with_defaults(self.defaults))

    def complete(self, requests: Iterable[tuple[Sequence[int], SamplingParams]]
                 ) -> Iterator[tuple[int, list[Completion]]]:
        """Many prompts (ids), each by its own parameters: yields (place, samples) of each as it ends.

        As many run together as the engine takes. Closing the iterator cancels the rest. Raises RequestError,
        GenerationError.
        """
        return self._driver.complete((ids, params.with_defaults(self.defaults), None) for ids, params in requests)

    def encode(self, prompt: Prompt) -> list[int]:
        """A prompt's ids: beginning-of-text and the text, or the ids as they are."""
        return self.tokenizer.encode(prompt, bos=True) if isinstance(prompt, str) else list(prompt)

    def token_text(self, token_id: int) -> str:
        """One id as it would be shown, control tokens too; bytes that are no whole character as \ufffd."""
        return self.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def encode_chat(self, messages: Sequence[Message], **template: Any) -> list[int]:
        """The prompt's ids for a conversation, as the checkpoint's template writes it."""
        if self.template is None:
            raise RequestError("messages", f"{self.directory} has no chat template; use generate() with a prompt")
        if template.get("tools"):
            template["tools"] = [tool_schema(tool) for tool in template["tools"]]
        return self.template.encode(self.tokenizer, messages, **template)

    def _complete(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Any]:
        """All prompts to their ends, in their order; with a bar on a terminal if they are many."""
        results: list[Any] = [None] * len(prompts)

        def describe(done: int, total: int, seconds: float) -> str:
            return f"{done}/{total} prompts, {done / max(seconds, 1e-9):.1f}/s"

        with ProgressBar("generating", len(prompts), describe, shown=None if len(prompts) > 1 else False) as bar:
            for place, completions in self.complete((ids, params) for ids in prompts):
                results[place] = completions[0] if params.n == 1 else completions
                bar.add(1)
        return results

    # ---- looking inside -------------------------------------------------------------------------------------

    def trace(self, prompt: Prompt | Sequence[Message] | Sequence[Prompt], capture: Sequence[str | Capture] | str = (),
              positions: Positions = None, edits: Sequence[Edit | Patch] = (), params: SamplingParams | None = None,
              max_bytes: int = MAX_BYTES, **template: Any) -> Trace | list[Trace]:
        """Run a prompt, a conversation, or a list of prompts, and return what passed the sites named in `capture`.

        positions: at which tokens; None for all, those generated too. edits: Add, Replace, Zero, Scale, Patch, in force
        from the first token on. params: how to continue; by default nothing is generated beyond the token that the
        prompt's last logits give. `llama trace --sites` lists what can be named. Raises PlanError for a plan that
        cannot be, RequestError, TraceError for one that did not do what it says.
        """
        is_chat = bool(prompt) and isinstance(prompt, Sequence) and isinstance(prompt[0], Mapping)
        one = is_chat or _is_one_prompt(prompt)
        prompts = [self.encode_chat(prompt, **template)] if is_chat else map(self.encode, [prompt] if one else prompt)
        params = (params or SamplingParams(max_tokens=1, temperature=0.0)).with_defaults(self.defaults)
        requests = [(ids, params, TracePlan(capture, positions, expanded(edits, self.config, len(ids)), max_bytes))
                    for ids in prompts]
        bounds = [self.engine.bound_plan(Request("", tuple(ids), params, trace=plan)) for ids, params, plan in requests]
        results: list[Any] = [None] * len(requests)
        for place, [completion] in self._driver.complete(requests):
            ids, _, plan = requests[place]
            every = (*ids, *completion.ids)
            tokens = tuple(map(self.token_text, every))
            values, found = assemble(completion.captured, bounds[place], len(every) - 1)
            results[place] = Trace(every, tokens, len(ids), values, found, plan, completion.text)
        return results[0] if one else results

    # ---- measuring ------------------------------------------------------------------------------------------

    def logits(self, ids: Sequence[int]) -> Tensor:
        """Next-token logits after each of the ids: [len(ids), vocab], float32. Raises RequestError."""
        return torch.cat([self.model.logits(hidden) for hidden in self.hidden(ids)])

    def score(self, ids: Sequence[int]) -> Tensor:
        """Natural-log probability of each id given those before it: [len(ids) - 1], float32; the first has none.

        Raises RequestError.
        """
        scores, first = [], 1
        targets = torch.tensor(ids, device=self.model.device)
        for chunk in self.hidden(ids):
            for hidden in chunk.split(SCORED_ROWS):
                logprobs = torch.log_softmax(self.model.logits(hidden), dim=-1)
                wanted = targets[first:first + len(hidden)]
                scores.append(logprobs[:len(wanted)].gather(1, wanted[:, None])[:, 0])
                first += len(hidden)
        return torch.cat(scores)

    @torch.inference_mode()
    def hidden(self, ids: Sequence[int]) -> Iterator[Tensor]:
        """The residual stream after the last block, of a whole text, chunk by chunk over a cache of its own: each
        [at most a step's tokens, hidden], in the model's dtype. `model.logits` makes logits of any rows of it."""
        if not 0 < len(ids) <= self.config.max_position_embeddings:
            raise RequestError("prompt", f"{len(ids)} ids; give at least one, and at most "
                               f"{self.config.max_position_embeddings}")
        for token_id in ids:
            if not 0 <= token_id < self.config.vocab_size:
                raise RequestError("prompt", f"the id {token_id} is outside the vocabulary of "
                                   f"{self.config.vocab_size} tokens")
        device, step = self.model.device, self.engine.scheduler.limits.step_tokens
        cache = KVCache(self.config, len(ids), 1, self.model.dtype, device, self.engine.cache.quantised)
        for start in range(0, len(ids), step):
            positions = torch.arange(start, min(start + step, len(ids)), device=device)
            segment = Segment(start, len(positions), ((0, start + len(positions)),))
            batch = RaggedBatch(torch.tensor(ids[start:start + step], device=device), positions, (segment,), positions)
            yield self.model.hidden(batch, cache)


def _num_blocks(model: Transformer, draft: Transformer | None, limits: Limits, kv_cache_bytes: int | None,
                kv_cache_dtype: str | None) -> int:
    """Blocks of the KV cache within its memory, which is not all there is: a draft model has as many of its own.
    Raises ConfigError if that is less than one."""
    dtype = str(model.dtype).removeprefix("torch.")
    block_bytes = BLOCK_SIZE * model.config.kv_bytes_per_token(kv_cache_dtype or dtype)
    useful = limits.max_running * -(-limits.max_context // BLOCK_SIZE)
    budget = kv_cache_bytes
    if budget is None:
        draft_bytes = 0 if draft is None else BLOCK_SIZE * draft.config.kv_bytes_per_token(dtype)
        budget = _cache_budget(model.device) * block_bytes // (block_bytes + draft_bytes)
    if budget < block_bytes:
        raise ConfigError(f"{budget} bytes for the KV cache hold not one block of {BLOCK_SIZE} positions, which "
                          f"takes {block_bytes}; give kv_cache_bytes more")
    return min(useful, budget // block_bytes)


def _cache_budget(device: torch.device) -> int:
    """Bytes for the KV cache where the model lies: half of what is free, for others need memory too; of a GPU, which has
    nobody else, nine tenths, less what activations and captured graphs take."""
    if device.type == "cpu":
        return available_memory() // 2
    return max(torch.cuda.mem_get_info(device)[0] * 9 // 10 - GPU_RESERVE_BYTES, 0)


def _load_draft(name: str | Path, tokenizer: Tokenizer, model: Transformer, progress: bool | None) -> Transformer:
    """The draft checkpoint, in the model's dtype and place. Raises ConfigError if it speaks another vocabulary."""
    directory = resolve(name)
    other = Tokenizer.from_directory(directory)
    if [other.token_bytes(i) for i in range(other.vocab_size)] != \
            [tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)]:
        raise ConfigError(f"{directory}: the draft model's tokenizer is not the model's; give one of the same family")
    dtype = str(model.dtype).removeprefix("torch.")
    draft = load_model(directory, dtype=dtype, device=model.device, weights="fastest", progress=progress)
    if draft.config.vocab_size != model.config.vocab_size:
        raise ConfigError(f"{directory}: the draft model has {draft.config.vocab_size} ids, the model "
                          f"{model.config.vocab_size}; give one of the same family")
    return draft


def _is_one_prompt(prompt: Prompt | Sequence[Prompt]) -> bool:
    return isinstance(prompt, str) or (len(prompt) > 0 and isinstance(prompt[0], int))
