"""Contestants in turns: the same prompt for all in one turn, another in the next."""

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from benchmarks.contestants import Distant, Turn
from llama.machine import available_memory


@dataclass(frozen=True)
class Entry:
    """Who takes part: what makes it, of what, and the bytes that it will hold."""

    make: type
    arguments: tuple[Any, ...]
    num_bytes: int


@dataclass
class Outcome:
    """Of one contestant: its turns, its facts, and its logits [vocab] after a prompt that is the same for all."""

    turns: list[Turn] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    logits: np.ndarray | None = None

    def rates(self, prompt_len: int, num_new: int) -> dict[str, list[float]]:
        """Tokens per second of each turn."""
        return {"prefill": [prompt_len / turn.prefill for turn in self.turns],
                "decode": [num_new / turn.decode for turn in self.turns]}


def contest(entries: Mapping[str, Entry], prompt_len: int, num_new: int, turns: int, vocab_size: int,
            num_threads: int, device: str = "cpu") -> dict[str, Outcome]:
    """What became of every contestant, each turn after some practice.

    All stay in memory where they fit; otherwise each is started for each of its turns anew, practises, and ends. On a
    GPU practice is a whole prompt: the first of a length is when kernels are compiled and libraries choose theirs.
    """
    free = available_memory() if device == "cpu" else torch.cuda.mem_get_info()[0]
    resident = sum(entry.num_bytes for entry in entries.values()) * 1.2 < free
    running: dict[str, Distant] = {}
    outcomes = {name: Outcome() for name in entries}
    practice = random_prompt(min(prompt_len, 64), vocab_size, -1)
    rehearsal = practice if device == "cpu" else random_prompt(prompt_len, vocab_size, -1)
    try:
        for number in range(turns):
            prompt = random_prompt(prompt_len, vocab_size, number)
            for name, entry in entries.items():
                if name not in running:
                    running[name] = Distant(entry.make, entry.arguments, num_threads)
                    running[name].ask("turn", rehearsal, min(num_new, 4))
                    outcomes[name].facts = running[name].ask("facts")
                    outcomes[name].logits = running[name].ask("logits", practice)
                outcomes[name].turns.append(running[name].ask("turn", prompt, num_new))
                if not resident:
                    running.pop(name).close()
    finally:
        for contestant in running.values():
            contestant.close()
    return outcomes


def random_prompt(length: int, vocab_size: int, seed: int) -> list[int]:
    """Ids without special ones, which repeat nothing."""
    rng = random.Random(seed)
    return [rng.randrange(max(vocab_size - 256, 1)) for _ in range(length)]
