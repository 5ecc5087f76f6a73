"""What the five experiments share: the model that is asked for, and a table on the terminal."""

import argparse
from collections.abc import Sequence
from typing import Any

from llama.runtime import Llama


def asked(about: str) -> Llama:
    """The checkpoint that --model names, by default the demo, in float32."""
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    parser.add_argument("--model", metavar="M", help="a checkpoint's directory or hub id; by default the demo")
    return Llama.load(parser.parse_args().model, dtype="float32")


def user(llm: Llama, text: str) -> list[int]:
    """The ids of a conversation that begins so."""
    return llm.encode_chat([{"role": "user", "content": text}])


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows below each other."""
    cells = [list(map(str, columns)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[place]) for row in cells) for place in range(len(columns))]
    print(f"\n{title}\n")
    for row in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
