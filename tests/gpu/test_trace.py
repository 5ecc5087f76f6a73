"""Looking inside on a GPU: what is captured is what the CPU computes, and a plan changes nothing that it does not name."""

import pytest
import torch

from llama import Add, SamplingParams, Zero
from tests.gpu.loaded import QUESTIONS, conversation, demo

SITES = ["embed", "layers.*.resid_post", "layers.3.attn.pattern[head=2]", "layers.*.mlp.act", "layers.1.attn.k_rot", "logits"]
GREEDY = SamplingParams(temperature=0.0, max_tokens=10)


@pytest.mark.parametrize("edits", [[], [Zero("layers.1.attn.heads[head=0]"), Add("layers.2.resid_post", 0.01)]],
                         ids=["captures", "edits"])
def test_captures_and_edits_are_those_of_the_cpu(device, edits):
    ids = conversation(demo("cpu"), QUESTIONS[1])
    there, here = (demo(where).trace(ids, SITES, edits=edits, params=GREEDY) for where in (device, "cpu"))
    assert there.ids == here.ids and list(there) == list(here)
    for name in here:
        assert there.positions[name] == here.positions[name]
        size = here[name].float().abs().max().clamp(min=1)
        assert (there[name].cpu() - here[name]).abs().max() < 1e-3 * size, name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_plan_that_only_looks_changes_no_token(device, dtype):
    llm = demo(device, dtype)
    for text in QUESTIONS[:4]:
        ids = conversation(llm, text)
        plain = llm.generate(ids, GREEDY)
        assert llm.trace(ids, SITES, params=GREEDY).text == plain.text
        assert llm.generate(ids, GREEDY).text == plain.text  # and leaves nothing behind


def test_traced_and_untraced_requests_share_a_step(device):
    llm = demo(device)
    prompts = [conversation(llm, text) for text in QUESTIONS[:3]]
    together = llm.trace(prompts, ["layers.*.resid_post"], params=GREEDY)
    for ids, trace in zip(prompts, together):
        alone = llm.trace(ids, ["layers.*.resid_post"], params=GREEDY)
        assert alone.ids == trace.ids
        assert (alone.stack("layers.*.resid_post") - trace.stack("layers.*.resid_post")).abs().max() < 1e-3


def test_gradients_flow_without_the_kernels(device):
    """The kernels know no slope: where gradients are wanted, the definitions compute."""
    from llama.model.ragged import RaggedBatch

    model = demo(device).model
    ids = conversation(demo(device), QUESTIONS[0])
    slopes = []
    for where in (device, "cpu"):
        model = demo(where).model
        x = model.embed.rows(torch.tensor(ids, device=where)).clone().requires_grad_()
        model.blocks[0].feed_forward(model.blocks[0].feed_forward_norm(x)).sum().backward()
        slopes.append(x.grad.cpu())
        assert len(RaggedBatch.whole(torch.tensor(ids)).ids) == len(x)
    assert (slopes[0] - slopes[1]).abs().max() < 1e-3 * slopes[1].abs().max()
