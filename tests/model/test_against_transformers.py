"""The model against transformers' LlamaForCausalLM and the equations, in every way a step can be cut."""

from functools import cache

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from llama.model.ragged import RaggedBatch, Segment
from llama.model.transformer import Llama
from tests import reference
from tests.model.pairs import SHAPES, Pages, difference, hugging_face, ours, plain_config, random_ids

TOLERANCE = 1e-4  # absolute, on logits of size 5 or so, in float32
IDS = random_ids(45)


@pytest.fixture(scope="module", params=list(SHAPES))
def pair(request):
    """transformers' model, ours, and transformers' logits of IDS."""
    theirs = hugging_face(SHAPES[request.param])
    return theirs, ours(theirs), theirs(torch.tensor([IDS])).logits[0]


def test_a_whole_sequence_agrees_with_transformers(pair):
    _, model, expected = pair
    assert expected.std() > 1, "logits this small would agree by themselves"
    assert difference(model(RaggedBatch.whole(torch.tensor(IDS))), expected) < TOLERANCE


def test_a_whole_sequence_agrees_with_the_equations(pair):
    theirs, model, _ = pair
    expected = reference.logits(theirs.state_dict(), plain_config(theirs), IDS)
    assert difference(model(RaggedBatch.whole(torch.tensor(IDS))), expected) < TOLERANCE


def test_prefill_agrees_with_transformers(pair):
    _, model, expected = pair
    assert difference(Pages(model, 16, {"a": [0, 1, 2]}).step(("a", IDS)), expected) < TOLERANCE


def test_token_by_token_decode_agrees_with_transformers(pair):
    _, model, expected = pair
    pages = Pages(model, 16, {"a": [0, 1, 2]})
    logits = torch.cat([pages.step(("a", [token])) for token in IDS])
    assert difference(logits, expected) < TOLERANCE


@pytest.mark.parametrize("table", [[0, 1, 2, 3, 4, 5], [5, 3, 4, 0, 7, 2]], ids=["one run", "fragmented"])
def test_a_prompt_cut_into_uneven_chunks_agrees_with_transformers(pair, table):
    _, model, expected = pair
    pages = Pages(model, 8, {"a": table})
    cuts = [0, 1, 8, 9, 24, 43, 44, 45]  # chunks of one token, of a block, across blocks; the last two decode
    logits = [pages.step(("a", IDS[first:last])) for first, last in zip(cuts, cuts[1:])]
    assert difference(torch.cat(logits), expected) < TOLERANCE


def test_prefill_chunks_and_decodes_share_a_step(pair):
    _, model, expected = pair
    pages = Pages(model, 4, {"a": [9, 3, 4, 5, 0], "b": [12, 1, 11], "c": [2, 7, 6, 8, 10]})
    seen = {name: [] for name in "abc"}
    plan = [{"a": 7}, {"a": 1, "b": 5}, {"b": 1, "a": 1, "c": 13}, {"c": 4, "a": 6, "b": 1},
            {"a": 1, "b": 2, "c": 1}]
    for step in plan:
        parts = [(name, IDS[pages.lengths[name]:pages.lengths[name] + count]) for name, count in step.items()]
        for name, rows in zip(step, pages.step(*parts).split(list(step.values()))):
            seen[name].append(rows)
    for name, rows in seen.items():
        assert difference(torch.cat(rows), expected[:pages.lengths[name]]) < TOLERANCE, name


