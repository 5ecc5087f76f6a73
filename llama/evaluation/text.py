"""How well a model foresees a text: its perplexity, and how far it is from a reference model.

Perplexity is exp(-mean ln p(token | what stands before it in its window)). `windows` with a stride of the whole
length is the protocol behind the published figures for WikiText-2: the test split's rows joined by two line ends,
one beginning-of-text token before it all, windows of 2048 tokens side by side, their first tokens not scored, the
rest that makes no whole window left out (GPTQ, arXiv:2210.17323, and the papers on quantisation since). With a
shorter stride windows overlap, and a token is scored in the first window that holds it: nearer to what the model
does with a whole text, at length / stride times the cost.
"""

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.engine.engine import SCORED_ROWS
from llama.evaluation import EvaluationError
from llama.runtime import Llama


@dataclass(frozen=True)
class Window:
    """Ids that the model reads together. The first `num_context` of them, at least one, are given, the others
    scored."""

    ids: tuple[int, ...]
    num_context: int = 1

    @property
    def num_scored(self) -> int:
        """Tokens whose probability counts."""
        return len(self.ids) - self.num_context


def windows(ids: Sequence[int], length: int, stride: int | None = None) -> list[Window]:
    """A text cut into windows of `length` ids, each beginning `stride` after the last; None: side by side.

    A text that is shorter than a window is one. Raises EvaluationError.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length or length < 2:
        raise EvaluationError(f"windows of {length} tokens at a stride of {stride} do not cover a text; give a "
                              "length from 2 up and a stride from 1 to the length")
    if len(ids) < 2:
        raise EvaluationError(f"the text has {len(ids)} tokens, and nothing to foresee; give a longer one")
    starts = range(0, max(len(ids) - length, 0) + 1, stride)
    return [Window(tuple(ids[start:start + length]), max(length - stride, 1) if start else 1) for start in starts]


def predictions(llm: Llama, window: Window) -> Iterator[tuple[Tensor, Tensor]]:
    """The residual streams [rows, hidden] that foresee a window's scored tokens, and those tokens [rows], at most
    SCORED_ROWS at a time."""
    ids = torch.tensor(window.ids, device=llm.model.device)
    start = 0  # where a chunk begins; its row r foresees the token at start + r + 1
    for chunk in llm.hidden(window.ids):
        first = max(window.num_context - 1 - start, 0)
        rows = chunk[first:len(ids) - 1 - start]
        targets = ids[start + first + 1:start + first + 1 + len(rows)]
        start += len(chunk)
        if len(rows):
            yield from zip(rows.split(SCORED_ROWS), targets.split(SCORED_ROWS))


class Reference:
    """What a reference model makes of windows: the residual streams after its last block, in a file.

    Divergences need whole rows of logits, which would be 250 kB a token; the streams are 8 kB in the 8B shape, and
    norm and head, which the reference keeps, make the same logits of them again. So the divergence is exact, and
    two models are never in memory together. Raises OSError where the temporary directory has no room.
    """

    def __init__(self, llm: Llama, texts: Sequence[Window], advance: Callable[[int], None] = lambda count: None):
        """Reads all windows, and takes the model: `llm` has no blocks afterwards. advance: told of each window's
        scored tokens."""
        self._file = tempfile.TemporaryFile()
        for window in texts:
            for hidden, _ in predictions(llm, window):
                self._file.write(hidden.cpu().contiguous().view(torch.uint8).numpy())
            advance(window.num_scored)
        self._model = llm.model
        self._model.blocks = torch.nn.ModuleList()

    def rewind(self) -> None:
        """Begin again at the first window."""
        self._file.seek(0)

    def logits(self, num_rows: int) -> Tensor:
        """The logits of the next rows, in the order of reading: [num_rows, vocab], float32."""
        model = self._model
        num_bytes = num_rows * model.config.hidden_size * model.dtype.itemsize
        rows = torch.frombuffer(bytearray(self._file.read(num_bytes)), dtype=model.dtype)
        with torch.inference_mode():
            return model.logits(rows.view(num_rows, -1).to(model.device))


@dataclass(frozen=True)
class Agreement:
    """A model beside its reference, token by token. divergences: KL(reference || model) of the next token's
    distribution, in nats: [tokens], float64. num_same: tokens before which both hold the same token for likeliest.
    """

    divergences: Tensor
    num_same: int
    reference_nll: float

    @property
    def mean(self) -> float:
        """The mean divergence."""
        return self.divergences.mean().item()

    def percentile(self, percent: float) -> float:
        """The divergence below which that share of all tokens lies; 100: the largest."""
        ordered = self.divergences.sort().values
        return ordered[max(math.ceil(len(ordered) * percent / 100) - 1, 0)].item()

    @property
    def same_top(self) -> float:
        """The share of tokens before which both hold the same token for likeliest."""
        return self.num_same / len(self.divergences)

    @property
    def reference_perplexity(self) -> float:
        """The reference's own."""
        return math.exp(self.reference_nll / len(self.divergences))


@dataclass(frozen=True)
class TextScore:
    """What came of a text. nll: the sum of -ln p over `num_tokens` scored tokens."""

    num_tokens: int
    nll: float
    agreement: Agreement | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean."""
        return math.exp(self.nll / self.num_tokens)


def score_text(llm: Llama, texts: Sequence[Window], reference: Reference | None = None,
               advance: Callable[[int], None] = lambda count: None) -> TextScore:
    """Perplexity over windows; with a Reference that has read the same ones, agreement with it too.

    Distributions are float64. advance: told of each window's scored tokens as they are done.
    """
    num_tokens, nll, reference_nll, num_same = 0, 0.0, 0.0, 0
    divergences: list[Tensor] = []
    if reference is not None:
        reference.rewind()
    for window in texts:
        for hidden, targets in predictions(llm, window):
            logits = llm.model.logits(hidden)
            logprobs = logits.double().log_softmax(dim=-1)  # [rows, vocab]
            nll -= _sum_at(logprobs, targets)
            num_tokens += len(targets)
            if reference is not None:
                theirs = reference.logits(len(targets))
                num_same += int((theirs.argmax(dim=-1) == logits.argmax(dim=-1)).sum())
                expected = theirs.double().log_softmax(dim=-1)
                reference_nll -= _sum_at(expected, targets)
                divergences.append((expected.exp() * (expected - logprobs)).sum(dim=-1).cpu())
        advance(window.num_scored)
    agreement = Agreement(torch.cat(divergences), num_same, reference_nll) if divergences else None
    return TextScore(num_tokens, nll, agreement)


def _sum_at(logprobs: Tensor, targets: Tensor) -> float:
    return logprobs.gather(1, targets[:, None]).sum().item()
