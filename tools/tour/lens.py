"""A sum, layer by layer: python -m tools.tour.lens

The logit lens reads the residual stream after each layer as if it were the last. The model copies the question's
numbers early; the digits of the answer appear in the last layer, and direct attribution says which part of it writes them.
"""

from dataclasses import dataclass

from llama.engine.request import SamplingParams
from llama.internals.lens import ATTRIBUTION_SITES, LENS_SITES, Attribution, attribute, logit_lens
from llama.runtime import Llama
from tools.tour.shared import asked, table, user


@dataclass(frozen=True)
class Reading:
    """reply: what the model said, token by token. said: by layer, what it would have said in each one's place.
    probability: by layer, of what it did say. attribution: of the answer's first digit."""

    reply: list[str]
    names: list[str]
    said: list[list[str]]
    probability: list[list[float]]
    attribution: Attribution


def experiment(llm: Llama, first: int = 17, second: int = 25) -> Reading:
    """Ask for a sum and read every layer at every token of the reply."""
    trace = llm.trace(user(llm, f"What is {first} + {second}?"), (*LENS_SITES, *ATTRIBUTION_SITES), slice(-1, None),
                      params=SamplingParams(temperature=0.0, max_tokens=16))
    lens = logit_lens(llm.model, trace, k=1)
    reply = list(trace.tokens[trace.num_prompt:])
    digit = reply.index(" =") + 2  # after " =" and " "
    position = trace.num_prompt + digit - 1
    said = [[llm.token_text(token) for token in row] for row in lens.ids[..., 0].tolist()]
    return Reading(reply, list(lens.names), said, lens.next_logprobs.exp().tolist(),
                   attribute(llm.model, trace, trace.ids[position + 1], position=position))


def main() -> None:
    """Print what each layer would have said, and who said the digit."""
    found = experiment(asked(__doc__))
    table("What each layer would have said (last line: what was said)", ["", *map(repr, found.reply)],
          [[name, *map(repr, row)] for name, row in zip(found.names, found.said)])
    parts = found.attribution
    table(f"Who said the answer's first digit: parts of its logit {parts.logit:.1f}",
          ["layer", *(f"head {n}" for n in range(parts.heads.shape[1])), "feed-forward"],
          [[layer, *(f"{share:+.2f}" for share in row), f"{mlp:+.2f}"]
           for layer, (row, mlp) in enumerate(zip(parts.heads.tolist(), parts.mlps.tolist()))])


if __name__ == "__main__":
    main()
