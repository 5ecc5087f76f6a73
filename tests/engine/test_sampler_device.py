"""llama.engine.sampler as a GPU needs it: what is drawn is enqueued, and read when it suits.

Without a GPU, tensors without data ("meta") stand for those on one: whatever wants to know a number of theirs fails.
"""

import contextlib

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from llama.engine.request import TokenLogprob
from llama.engine.sampler import NUM_CANDIDATES, SampleRow, draw, log_probabilities, sample
from llama.engine.scores import read, score
from llama.engine.upload import upload
from tests.engine.simulation import params
from tests.engine.test_sampler import random_logits

VOCAB = 3000


class Enqueuing(TorchDispatchMode):
    """Writes down what is computed; refuses a copy to the device for which the host would wait."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket._qualified_op_name.removeprefix("aten::")
        if name == "_to_copy" and (kwargs or {}).get("device") is not None:
            assert kwargs.get("non_blocking"), "a copy waits"
        self.seen.append(name)
        return function(*args, **(kwargs or {}))


class NoLists(TorchFunctionMode):
    """Refuses to make tensors of Python's lists: on a GPU that is a copy that waits, in an index as elsewhere."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        assert function not in (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.cpu), function
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            assert not isinstance(args[1], list)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def nothing_waits():
    """Raises if the host waits for the device. Gives the list of what is enqueued meanwhile."""
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoLists(), Enqueuing() as mode:
            yield mode.seen
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def on_device(logits):
    return logits.to("cuda" if torch.cuda.is_available() else "meta")


MASK = np.packbits(np.arange(VOCAB) % 3 == 0, bitorder="little")
ROWS = [SampleRow(params(**chosen), 7, 0, place, **known) for place, (chosen, known) in enumerate([
    ({}, {}),
    ({"temperature": 0.0, "logprobs": 2}, {}),
    ({"temperature": 0.7}, {}),
    ({"temperature": 0.6, "top_p": 0.9}, {}),
    ({"temperature": 0.6, "top_p": 0.9, "logprobs": 0}, {}),
    ({"temperature": 1.0, "top_k": 40, "min_p": 0.02}, {}),
    ({"temperature": 1.0, "top_k": 2000, "logprobs": 5}, {}),
    ({"repetition_penalty": 1.3}, {"prompt_ids": np.array([1, 5, 9]), "counts": {5: 2}}),
    ({"frequency_penalty": 0.5, "presence_penalty": 1.0}, {"counts": {3: 1, 4: 2}}),
    ({"logit_bias": {17: 4.0}}, {}),
    ({"temperature": 1.0}, {"banned": (2, 3)}),
    ({"temperature": 0.5, "top_p": 0.5}, {"mask": MASK}),
])]


@pytest.mark.parametrize("rows", [*([row] for row in ROWS), ROWS, ROWS[:1] * 9], ids=lambda rows: str(len(rows)))
def test_drawing_waits_for_nothing(rows):
    logits = on_device(random_logits(len(rows), VOCAB))
    with nothing_waits():
        drawn = draw(logits, rows)
    assert drawn.ids.shape == (len(rows),) and drawn.ids.dtype == torch.int64 and drawn.ids.device == logits.device
    assert drawn.parts[0] is drawn.ids
    assert sum(part.nbytes for part in drawn.parts) < 300 * len(rows)


def test_scoring_waits_for_nothing():
    logits, ids = on_device(random_logits(5, VOCAB)), on_device(torch.arange(5))
    with nothing_waits():
        score(logits, ids, [None, 0, 3, 20, 3])


def test_the_likeliest_tokens_are_one_argmax_and_nothing_else():
    logits = on_device(random_logits(9, VOCAB))
    with nothing_waits() as enqueued:
        draw(logits, ROWS[:1] * 9)
    assert enqueued == ["argmax"]


def test_what_is_read_later_is_what_is_drawn_at_once():
    """Though the logits' memory has been used again by then."""
    logits = random_logits(len(ROWS), VOCAB)
    expected = sample(logits, ROWS)
    drawn = draw(logits, ROWS)
    logits.fill_(torch.nan)
    parts = read(drawn.parts)
    assert not drawn.amended(parts)
    assert drawn.tokens(parts) == expected
    assert drawn.ids.tolist() == [token.token_id for token in expected]


@pytest.mark.parametrize("logprobs", [None, 2])
@pytest.mark.parametrize("chosen", [{"top_p": 0.99}, {"min_p": 1e-6}], ids=str)
def test_a_row_flatter_than_its_candidates_is_drawn_again_by_the_host(chosen, logprobs):
    flat, steep = random_logits(1, VOCAB, scale=0.1), random_logits(1, VOCAB, scale=9)
    wanted = params(temperature=1.0, logprobs=logprobs, **chosen)
    rows = [SampleRow(wanted, 5, 0, position) for position in range(40)]
    logits = torch.where(torch.arange(40)[:, None] % 2 == 0, flat, steep)
    drawn, raw = draw(logits, rows), logits.clone()
    logits.fill_(torch.nan)
    parts = read(drawn.parts)
    assert drawn.amended(parts)
    tokens = drawn.tokens(parts)
    ids, first = [token.token_id for token in tokens], drawn.ids.tolist()
    assert ids[1::2] == first[1::2] and ids[0::2] != first[0::2]
    best = flat[0].sort(descending=True).indices
    assert {best.tolist().index(token_id) >= NUM_CANDIDATES for token_id in ids[0::2]} == {True, False}
    assert tokens == log_probabilities(raw, ids, [logprobs] * 40)
    assert tokens == [sample(raw[place:place + 1], [row])[0] for place, row in enumerate(rows)]


def test_without_a_flat_row_nothing_is_amended():
    rows = [SampleRow(params(temperature=1.0, top_p=0.9), 5, 0, position) for position in range(8)]
    drawn = draw(random_logits(8, VOCAB, scale=9), rows)
    assert not drawn.amended(read(drawn.parts))
    limited = [SampleRow(params(temperature=1.0, top_k=NUM_CANDIDATES), 5, 0, 0)]
    assert len(draw(random_logits(1, VOCAB, scale=0.1), limited).parts) == 1


def test_of_equal_candidates_the_lowest_ids_are_kept():
    rows = [SampleRow(params(temperature=1.0, top_k=5), 5, 0, position) for position in range(200)]
    logits = random_logits(1, VOCAB, scale=0.1)[0]
    logits[torch.arange(100, 2000, 10)] = 9
    drawn = {token.token_id for token in sample(logits.expand(200, -1), rows)}
    assert drawn == {100, 110, 120, 130, 140}


def test_uploaded_arrays_are_themselves():
    arrays = (np.arange(3), np.float32([[1.5], [2.5]]), np.uint8([7] * 5), np.array([0.1, 0.2]), np.empty((0, 4)),
              np.arange(12).reshape(3, 4)[:, ::2])
    for array, tensor in zip(arrays, upload(torch.device("cpu"), *arrays), strict=True):
        assert tensor.shape == array.shape and np.array_equal(tensor.numpy(), array) and tensor.numpy().dtype == array.dtype
    assert upload(torch.device("cpu")) == []


def test_scores_are_read_from_copies():
    logits = random_logits(3, 50)
    scores = score(logits, torch.tensor([4, 5, 6]), [None, 2, 0])
    assert scores.tokens(read(scores.parts)) == log_probabilities(logits, [4, 5, 6], [None, 2, 0])
    assert scores.tokens(read(scores.parts))[0] == TokenLogprob(4, None)
