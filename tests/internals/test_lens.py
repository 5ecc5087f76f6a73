"""Lenses and gradients: against transformers' own modules, and against what they must add up to."""

import pytest
import torch

from llama.internals.gradients import gradients
from llama.internals.lens import (ATTRIBUTION_SITES, LENS_SITES, attribute, induction_scores, logit_lens, norms,
                                  previous_token_scores)
from llama.internals.trace import Add, PlanError, Scale, Trace, TraceError, TracePlan, Zero
from tests.internals.hooked import Hooked
from tests.internals.traced import logits_of, random_vector, request, run, small_engine
from tests.model.pairs import difference, random_ids

IDS = random_ids(19)
NEAR = 5e-5


@pytest.fixture(scope="module")
def trace(model):
    """IDS, with all that the lenses read."""
    plan = TracePlan((*LENS_SITES, *ATTRIBUTION_SITES, "layers.*.attn.pattern", "logits"))
    _, values = run(small_engine(model), [request("x", IDS, plan)])["x"]
    return Trace(tuple(IDS), ("",) * len(IDS), len(IDS), values, dict.fromkeys(values, tuple(range(len(IDS)))), plan)


def test_the_logit_lens_is_norm_and_head_on_transformers_hidden_states(model, theirs, trace):
    table = logit_lens(model, trace, k=3)
    seen = Hooked(theirs).run(IDS)
    for row, name in enumerate(table.names):
        logprobs = theirs.lm_head(theirs.model.norm(seen[name])).log_softmax(dim=-1)
        assert difference(table.logprobs[row], logprobs.topk(3)[0]) < NEAR
        assert torch.equal(table.ids[row], logprobs.topk(3)[1])
        assert difference(table.next_logprobs[row, :-1], logprobs[range(18), IDS[1:]]) < NEAR
        assert table.next_logprobs[row, -1].isnan()
        assert difference(table.entropy[row], torch.distributions.Categorical(logits=logprobs).entropy()) < 1e-4
    assert table.names == ("embed", "layers.0.resid_post", "layers.1.resid_post")


def test_the_lens_site_is_the_lens_table(model, trace):
    table = logit_lens(model, trace, k=3)
    _, values = run(small_engine(model), [request("x", IDS, TracePlan(("layers.*.lens[top=3]",)))])["x"]
    for row, layer in ((1, 0), (2, 1)):
        ids, logprobs = values[f"layers.{layer}.lens[top=3]"].unbind(dim=-1)
        assert torch.equal(ids.long(), table.ids[row])
        assert difference(logprobs, table.logprobs[row]) < 1e-5


def test_a_tuned_lens_translates_first(model, theirs, trace):
    matrix, shift = random_vector(48 * 48).view(48, 48), random_vector(48, seed=1)
    table = logit_lens(model, trace, 1, {"layers.0.resid_post": lambda x: x @ matrix + shift})
    plain = logit_lens(model, trace, 1)
    expected = theirs.lm_head(theirs.model.norm(trace["layers.0.resid_post"] @ matrix + shift)).log_softmax(-1)
    assert difference(table.logprobs[1, :, 0], expected.max(dim=-1)[0]) < NEAR
    assert torch.equal(table.logprobs[[0, 2]], plain.logprobs[[0, 2]])
    with pytest.raises(TraceError, match="'layers.\\*.resid_post' was not captured"):
        logit_lens(model, Trace((), (), 0, {}, {}, TracePlan()))


@pytest.mark.parametrize("against", [None, 17])
def test_the_parts_of_a_logit_add_up_to_it(model, trace, against):
    for position in (-1, 4):
        parts = attribute(model, trace, 5, against, position)
        logits = trace.at("logits", position)
        assert parts.logit == pytest.approx(float(logits[5] - (0 if against is None else logits[against])), abs=1e-4)
        assert parts.heads.shape == (2, 8) and parts.mlps.shape == (2,)
    assert parts.heads.abs().min() > 0


def test_a_parts_share_is_what_the_logit_loses_without_it(model, trace):
    """Exactly so for the last layer's, whose output only the final norm sees, with its scale held."""
    parts = attribute(model, trace, 5)
    hold = Zero("final_norm.scale"), Add("final_norm.scale", trace.at("final_norm.scale", -1))
    without = logits_of(model, IDS, [Zero("layers.1.mlp_out", -1), *hold])[-1, 5]
    assert (trace["logits"][-1, 5] - without).item() == pytest.approx(parts.mlps[1].item(), abs=1e-4)


