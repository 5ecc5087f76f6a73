"""Perplexity by the published protocols, as transformers and as float64 computes them; divergences by definition."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from llama import Llama
from llama.checkpoint.load import load_model
from llama.evaluation import EvaluationError
from llama.evaluation.text import Reference, Window, score_text, windows
from tests.reference import logits as float64_logits
from tools.make_checkpoint import main as make_checkpoint


def random_ids(count, seed=0):
    return torch.randint(0, 1280, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def test_windows_side_by_side():
    assert windows(range(11), 4) == [Window((0, 1, 2, 3)), Window((4, 5, 6, 7))]
    assert windows(range(3), 4) == windows(range(3), 3) == [Window((0, 1, 2))]
    assert [window.num_scored for window in windows(range(8), 4)] == [3, 3]


@pytest.mark.parametrize("length, stride", [(4, 1), (4, 3), (7, 2), (5, 4)])
def test_overlapping_windows_score_each_token_once_with_all_the_context_there_is(length, stride):
    seen = []
    for number, window in enumerate(windows(range(20), length, stride)):
        assert window.ids == tuple(range(number * stride, number * stride + length))
        seen += window.ids[window.num_context:]
    assert seen == list(range(1, 1 + len(seen))) and 20 - stride < 1 + len(seen) <= 20


@pytest.mark.parametrize("ids, length, stride, message", [
    ([5], 4, 4, "the text has 1 tokens, and nothing to foresee"),
    (range(9), 1, 1, "windows of 1 tokens"), (range(9), 4, 5, "at a stride of 5 do not cover a text"),
    (range(9), 4, 0, "give a length from 2 up and a stride from 1 to the length")])
def test_what_no_windows_cover(ids, length, stride, message):
    with pytest.raises(EvaluationError, match=message):
        windows(ids, length, stride)


@pytest.mark.parametrize("length", [7, 59, 60, 61, 200])
def test_perplexity_as_papers_on_quantisation_compute_it(llm, theirs, length):
    """Whole windows side by side; the mean over windows of transformers' own loss."""
    ids = random_ids(131)
    text = torch.tensor(ids)[None]
    num_windows = max(len(ids) // length, 1)
    losses = [theirs(window, labels=window).loss.item()
              for window in (text[:, i * length:(i + 1) * length] for i in range(num_windows))]
    score = score_text(llm, windows(ids, length))
    assert score.num_tokens == num_windows * (min(length, len(ids)) - 1)
    assert math.log(score.perplexity) == pytest.approx(np.mean(losses), abs=1e-5)


@pytest.mark.parametrize("length, stride", [(40, 13), (130, 30), (30, 29)])
def test_perplexity_by_a_sliding_window(llm, theirs, length, stride):
    """What was scored before is masked from transformers' loss."""
    ids = random_ids(length + 3 * stride)
    total = count = 0
    for number in range(4):
        window = torch.tensor(ids[number * stride:number * stride + length])[None]
        labels = window.clone()
        if number:
            labels[:, :-stride] = -100
        num_scored = stride if number else length - 1
        total += theirs(window, labels=labels).loss.item() * num_scored
        count += num_scored
    score = score_text(llm, windows(ids, length, stride))
    assert (score.num_tokens, score.nll) == (count, pytest.approx(total, rel=1e-5))


def test_perplexity_in_float64(llm, theirs):
    ids = random_ids(30, seed=4)
    config = theirs.config.to_dict()
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling["rope_theta"], "rope_scaling": scaling}
    logits = float64_logits(theirs.state_dict(), config, ids)
    expected = F.cross_entropy(logits[:-1], torch.tensor(ids[1:])).exp().item()
    assert score_text(llm, windows(ids, 30)).perplexity == pytest.approx(expected, rel=1e-5)


@pytest.fixture
def pair(random_checkpoint, tmp_path):
    """A model and a reference with half the layers, in bfloat16: (Llama, Llama)."""
    make_checkpoint([str(tmp_path), "--shape", "tiny", "--vocab-size", "1280", "--dtype", "bfloat16", "--layers", "1",
                     "--tokenizer", "llama/demo"])
    options = {"limits": {"step_tokens": 60}, "kv_cache_bytes": 1 << 20}
    return Llama.load(random_checkpoint, **options), Llama.load(tmp_path, **options)


@pytest.mark.parametrize("length, stride", [(50, 50), (50, 20)])
def test_agreement_is_that_of_whole_rows_of_logits(pair, length, stride):
    llm, other = pair
    ids, rows, targets = random_ids(110), [], []
    texts = windows(ids, length, stride)
    for window in texts:
        whole = [one.logits(window.ids)[window.num_context - 1:-1].double() for one in (other, llm)]
        rows.append([logits.log_softmax(dim=-1) for logits in whole])
        targets += window.ids[window.num_context:]
    theirs, ours = (torch.cat(part) for part in zip(*rows))
    expected = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(dim=-1)
    done = []
    score = score_text(llm, texts, Reference(other, texts, done.append), done.append)
    agreement = score.agreement
    torch.testing.assert_close(agreement.divergences, expected, rtol=1e-4, atol=1e-6)
    assert agreement.mean == pytest.approx(expected.mean().item(), rel=1e-4) and agreement.mean > 0.01
    assert agreement.same_top == pytest.approx((theirs.argmax(1) == ours.argmax(1)).double().mean().item())
    assert 0 < agreement.same_top < 0.5
    assert agreement.reference_perplexity == pytest.approx(F.nll_loss(theirs, torch.tensor(targets)).exp().item(), 1e-4)
    assert agreement.reference_perplexity != pytest.approx(score.perplexity, 1e-3)
    assert sum(done) == 2 * len(targets)
    for percent in (50, 90, 99.9, 100):
        assert agreement.percentile(percent) == np.percentile(agreement.divergences, percent, method="inverted_cdf")


def test_a_model_agrees_with_itself(random_checkpoint, llm):
    """To the bit: the reference's logits are computed again from its residual streams."""
    texts = windows(random_ids(150), 60)
    again = Llama.load(random_checkpoint, limits={"step_tokens": 60}, kv_cache_bytes=1 << 20)
    reference = Reference(again, texts)
    for _ in range(2):  # it may be asked any number of times
        agreement = score_text(llm, texts, reference).agreement
        assert agreement.divergences.abs().max() == 0
        assert agreement.same_top == 1
        assert len(agreement.divergences) == 118


def test_the_reference_gives_its_blocks_back(random_checkpoint):
    llm = Llama.load(random_checkpoint, kv_cache_bytes=1 << 20)
    Reference(llm, windows(random_ids(20), 20))
    left = {name.split(".")[0] for name, _ in llm.model.named_parameters()}
    assert left == {name.split(".")[0] for name, _ in load_model(random_checkpoint).named_parameters()} - {"blocks"}
