"""Multiple-choice questions, and how many of them log likelihoods answer right. Free of torch.

The choices of a question are compared by their log likelihoods, and by these for each of a choice's characters,
which is fairer to long ones: `acc` and `acc_norm` of lm-evaluation-harness.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Question:
    """A context, the texts that may follow it after a space, and which of them is right, counted from 0."""

    context: str
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True)
class ChoiceScore:
    """Questions answered right, by the sum and by the sum for each character, out of `num_questions`."""

    num_questions: int
    num_right: int
    num_right_by_length: int

    @property
    def accuracy(self) -> float:
        """The harness's `acc`."""
        return self.num_right / self.num_questions

    @property
    def accuracy_by_length(self) -> float:
        """The harness's `acc_norm`."""
        return self.num_right_by_length / self.num_questions


def standard_error(share: float, count: int) -> float:
    """Of a share of so many questions; 0 for a single one."""
    return math.sqrt(share * (1 - share) / (count - 1)) if count > 1 else 0.0


def grade(questions: Sequence[Question], likelihoods: Sequence[Sequence[float]]) -> ChoiceScore:
    """How many answers are the right ones; of choices that are equally likely the first is taken."""
    right = by_length = 0
    for question, sums in zip(questions, likelihoods, strict=True):
        means = [total / len(choice) for total, choice in zip(sums, question.choices, strict=True)]
        right += sums.index(max(sums)) == question.answer
        by_length += means.index(max(means)) == question.answer
    return ChoiceScore(len(questions), right, by_length)
