"""Log probabilities of tokens and of the likeliest alternatives to them: begun on the device, read when it suits."""

from collections.abc import Iterable, Sequence as Ordered
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llama.engine.request import TokenLogprob
from llama.engine.upload import upload


@dataclass(frozen=True)
class Scores:
    """Scores that are being computed on the device.

    parts: small tensors there, of which the host needs a copy to know the `tokens`: the ids [rows], int64; then, for each
    group of rows, their log probabilities [group], and the best [group, count] and their ids. groups: the rows in each.
    """

    parts: tuple[Tensor, ...]
    groups: tuple[tuple[int, ...], ...]

    def tokens(self, parts: Ordered[Tensor]) -> list[TokenLogprob]:
        """A token a row. parts: copies of this one's on the CPU."""
        ids, *scored = (part.tolist() for part in parts)
        results = [TokenLogprob(token_id, None) for token_id in ids]
        for places, *lists in zip(self.groups, scored[0::3], scored[1::3], scored[2::3]):
            for place, own, values, names in zip(places, *lists):
                results[place] = TokenLogprob(ids[place], own, tuple(zip(names, values)))
        return results


def score(logits: Tensor, ids: Tensor, wanted: Ordered[int | None]) -> Scores:
    """Begin to compute each id's natural-log probability in its row of raw logits [rows, vocab], and the `wanted` number
    of likeliest alternatives. Rows that want None get no probability. ids: [rows], int64, where the logits are."""
    counts = sorted({*wanted} - {None})  # each by itself: which of equals are taken must not hang on what others want
    groups = tuple(tuple(place for place, one in enumerate(wanted) if one == count) for count in counts)
    parts = [ids]
    for count, places, there in zip(counts, groups, upload(logits.device, *map(np.asarray, groups))):
        is_all = len(places) == len(wanted)
        logprobs = torch.log_softmax(logits if is_all else logits[there], dim=-1)
        own = logprobs.gather(1, (ids if is_all else ids[there])[:, None])[:, 0]
        parts += own, *logprobs.topk(min(count, logprobs.shape[-1]))
    return Scores(tuple(parts), groups)


def log_probabilities(logits: Tensor, ids: Ordered[int], wanted: Ordered[int | None]) -> list[TokenLogprob]:
    """The same at once, of ids that the host knows."""
    there, = upload(logits.device, np.asarray(ids, dtype=np.int64))
    scores = score(logits, there, wanted)
    return scores.tokens(read(scores.parts))


def read(parts: Iterable[Tensor]) -> list[Tensor]:
    """Copies on the CPU; waits for what makes them."""
    return [part.cpu() for part in parts]
