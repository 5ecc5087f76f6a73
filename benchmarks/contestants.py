"""Whoever is measured: this runtime and its peers, each in a process of its own, all asked the same way.

A turn is a prompt of ids and a number of new tokens, greedy, whatever they are: the prompt's time ends with the
first new token, and each of the others takes a decode. Idle contestants only hold memory.
"""

import ctypes
import logging
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from benchmarks.weights import Source, draw
from llama.checkpoint.layout import places

# What is read between two tokens to see what the memory gives meanwhile: longer than a step of a small model is too long.
_READ_BYTES = 1 << 28


@dataclass(frozen=True)
class Turn:
    """What a turn took, in seconds, and what was generated. read_rate: bytes per second that were read between tokens."""

    prefill: float
    decode: float
    ids: list[int]
    read_rate: float | None = None


class Contestant(Protocol):
    """A model in memory."""

    def turn(self, prompt: Sequence[int], num_new: int) -> Turn:
        """Read the prompt and generate num_new + 1 tokens."""

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        """Those after the prompt: [vocab], float32."""

    def facts(self) -> dict[str, Any]:
        """What is worth knowing about it."""


class Ours:
    """This runtime's engine, with one sequence at a time. options: of `Source.model`. step_tokens: of a prompt, at most.
    reads: between any two tokens, read other memory too (the CPU's): its rate may be another in the next second."""

    def __init__(self, source: Source, options: dict[str, Any], context: int, device: str = "cpu",
                 step_tokens: int = 512, reads: bool = False):
        from llama.engine.engine import BLOCK_SIZE, Engine
        from llama.engine.limits import Limits
        from llama.model.memory import huge_pages

        self._model = source.model(**options, device=device)
        limits = Limits(max_context=context, max_running=1, step_tokens=step_tokens)
        self._engine = Engine(self._model, limits, context // BLOCK_SIZE + 2)
        self._memory = huge_pages(torch.empty(_READ_BYTES // 4, dtype=torch.int32)).fill_(1) if reads else None

    def turn(self, prompt: Sequence[int], num_new: int) -> Turn:
        from llama.engine.request import Request, SamplingParams, TokenEvent

        greedy = SamplingParams(max_tokens=num_new + 1, temperature=0.0, top_p=1.0, top_k=-1, repetition_penalty=1.0,
                                ignore_eos=True)
        self._engine.submit(Request("turn", tuple(prompt), greedy))
        prefill, decode, reading, ids = 0.0, 0.0, 0.0, []
        while self._engine.has_work:
            began = time.perf_counter()
            events = self._engine.step()
            taken = time.perf_counter() - began
            prefill, decode = (prefill, decode + taken) if ids else (prefill + taken, decode)
            ids += [event.token_id for event in events if isinstance(event, TokenEvent)]
            if self._memory is not None and ids:
                began = time.perf_counter()
                self._memory.max()
                reading += time.perf_counter() - began
        return Turn(prefill, decode, ids, len(ids) * _READ_BYTES / reading if reading else None)

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        from llama.model.ragged import RaggedBatch

        with torch.inference_mode():
            ids = torch.tensor(prompt, device=self._model.device)
            return self._model(RaggedBatch.whole(ids))[-1].cpu().numpy()

    def facts(self) -> dict[str, Any]:
        from benchmarks.common import step_bytes, weight_bytes

        kv_bytes = self._model.config.kv_bytes_per_token(str(self._model.dtype).removeprefix("torch."))
        return {"weight_bytes": weight_bytes(self._model), "step_bytes": step_bytes(self._model),
                "kv_bytes_per_token": kv_bytes}


class Transformers:
    """Hugging Face's model and cache, called directly: its `generate` would add to every token."""

    def __init__(self, source: Source, context: int, device: str = "cpu"):
        self._device = device
        self._context = context
        self._model = peer(source, device)

    @torch.inference_mode()
    def turn(self, prompt: Sequence[int], num_new: int) -> Turn:
        began = time.perf_counter()
        out = self._model(self._row(prompt), use_cache=True, logits_to_keep=1)
        ids = [int(out.logits[0, -1].argmax())]
        first = time.perf_counter()
        for _ in range(num_new):
            out = self._model(self._row(ids[-1:]), use_cache=True, past_key_values=out.past_key_values, logits_to_keep=1)
            ids.append(int(out.logits[0, -1].argmax()))
        return Turn(first - began, time.perf_counter() - first, ids)

    @torch.inference_mode()
    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        return self._model(self._row(prompt), logits_to_keep=1).logits[0, -1].float().cpu().numpy()

    def facts(self) -> dict[str, Any]:
        import transformers

        return {"version": transformers.__version__}

    def _row(self, ids: Sequence[int]) -> torch.Tensor:
        return torch.tensor([ids], device=self._device)


class CompiledTransformers(Transformers):
    """The same model with a static cache and its decode step compiled into a CUDA graph, which is the fastest that its
    own documentation shows; the ids stay on the device until the end of a turn."""

    def __init__(self, source: Source, context: int, device: str = "cpu"):
        from transformers import StaticCache

        super().__init__(source, context, device)
        self._cache = StaticCache(config=self._model.config, max_cache_len=context)
        self._step = torch.compile(self._model, mode="reduce-overhead")

    @torch.inference_mode()
    def turn(self, prompt: Sequence[int], num_new: int) -> Turn:
        self._cache.reset()
        began = time.perf_counter()
        out = self._model(self._row(prompt), use_cache=True, past_key_values=self._cache, logits_to_keep=1)
        last = out.logits[:, -1:].argmax(dim=-1)  # [1, 1]
        ids = [last]
        int(last)
        first = time.perf_counter()
        position = torch.full_like(last, len(prompt))
        for _ in range(num_new):
            torch.compiler.cudagraph_mark_step_begin()
            out = self._step(last, position_ids=position, use_cache=True, past_key_values=self._cache, logits_to_keep=1)
            last = out.logits[:, -1:].argmax(dim=-1)
            position = position + 1
            ids.append(last)
        found = torch.cat(ids, dim=1)[0].tolist()
        return Turn(first - began, time.perf_counter() - first, found)


def peer(source: Source, device: str) -> Any:
    """transformers' model with the same weights, in the dtype that the configuration names."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    if source.directory is not None:
        return AutoModelForCausalLM.from_pretrained(source.directory, dtype="auto").eval().to(device)
    dtype = getattr(torch, source.config.dtype)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**source.raw_config), dtype=dtype).eval()
    for name, place in places(source.config).items():
        weight = model.get_parameter(name).data
        for first, rows in draw(name, place.shape, dtype, device):
            weight[first:first + len(rows)].copy_(rows)
    return model


class LlamaCpp:
    """llama.cpp through llama-cpp-python's bindings of its C functions, with nothing of Python's in between."""

    def __init__(self, path: Path, context: int):
        import llama_cpp

        self._lib = llama_cpp
        logging.getLogger("llama-cpp-python").setLevel(logging.ERROR)
        refuse_amx()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(bytes(path), params)
        if not self._model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch = context, context
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self._context = llama_cpp.llama_init_from_model(self._model, options)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))

    def turn(self, prompt: Sequence[int], num_new: int) -> Turn:
        self._forget()
        began = time.perf_counter()
        ids = [int(self._decode(prompt).argmax())]
        first = time.perf_counter()
        for _ in range(num_new):
            ids.append(int(self._decode(ids[-1:]).argmax()))
        return Turn(first - began, time.perf_counter() - first, ids)

    def logits(self, prompt: Sequence[int]) -> np.ndarray:
        self._forget()
        return self._decode(prompt).copy()

    def _forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)

    def _decode(self, ids: Sequence[int]) -> np.ndarray:
        """The logits after the last of the ids: [vocab], in llama.cpp's own memory until the next call."""
        tokens = (self._lib.llama_token * len(ids))(*ids)
        code = self._lib.llama_decode(self._context, self._lib.llama_batch_get_one(tokens, len(ids)))
        if code:
            raise RuntimeError(f"llama_decode returned {code}")
        pointer = self._lib.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(pointer, (self._vocab_size,))

    def facts(self) -> dict[str, Any]:
        return {"version": self._lib.__version__, "amx": "refused"}


class _SignalStack(ctypes.Structure):
    """stack_t of sigaltstack(2)."""

    _fields_ = [("address", ctypes.c_void_p), ("flags", ctypes.c_int), ("size", ctypes.c_size_t)]


_SMALL_STACK = ctypes.create_string_buffer(8192)


def refuse_amx() -> None:
    """Keep llama.cpp from its AMX kernels, which end the process at the first prompt (ggml-org/llama.cpp, issue
    20824): Linux gives no AMX to a process with a signal stack too small for its registers. What it uses instead are
    those for AVX-512. Without effect where there is no AMX, or where the process has it already."""
    stack = _SignalStack(ctypes.addressof(_SMALL_STACK), 0, len(_SMALL_STACK))
    if ctypes.CDLL(None).sigaltstack(ctypes.byref(stack), None):
        raise RuntimeError("sigaltstack failed")


class Distant:
    """A contestant in a process of its own, which begins when it is made."""

    def __init__(self, make: type, arguments: tuple[Any, ...], num_threads: int):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, make, arguments, num_threads), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()  # once it is loaded

    def ask(self, method: str, *arguments: Any) -> Any:
        """What a method of the contestant's returns. Raises RuntimeError with what went wrong there."""
        self._pipe.send((method, arguments))
        return self._receive()

    def close(self) -> None:
        """End the process; its memory is free afterwards."""
        self._pipe.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(f"a contestant ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer


def _serve(pipe: Connection, make: type, arguments: tuple[Any, ...], num_threads: int) -> None:
    """A contestant's process: an answer to each message, until the other end closes."""
    torch.set_num_threads(num_threads)
    try:
        contestant = make(*arguments)
        pipe.send(None)
        while True:
            method, arguments = pipe.recv()
            pipe.send(getattr(contestant, method)(*arguments))
    except EOFError:
        return
    except Exception as error:
        pipe.send(f"{make.__name__}: {error}")
