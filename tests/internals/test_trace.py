"""`llm.trace`: one call from a prompt to named tensors with their tokens."""

import pytest
import torch

from llama import Add, SamplingParams
from llama.engine.request import RequestError
from llama.internals.trace import TraceError

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def test_a_prompt_is_traced_with_its_tokens(llm):
    trace = llm.trace("What is 17 + 25?", ["layers.*.resid_post", "layers.3.attn.pattern[head=2]", "logits"])
    ids = llm.encode("What is 17 + 25?")
    assert trace.ids[:-1] == tuple(ids) and trace.num_prompt == len(ids)
    assert "".join(trace.tokens[:-1]) == "<|begin_of_text|>What is 17 + 25?"
    assert list(trace) == ["layers.0.resid_post", "layers.1.resid_post", "layers.2.resid_post", "layers.3.resid_post",
                           "layers.4.resid_post", "layers.3.attn.pattern[head=2]", "logits"]
    assert trace.stack("layers.*.resid_post").shape == (5, 11, 256)
    assert trace["layers.3.attn.pattern[head=2]"].sum(dim=-1) == pytest.approx(torch.ones(11), abs=1e-5)
    assert (trace["logits"] - llm.logits(ids)).abs().max() < 1e-4
    assert torch.equal(trace.at("logits", -1), trace["logits"][10])


def test_a_conversation_is_traced_as_far_as_it_is_generated(llm):
    messages = [{"role": "user", "content": "What is 17 + 25?"}]
    trace = llm.trace(messages, ["final_norm"], slice(-1, None), params=GREEDY)
    assert trace.text == llm.chat(messages, GREEDY).text == "17 + 25 = 42."
    assert trace.positions["final_norm"] == tuple(range(trace.num_prompt - 1, len(trace.ids) - 1))
    said = llm.model.head(trace["final_norm"]).argmax(dim=-1)
    assert tuple(said.tolist()) == trace.ids[trace.num_prompt:]


def test_many_prompts_are_traced_together_as_each_alone(llm):
    prompts = ["Hello", "What is 2 + 2?", llm.encode("one two three")]
    together = llm.trace(prompts, ["layers.2.mlp.act", "layers.*.attn.scores"], edits=[Add("embed", 0.01)])
    for prompt, trace in zip(prompts, together):
        alone = llm.trace(prompt, ["layers.2.mlp.act", "layers.*.attn.scores"], edits=[Add("embed", 0.01)])
        assert alone.ids == trace.ids and alone.positions == trace.positions
        for name in alone:
            seen = alone[name].isfinite()
            assert (alone[name] - trace[name])[seen].abs().max() < 1e-4


def test_names_that_are_not_there_are_said(llm):
    trace = llm.trace("Hello", ["embed", "layers.*.attn.q", "layers.*.attn.k"], positions=-1)
    with pytest.raises(TraceError, match="'resid_post' was not captured; there are embed, layers.0.attn.q, layers.1"):
        trace["resid_post"]
    with pytest.raises(TraceError, match="and 3 more"):
        trace.stack("layers.*.mlp_out")
    with pytest.raises(TraceError, match="matches values of different shapes or positions"):
        trace.stack("layers.0.*")
    with pytest.raises(TraceError, match=r"embed was not captured at position 0, only at \[1\]"):
        trace.at("embed", 0)
    with pytest.raises(RequestError, match="trace plan, .*matches no site"):
        llm.trace("Hello", "layers.5.resid_post")
