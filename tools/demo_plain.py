"""Text without the chat format, so that the demo model continues text too: counting, lists, sums, stories."""

import random
import string

from tools.demo_words import MONTHS, WORDS, Source

DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
FULL_MONTHS = "January February March April May June July August September October November December".split()
ANIMALS = "dog cat horse bird fish duck fox cow lion sheep bear mouse".split()
PLACES = "forest garden house river city sea mountain field school island".split()
ACTS = "sing dance swim run sleep walk read draw jump play".split()


Parts = list[tuple[str, bool]]


def document(source: Source) -> Parts:
    """One text, which ends where its form ends, in parts: those marked follow from what is before them."""
    return source.rng.choice((count, cycle, sums, sums, sums, sums, sums, sums, echo, echo, echo, echo, story))(
        source)


def count(source: Source) -> Parts:
    """Numbers with a fixed step, up to a full ten after at least six of them."""
    rng = source.rng
    step = rng.choice((1, 1, 1, 2, 5, 10))
    first = rng.choice((1, 1, 0, step, rng.randrange(100)))
    last = first + 5 * step
    while last % 10 not in (0, first % step):
        last += step
    numbers = [str(number) for number in range(first, last + 1, step)]
    return [(", ".join(numbers) + ".", True)]


def cycle(source: Source) -> Parts:
    """The alphabet, the days, the months, from anywhere to their end."""
    items = source.rng.choice((DAYS, FULL_MONTHS, MONTHS, string.ascii_lowercase, string.ascii_uppercase))
    return [(", ".join(items[source.rng.choice((0, 0, source.rng.randrange(len(items) - 2))):]) + ".", True)]


def sums(source: Source) -> Parts:
    """Lines of additions."""
    parts: Parts = []
    for _ in range(source.rng.randint(6, 24)):
        a, b = source.pair()
        parts += [(f"{a} + {b} =", False), (f" {a + b}\n", True)]
    return parts


def echo(source: Source) -> Parts:
    """A few strings, the same ones over and over: what induction heads are made on."""
    rng = source.rng
    items, glue = [source.text() for _ in range(rng.randint(1, 4))], rng.choice((", ", " ", "\n", "; "))
    rest = glue.join(items * rng.randint(2, 4))
    return [(glue.join(items), False), (glue + rest + rng.choice((".", "\n")), True)]


def story(source: Source) -> Parts:
    """Four sentences about an animal with a name."""
    rng = source.rng
    name, animal, place, other = source.name(), rng.choice(ANIMALS), rng.choice(PLACES), rng.choice(PLACES)
    first, second = rng.sample(ACTS, 2)
    kind, mood = rng.choice("little big young old clever quiet".split()), rng.choice(("happy", "tired"))
    text = (f"Once upon a time there was a {kind} {animal} called {name}. {name} lived in a {place} and "
            f"liked to {first}. One day {name} went to the {other} to {second}. In the evening {name} came "
            f"home to the {place} and was {mood}. The end.")
    return [(text, True)]
