"""Log likelihoods of choices as transformers and lm-evaluation-harness compute them, and what is right by them."""

import importlib.util
import json
import math

import pytest
import torch
import transformers

from llama.evaluation import EvaluationError
from llama.evaluation.choices import encode, log_likelihoods
from llama.evaluation.grading import ChoiceScore, Question, grade, standard_error

QUESTIONS = [
    Question("Hello. How can", ("I assist you today?", "the moon", "a"), 0),
    Question("Question: 2 + 2?\nAnswer: ", ("4", "four hundred and seventeen of them, or more"), 1),
    Question("The capital of France is\n", ("Paris", "Rome", "wet"), 2),
    Question("", ("Hello", "Good bye"), 0),
    Question("A long one, " * 30, ("yes", "no"), 1),
    Question("To be", ("or not", "to be", "é 🦙"), 1),
]


def expected_sums(theirs, encoded):
    """One choice at a time, each with its context."""
    sums = []
    for choice in encoded.choices:
        logprobs = theirs(torch.tensor([*encoded.context, *choice])[None]).logits[0].log_softmax(dim=-1)
        sums.append(sum(logprobs[len(encoded.context) - 1 + place, token_id].item()
                        for place, token_id in enumerate(choice)))
    return sums


def test_as_transformers_gives_for_each_choice_alone(llm, theirs):
    """Several questions to a step, and one that is longer than a step."""
    encoded = [encode(llm, question) for question in QUESTIONS]
    assert max(question.num_tokens for question in encoded) > 60
    steps = []
    found = log_likelihoods(llm, encoded, steps.append)
    assert sum(steps) == len(QUESTIONS) > len(steps) > 1
    for sums, question in zip(found, encoded, strict=True):
        assert sums == pytest.approx(expected_sums(theirs, question), abs=1e-3)


def test_the_steps_do_not_matter(llm):
    encoded = [encode(llm, question) for question in QUESTIONS]
    alone = [log_likelihoods(llm, [question])[0] for question in encoded]
    for together, one in zip(log_likelihoods(llm, encoded), alone, strict=True):
        assert together == pytest.approx(one, abs=1e-4)


def test_spaces_at_the_end_of_a_context_belong_to_the_choices(llm):
    encoded = encode(llm, Question("To be \n", ("or",), 0))
    assert list(encoded.context) == llm.tokenizer.encode("To be", bos=True)
    assert llm.tokenizer.decode(encoded.choices[0]) == " \n or"


def test_what_the_context_does_not_hold_is_refused(llm):
    with pytest.raises(EvaluationError, match="context and choice 'no' have 131.* tokens, and the model was made for "
                                              "131072; shorten them"):
        encode(llm, Question("0" * 131072, ("no", "yes"), 0))


def test_right_by_the_sum_and_by_the_characters():
    question = Question("?", ("ab", "abcd"), 0)
    assert grade([question], [[-1.0, -1.9]]) == ChoiceScore(1, 1, 0)
    assert grade([question], [[-1.0, -2.1]]) == ChoiceScore(1, 1, 1)
    assert grade([question], [[-2.0, -1.9]]) == ChoiceScore(1, 0, 0)
    assert grade([Question("?", ("a", "b"), 1)], [[-1.0, -1.0]]) == ChoiceScore(1, 0, 0)
    score = ChoiceScore(8, 6, 2)
    assert (score.accuracy, score.accuracy_by_length) == (0.75, 0.25)


@pytest.mark.parametrize("share, count", [(0.75, 8), (0.5, 2), (1.0, 5)])
def test_the_standard_error_is_that_of_a_sample(share, count):
    sample = [1.0] * round(share * count) + [0.0] * round((1 - share) * count)
    assert standard_error(share, count) == pytest.approx(torch.tensor(sample).std().item() / math.sqrt(count))
    assert standard_error(1.0, 1) == 0.0


HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None


@pytest.mark.skipif(not HAS_LM_EVAL, reason="needs the `clients` extra, which has lm_eval")
def test_the_harness_measures_the_same(llm, theirs, random_checkpoint, tmp_path, monkeypatch):
    """Its own splitting of texts, its sums and its accuracies, over transformers' logits."""
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.evaluator import evaluate

    class OverTransformers(TemplateLM):
        backend = "causal"
        eot_token_id = 0
        prefix_token_id = llm.tokenizer.bos_token_id
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(random_checkpoint / "tokenizer.json"))

        def tok_encode(self, string, add_special_tokens=True, **kwargs):
            ids = self.tokenizer.encode(string, add_special_tokens=False)
            return [self.prefix_token_id, *ids] if add_special_tokens else ids

        def _loglikelihood_tokens(self, requests, **kwargs):
            results = []
            for _, context, choice in requests:
                logprobs = theirs(torch.tensor([context + choice])).logits[0].log_softmax(dim=-1)
                rows = logprobs[len(context) - 1:-1]
                results.append((rows[range(len(choice)), choice].sum().item(), False))
            return results

        def loglikelihood_rolling(self, requests, **kwargs): ...

        def generate_until(self, requests, **kwargs): ...

    asked = [question for question in QUESTIONS if question.context]
    lines = [{"context": one.context, "choices": one.choices, "answer": one.answer} for one in asked]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    task = ConfigurableTask(config={
        "task": "small", "dataset_path": "json", "test_split": "test", "output_type": "multiple_choice",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}}, "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}", "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}]})
    theirs_found = evaluate(OverTransformers(), {"small": task}, bootstrap_iters=0, log_samples=True)
    found = log_likelihoods(llm, [encode(llm, question) for question in asked])
    for sums, sample in zip(found, theirs_found["samples"]["small"], strict=True):
        assert sums == pytest.approx([score for [(score, _)] in sample["resps"]], abs=1e-3)
    score, results = grade(asked, found), theirs_found["results"]["small"]
    assert score.accuracy == results["acc,none"] and score.accuracy_by_length == results["acc_norm,none"]
    assert score.accuracy != score.accuracy_by_length
