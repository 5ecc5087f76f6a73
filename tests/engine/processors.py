"""What others make of one row of logits before a token is drawn from it."""

import numpy as np
import torch
from torch import Tensor
from transformers import (MinPLogitsWarper, RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper,
                          TopKLogitsWarper, TopPLogitsWarper)

from llama.engine.request import SamplingParams
from llama.engine.sampler import SampleRow


def kept_distribution(scores: Tensor, wanted: SamplingParams) -> np.ndarray:
    """The probabilities that transformers leaves of one row: [vocab] -> [vocab], float64."""
    scores = TemperatureLogitsWarper(float(wanted.temperature))(None, scores[None].double())
    if wanted.top_k > 0:
        scores = TopKLogitsWarper(wanted.top_k)(None, scores)
    if wanted.top_p < 1:
        scores = TopPLogitsWarper(float(wanted.top_p))(None, scores)
    if wanted.min_p > 0:
        scores = MinPLogitsWarper(float(wanted.min_p))(None, scores)
    return torch.softmax(scores[0], dim=-1).numpy()


def expected_adjustment(logits: Tensor, row: SampleRow) -> Tensor:
    """transformers' repetition penalty, then vLLM's frequency and presence penalties over generated ids, then
    what is added, then what is forbidden: [vocab] -> [vocab]."""
    wanted, seen = row.params, [*row.prompt_ids, *row.counts]
    scores = logits.clone()
    if wanted.repetition_penalty != 1 and seen:
        penalise = RepetitionPenaltyLogitsProcessor(wanted.repetition_penalty)
        scores = penalise(torch.tensor([seen]), scores[None])[0]
    output = torch.zeros(len(logits))
    for token_id, count in row.counts.items():
        output[token_id] = count
    scores = scores - wanted.frequency_penalty * output - wanted.presence_penalty * (output > 0)
    for token_id, bias in wanted.logit_bias.items():
        scores[token_id] += bias
    scores[list(row.banned)] = -torch.inf
    return scores
