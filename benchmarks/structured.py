"""What constrained output costs a step, and what it costs to look for calls in a reply.

    python -m benchmarks.structured --tokenizer tokenizer.model

masks: computed by llguidance for each row, and applied in the sampler to all rows, over 128,256 ids, along a text. Their
share is of the shortest step that the memory allows a model of the 3.2 1B and of the 3.1 8B shape in bf16. calls: a
megabyte of awkward text, given at once and 64 characters at a time.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import begin, finish, seconds, show, summary
from benchmarks.roofline import read_bandwidth
from llama.engine.request import SamplingParams
from llama.engine.sampler import SampleRow, adjust
from llama.text import grammar
from llama.text.matcher import GrammarCompiler
from llama.text.tokenizer import Tokenizer
from llama.text.tools import ToolCallStream

STEP_BYTES = {"1B": 2.47e9, "8B": 15.0e9}  # of weights that a step reads

_TEXT = {"type": "string"}
_PERSON = {"type": "object", "required": ["name", "age"], "properties": {
    "name": _TEXT, "age": {"type": "integer", "minimum": 0}, "tags": {"type": "array", "items": _TEXT},
    "address": {"type": "object", "properties": {"street": _TEXT}}}}
_VALUE = {"name": "Ada, Countess of Lovelace", "age": 36, "tags": ["mathematics", "poetry", "Zürich 🦙"],
          "address": {"street": "12 St James's Square"}}
LANGUAGES = {
    "schema": (lambda: grammar.json_schema(_PERSON), json.dumps(_VALUE, ensure_ascii=False)),
    "any object": (grammar.json_object, json.dumps(_VALUE, indent=2, ensure_ascii=False)),
    "regex": (lambda: grammar.regex(r"([A-Za-z ]+, )*[a-z ]+\."), "Some words, and others, and then an end."),
    "choice": (lambda: grammar.choice(["positive", "negative", "neither of the two"]), "neither of the two"),
}
AWKWARD = {"braces": "\n{", "calls begun": '\n{"name":"f","parameters":{"a":',
           "brackets": '{"name":"f","parameters":{"a":[[],', "calls": '{"name":"f","parameters":{"a":1}};',
           "lists": "\n[f(a=1, ", "text": "Hello, world. "}


def measure_masks(tokenizer: Tokenizer, num_rows: int, repeats: int) -> dict[str, Any]:
    """Seconds a step, by language: to compute the masks of so many rows, and to apply them to the logits."""
    compiler = GrammarCompiler(tokenizer, [tokenizer.token_id("<|eot_id|>")])
    compiler.prepare()
    logits, params = torch.randn(num_rows, tokenizer.vocab_size), SamplingParams()
    results = {}
    for name, (write, text) in LANGUAGES.items():
        written, computing, applying = write(), [], []
        compiling = seconds(lambda: compiler(written))
        for _ in range(repeats):
            matchers = [compiler(written) for _ in range(num_rows)]
            for position, token_id in enumerate(tokenizer.encode(text)):
                began = time.perf_counter()
                masks = [matcher.masks()[0] for matcher in matchers]
                computing.append(time.perf_counter() - began)
                rows = [SampleRow(params, 0, row, position, mask=mask) for row, mask in enumerate(masks)]
                applying.append(seconds(lambda: adjust(logits, rows)))
                for matcher in matchers:
                    matcher.accept(token_id)
        results[name] = {"compile": compiling, "masks": summary(computing), "applying": summary(applying),
                         "mean": (sum(computing) + sum(applying)) / len(computing)}
    return results


class _Letters:
    """Tokens are characters, so that any text can be pushed."""

    special_tokens: dict[str, int] = {}

    def is_special(self, token_id: int) -> bool:
        return False

    def token_bytes(self, token_id: int) -> bytes:
        return chr(token_id).encode()


def measure_calls() -> dict[str, tuple[float, float]]:
    """Seconds that a megabyte takes, at once and in pieces."""
    results = {}
    for name, unit in AWKWARD.items():
        text = (unit * (2**20 // len(unit) + 1))[:2**20]

        def read(size: int, text: str = text) -> None:
            stream = ToolCallStream(_Letters(), ["f"])
            for start in range(0, len(text), size):
                stream.push(text[start:start + size])
            stream.finish(is_cut=False)

        results[name] = tuple(min(seconds(lambda: read(size)) for _ in range(3)) for size in (2**20, 64))
    return results


def show_masks(results: dict[int, dict[str, Any]], bandwidth: float) -> None:
    """A table: microseconds, and the share of the shortest step."""
    shortest = {name: num_bytes / bandwidth for name, num_bytes in STEP_BYTES.items()}
    rows: list[Sequence[Any]] = []
    for num_rows, by_language in results.items():
        for name, found in by_language.items():
            parts = [f"{found[part]['median'] * 1e6:.0f} ({found[part]['max'] * 1e6:.0f})"
                     for part in ("masks", "applying")]
            shares = [f"{found['mean'] / step:.2%}" for step in shortest.values()]
            mean = f"{found['mean'] * 1e6:.0f}"
            rows.append([num_rows, name, f"{found['compile'] * 1e3:.1f} ms", *parts, mean, *shares])
    bounds = ", ".join(f"{name} {step * 1e3:.0f} ms" for name, step in shortest.items())
    show("Microseconds a step, median (largest), at 128,256 ids; the shortest steps that "
         f"{bandwidth / 1e9:.1f} GB/s allow are {bounds}",
         ["rows", "language", "compiled in", "masks", "applied", "both, mean",
          *(f"of {name}" for name in shortest)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True, metavar="FILE", help="Meta's tokenizer.model")
    parser.add_argument("--repeats", type=int, default=5)
    args, machine = begin(parser)
    tokenizer, bandwidth = Tokenizer.from_tiktoken_file(Path(args.tokenizer)), read_bandwidth()
    masks = {num_rows: measure_masks(tokenizer, num_rows, args.repeats) for num_rows in (1, 8)}
    show_masks(masks, bandwidth)
    calls = measure_calls()
    show("Milliseconds to look for calls in a megabyte; to be under 50", ["of", "at once", "64 characters at a time"],
         [[name, *(f"{value * 1e3:.1f}" for value in values)] for name, values in calls.items()])
    finish({"machine": machine, "bandwidth": bandwidth, "masks": masks, "calls": calls}, args.json)


if __name__ == "__main__":
    main()
