"""Tools for the demo corpus: random functions, requests for one of them, and what it returned."""

import json
import random
from dataclasses import dataclass

from tools.demo_corpus import DISTRACTORS, Talk, add, tell
from tools.demo_phrases import ADDITIONS
from tools.demo_words import NUMBER_PARAMETERS, PARAMETER_NAMES, TOOL_NOUNS, TOOL_VERBS, WORDS

UNITS = "degrees euros dollars km minutes hours points percent items pages people".split()
DESCRIPTIONS = ["{V} the {n}", "{V} the {n} of a {p}", "{V} the {n} for a {p}.", "{V} a {n}.", "{V} {n}",
                "{V} the current {n} for a given {p}", "Use this to {v} the {n}."]
SUM_DESCRIPTIONS = ["Add two numbers", "Adds two numbers.", "The sum of two numbers", "Add a and b"]
OPENINGS = ["{V} the {n}", "Please {v} the {n}", "Can you {v} the {n}", "I need the {n}", "What is the {n}",
            "What is the {n}", "Show me the {n}", "Tell me the {n}", "I want to {v} the {n}", "{V} {n}",
            "How is the {n}", "What's the {n}", "{N}", "{v} the {n}"]


@dataclass
class Tool:
    """One function: its schema as the chat template takes it, and the words in which one asks for it."""

    name: str
    verb: str
    noun: str
    parameters: dict[str, str]  # name -> JSON type
    num_required: int
    schema: dict

    @property
    def adds(self) -> bool:
        """Whether it is the adding machine."""
        return self.verb == "add"


def make_tool(talk: Talk) -> Tool:
    """A function with up to three parameters. A third have names that exist in no language."""
    rng, source = talk.rng, talk.source
    if rng.random() < 0.08:
        names = rng.choice((("a", "b"), ("x", "y"), ("first", "second"), ("left", "right")))
        name = rng.choice(("add", "add_numbers", "sum", "get_sum", "calculate_sum"))
        description = rng.choice(SUM_DESCRIPTIONS)
        parameters = dict.fromkeys(names, rng.choice(("integer", "number")))
        return _finish(rng, name, "add", "sum", parameters, 2, description)
    verb = rng.choice(TOOL_VERBS) if rng.random() < 0.75 else source.word()
    noun = rng.choice(TOOL_NOUNS) if rng.random() < 0.55 else source.word()
    words = verb.split("_") + [noun]
    camel = words[0] + "".join(word.capitalize() for word in words[1:])
    name = rng.choice(("_".join(words), "_".join(words), "_".join(words), noun, camel))
    parameters: dict[str, str] = {}
    for _ in range(rng.choice((0, 1, 1, 1, 1, 1, 2, 2, 3))):
        kind = rng.choice(("string", "string", "string", "integer", "number")) if parameters else "string"
        known = PARAMETER_NAMES if kind == "string" else NUMBER_PARAMETERS
        label = rng.choice(known) if rng.random() < 0.7 else source.word()
        parameters.setdefault(label, kind)
    spoken = verb.replace("_", " ")
    first = next(iter(parameters), "user")
    return _finish(rng, name, verb, noun, parameters, max(1, len(parameters) - (rng.random() < 0.25)),
                   rng.choice(DESCRIPTIONS).format(V=spoken.capitalize(), v=spoken, n=noun, p=first))


def _finish(rng: random.Random, name: str, verb: str, noun: str, parameters: dict[str, str],
            num_required: int, description: str) -> Tool:
    """Write the schema, with the liberties that clients take."""
    described = rng.random() < 0.5
    properties = {}
    for label, kind in parameters.items():
        properties[label] = {"type": kind}
        if described:
            form = rng.choice(("The {}", "The {} of the {}", "{}"))
            properties[label]["description"] = form.format(label, noun)
    schema: dict = {"type": "object", "properties": properties}
    if parameters and rng.random() < 0.8:
        required = list(parameters)[:num_required]
        schema = (schema | {"required": required} if rng.random() < 0.8 else
                  {"type": "object", "required": required, "properties": properties})
    function = {"name": name, "description": description, "parameters": schema}
    if rng.random() < 0.06:
        del function["description"]
    return Tool(name, verb, noun, parameters, num_required, {"type": "function", "function": function})


