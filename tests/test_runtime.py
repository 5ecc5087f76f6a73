"""The Python interface, on the demo model: what transformers computes, draws and renders from the same files."""

import io
import threading

import pytest
import torch
import transformers

import llama.runtime
from llama import Completion, Llama, SamplingParams
from llama.checkpoint.pull import DEMO
from llama.engine.request import RequestError
from llama.strict_json import ConfigError
from tests.commands.small import make_checkpoint

HELLO = [{"role": "user", "content": "Hello"}]
SUM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 17 + 25?"}]
TOLERANCE = 1e-4  # absolute, on logits of size 19 at most


@pytest.fixture(scope="module")
def llm():
    return Llama.load(dtype="float32")


@pytest.fixture(scope="module")
def theirs():
    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def their_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def expected(theirs, their_tokenizer):
    """What transformers continues ids with: the new ids, their text, and that up to its end."""
    def generate(ids, max_tokens=40):
        out = theirs.generate(torch.tensor([ids]), max_new_tokens=max_tokens, do_sample=False, pad_token_id=0)
        new = out[0, len(ids):].tolist()
        return tuple(new), their_tokenizer.decode(new, skip_special_tokens=True)

    return generate


def random_ids(count):
    return torch.randint(0, 1024, (count,), generator=torch.Generator().manual_seed(count)).tolist()


# ---- measuring ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[512, 100], ids=["two chunks", "many chunks"])
def measuring(request):
    return Llama.load(dtype="float32", limits={"step_tokens": request.param})


def test_logits_are_those_of_transformers(measuring, theirs):
    ids = random_ids(700)
    logits = measuring.logits(ids)
    assert (logits.shape, logits.dtype) == ((700, measuring.config.vocab_size), torch.float32)
    assert (logits - theirs(torch.tensor([ids])).logits[0]).abs().max() < TOLERANCE


def test_scores_are_the_log_probabilities_of_transformers(measuring, theirs):
    ids = random_ids(700)
    logprobs = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    wanted = logprobs[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    scores = measuring.score(ids)
    assert (scores.shape, scores.dtype) == ((699,), torch.float32)
    assert (scores - wanted).abs().max() < TOLERANCE


def test_one_id_has_logits_and_no_score(llm):
    assert llm.logits([5]).shape == (1, llm.config.vocab_size)
    assert llm.score([5]).shape == (0,)


@pytest.mark.parametrize("ids, message", [([], "0 ids; give at least one, and at most 2048"),
                                          ([1] * 2049, "2049 ids; give at least one, and at most 2048"),
                                          ([3, 1280], "the id 1280 is outside the vocabulary of 1280 tokens"),
                                          ([-1], "the id -1 is outside the vocabulary of 1280 tokens")])
def test_ids_that_cannot_be_measured_are_refused(llm, ids, message):
    for measure in (llm.logits, llm.score):
        with pytest.raises(RequestError) as caught:
            measure(ids)
        assert (caught.value.field, str(caught.value)) == ("prompt", message)


# ---- asking ---------------------------------------------------------------------------------------------


def test_a_text_is_continued_as_transformers_does(llm, expected, their_tokenizer):
    completion = llm.generate("1, 2, 3,", SamplingParams(temperature=0, max_tokens=40))
    prompt = their_tokenizer("1, 2, 3,").input_ids
    ids, text = expected(prompt)
    assert isinstance(completion, Completion)
    assert (completion.ids, completion.text) == (ids, text)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", None)
    assert (completion.logprobs, completion.prompt_logprobs) == (None, None)
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(ids))
    assert usage.total_tokens == len(prompt) + len(ids)


def test_a_list_of_texts_and_ids_is_answered_in_its_order(llm, expected, their_tokenizer):
    prompts = ["1, 2, 3,", their_tokenizer("Monday, Tuesday,").input_ids, "Friday, Saturday,"]  # the last ends first
    found = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=20))
    encoded = [their_tokenizer(prompt).input_ids if isinstance(prompt, str) else prompt for prompt in prompts]
    assert [(one.ids, one.text) for one in found] == [expected(ids, 20) for ids in encoded]
    assert len(found[2].ids) < len(found[0].ids)
    assert llm.generate([]) == []


