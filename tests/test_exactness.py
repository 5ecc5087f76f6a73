"""llama.runtime: the engine's exactness on the demo model, and a draft checkpoint as an option of loading."""

import shutil
from collections import Counter
from dataclasses import replace

import pytest
import torch

from llama.checkpoint.save import save_model
from llama.config import ConfigError
from llama.engine.engine import BLOCK_SIZE
from llama.engine.limits import Limits
from llama.engine.propose import PromptLookup
from llama.engine.request import SamplingParams
from llama.model.transformer import Llama as Transformer
from llama.runtime import Llama
from tests.commands.small import make_checkpoint
from tests.engine.running import alone, engine_of, run
from tests.engine.simulation import request
from tests.engine.test_engine import assert_same
from tools.train_demo import CONFIG, DEMO

QUESTIONS = ("Hello", "What is 17 + 25?", "Repeat: the cat and the dog and the cat and the dog and the cat.",
             "My name is Ada. What is my name?", "Hello there, who are you?", "What is 8 + 9?")
CHOSEN = ({}, {"temperature": 0.8, "n": 2}, {"prompt_logprobs": 1}, {"temperature": 1.0, "top_p": 0.9},
          {"repetition_penalty": 1.2}, {"temperature": 1.0, "frequency_penalty": 0.5, "min_tokens": 5})


@pytest.fixture(scope="module", params=[("float32", False), ("float32", True), ("bfloat16", True)], ids=str)
def demo(request):
    """The demo model, as it is and in deterministic mode."""
    dtype, deterministic = request.param
    return Llama.load(dtype=dtype, deterministic=deterministic)


def test_the_demo_says_the_same_alone_batched_chunked_cached_preempted_and_guessed(demo):
    model, is_exact = demo.model, demo.model.blocks[0].attention.deterministic
    asked = [request(f"r{place}", demo.encode_chat([{"role": "user", "content": text}]), seed=place, logprobs=2,
                     max_tokens=14, ignore_eos=True, **chosen)
             for place, (text, chosen) in enumerate(zip(QUESTIONS, CHOSEN))]
    plain = alone(model, asked)
    tight = -(-max(len(one.prompt_ids) for one in asked) // BLOCK_SIZE) + 2
    small, lookup = Limits(512, step_tokens=23, mixed_step_tokens=11), PromptLookup(min_ngram=1)
    counts = Counter()
    for limits, num_blocks, proposer, times in ((Limits(512), 400, None, 2), (small, 400, lookup, 1),
                                                (small, tight, None, 1)):
        engine = engine_of(model, limits, num_blocks, proposer=proposer)
        for _ in range(times):  # the second time, prefixes are found
            found = run(engine, asked)
            assert_same(found, plain, asked)
            if is_exact:
                assert found.samples == plain.samples and found.prompts == plain.prompts
            counts += found.counts
    assert min(counts[what] for what in ("cached", "preempted", "accepted")) > 1, counts


# ---- a draft checkpoint ------------------------------------------------------------------------------------


def test_a_draft_checkpoint_changes_nothing_but_the_number_of_steps():
    params = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    steps, texts = [], []
    for draft in (None, DEMO):
        llm = Llama.load(dtype="float32", draft=draft)
        step, count = llm.engine.step, []
        llm.engine.step = lambda step=step, count=count: count.append(1) or step()
        texts.append(llm.generate(["The cat", "Hello"], params))
        steps.append(len(count))
    assert [one.ids for one in texts[0]] == [one.ids for one in texts[1]]
    assert steps[1] < steps[0] / 2


def test_a_draft_with_another_tokenizer_is_refused(tmp_path):
    other = make_checkpoint(tmp_path / "other")
    with pytest.raises(ConfigError, match="the draft model's tokenizer is not the model's; give one of the same"):
        Llama.load(draft=other)


@pytest.mark.parametrize("vocab_size", [1000, 1288])
def test_a_draft_with_another_vocabulary_is_refused(tmp_path, vocab_size):
    """Fewer ids: it could not read what the model says; more: the model could not read what it guesses."""
    config = replace(CONFIG, vocab_size=vocab_size, num_layers=1, bos_token_id=0, eos_token_ids=(1,))
    model = Transformer(config, torch.float32)
    for parameter in model.parameters():
        parameter.fill_(0.0)
    save_model(model, tmp_path)
    shutil.copy(DEMO / "tokenizer.json", tmp_path)
    with pytest.raises(ConfigError, match=f"the draft model has {vocab_size} ids, the model {CONFIG.vocab_size}"):
        Llama.load(draft=tmp_path)
