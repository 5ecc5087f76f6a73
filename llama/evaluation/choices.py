"""What a model thinks of the choices of multiple-choice questions: a log likelihood each.

As lm-evaluation-harness computes it: the sum over the choice's tokens, given the context. A context's tokens are
those that it has alone, after one beginning-of-text token; spaces at its end belong to the choices.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llama.engine.engine import SCORED_ROWS
from llama.evaluation import EvaluationError
from llama.evaluation.grading import Question
from llama.model.cache import KVCache
from llama.model.ragged import RaggedBatch, Segment
from llama.runtime import Llama


@dataclass(frozen=True)
class EncodedQuestion:
    """The ids of a context, and of each choice."""

    context: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]

    @property
    def num_tokens(self) -> int:
        """What the model has to read: the context once, and every choice."""
        return len(self.context) + sum(map(len, self.choices))


def encode(llm: Llama, question: Question) -> EncodedQuestion:
    """A question's ids. Raises EvaluationError where a choice has none, or the context does not hold it."""
    context = question.context.rstrip()
    spaces = question.context[len(context):]
    context_ids = tuple(llm.tokenizer.encode(context, bos=True))
    choices = []
    for choice in question.choices:
        whole = llm.tokenizer.encode(f"{context}{spaces} {choice}", bos=True)
        choices.append(tuple(whole[len(context_ids):]))
        if len(whole) > llm.config.max_position_embeddings:
            raise EvaluationError(f"context and choice {choice!r} have {len(whole)} tokens, and the model was made "
                                  f"for {llm.config.max_position_embeddings}; shorten them")
        if not choices[-1]:
            raise EvaluationError(f"the choice {choice!r} becomes part of the context's last token; change one of "
                                  "them")
    return EncodedQuestion(context_ids, tuple(choices))


def log_likelihoods(llm: Llama, questions: Sequence[EncodedQuestion],
                    advance: Callable[[int], None] = lambda count: None) -> list[list[float]]:
    """The natural-log likelihood of every choice of every question. advance: told of each step's questions.

    As many questions to a step as it has tokens, in their order. In a step, a question is a tree: its context is
    read once, and each choice sees it and itself.
    """
    results: list[list[float]] = []
    for group in _groups(questions, llm.engine.scheduler.limits.step_tokens):
        results += _step(llm, group)
        advance(len(group))
    return results


def _groups(questions: Sequence[EncodedQuestion], step_tokens: int) -> Iterator[list[EncodedQuestion]]:
    """Neighbours that together have at most `step_tokens`; a question that has more is alone."""
    group: list[EncodedQuestion] = []
    room = step_tokens
    for question in questions:
        if group and question.num_tokens > room:
            yield group
            group, room = [], step_tokens
        group.append(question)
        room -= question.num_tokens
    if group:
        yield group


@torch.inference_mode()
def _step(llm: Llama, questions: Sequence[EncodedQuestion]) -> list[list[float]]:
    """One step over all choices of some questions."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    rows: list[int] = []  # that foresee a choice's tokens
    targets: list[int] = []
    for question in questions:
        seen = len(ids), len(ids) + len(question.context)
        ids += question.context
        positions += range(len(question.context))
        segments.append(Segment(0, len(question.context), (seen,)))
        for choice in question.choices:
            own = len(ids), len(ids) + len(choice)
            rows += [seen[1] - 1, *range(own[0], own[1] - 1)]
            targets += choice
            ids += choice
            positions += range(len(question.context), len(question.context) + len(choice))
            segments.append(Segment(len(question.context), len(choice), (seen, own)))
    device = llm.model.device
    slots = torch.arange(len(ids), device=device)
    batch = RaggedBatch(torch.tensor(ids, device=device), torch.tensor(positions, device=device), tuple(segments),
                        slots)
    cache = KVCache(llm.config, len(ids), 1, llm.model.dtype, device)
    scores = iter(_scores(llm, llm.model.hidden(batch, cache)[rows], targets))
    return [[math.fsum(next(scores) for _ in choice) for choice in question.choices] for question in questions]


def _scores(llm: Llama, hidden: Tensor, targets: Sequence[int]) -> list[float]:
    """The log probability of each target after its residual stream; hidden: [targets, hidden]."""
    scores: list[float] = []
    for rows, wanted in zip(hidden.split(SCORED_ROWS), torch.tensor(targets, device=hidden.device).split(SCORED_ROWS)):
        logprobs = llm.model.logits(rows).log_softmax(dim=-1)
        scores += logprobs.gather(1, wanted[:, None])[:, 0].tolist()
    return scores
