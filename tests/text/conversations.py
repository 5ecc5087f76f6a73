"""Conversations for the tests of llama.text.chat."""

import random

from tests.text.samples import random_text

ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Add a & b",
        "parameters": {"type": "object", "properties": {}},
    },
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def calling(*calls):
    """An assistant's message with tool calls, each a (name, arguments) or (name, arguments, id)."""
    functions = [{"type": "function", "function": {"name": c[0], "arguments": c[1]}} for c in calls]
    ids = [{"id": c[2]} if len(c) > 2 else {} for c in calls]
    return {"role": "assistant", "tool_calls": [f | i for f, i in zip(functions, ids, strict=True)]}


def tool(content, **more):
    return {"role": "tool", "content": content, **more}


SEARCH = {"builtin_tools": ["brave_search", "code_interpreter"]}


def random_json(rng: random.Random, depth: int = 2):
    """JSON data with strings of every kind as keys and values."""
    kind = rng.randrange(8 if depth else 5)
    if kind < 2:
        return random_text(rng, 2)
    if kind < 5:
        return rng.choice([None, True, False, rng.randint(-(10**12), 10**12), rng.random(), 1e300])
    if kind == 5:
        return [random_json(rng, depth - 1) for _ in range(rng.randint(0, 3))]
    return {random_text(rng, 2): random_json(rng, depth - 1) for _ in range(rng.randint(0, 3))}


def random_conversation(rng: random.Random) -> tuple[list, dict]:
    """Messages and options that the official template takes."""
    messages = [system(random_text(rng))] if rng.random() < 0.5 else []
    for _ in range(rng.randint(1, 4)):
        messages.append(user(random_text(rng)))
        if rng.random() < 0.4:
            arguments = {random_text(rng, 1): random_json(rng) for _ in range(rng.randint(0, 3))}
            messages.append(calling((random_text(rng, 2), arguments)))
            messages.append({"role": rng.choice(["tool", "ipython"]), "content": random_text(rng)})
        if rng.random() < 0.7:
            messages.append(assistant(random_text(rng)))
    options = {"add_generation_prompt": rng.random() < 0.7}
    if rng.random() < 0.5:
        names = [random_text(rng, 2) for _ in range(rng.randint(1, 3))]
        functions = [{"name": name, "parameters": random_json(rng)} for name in names]
        options["tools"] = [{"type": "function", "function": function} for function in functions]
    if rng.random() < 0.3:
        options |= SEARCH
    if rng.random() < 0.3:
        options["tools_in_user_message"] = rng.random() < 0.5
    if rng.random() < 0.3:
        options["date_string"] = random_text(rng, 1)
    return messages, options
