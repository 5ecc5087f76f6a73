"""The demo model, once for each way in which it is loaded."""

import functools

import torch
from torch import Tensor

from llama.runtime import Llama

QUESTIONS = ("Hello", "What is 17 + 25?", "Repeat: the cat and the dog and the cat and the dog and the cat.",
             "My name is Ada. What is my name?", "Hello there, who are you?", "What is 8 + 9?")


@functools.cache
def demo(device: str, dtype: str = "float32", **options) -> Llama:
    """The embedded checkpoint on a device."""
    with torch.inference_mode(False):  # whoever asks first: all others use it too, and the loader's threads fill it
        return Llama.load(device=device, dtype=dtype, progress=False, kv_cache_bytes=64 << 20, **options)


def conversation(llm: Llama, text: str) -> list[int]:
    """A question as the template writes it."""
    return llm.encode_chat([{"role": "user", "content": text}], date_string="26 Jul 2024")


def distance(found: Tensor, exact: Tensor) -> float:
    """How far logits are from others, against how far those reach: without what all in a row have in common."""
    off, exact = (x.double().cpu() - x.double().cpu().mean(dim=-1, keepdim=True) for x in (found - exact.to(found.device), exact))
    return (off.norm() / exact.norm()).item()
