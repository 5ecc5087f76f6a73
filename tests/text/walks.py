"""Texts that a grammar lets through: whether one is, and random ones, token by token."""

import random
from collections.abc import Sequence

import numpy as np

from llama.text.matcher import GrammarCompiler, Matcher
from llama.text.tokenizer import Tokenizer

# What ends strings, numbers, arrays and objects, and so brings a random value to its end.
_CLOSERS = ('"', "}", "]", '"}', '"]', ",")


def allowed_ids(matcher: Matcher, guesses: Sequence[int] = ()) -> list[int]:
    """What may come next, after these guesses."""
    return np.flatnonzero(np.unpackbits(matcher.masks(guesses)[-1], bitorder="little")).tolist()


def accepts(compiler: GrammarCompiler, tokenizer: Tokenizer, written: str, text: str) -> bool:
    """Whether a text is one of the grammar's."""
    matcher = compiler(written)
    for token_id in tokenizer.encode(text):
        if token_id not in allowed_ids(matcher):
            return False
        matcher.accept(token_id)
    return not matcher._eos_token_ids.isdisjoint(allowed_ids(matcher))


def walk(compiler: GrammarCompiler, tokenizer: Tokenizer, written: str, rng: random.Random, most: int) -> list[int]:
    """The ids of a random text, in which after some time all comes to an end that can; at most so many."""
    matcher, ids = compiler(written), []
    closers = {token_id for text in _CLOSERS for token_id in tokenizer.encode(text)}
    while len(ids) < most and not matcher.is_over:
        allowed = allowed_ids(matcher)
        ending = [token_id for token_id in allowed if token_id in matcher._eos_token_ids]
        closing = [token_id for token_id in allowed if token_id in closers]
        if ending and (rng.random() < 0.3 or len(ids) > 20):
            allowed = ending
        elif closing and (rng.random() < 0.3 or len(ids) > 20):
            allowed = closing
        ids.append(rng.choice(allowed))
        matcher.accept(ids[-1])
    return ids