def test_previous_token_scores_are_the_attention_one_to_the_left(theirs, model, trace):
    scores = previous_token_scores(trace)
    patterns = Hooked(theirs).run(IDS)
    for layer in range(2):
        pattern = patterns[f"layers.{layer}.attn.pattern"]
        expected = torch.stack([pattern[row, :, row - 1] for row in range(1, len(IDS))]).mean(dim=0)
        assert difference(scores[layer], expected) < NEAR


def test_induction_scores_are_the_attention_to_what_followed_last_time(theirs, model):
    scores = induction_scores(model, length=9, repeats=2, seed=3)
    generator, expected = torch.Generator().manual_seed(3), torch.zeros(2, 8)
    for _ in range(2):
        ids = torch.randint(181, (9,), generator=generator).tolist() * 2
        seen = Hooked(theirs).run(ids)
        for layer in range(2):
            pattern = seen[f"layers.{layer}.attn.pattern"]
            expected[layer] += torch.stack([pattern[row, :, row - 9 + 1] for row in range(9, 18)]).mean(dim=0) / 2
    assert difference(scores, expected) < NEAR


def test_norms_are_lengths(trace):
    lengths = norms(trace)
    assert lengths.shape == (2, len(IDS))
    assert lengths[1, 3] == pytest.approx(trace["layers.1.resid_post"][3].square().sum().sqrt().item())


# ---- gradients ----------------------------------------------------------------------------------------------


def test_gradients_are_those_of_transformers(theirs, model):
    sites = {"embed": "model.embed_tokens", "layers.0.attn.q": "model.layers.0.self_attn.q_proj",
             "layers.1.attn.v": "model.layers.1.self_attn.v_proj", "layers.0.mlp.gate": "model.layers.0.mlp.gate_proj",
             "layers.1.attn_out": "model.layers.1.self_attn.o_proj", "final_norm": "model.norm"}
    kept = {}

    def keep(name):
        def hook(_, __, output):
            kept[name] = output if output.requires_grad else output.requires_grad_()
            return kept[name]
        return hook

    hooks = [theirs.get_submodule(path).register_forward_hook(keep(name)) for name, path in sites.items()]
    with torch.enable_grad():
        logits = theirs(torch.tensor([IDS])).logits[0, -1]
        expected = torch.autograd.grad(logits[5] - logits[9], list(kept.values()))
    for hook in hooks:
        hook.remove()
    value, found = gradients(model, IDS, list(sites), 5, 9)
    assert value == pytest.approx((logits[5] - logits[9]).item(), abs=1e-4)
    for name, gradient in zip(kept, expected):
        assert difference(found[name].flatten(1), gradient[0]) < NEAR, name
        assert gradient.abs().max() > 1e-3


def test_a_gradient_is_that_of_the_edited_run(model):
    edits = [Add("layers.0.resid_pre", random_vector(48), positions=[3]), Zero("layers.1.attn.pattern[head=2]")]
    value, found = gradients(model, IDS, ["layers.0.resid_post"], 5, edits=edits)
    direction, step = random_vector(48, seed=2), 1e-3
    up, down = (logits_of(model, IDS, [*edits, Add("layers.0.resid_post", direction, sign * step, [7])])[-1, 5].item()
                for sign in (1, -1))
    assert value == pytest.approx(logits_of(model, IDS, edits)[-1, 5].item(), abs=1e-4)
    slope = (found["layers.0.resid_post"][7] @ direction).item()
    assert abs(slope) > 0.01 and (up - down) / (2 * step) == pytest.approx(slope, rel=0.02, abs=1e-2)


def test_there_is_no_gradient_of_what_nothing_follows_from(model):
    with pytest.raises(PlanError, match="layers.1.lens is only read"):
        gradients(model, IDS, ["layers.1.lens"], 5)
    assert "layers.1.lens" not in gradients(model, IDS, ["layers.1.*"], 5)[1]


@pytest.mark.parametrize("site", ["layers.0.attn.pattern", "layers.1.attn.head_out", "layers.0.attn.scores",
                                  "layers.1.resid_mid", "layers.0.attn_norm.scale", "layers.0.attn.k_rot"])
def test_a_gradient_is_the_slope_that_small_edits_show(model, site):
    value, found = gradients(model, IDS, [site], 5)
    step = 1e-3
    up, down = (logits_of(model, IDS, [Scale(site, 1 + sign * step)])[-1, 5].item() for sign in (1, -1))
    base = run(small_engine(model), [request("x", IDS, TracePlan((site,)))])["x"][1][site]
    seen = base.isfinite()
    along = (found[site][seen] * base[seen]).sum().item()
    assert (up - down) / (2 * step) == pytest.approx(along, rel=0.02, abs=2e-2)
    assert value == pytest.approx(logits_of(model, IDS)[-1, 5].item(), abs=1e-4)
