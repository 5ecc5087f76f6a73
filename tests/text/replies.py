"""Replies for the tests of tool calls: how they are fed, generated calls in every form, and what is read."""

import functools
import json
import random
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from llama.text.stream import TextStream
from llama.text.tokenizer import Tokenizer
from llama.text.tools import PYTHON_TAG, ToolCall, ToolCallStream

TAG = "\ue000"  # in the replies below, the python tag
NAMES = ("f", "get_weather", "get-time", "brave_search", "wolfram_alpha")

Read = list[str | ToolCall]


def as_ids(tokenizer: Tokenizer, reply: str) -> list[int]:
    """A reply's ids, as its text is encoded."""
    tag = tokenizer.special_tokens[PYTHON_TAG]
    segments = [[part, tag] for part in reply.split(TAG)]
    return tokenizer.encode_prompt([each for segment in segments for each in segment][:-1])


def as_bytes(tokenizer: Tokenizer, reply: str) -> list[int]:
    """A reply's ids, one for each byte."""
    ids = ids_of_bytes(tokenizer)
    tag = tokenizer.special_tokens[PYTHON_TAG]
    return [each for character in reply for each in
            ([tag] if character == TAG else [ids[bytes([byte])] for byte in character.encode()])]


@functools.cache
def ids_of_bytes(tokenizer: Tokenizer) -> dict[bytes, int]:
    """The tokens of single bytes: in every vocabulary they are among the first."""
    tokens = ((tokenizer.token_bytes(i), i) for i in range(min(512, tokenizer.vocab_size)))
    return {raw: token_id for raw, token_id in tokens if len(raw) == 1}


def merged(events: Iterable[str | ToolCall]) -> Read:
    """The events, with texts that follow one another joined."""
    joined: list[Any] = []
    for event in events:
        if isinstance(event, str) and joined and isinstance(joined[-1], list):
            joined[-1].append(event)
        else:
            joined.append([event] if isinstance(event, str) else event)
    return ["".join(each) if isinstance(each, list) else each for each in joined]


def read(tokenizer: Tokenizer, pushes: Iterable[Sequence[int]], names: Collection[str] = NAMES, *,
         is_cut: bool = False, stop: Sequence[str] = (), skip_special_tokens: bool = True) -> list[Read]:
    """What each push of ids brings, as in a server through a TextStream; and last, what the end brings."""
    texts = TextStream(tokenizer, stop=stop, skip_special_tokens=skip_special_tokens)
    stream = ToolCallStream(tokenizer, names, skip_special_tokens=skip_special_tokens)
    brought = []
    for ids in pushes:
        brought.append(stream.push("".join(map(texts.push, ids)), ids))
        if texts.stop_match is not None:
            return [*brought, stream.finish(is_cut=True)]
    return [*brought, stream.push(texts.finish()) + stream.finish(is_cut=is_cut)]


def whole(tokenizer: Tokenizer, reply: str, names: Collection[str] = NAMES, **options: Any) -> Read:
    """What a reply says that comes in one piece."""
    return merged(sum(read(tokenizer, [as_ids(tokenizer, reply)], names, **options), []))


@dataclass(frozen=True)
class Written:
    """A call or several, written in one form."""

    text: str
    calls: tuple[tuple[str, dict[str, Any]], ...]

    def is_in(self, events: Read) -> bool:
        """Whether these are the calls, with the arguments in their order."""
        found = [(each.name, list(json.loads(each.arguments).items())) for each in events]
        return found == [(name, list(arguments.items())) for name, arguments in self.calls]


