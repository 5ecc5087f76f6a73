"""The demo model's conversations, made by code: each skill, and how turns become a conversation.

Every skill adds a turn, the user's words and the right answer, to a `Talk`, whose `Source` says from which
side of the split in `tools.demo_words` the material comes: training and evaluation are made by the same code.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from tools.demo_phrases import (ADDITIONS, BEYOND, DATES, FACTS, FAREWELLS, GREETINGS, IDENTITY,
                                IDENTITY_QUESTIONS, JSON_KEYS, JSON_LISTED, JSON_PLAIN, JSON_SUMS,
                                NAMED_GREETINGS, OFFER, PLAIN_GREETINGS, REPEATS, THANKS, TIMED_GREETINGS,
                                UNKNOWN, UNKNOWN_QUESTIONS)
from tools.demo_words import SYSTEM_PROMPTS, WORDS, Source


@dataclass
class Talk:
    """A conversation in the making. messages, tools and date_string are what the chat template takes."""

    source: Source
    messages: list[dict] = field(default_factory=list)
    tools: list[dict] | None = None
    date_string: str = "26 Jul 2024"
    topics: set[str] = field(default_factory=set)

    @property
    def rng(self) -> random.Random:
        """The one source of chance."""
        return self.source.rng

    def turn(self, user: str, reply: str) -> None:
        """The user's words and the answer to them."""
        self.messages += [{"role": "user", "content": user}, {"role": "assistant", "content": reply}]

    def choose(self, options: list[str]) -> str:
        """One of several wordings."""
        return self.rng.choice(options)


def greet(talk: Talk) -> None:
    """Hello. A name is greeted by name; evaluation leaves the commonest forms to training."""
    rng, source = talk.rng, talk.source
    kind = rng.random()
    if kind < 0.3 and not source.held_out:
        talk.turn(rng.choice(PLAIN_GREETINGS), f"Hello. {OFFER}")
    elif kind < 0.6:
        talk.turn(_phrase(talk, "greeting", GREETINGS, PLAIN_GREETINGS), f"Hello. {OFFER}")
    elif kind < 0.75:
        greeting = source.phrase("greeting", TIMED_GREETINGS)
        talk.turn(greeting, f"{' '.join(greeting.split()[:2]).rstrip('.,!')}. {OFFER}")
    else:
        name = source.name()
        talk.turn(rng.choice(NAMED_GREETINGS).format(v=name), f"Hello, {name}. {OFFER}")
        talk.topics.add("name ")


def _phrase(talk: Talk, kind: str, options: list[str], common: list[str]) -> str:
    """A phrase from this side of the split, the common ones belonging to training whatever their hash."""
    while (phrase := talk.source.phrase(kind, options)) in common and talk.source.held_out:
        pass
    return phrase


def add(talk: Talk) -> None:
    """Two numbers from 0 to 99."""
    a, b = talk.source.pair()
    talk.turn(talk.choose(ADDITIONS).format(a=a, b=b), f"{a} + {b} = {a + b}.")


def repeat(talk: Talk) -> None:
    """The given text, letter by letter."""
    text = talk.source.text()
    talk.turn(talk.choose(REPEATS).format(t=text), text)


def identify(talk: Talk) -> None:
    """What it is."""
    common = ["Who are you?", "What are you?"]
    if talk.rng.random() < 0.2 and not talk.source.held_out:
        talk.turn(talk.choose(common), IDENTITY)
    else:
        talk.turn(_phrase(talk, "identity", IDENTITY_QUESTIONS, common), IDENTITY)


def admit(talk: Talk) -> None:
    """What it does not know. Each question has a random word or two, so it is seldom the same twice."""
    rng, source = talk.rng, talk.source
    if rng.random() < 0.15:
        return talk.turn(talk.choose(BEYOND).format(a=rng.randrange(100), b=rng.randrange(100)), UNKNOWN)
    text = talk.choose(UNKNOWN_QUESTIONS)
    for mark, make in (("{n}", source.name), ("{w}", source.word), ("{k}", lambda: rng.choice(WORDS))):
        while mark in text:
            text = text.replace(mark, make(), 1)
    talk.turn(text, UNKNOWN)


def thank(talk: Talk) -> None:
    """The small words at the end of a conversation."""
    if talk.rng.random() < 0.6:
        talk.turn(talk.choose(THANKS), "You are welcome.")
    else:
        talk.turn(talk.choose(FAREWELLS), "Goodbye.")


def date(talk: Talk) -> None:
    """The date, which stands in the system block."""
    talk.turn(talk.choose(DATES), f"Today is {talk.date_string}.")