@settings(max_examples=20)
@given(st.data())
def test_any_interleaving_of_any_sequences_gives_the_logits_of_each_alone(data):
    model = interleaved_model()
    block_size = data.draw(st.sampled_from([1, 3, 8]), "block size")
    names = "abc"[:data.draw(st.integers(1, 3), "sequences")]
    lengths = {name: data.draw(st.integers(1, 20), f"length of {name}") for name in names}
    free = iter(data.draw(st.permutations(range(60)), "blocks"))
    pages = Pages(model, block_size, {name: [next(free) for _ in range(-(-lengths[name] // block_size))]
                                      for name in names})
    ids = {name: random_ids(20, seed) for seed, name in enumerate(names)}
    alone = {name: model(RaggedBatch.whole(torch.tensor(ids[name]))) for name in names}
    while pages.lengths != lengths:
        left = {name: lengths[name] - pages.lengths[name] for name in names}
        unfinished = st.sampled_from([name for name in names if left[name]])
        chosen = data.draw(st.lists(unfinished, min_size=1, unique=True), "step")
        starts = {name: pages.lengths[name] for name in chosen}
        ends = {name: starts[name] + data.draw(st.integers(1, left[name]), "tokens") for name in chosen}
        logits = pages.step(*((name, ids[name][starts[name]:ends[name]]) for name in chosen))
        expected = torch.cat([alone[name][starts[name]:ends[name]] for name in chosen])
        assert difference(logits, expected) < TOLERANCE


@cache
def interleaved_model() -> Llama:
    """One model for all examples: hypothesis does not take a fixture that is made anew for each."""
    return ours(hugging_face(SHAPES["8:1 of 32, tied"]))


def test_greedy_generation_is_identical_to_transformers(pair):
    theirs, model, _ = pair
    prompt = IDS[:11]
    expected = theirs.generate(torch.tensor([prompt]), max_new_tokens=64, do_sample=False, eos_token_id=None,
                               pad_token_id=0)[0, len(prompt):].tolist()
    assert len(expected) == 64 and len(set(expected)) > 8, "a loop of few tokens would prove little"
    pages = Pages(model, 8, {"a": [*range(9, -1, -1)]})
    logits = pages.step(("a", prompt), logit_rows=[len(prompt) - 1])
    generated = [logits.argmax().item()]
    while len(generated) < 64:
        generated.append(pages.step(("a", generated[-1:])).argmax().item())
    assert generated == expected


def test_whole_sequences_of_one_length_are_a_batch(pair):
    _, model, expected = pair
    others = random_ids(45, seed=9)
    logits = model(RaggedBatch.whole(torch.tensor([IDS, others])))
    assert difference(logits[:45], expected) < TOLERANCE
    assert difference(logits[45:], model(RaggedBatch.whole(torch.tensor(others)))) < TOLERANCE


def test_whole_sequences_of_unequal_lengths_do_not_see_each_other(pair):
    _, model, expected = pair
    lengths = [9, 30, 1, 45]
    batch = RaggedBatch(torch.tensor([token for length in lengths for token in IDS[:length]]),
                        torch.cat([torch.arange(length) for length in lengths]),
                        tuple(Segment(0, length) for length in lengths))
    for rows in model(batch).split(lengths):
        assert difference(rows, expected[:len(rows)]) < TOLERANCE


def test_a_later_token_never_changes_an_earlier_one(pair):
    _, model, _ = pair
    changed = IDS[:30] + random_ids(15, seed=5)
    for run in (lambda ids: model(RaggedBatch.whole(torch.tensor(ids))),
                lambda ids: Pages(model, 16, {"a": [0, 1, 2]}).step(("a", ids))):
        before, after = run(IDS), run(changed)
        assert difference(before[:30], after[:30]) < TOLERANCE
        assert difference(before[30:], after[30:]) > 0.1


# Tolerances, as shares of the logits' own spread: of any difference from transformers, and of our mean error.
@pytest.mark.parametrize("dtype, largest, mean", [(torch.bfloat16, 0.25, 0.03), (torch.float16, 0.03, 0.004)])
def test_half_precision_is_as_near_the_equations_as_transformers_is(pair, dtype, largest, mean):
    theirs, _, _ = pair
    half = transformers.LlamaForCausalLM(theirs.config).eval().requires_grad_(False)
    half.load_state_dict(theirs.state_dict())
    half = half.to(dtype)
    model = ours(half)
    exact = reference.logits(half.state_dict(), plain_config(half), IDS)
    their_logits = half(torch.tensor([IDS])).logits[0]
    their_error = root_mean_square(their_logits - exact)
    pages = Pages(model, 8, {"a": [5, 3, 4, 0, 7, 2]})
    paths = {"whole": model(RaggedBatch.whole(torch.tensor(IDS))),
             "chunks": torch.cat([pages.step(("a", part)) for part in (IDS[:20], IDS[20:44], IDS[44:])])}
    for path, logits in paths.items():
        assert difference(logits, their_logits) < largest * exact.std(), path
        assert root_mean_square(logits - exact) < mean * exact.std(), path
        assert root_mean_square(logits - exact) < 1.05 * their_error, path


def root_mean_square(errors: torch.Tensor) -> float:
    """Over all logits."""
    return errors.double().square().mean().sqrt().item()