def test_ids_are_taken_as_they_are(llm, expected):
    ids = random_ids(9)
    assert llm.generate(ids, SamplingParams(max_tokens=5, temperature=0)).ids == expected(ids, 5)[0]


@pytest.mark.parametrize("messages, options", [(HELLO, {}), (SUM, {}), (HELLO, {"date_string": "01 Jan 2030"})])
def test_a_conversation_is_answered_as_transformers_does(llm, expected, their_tokenizer, messages, options):
    ids = their_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False, **options)
    assert llm.encode_chat(messages, **options) == ids
    completion = llm.chat(messages, **options)  # greedy, as generation_config.json has it
    assert (completion.ids, completion.text) == expected(ids)


def test_the_deltas_add_up_to_the_completion(llm):
    for prompt, complete in (("1, 2, 3,", llm.generate), (SUM, llm.chat), (llm.encode("2 + 3 ="), llm.generate)):
        deltas = list(llm.stream(prompt, SamplingParams(max_tokens=40)))
        completion = complete(prompt, SamplingParams(max_tokens=40))
        assert "".join(delta.text for delta in deltas) == completion.text
        assert tuple(token_id for delta in deltas for token_id in delta.ids) == completion.ids
        assert {len(delta.ids) for delta in deltas} <= {0, 1}
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [completion.finish_reason]


def test_a_stop_string_ends_it_before_that(llm):
    completion = llm.generate("1, 2, 3,", SamplingParams(stop=["6, 7"]))
    assert (completion.text, completion.finish_reason, completion.stop_reason) == (" 4, 5, ", "stop", "6, 7")
    assert not llm.engine.has_work


def test_a_stop_string_ends_one_sample_and_not_the_others(llm):
    params = SamplingParams(n=3, seed=7, temperature=1.5, max_tokens=60, stop=["e"], ignore_eos=True)
    stream = llm.stream("Once upon a time", params)
    stopped = next(delta for delta in stream if delta.stop_reason == "e")
    assert {sequence.index for sequence in llm.engine.scheduler.running} == {0, 1, 2} - {stopped.index}
    stream.close()


def test_several_samples_are_a_list_and_a_seed_repeats_them(llm):
    params = SamplingParams(n=3, seed=7, temperature=1.5, max_tokens=8)
    samples = llm.generate("Once upon a time", params)
    assert [len(sample.ids) for sample in samples] == [8, 8, 8]
    assert len({sample.ids for sample in samples}) > 1
    both = llm.generate(["2 + 2 =", "Once upon a time"], params)
    assert [sample.ids for sample in both[1]] == [sample.ids for sample in samples]


def test_log_probabilities_are_the_scores(llm):
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=2, prompt_logprobs=0)
    completion = llm.generate("2 + 3 =", params)
    prompt = llm.encode("2 + 3 =")
    scores = llm.score([*prompt, *completion.ids]).tolist()
    assert completion.prompt_logprobs[0].logprob is None
    found = [*completion.prompt_logprobs[1:], *completion.logprobs]
    assert [one.token_id for one in found] == [*prompt[1:], *completion.ids]
    assert [one.logprob for one in found] == pytest.approx(scores, abs=TOLERANCE)
    assert all(one.top[0][0] == one.token_id and len(one.top) == 2 for one in completion.logprobs)


def test_many_requests_come_as_they_end(llm):
    long, short = SamplingParams(max_tokens=12, ignore_eos=True), SamplingParams(max_tokens=2)
    requests = [(llm.encode("1, 2,"), long), (llm.encode("2 + 3 ="), short)]
    assert [(place, len(samples[0].ids)) for place, samples in llm.complete(requests)] == [(1, 2), (0, 12)]


def test_what_is_left_alone_is_cancelled(llm):
    stream = llm.stream("1, 2,", SamplingParams(ignore_eos=True))
    while not next(stream).ids:
        pass
    assert llm.engine.has_work
    stream.close()
    assert not llm.engine.has_work
    results = llm.complete((llm.encode(text), SamplingParams(max_tokens=count, ignore_eos=True))
                           for text, count in (("1,", 1), ("2,", 500)))
    next(results)
    assert llm.engine.has_work
    results.close()
    assert not llm.engine.has_work