def random_value(rng: random.Random, depth: int = 3) -> Any:
    """A JSON value with all that is awkward in text."""
    kind = rng.random()
    if kind < 0.5:
        pieces = ["a", "Zürich", "🦙", '"', "'", "\\", "\n", "\t", "{", "}", "[1]", "</function>", "; ", ")",
                  "\x7f", " ", "<|python_tag|>", "\\n", "f(a=1)", ""]
        return "".join(rng.choice(pieces) for _ in range(rng.randint(0, 5)))
    if kind < 0.8 or depth == 0:
        return rng.choice([0, -1, 12345678901234567890, 1.5, -2.5e-7, 1e300, True, False, None])
    if kind < 0.9:
        return [random_value(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {f"k{i}": random_value(rng, depth - 1) for i in range(rng.randint(0, 3))}


def random_call(rng: random.Random, form: str) -> Written:
    """A call in a form: "json", "function", "list", or "dotted", which has the tag before it."""
    def arguments() -> dict[str, Any]:
        names = [rng.choice(["a", "b", "city", "n_1"]) + str(i) for i in range(rng.randint(0, 3))]
        return {name: random_value(rng) for name in names}

    calls = [(rng.choice(NAMES), arguments()) for _ in range(rng.randint(1, 3) if form == "list" else 1)]
    [(name, given), *_] = calls
    if form == "json":
        text = json_call(rng, name, given)
    elif form == "function":
        text = f"<function={name}>{json.dumps(given, ensure_ascii=rng.random() < 0.5)}</function>"
    elif form == "list":
        text = f"[{', '.join(name + python_arguments(rng, each) for name, each in calls)}]"
    else:
        text = f"{TAG}{name}.call{python_arguments(rng, given)}"
    return Written(text, tuple(calls))


def json_call(rng: random.Random, name: str, arguments: dict[str, Any]) -> str:
    """A call as a JSON object, in one of the ways in which models write it."""
    inner = [(rng.choice(["name", "function"]), name), (rng.choice(["parameters", "arguments"]), arguments)]
    if rng.random() < 0.3:
        inner = [("function", dict([("name", name), inner[1]]))]
    members = inner + [("type", "function")] * rng.randint(0, 1)
    rng.shuffle(members)
    text = json.dumps(dict(members), ensure_ascii=rng.random() < 0.5, indent=rng.choice([None, None, 4]))
    return rng.choice(["", TAG, TAG + " "]) + text


def python_arguments(rng: random.Random, arguments: dict[str, Any]) -> str:
    """Arguments as Python writes them."""
    def literal(value: Any) -> str:
        if isinstance(value, str):
            return repr(value) if rng.random() < 0.5 else json.dumps(value)
        if isinstance(value, list):
            return f"[{', '.join(map(literal, value))}]"
        if isinstance(value, dict):
            return "{" + ", ".join(f"{literal(key)}: {literal(each)}" for key, each in value.items()) + "}"
        return repr(value)

    space = rng.choice(["", " "])
    return "(" + ", ".join(f"{key}{space}={space}{literal(value)}" for key, value in arguments.items()) + ")"


def account_for(tokenizer: Tokenizer, reply: str, names: Collection[str] = NAMES, *, is_cut: bool = False
                ) -> Read:
    """Feeds a reply a character at a time, and finds every character of it in what comes: in a text, or,
    between texts, in calls, which are then all that a reply says in which nothing else stands.

    Returns what came.
    """
    tag = tokenizer.special_tokens[PYTHON_TAG]
    pushes = [[tag] if character == TAG else as_bytes(tokenizer, character) for character in reply]
    came = read(tokenizer, pushes, names, is_cut=is_cut)
    start, text, everything = 0, "", []
    for end, events in enumerate(came, start=1):
        everything += events
        text += "".join(each for each in events if isinstance(each, str))
        calls = [each for each in events if isinstance(each, ToolCall)]
        assert all(isinstance(each, str) for each in events[:len(events) - len(calls)]), "text after a call"
        if calls:
            segment = reply[start:end]
            told = next(i for i in range(len(segment) + 1) if segment[:i].replace(TAG, "") == text)
            gap = segment[told:] if told or not start else re.sub(r"\A\s*;?", "", segment)
            assert whole(tokenizer, gap, names) == calls
            start, text = end, ""
    rest = reply[start:].replace(TAG, "")
    assert rest == text or (start and not text and re.fullmatch(r"\s*;?\s*", rest))
    return merged(everything)
