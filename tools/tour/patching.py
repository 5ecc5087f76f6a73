"""Put one prompt's name into another: python -m tools.tour.patching

Two people introduce themselves; the runs differ in the name alone. Where a value of the one run, put into the other,
makes it greet the wrong person, there the name is: at first at the name's own tokens, and from some layer on at the
place where it is about to be said.
"""

from dataclasses import dataclass

from llama.engine.request import SamplingParams
from llama.internals.patch import Sweep, logit_difference, sweep
from llama.internals.trace import Patch
from llama.runtime import Llama
from tools.tour.shared import asked, table, user

GREEDY = SamplingParams(temperature=0.0, max_tokens=16)


@dataclass(frozen=True)
class Patched:
    """replies: of the two prompts as they are, then of the second with the first one's name patched in. sweep: over
    layers and positions, at the token where the name begins to be said. tokens: what stands at the positions."""

    replies: list[str]
    sweep: Sweep
    tokens: list[str]
    name_at: list[int]


def experiment(llm: Llama, name: str = "Kim", other: str = "Tom") -> Patched:
    """Names of equally many tokens, greeted."""
    clean, corrupted = (llm.trace(user(llm, f"My name is {each}."), "layers.0.resid_post", params=GREEDY)
                        for each in (name, other))
    count = clean.num_prompt
    name_at = [place for place in range(count) if clean.ids[place] != corrupted.ids[place]]
    patched = llm.trace(corrupted.ids[:count], edits=[Patch("layers.0.resid_post", clean, positions=name_at)],
                        params=GREEDY)
    says = next(place for place in range(count, len(clean.ids)) if clean.ids[place] != corrupted.ids[place])
    found = sweep(llm.model, clean.ids[:says], corrupted.ids[:says],
                  logit_difference(clean.ids[says], corrupted.ids[says]))
    return Patched([clean.text, corrupted.text, patched.text], found, list(corrupted.tokens[:says]), name_at)


def main() -> None:
    """Print the three replies and the share that each patch recovers."""
    found = experiment(asked(__doc__))
    for what, reply in zip(("one prompt", "the other", "the other, with the one's name after layer 0"), found.replies):
        print(f"{what}: {reply}")
    last = len(found.tokens) - 1
    places = [*found.name_at, *range(last - 4, last + 1)]
    shares = found.sweep.recovered.tolist()
    table("Share of the way to the one's name, by patched layer and token",
          ["layer", *(repr(found.tokens[place]) for place in places)],
          [[layer, *(f"{row[place]:.0%}" for place in places)] for layer, row in enumerate(shares)])


if __name__ == "__main__":
    main()
