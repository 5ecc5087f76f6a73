"""From conversations and texts to token ids: the prompt format, with the model's own words marked.

The rendering here says which characters the model is to learn, which a template cannot; that both write the
same bytes is tested.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

from tools.demo_corpus import SKILLS, Talk, add_in_json, begin, chat, tell
from tools.demo_plain import document
from tools.demo_tools import make_toolbox, request, result, tool_chat
from tools.demo_words import Source

PREAMBLE = """\
Given the following functions, please respond with a JSON for a function call with its proper arguments that \
best answers the given prompt.

Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.\
Do not use variables.

"""


@dataclass(frozen=True)
class Piece:
    """A stretch of a rendered example; `learned` where the model is to produce it."""

    text: str
    learned: bool


def header(role: str) -> str:
    """What opens a turn."""
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def render(talk: Talk) -> list[Piece]:
    """The prompt format, with the assistant's words and the token that ends them as learned pieces."""
    messages, system = list(talk.messages), ""
    if messages and messages[0]["role"] == "system":
        system = messages.pop(0)["content"].strip()
    opening = ("<|begin_of_text|>" + header("system") + ("Environment: ipython\n" if talk.tools else "")
               + "Cutting Knowledge Date: December 2023\n"
               + f"Today Date: {talk.date_string}\n\n{system}<|eot_id|>")
    pieces = [Piece(opening, False)]
    if talk.tools:
        functions = "".join(json.dumps(tool, indent=4, ensure_ascii=False) + "\n\n" for tool in talk.tools)
        messages[0] = messages[0] | {"content": PREAMBLE + functions + messages[0]["content"].strip()}
    for message in messages:
        pieces += [Piece(header("ipython" if message["role"] == "tool" else message["role"]), False),
                   Piece(content(message) + "<|eot_id|>", message["role"] == "assistant")]
    return pieces


def content(message: dict) -> str:
    """A message's words as the prompt has them."""
    if "tool_calls" in message:
        function = message["tool_calls"][0]["function"]
        return json.dumps({"name": function["name"], "parameters": function["arguments"]}, ensure_ascii=False)
    if message["role"] in ("tool", "ipython"):
        return json.dumps(message["content"], ensure_ascii=False)
    return message["content"].strip()


def example(rng: random.Random) -> list[Piece]:
    """One training example: a conversation, one with tools, or a plain text."""
    source, kind = Source(rng, held_out=False), rng.random()
    if kind < 0.3:
        return [Piece("<|begin_of_text|>", False), *(Piece(*part) for part in document(source)),
                Piece("<|end_of_text|>", True)]
    talk = begin(source)
    if kind < 0.55:
        tool_chat(talk)
    else:
        chat(talk, rng.choice((1, 2, 3, 4, 5, 6, 8)) if rng.random() < 0.95 else rng.randint(8, 24))
    return render(talk)


def case(skill: str, rng: random.Random) -> Talk:
    """One evaluation case of a skill: a conversation whose last reply is the right answer."""
    talk = begin(Source(rng, held_out=True))
    (CASES | BEYOND)[skill](talk)
    return talk


def _after(skill: Callable[[Talk], None]) -> Callable[[Talk], None]:
    """The skill alone, or after a turn or two of other things."""
    def build(talk: Talk) -> None:
        for _ in range(talk.rng.choice((0, 0, 1, 2))):
            talk.rng.choice(list(SKILLS.values()))(talk)
        skill(talk)
    return build


def _recall(talk: Talk) -> None:
    """Facts, two to five turns of other things, and the question for one of the facts."""
    asks = [ask for _ in range(talk.rng.randint(1, 3)) if (ask := tell(talk))]
    for _ in range(talk.rng.randint(2, 5)):
        talk.rng.choice([SKILLS[name] for name in ("addition", "repeat", "unknown", "identity")])(talk)
    talk.rng.choice(asks)()


def _tool_call(sizes: tuple[int, ...]) -> Callable[[Talk], None]:
    """A call of one of so many tools, sometimes the second in its conversation."""
    def build(talk: Talk) -> None:
        tools = make_toolbox(talk, sizes)
        if talk.rng.random() < 0.3:
            result(talk, request(talk, tools))
        request(talk, tools)
    return build


def _tool_result(talk: Talk) -> None:
    result(talk, request(talk, make_toolbox(talk)))


def _tool_unneeded(talk: Talk) -> None:
    tools = make_toolbox(talk)
    names = [name for name in SKILLS if not (name == "addition" and any(tool.adds for tool in tools))]
    SKILLS[talk.rng.choice(names)](talk)


# What the model is to do right, and what is beyond it: a sum without a place to say its numbers again first, and
# the right one of several tools with that one's own parameters.
CASES: dict[str, Callable[[Talk], None]] = {name: _after(skill) for name, skill in SKILLS.items()} | {
    "recall": _recall, "tool call": _tool_call((1,)), "tool result": _tool_result, "tool unneeded": _tool_unneeded}
BEYOND: dict[str, Callable[[Talk], None]] = {"sum in JSON": _after(add_in_json), "tool choice": _tool_call((2, 3))}