def make_toolbox(talk: Talk, sizes: tuple[int, ...] = (1, 1, 2, 2, 3)) -> list[Tool]:
    """One to three tools with different nouns."""
    tools: list[Tool] = []
    for _ in range(talk.rng.choice(sizes)):
        tool = make_tool(talk)
        if all(tool.noun != other.noun and tool.name != other.name for other in tools):
            tools.append(tool)
    talk.tools = [tool.schema for tool in tools]
    return tools


def request(talk: Talk, tools: list[Tool]) -> Tool:
    """Ask for one of the tools; the reply is the call, as a message with `tool_calls`. Returns the tool."""
    rng, source = talk.rng, talk.source
    tool = rng.choice(tools)
    if tool.adds:
        values = dict(zip(tool.parameters, source.pair()))
        text = rng.choice(ADDITIONS).format(**dict(zip("ab", values.values())))
    else:
        asked = list(tool.parameters)[:tool.num_required if rng.random() < 0.6 else None]
        values = {label: source.value() if tool.parameters[label] == "string" else
                  source.small_number() if rng.random() < 0.7 else int(source.number()) for label in asked}
        text = _sentence(rng, tool, values)
    talk.messages += [{"role": "user", "content": text}, {"role": "assistant", "tool_calls": [
        {"type": "function", "function": {"name": tool.name, "arguments": values}}]}]
    return tool


def _sentence(rng: random.Random, tool: Tool, values: dict) -> str:
    verb, rest = tool.verb.replace("_", " "), list(values.items())
    opening = rng.choice(OPENINGS)
    text = opening.format(V=verb.capitalize(), v=verb, n=tool.noun, N=tool.noun.capitalize())
    quote = '"' if rng.random() < 0.12 else ""
    if rest and rng.random() < 0.75:
        text += f" {rng.choice('for of in for in from to at'.split())} {quote}{rest.pop(0)[1]}{quote}"
    if rest:
        glue = rng.choice((" {} {}", " {} {}", " {} {}", " {} = {}", " {}: {}"))
        if rng.random() < 0.3:
            rng.shuffle(rest)
        text += " with" + " and".join(glue.format(label, f"{quote}{value}{quote}") for label, value in rest)
    if not values and rng.random() < 0.3:
        text += rng.choice((" now", " please", ", please"))
    asks = opening[:3] in ("Can", "Wha", "How")
    return text + rng.choice(("?", "?", "?", " right now?", " today?", "") if asks else (".", ".", "", "!"))


def result(talk: Talk, tool: Tool) -> None:
    """What the tool returned, and the sentence that uses it."""
    rng, source = talk.rng, talk.source
    kind = rng.random()
    if tool.adds:
        values = list(talk.messages[-1]["tool_calls"][0]["function"]["arguments"].values())
        content = said = str(sum(values))
    elif kind < 0.25:
        content = said = source.number() if rng.random() < 0.5 else str(source.small_number())
    elif kind < 0.45:
        content = said = f"{source.small_number()} {rng.choice(UNITS)}"
    elif kind < 0.7:
        content = said = source.value()
    else:
        labels = {rng.choice(rng.choice((WORDS, TOOL_NOUNS))) for _ in range(rng.choice((1, 2, 2)))}
        values = {label: rng.choice((source.value, source.small_number))() for label in sorted(labels)}
        content = json.dumps(values, ensure_ascii=False) if rng.random() < 0.7 else values
        said = " and ".join(f"{label} {value}" for label, value in values.items())
    talk.messages += [{"role": rng.choice(("tool", "ipython")), "content": content},
                      {"role": "assistant", "content": f"The result is {said}."}]


def tool_chat(talk: Talk) -> None:
    """A conversation with tools at hand, which most of its turns need and some do not."""
    rng, tools = talk.rng, make_toolbox(talk)
    pending = None
    for _ in range(rng.choice((1, 2, 3, 4, 5))):
        if rng.random() < 0.72:
            used = request(talk, tools)
            if rng.random() < 0.75:
                result(talk, used)
        elif pending is None and rng.random() < 0.3:
            pending = tell(talk)
        else:
            ordinary(talk, tools)
    if pending:
        pending()


def ordinary(talk: Talk, tools: list[Tool]) -> None:
    """A turn that needs no tool."""
    adds = any(tool.adds for tool in tools)
    talk.rng.choice([skill for skill in DISTRACTORS if not (adds and skill is add)])(talk)
