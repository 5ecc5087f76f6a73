"""llguidance (the extra `structured`), as this project asks it: what it may take, what it must know of a vocabulary."""

from collections.abc import Collection, Sequence
from typing import Any

INSTALL = "pip install 'llama-runtime[structured]'"

# What one grammar may take, in llguidance's own measures, so that a bound is the same on every machine. Each is
# some hundredths of a second at most: of making the lexer, of one mask, and of the memory that it may come to.
LIMITS = {"initial_lexer_fuel": 1_000_000, "step_lexer_fuel": 500_000, "step_max_items": 100_000,
          "max_items_in_row": 2000, "max_lexer_states": 20_000, "max_grammar_size": 100_000}
MAX_KEPT = 32  # grammars that are kept when they are compiled: most who ask, ask for the same again


class GrammarError(ValueError):
    """A grammar, or a schema, that cannot be followed. `where` names the place at fault, `code` the kind of fault.

    The message begins with the place.
    """

    def __init__(self, where: str, complaint: str, code: str = "invalid_value"):
        super().__init__(f"{where} {complaint}")
        self.where = where
        self.code = code


def llguidance() -> Any:
    """The library. Raises GrammarError if it is not installed."""
    try:
        import llguidance
    except ImportError:
        complaint = f"needs llguidance, which is not installed: {INSTALL}"
        raise GrammarError("constrained output", complaint, "extra_not_installed") from None
    return llguidance


def make_trie(tokens: Sequence[bytes], special_ids: Collection[int], eos_token_ids: Collection[int]) -> Any:
    """What llguidance knows of a vocabulary. tokens: each id's bytes, none where there is no such id."""
    library = llguidance()
    if not eos_token_ids:
        raise GrammarError("grammar", "needs a token that ends a turn, and the checkpoint names none")
    vocabulary = _Vocabulary(tokens, sorted(special_ids), sorted(eos_token_ids))
    return library.LLTokenizer(library.TokenizerWrapper(vocabulary), eos_token=vocabulary.eos_token_ids)


class _Vocabulary:
    """A vocabulary in the form that llguidance asks for. How a text is cut into tokens is never asked: nothing is
    forced (`llama.text.grammar`), all ways count alike."""

    def __init__(self, tokens: Sequence[bytes], special_ids: Sequence[int], eos_token_ids: Sequence[int]):
        self.tokens = list(tokens)
        self.special_token_ids = list(special_ids)
        self.eos_token_ids = list(eos_token_ids)
        self.eos_token_id = eos_token_ids[0]
        self.bos_token_id = None

    def __call__(self, text: bytes) -> list[int]:
        return [self.tokens.index(bytes([byte])) for byte in text]
