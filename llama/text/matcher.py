"""Grammars over a tokenizer's bytes: which ids may come next, so that the text can still become one of a language.

llguidance (the extra `structured`) does the work: an Earley parser over a lexer of derivatives, walked along the
trie of all tokens. An id is allowed exactly if its bytes keep the text a beginning of the language, however it
is cut into tokens; a control token never is, but for those that end a turn, where the text may end.
"""

import functools
import threading
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from llama.text.guidance import LIMITS, MAX_KEPT, GrammarError, llguidance, make_trie
from llama.text.tokenizer import Tokenizer, TokenizerError


class GrammarCompiler:
    """Makes a Matcher of a grammar that `llama.text.grammar` wrote. May be called from several threads."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: Collection[int]):
        """eos_token_ids: what ends a turn."""
        self._tokenizer = tokenizer
        self._eos_token_ids = frozenset(eos_token_ids)
        self._lock = threading.Lock()
        self._trie: Any = None  # llguidance's, made when it is first needed: that takes its time
        self._compiled = functools.lru_cache(MAX_KEPT)(self._compile)

    def prepare(self) -> None:
        """Do what takes its time once: a second, for 128,256 ids. Raises GrammarError."""
        with self._lock:
            if self._trie is None:
                self._trie = make_trie(_all_tokens(self._tokenizer), self._tokenizer.special_tokens.values(),
                                       self._eos_token_ids)

    def __call__(self, grammar: str) -> "Matcher":
        """Raises GrammarError. What was compiled lately is not compiled again."""
        return self._compiled(grammar).fork()

    def _compile(self, grammar: str) -> "Matcher":
        library = llguidance()
        self.prepare()
        limits = library.LLParserLimits(**LIMITS, verbose_errors=False)
        matcher = library.LLMatcher(self._trie, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise GrammarError("grammar", f"cannot be followed: {matcher.get_error()}")
        return Matcher(matcher, self._tokenizer.vocab_size, self._eos_token_ids)


class Matcher:
    """How far one text has come in its grammar: `llama.engine.constraint.Constraint` in deed."""

    def __init__(self, matcher: Any, vocab_size: int, eos_token_ids: frozenset[int]):
        self.is_over = False
        self._matcher = matcher
        self._num_words = -(-vocab_size // 32)
        self._eos_token_ids = eos_token_ids

    def masks(self, guesses: Sequence[int] = ()) -> np.ndarray:
        """[1 + guesses, bytes], uint8: a bit for each id that may come next, and after each guess. Raises
        GrammarError if the grammar takes more than LIMITS."""
        matcher, words = self._matcher, np.empty((1 + len(guesses), self._num_words), dtype="<u4")
        for place, line in enumerate(words):
            matcher.unsafe_compute_mask_ptr(line.ctypes.data, line.nbytes)
            if matcher.is_error():
                raise GrammarError("grammar", f"takes more time or memory than it may: {matcher.get_error()}")
            if place < len(guesses):
                matcher.consume_token(guesses[place])
        if guesses:
            matcher.rollback(len(guesses))
        return words.view(np.uint8)

    def num_allowed(self, guesses: Sequence[int]) -> int:
        """How many of these may come next, one after another; none that ends the text."""
        ends = (place for place, token_id in enumerate(guesses) if token_id in self._eos_token_ids)
        return self._matcher.validate_tokens(list(guesses[:next(ends, len(guesses))]))

    def accept(self, token_id: int) -> None:
        """Go on by an id that may come next. Where that fails, the next `masks` says so."""
        self._matcher.consume_token(token_id)
        self.is_over = token_id in self._eos_token_ids

    def fork(self) -> "Matcher":
        """Another text with the same beginning."""
        return Matcher(self._matcher.deep_copy(), self._num_words * 32, self._eos_token_ids)


def _all_tokens(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every id."""
    tokens = []
    for token_id in range(tokenizer.vocab_size):
        try:
            tokens.append(tokenizer.token_bytes(token_id))
        except TokenizerError:  # an id that the vocabulary leaves out
            tokens.append(b"")
    return tokens
