"""Token ids to text as they come: characters and stop strings are held back until they are certain."""

import codecs
from collections import deque
from collections.abc import Sequence

from llama.text.tokenizer import Tokenizer


class TextStream:
    """Turns one sequence of ids into text deltas.

    The deltas of `push` and `finish`, joined, are what `Tokenizer.decode` gives for all the ids, up to the
    first stop string. The first is the one that is complete first, the longest of those that end together,
    wherever the tokens' borders lie. Time is linear in the text. `stop_match` is the one met, or None.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        skip_special_tokens: bool = True,
    ):
        """`include_stop` cuts the text after the stop string, not before. Raises ValueError on bad `stop`."""
        if isinstance(stop, str) or not all(isinstance(string, str) and string for string in stop):
            raise ValueError("stop must be a list of strings, none of them empty")
        self.stop_match: str | None = None
        self._tokenizer = tokenizer
        self._include_stop = include_stop
        self._skip_special_tokens = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._matchers = [_StopMatcher(string) for string in stop]
        self._held: deque[str] = deque()  # decoded, and perhaps the beginning of a stop string
        self._held_len = 0
        self._emitted: list[str] = []
        self._closed = False

    @property
    def text(self) -> str:
        """Everything emitted so far."""
        self._emitted = ["".join(self._emitted)]
        return self._emitted[0]

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Takes the next id; returns the text that has become certain: after a match or `finish`, none.

        Without `may_stop`, a stop string that this id completes is text like any other. Raises TokenizerError
        on an id that the vocabulary does not have.
        """
        if self._closed or (self._skip_special_tokens and self._tokenizer.is_special(token_id)):
            return ""
        return self._accept(self._decoder.decode(self._tokenizer.token_bytes(token_id)), may_stop)

    def finish(self) -> str:
        """Ends the stream; returns the rest of the text, an incomplete character at its end as U+FFFD."""
        if self._closed:
            return ""
        text = self._accept(self._decoder.decode(b"", final=True), may_stop=True)
        if not self._closed:
            text += self._release(self._held_len)
            self._closed = True
        return text

    def _accept(self, text: str, may_stop: bool) -> str:
        """Holds `text`, looks for stop strings in it, and releases what none of them can reach any more."""
        if not text:
            return ""
        before = self._held_len
        self._held.append(text)
        self._held_len += len(text)
        if self._matchers:
            for seen, character in enumerate(text, start=1):
                complete = [matcher.stop for matcher in self._matchers if matcher.advance(character)]
                if complete and may_stop:
                    self._closed = True
                    self.stop_match = max(complete, key=len)
                    return self._release(before + seen - (0 if self._include_stop else len(self.stop_match)))
        return self._release(self._held_len - max((matcher.held for matcher in self._matchers), default=0))

    def _release(self, count: int) -> str:
        """Emits the first `count` characters held."""
        self._held_len -= count
        released = []
        while count:
            piece = self._held.popleft()
            if len(piece) > count:
                self._held.appendleft(piece[count:])
                piece = piece[:count]
            released.append(piece)
            count -= len(piece)
        text = "".join(released)
        self._emitted.append(text)
        return text


class _StopMatcher:
    """Knuth, Morris and Pratt's search: the text so far ends in the first `matched` characters of `stop`."""

    def __init__(self, stop: str):
        self.stop = stop
        self.matched = 0
        # fallback[i]: the longest beginning of stop that is also an end of stop[:i + 1], and shorter than it
        self._fallback = [0] * len(stop)
        length = 0
        for i in range(1, len(stop)):
            while length and stop[length] != stop[i]:
                length = self._fallback[length - 1]
            length += stop[length] == stop[i]
            self._fallback[i] = length

    @property
    def held(self) -> int:
        """Characters at the end of the text that may still become part of the string."""
        return self._fallback[-1] if self.matched == len(self.stop) else self.matched

    def advance(self, character: str) -> bool:
        """Takes the text's next character; says whether the text now ends with the whole string."""
        if self.matched == len(self.stop):  # a match that did not stop: the next one may overlap it
            self.matched = self._fallback[-1]
        while self.matched and self.stop[self.matched] != character:
            self.matched = self._fallback[self.matched - 1]
        self.matched += self.stop[self.matched] == character
        return self.matched == len(self.stop)
