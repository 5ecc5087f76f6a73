"""Find the induction heads, and prove it: python -m tools.tour.induction

An induction head looks for the last time that the current token occurred, and attends to what came after it
(arXiv:2209.11895). On random text said twice such heads stand out. That they are the cause is shown by taking them
away: the second half becomes as hard as the first; without as many other heads of the same layer, hardly anything
changes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from llama.internals.lens import induction_scores
from llama.internals.trace import Zero
from llama.runtime import Llama
from tools.tour.shared import asked, table

Head = tuple[int, int]


@dataclass(frozen=True)
class Found:
    """scores: [layers, heads]. heads: those above the threshold. Losses are nats a token of the second half: as it is,
    without these heads, without others of their layers; first_half: of text that nothing announces."""

    scores: Tensor
    heads: list[Head]
    loss: float
    without: float
    without_others: float
    first_half: float


def losses(llm: Llama, ids: list[int], without: list[Head]) -> Tensor:
    """Nats that each id after the first cost, with some heads silent: [len(ids) - 1]."""
    edits = [Zero(f"layers.{layer}.attn.heads[head={head}]") for layer, head in without]
    logits = llm.trace(ids, "logits", edits=edits)["logits"][:-1]
    return -logits.log_softmax(dim=-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def experiment(llm: Llama, length: int = 32, threshold: float = 0.3) -> Found:
    """Score all heads, and ablate the best against others."""
    plain = min(llm.config.vocab_size, llm.tokenizer.bos_token_id)  # ids of text, not of control tokens
    scores = induction_scores(llm.model, length, vocabulary=plain)
    heads = [tuple(place) for place in (scores > threshold).nonzero().tolist()]
    layers = {layer for layer, _ in heads}
    rest = [(layer, head) for layer in layers for head in scores[layer].argsort().tolist()
            if (layer, head) not in heads]
    half = torch.randint(plain, (length,), generator=torch.Generator().manual_seed(1)).tolist()
    second = slice(length, None)  # of the losses, which begin with the second token
    plain_losses = losses(llm, half * 2, [])
    ablated, others = (losses(llm, half * 2, silent)[second].mean().item() for silent in (heads, rest[:len(heads)]))
    return Found(scores, heads, plain_losses[second].mean().item(), ablated, others,
                 plain_losses[:length - 1].mean().item())


def main() -> None:
    """Print the scores, and what is lost without."""
    found = experiment(asked(__doc__))
    table("Attention to what followed the last time", ["layer", *(f"head {n}" for n in range(found.scores.shape[1]))],
          [[layer, *(f"{score:.2f}" for score in row)] for layer, row in enumerate(found.scores)])
    table(f"Nats a token when text is said again; induction heads: {found.heads}", ["what runs", "nats"],
          [["everything", f"{found.loss:.2f}"], ["without the induction heads", f"{found.without:.2f}"],
           ["without as many others there", f"{found.without_others:.2f}"],
           ["(text said for the first time)", f"{found.first_half:.2f}"]])


if __name__ == "__main__":
    main()
