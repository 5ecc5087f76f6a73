"""From flags to a loaded model and to sampling parameters."""

import argparse
from typing import TYPE_CHECKING

from llama.checkpoint.ahead import read_ahead
from llama.checkpoint.pull import resolve
from llama.commands import CommandError, UsageError
from llama.config import LlamaConfig
from llama.engine.request import RequestError, SamplingParams

if TYPE_CHECKING:
    from llama.runtime import Llama


def prepare_torch(args: argparse.Namespace) -> None:
    """Set --threads, and see that --device is there."""
    import torch

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    try:
        device = torch.device(args.device)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device {args.device!r} is no device that this code runs on; give cpu, cuda or "
                         "cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise CommandError(f"--device {args.device}: torch {torch.__version__} finds "
                           f"{torch.cuda.device_count()} CUDA devices here; leave --device out for the CPU")


def load(args: argparse.Namespace) -> "Llama":
    """The model that the flags describe."""
    directory = resolve(args.model)
    context = LlamaConfig.from_directory(directory).context_length(args.context)  # before torch takes its time
    read_ahead(directory)
    prepare_torch(args)
    from llama.runtime import Llama

    return Llama.load(directory, dtype=args.dtype, device=args.device, quantize=args.quantize, max_context=context,
                      kv_cache_bytes=args.kv_cache, kv_cache_dtype=args.kv_cache_dtype,
                      prompt_lookup=args.prompt_lookup, draft=args.draft, deterministic=args.deterministic)


def sampling_params(args: argparse.Namespace, **more: object) -> SamplingParams:
    """What the sampling flags ask for. Raises UsageError."""
    names = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "frequency_penalty",
             "presence_penalty", "repetition_penalty")
    given = {name: getattr(args, name, None) for name in names} | more
    try:
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})
    except RequestError as error:
        raise UsageError(f"--{error.field.replace('_', '-')}: {error}") from None