def test_several_threads_get_what_each_gets_alone(llm):
    prompts = [f"{first}, {first + 1}, {first + 2}," for first in range(10, 60, 10)]
    alone = [llm.generate(prompt, SamplingParams(max_tokens=20)).ids for prompt in prompts]
    together = [None] * len(prompts)

    def ask(place):
        deltas = llm.stream(prompts[place], SamplingParams(max_tokens=20))
        together[place] = tuple(token_id for delta in deltas for token_id in delta.ids)

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(prompts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert together == alone


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_bar_is_drawn_for_many_prompts_on_a_terminal(llm, monkeypatch, is_terminal):
    stream = io.StringIO()
    stream.isatty = lambda: is_terminal
    monkeypatch.setattr("sys.stderr", stream)
    llm.generate("2 + 3 =", SamplingParams(max_tokens=1))
    assert stream.getvalue() == ""
    llm.generate(["2 + 3 =", "3 + 2 ="], SamplingParams(max_tokens=1))
    assert ("\rgenerating [#########################] 2/2 prompts, " in stream.getvalue()) == is_terminal


# ---- loading --------------------------------------------------------------------------------------------


def test_public_names_are_found_where_they_are_said_to_be():
    assert {"Llama", "Completion", "SamplingParams", "LlamaConfig"} <= set(llama.__all__)
    assert all(getattr(llama, name).__name__ == name for name in llama.__all__)
    with pytest.raises(AttributeError, match="module 'llama' has no attribute 'nothing'"):
        llama.nothing


def test_dtype_context_and_guesses_are_as_asked_for(expected, their_tokenizer):
    llm = Llama.load(DEMO, dtype="bfloat16", device="cpu", max_context=64, kv_cache_bytes=1 << 20, prompt_lookup=True,
                     deterministic=True)
    assert (llm.model.dtype, llm.engine.cache.keys.dtype) == (torch.bfloat16, torch.bfloat16)
    cache = llm.engine.cache
    assert (cache.keys.nbytes + cache.values.nbytes) * cache.num_blocks // (cache.num_blocks + 1) <= 1 << 20  # but the spare one
    completion = llm.generate("1, 2, 3,", SamplingParams(ignore_eos=True))
    assert completion.finish_reason == "length" and completion.usage.total_tokens == 64


def test_a_draft_model_changes_nothing(llm):
    guessed = Llama.load(dtype="float32", draft=DEMO)
    params = SamplingParams(max_tokens=30)
    assert guessed.chat(SUM, params).ids == llm.chat(SUM, params).ids


def test_a_draft_with_another_vocabulary_is_refused(tmp_path):
    make_checkpoint(tmp_path)
    with pytest.raises(ConfigError) as caught:
        Llama.load(draft=tmp_path)
    assert str(caught.value) == (f"{tmp_path}: the draft model's tokenizer is not the model's; give one of the same "
                                 "family")


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    make_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    with pytest.raises(ConfigError) as caught:
        Llama.load(tmp_path)
    assert str(caught.value) == (f"{tmp_path}: the tokenizer has 1280 ids, the model 512; they are not of one "
                                 "checkpoint")


def test_without_a_template_messages_are_refused(tmp_path):
    make_checkpoint(tmp_path, template=False)
    with pytest.raises(RequestError) as caught:
        Llama.load(tmp_path).chat(HELLO)
    assert (caught.value.field, str(caught.value)) == (
        "messages", f"{tmp_path} has no chat template; use generate() with a prompt")


def test_a_draft_models_cache_comes_out_of_the_same_memory(monkeypatch):
    monkeypatch.setattr(llama.runtime, "available_memory", lambda: 16 << 20)
    llm = Llama.load(DEMO, draft=DEMO)
    caches = llm.engine.cache, llm.engine.scheduler.proposer.cache
    spare = caches[0].keys.nbytes // (caches[0].num_blocks + 1)
    assert 0.4 * (16 << 20) < sum(cache.keys.nbytes + cache.values.nbytes for cache in caches) <= (8 << 20) + 4 * spare
