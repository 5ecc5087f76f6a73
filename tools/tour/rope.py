"""Positions are rotations: python -m tools.tour.rope

One token many times over: in the first layer its query is the same everywhere, until it is rotated. Then pair i of its
dimensions stands at position * frequency_i, and the product of a query and a key depends on their distance alone.
"""

import torch
from torch import Tensor

from llama.model.rope import inverse_frequencies
from llama.runtime import Llama
from tools.tour.shared import asked, table

LAYER = "layers.0.attn"


def turned(before: Tensor, after: Tensor) -> Tensor:
    """By which angle each pair (i, i + half) was turned: [..., head_dim] twice -> [..., head_dim / 2], -π to π. NaN
    for a pair that the model does not use, which is zero before and after."""
    pairs = [torch.complex(*value.double().chunk(2, dim=-1)) for value in (before, after)]
    return (pairs[1] / pairs[0]).angle()


def experiment(llm: Llama, word: str = " the", count: int = 24) -> dict[str, Tensor]:
    """angles, expected: [positions, pairs], measured and by formula. scores: [positions, context], those of head 0."""
    ids = llm.tokenizer.encode(word)[:1] * count
    trace = llm.trace(ids, [f"{LAYER}.q", f"{LAYER}.q_rot", f"{LAYER}.scores"])
    angles = turned(trace[f"{LAYER}.q"][:, 0], trace[f"{LAYER}.q_rot"][:, 0])
    expected = torch.arange(count)[:, None] * inverse_frequencies(llm.config).double()
    return {"angles": angles, "expected": torch.polar(torch.ones_like(expected), expected).angle(),
            "scores": trace[f"{LAYER}.scores"][:, 0]}


def main() -> None:
    """Print a few pairs, and the scores along two diagonals."""
    found = experiment(asked(__doc__))
    pairs = found["angles"].isfinite().all(dim=0).nonzero()[:, 0][::2].tolist()[:5]
    table("Turned by, in radians (and by position * frequency)", ["position", *(f"pair {pair}" for pair in pairs)],
          [[position, *(f"{found['angles'][position, pair]:+.3f} ({found['expected'][position, pair]:+.3f})"
                        for pair in pairs)] for position in (0, 1, 2, 3, 8, 16)])
    table("Score of a query for the key so many tokens before it", ["query at", "0 before", "1 before", "4 before"],
          [[row, *(f"{found['scores'][row, row - back]:.4f}" for back in (0, 1, 4))] for row in (4, 9, 16, 23)])


if __name__ == "__main__":
    main()
