"""Steer: python -m tools.tour.steering

The mean difference between the residual streams of two kinds of prompt is a direction (arXiv:2308.10248). Added while
the model answers, it makes a greeting be answered as a sum; subtracted, a sum as a greeting.
"""

from llama.engine.request import SamplingParams
from llama.internals.patch import steering_vector
from llama.internals.trace import Add
from llama.runtime import Llama
from tools.tour.shared import asked, table, user

SUMS = ["What is 12 + 34?", "What is 7 + 61?", "What is 55 + 23?", "What is 40 + 9?"]
GREETINGS = ["Hello", "Hi there", "Good morning", "Hey"]
SITE = "layers.3.resid_post"


def experiment(llm: Llama, questions: tuple[str, ...] = ("Hello", "What is 17 + 25?")) -> dict[str, dict[float, str]]:
    """By question: the reply at each strength of steering from greetings to sums."""
    sums, greetings = (llm.trace([user(llm, text) for text in texts], SITE, -1) for texts in (SUMS, GREETINGS))
    vector = steering_vector(sums, greetings, SITE)
    replies: dict[str, dict[float, str]] = {}
    for question in questions:
        for scale in (-1.0, 0.0, 1.0):
            steered = llm.trace(user(llm, question), edits=[Add(SITE, vector, scale, positions=slice(-1, None))],
                                params=SamplingParams(temperature=0.0, max_tokens=20))
            replies.setdefault(question, {})[scale] = steered.text
    return replies


def main() -> None:
    """Print the replies."""
    for question, replies in experiment(asked(__doc__)).items():
        table(question, ["strength", "reply"], [[f"{scale:+.0f}", reply] for scale, reply in replies.items()])


if __name__ == "__main__":
    main()