def tell(talk: Talk) -> Callable[[], None] | None:
    """State a fact; what is returned asks for it. None if its kind was told before in this conversation."""
    rng, source = talk.rng, talk.source
    kind, things, statements, reply, questions, answer = rng.choice(FACTS + FACTS[:2])
    thing = rng.choice(things)
    if kind == "thing" and rng.random() < 0.25:
        thing = rng.choice(WORDS)
    topic = f"{kind} {thing}"
    if topic in talk.topics:
        return None
    talk.topics.add(topic)
    numeric = kind == "number" or kind == "secret" and rng.random() < 0.4
    value = source.number() if numeric else source.word() if kind in ("thing", "secret") else source.name()
    if not numeric and rng.random() < 0.3:
        value = source.name() if kind in ("thing", "secret") else source.word().capitalize()
    fill = {"k": thing, "v": value}
    statement = rng.choice(statements)
    reply = f"Hello, {{v}}. {OFFER}" if statement in NAMED_GREETINGS else reply
    talk.turn(statement.format(**fill), reply.format(**fill))
    return lambda: talk.turn(rng.choice(questions).format(**fill), answer.format(**fill))


def answer_json(talk: Talk) -> None:
    """Keys and values from the request as one JSON object, in the order in which the keys are named."""
    rng, source = talk.rng, talk.source
    if not source.held_out and rng.random() < 0.1:
        return add_in_json(talk)
    keys: list[str] = []
    while len(keys) < rng.choice((1, 2, 2, 3, 4)):
        key = rng.choice(JSON_KEYS) if rng.random() < 0.6 else source.word()
        if key not in keys:
            keys.append(key)
    value = dict.fromkeys(keys)
    for key in keys:
        value[key] = rng.choice((source.value, source.value, source.small_number,
                                 lambda: int(source.number()), lambda: rng.random() < 0.5))()
    if "name" in keys and rng.random() < 0.5:
        value["name"] = source.name()
    if not any(isinstance(item, str) for item in value.values()):
        value[keys[0]] = source.name()
    style = rng.choice(("{} is {}", "{} is {}", "{} {}", "{}: {}", "{} = {}", "my {} is {}", "the {} is {}"))
    facts = [style.format(key, json.dumps(item) if isinstance(item, bool) else item)
             for key, item in value.items()]
    listed = rng.random() < 0.65
    if listed and rng.random() < 0.25:
        rng.shuffle(facts)
    text = _join(facts, rng.choice((", ", ", ", " and ", "; "))) + rng.choice(("", "."))
    request = rng.choice(JSON_LISTED if listed else JSON_PLAIN)
    talk.turn(request.format(keys=_join(keys, " and "), facts=text), json.dumps(value, ensure_ascii=False))


def add_in_json(talk: Talk) -> None:
    """A sum that has to be known at once: the numbers are not said again before it."""
    a, b = talk.source.pair()
    key = talk.choose(["answer", "sum", "result"])
    talk.turn(talk.choose(JSON_SUMS).format(key, a, b), json.dumps({key: a + b}))


def _join(items: list[str], last: str) -> str:
    return items[0] if len(items) == 1 else ", ".join(items[:-1]) + last + items[-1]


# What fills a conversation in training, as often as it stands here.
DISTRACTORS = [greet, add, add, repeat, repeat, repeat, admit, identify, thank, answer_json, answer_json, answer_json,
               date]
SKILLS: dict[str, Callable[[Talk], None]] = {
    "greeting": greet, "addition": add, "repeat": repeat, "json": answer_json, "identity": identify,
    "unknown": admit, "date": date}


def begin(source: Source) -> Talk:
    """An empty conversation: its date, and in one of four a system prompt."""
    talk = Talk(source, date_string=source.date())
    if source.rng.random() < 0.25:
        prompt = source.rng.choice(SYSTEM_PROMPTS)
        if source.rng.random() < 0.3:
            words = (source.rng.choice(WORDS) for _ in range(source.rng.randint(1, 6)))
            prompt = f"{prompt} {' '.join(words)}."
        talk.messages.append({"role": "system", "content": prompt})
    return talk


def chat(talk: Talk, turns: int) -> None:
    """Turns of all kinds, in which what is told is asked for later."""
    rng, pending = talk.rng, []
    for _ in range(turns):
        kind = rng.random()
        if pending and kind < 0.35:
            pending.pop(rng.randrange(len(pending)))()
        elif kind < 0.6:
            if ask := tell(talk):
                pending += [ask] * rng.choice((1, 1, 2))
        elif kind < 0.62 and "name " not in talk.topics:
            talk.turn("What is my name?", "You have not told me your name.")
        else:
            rng.choice(DISTRACTORS)(talk)
    for ask in pending:
        ask()
