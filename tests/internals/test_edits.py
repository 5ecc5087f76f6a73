"""Edits are proven by their effect: none at all of size zero, and what theory says otherwise."""

import json

import pytest
import torch

from llama.internals.trace import (Add, Capture, Patch, PlanError, Replace, Scale, Trace, TracePlan, Zero, assemble,
                                   expanded)
from llama.model.edits import edit_from_json
from tests.engine.running import TINY
from tests.internals.traced import logits_of, random_vector, request, run, small_engine
from tests.model.pairs import difference, hugging_face, ours, random_ids

IDS, OTHER = random_ids(23), random_ids(23, seed=4)
NEAR = 5e-5


@pytest.fixture(scope="module")
def plain(model):
    """The logits of IDS."""
    return logits_of(model, IDS)


def captured(model, ids, capture, edits=()) -> Trace:
    """A Trace of a prompt."""
    plan = TracePlan(tuple(capture), edits=tuple(edits))
    _, values = run(small_engine(model), [request("x", ids, plan)])["x"]
    return Trace(tuple(ids), ("",) * len(ids), len(ids), values, dict.fromkeys(values, tuple(range(len(ids)))), plan)


@pytest.mark.parametrize("edit", [
    Add("layers.*.resid_post", 3.0, scale=0), Add("layers.0.attn.q", [[0.0] * 16] * 8), Scale("*norm*", 1),
    Scale("layers.*.attn.v[head=1]", 1), Add("logits", 0.0, positions=[3]), Scale("layers.1.attn_norm.scale", 1)],
    ids=str)
def test_an_edit_of_size_zero_changes_no_bit(model, plain, edit):
    assert torch.equal(logits_of(model, IDS, [edit]), plain)


@pytest.mark.parametrize("site", ["attn.scores", "attn.pattern", "attn.head_out"])
def test_a_recomputed_value_scaled_by_one_changes_nothing_but_rounding(model, plain, site):
    logits = logits_of(model, IDS, [Scale(f"layers.*.{site}", 1)])
    assert 0 < difference(logits, plain) < NEAR


def test_what_is_only_read_is_passed_over_by_edits_of_a_whole_layer(model, plain):
    trace = captured(model, IDS, ["layers.1.lens"], [Scale("layers.1.*", 1), Zero("layers.1.mlp_out")])
    assert difference(trace["layers.1.lens"], logits_of(model, IDS, [Zero("layers.1.mlp_out")]).log_softmax(-1)) < NEAR
    assert difference(trace["layers.1.lens"], plain.log_softmax(-1)) > 0.01
    at_it = [Add("layers.1.resid_post", random_vector(48))]
    trace = captured(model, IDS, ["layers.1.lens"], at_it)
    assert difference(trace["layers.1.lens"], logits_of(model, IDS, at_it).log_softmax(-1)) < NEAR
    everything = captured(model, IDS, ["layers.*.resid_post", "layers.*.lens"])
    edits = expanded([Patch("*", everything)], model.config, len(IDS))
    assert difference(logits_of(model, IDS, edits), plain) < NEAR
    with pytest.raises(PlanError, match="layers.0.lens is only read"):
        expanded([Patch("layers.0.lens", everything)], model.config, len(IDS))


def test_replacing_a_value_by_itself_changes_no_bit(model, plain):
    trace = captured(model, IDS, ["layers.1.mlp.act", "layers.0.attn.k_rot"])
    assert torch.equal(logits_of(model, IDS, expanded([Patch("*", trace)], model.config, len(IDS))), plain)


def test_a_replaced_embedding_is_another_token(model, theirs):
    edit = Replace("embed", theirs.model.embed_tokens.weight[OTHER[5]], positions=5)
    changed = IDS[:5] + OTHER[5:6] + IDS[6:]
    assert difference(logits_of(model, IDS, [edit]), theirs(torch.tensor([changed])).logits[0]) < NEAR


def test_without_attention_and_feed_forward_only_the_embedding_speaks(model, theirs):
    logits = logits_of(model, IDS, [Zero("layers.*.attn_out"), Zero("layers.*.mlp_out")])
    alone = theirs.lm_head(theirs.model.norm(theirs.model.embed_tokens(torch.tensor(IDS))))
    assert difference(logits, alone) < NEAR


def test_a_vector_added_to_the_last_residual_goes_through_norm_and_head_alone(model, theirs):
    vector = random_vector(48)
    logits = logits_of(model, IDS, [Add("layers.1.resid_post", vector, scale=2.5, positions=[-1, 4])])
    hidden = theirs.model(torch.tensor([IDS]), output_hidden_states=True)
    seen = []
    hook = theirs.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    theirs.model(torch.tensor([IDS]))
    hook.remove()
    expected = hidden.last_hidden_state[0].clone()
    expected[[4, 22]] = theirs.model.norm(seen[0][[4, 22]] + 2.5 * vector)
    assert difference(logits, theirs.lm_head(expected)) < NEAR


def test_a_steered_generation_is_that_of_a_model_with_the_vector_in_it(model, theirs):
    vector = random_vector(48, seed=7)
    plan = TracePlan(edits=(Add("layers.0.resid_post", vector),))
    ids, _ = run(small_engine(model), [request("x", IDS, plan, 15)])["x"]
    hook = theirs.model.layers[0].register_forward_hook(lambda _, __, output: output + vector)
    expected = theirs.generate(torch.tensor([IDS]), max_new_tokens=15, do_sample=False, eos_token_id=None,
                               pad_token_id=0)
    hook.remove()
    assert ids == expected[0, len(IDS):].tolist()
    assert ids != run(small_engine(model), [request("x", IDS, None, 15)])["x"][0]


def test_a_patch_of_all_that_a_layer_hands_on_is_the_other_run(model):
    other = captured(model, OTHER, ["layers.0.resid_post"])
    edits = expanded([Patch("layers.0.resid_post", other)], model.config, len(IDS))
    assert difference(logits_of(model, IDS, edits), logits_of(model, OTHER)) < NEAR


def test_a_patch_takes_from_where_it_is_told(model):
    other = captured(model, OTHER, ["embed"])
    edits = expanded([Patch("embed", other, positions=[-1, 2], from_positions=[0, 9])], model.config, len(IDS))
    changed = IDS[:2] + [OTHER[9]] + IDS[3:-1] + [OTHER[0]]
    assert difference(logits_of(model, IDS, edits), logits_of(model, changed)) < NEAR


def test_a_head_is_ablated_before_or_after_its_output_matrix_alike(model, plain):
    before = logits_of(model, IDS, [Zero("layers.1.attn.heads[head=3]")])
    after = logits_of(model, IDS, [Zero("layers.1.attn.head_out[head=3]")])
    assert difference(before, after) < NEAR < 0.01 < difference(before, plain)


def test_a_key_that_is_not_attended_to_takes_its_value_with_it(model):
    trace = captured(model, IDS, ["layers.0.attn.pattern", "layers.0.attn.v", "layers.0.attn.heads"],
                     [Zero("layers.0.attn.pattern[head=6,key=2]")])
    pattern = trace["layers.0.attn.pattern"]
    assert (pattern[:, 6, 2] == 0).all() and (pattern[3:, 5, 2] > 0).all()
    values = trace["layers.0.attn.v"].repeat_interleave(4, dim=1)
    assert difference(trace["layers.0.attn.heads"], torch.einsum("qhc,chd->qhd", pattern, values)) < NEAR


def test_an_edit_stays_at_its_positions_and_in_its_request(model, plain):
    edits = [Zero("layers.0.mlp_out", positions=slice(10, None))]
    logits = logits_of(model, IDS, edits)
    assert torch.equal(logits[:10], plain[:10]) and (logits[10:] - plain[10:]).abs().amax(1).min() > 0.01


def test_a_cached_prefix_is_never_that_of_other_edits(model):
    engine, ids = small_engine(model), IDS + OTHER
    first, second = (TracePlan((Capture("logits", -1),), edits=(Add("layers.0.attn.v", size, positions=[1]),))
                     for size in (1, 2))
    for plan in (None, first, second, first, None):
        [new], values = run(engine, [request("x", ids, plan)])["x"]
        expected = logits_of(model, ids, plan.edits if plan else ())[-1]
        assert new == expected.argmax()
        assert plan is None or difference(values["logits"][0], expected) < NEAR


PLAN = TracePlan(("layers.*.resid_post", Capture("logits", [-1, 2])), slice(2, None),
                 (Add("embed", random_vector(48), 4.0, 3), Replace("layers.1.attn_out", 0.5), Zero("layers.0.mlp.up"),
                  Scale("layers.0.attn.q[head=1]", 2.0, [5, 1])), 10**6)


def test_a_plan_comes_back_from_json_as_it_went(model):
    text = json.dumps(PLAN.to_json())
    again = TracePlan.from_json(json.loads(text))
    assert json.dumps(again.to_json()) == text
    bounds = [plan.bind(model.config, len(IDS), len(IDS)) for plan in (PLAN, again)]
    assert bounds[0].captures == bounds[1].captures and bounds[0].digest == bounds[1].digest != ""
    assert torch.equal(logits_of(model, IDS, PLAN.edits), logits_of(model, IDS, again.edits))


@pytest.mark.parametrize("raw, sentence", [
    ([], "plan: a plan is an object"), ({"captures": []}, "captures: a plan has no such field"),
    ({"capture": "embed"}, "capture: capture is a list"),
    ({"capture": [3]}, r"capture\[0\]: a capture is a site's name"),
    ({"capture": [{"site": "embed", "at": 1}]}, r"capture\[0\]: "),
    ({"positions": "all"}, "positions: positions are a whole"),
    ({"positions": [1, True]}, "positions: positions are a whole"), ({"positions": {"from": 1}}, "has start and stop"),
    ({"max_bytes": -1}, "max_bytes: -1 is no number of bytes"), ({"edits": {}}, "edits: edits is a list"),
    ({"edits": [{"edit": "exec"}]}, r"edits\[0\]: an edit is an object whose \"edit\" is one of add, replace, zero"),
    ({"edits": [{"edit": "zero"}]}, r"edits\[0\]: zero needs site"),
    ({"edits": [{"edit": "zero", "site": "embed", "factor": 1}]}, r"edits\[0\]: zero has no field 'factor'"),
    ({"edits": [{"edit": "scale", "site": "embed", "factor": "2"}]}, r"edits\[0\].factor: '2' is no finite number"),
    ({"edits": [{"edit": "add", "site": "embed", "vector": "abc"}]}, r"edits\[0\].vector: a vector holds numbers"),
    ({"edits": [{"edit": "add", "site": "embed", "vector": [1, [2]]}]}, r"edits\[0\].vector: a vector holds numbers"),
    ({"edits": [{"edit": "add", "site": "embed", "vector": [1e400]}]}, r"edits\[0\].vector: a vector holds finite"),
])
def test_json_that_is_no_plan_is_refused_by_field(raw, sentence):
    with pytest.raises(PlanError, match=sentence):
        TracePlan.from_json(raw)


@pytest.mark.parametrize("edit, sentence", [
    (Add("embed", [1.0, 2.0]), r"the vector's shape is \[2\]; embed takes one number, or \[48\]"),
    (Replace("layers.0.attn.q[head=1]", torch.zeros(3, 16), [1, 2]), r"one number, or \[16\], or \[2, 16\], a row for"),
    (Replace("layers.0.attn.pattern", [0.0, 1.0]), "is as long as its context is: give one number"),
    (Zero("layers.*.lens"), r"edits\[0\].site: layers.0.lens is only read, and nothing follows from it; change "
                            "layers.0.resid_post, of which it is made"),
    (Zero("logits[top=3]"), r"logits\[top=3\]: top is for captures; what changes is logits as a whole"),
    (Zero("layers.0.nothing"), "matches no site"), (Zero("embed", 23), "position 23 is never computed")])
def test_an_edit_that_cannot_be_made_is_refused(model, edit, sentence):
    with pytest.raises(PlanError, match=sentence):
        TracePlan(edits=(edit,)).bind(model.config, len(IDS), len(IDS))


def test_a_patch_from_what_was_not_captured_is_refused(model):
    other = captured(model, OTHER, ["embed"])
    for patch, sentence in ((Patch("layers.0.mlp_out", other), "the other run captured nothing that"),
                            (Patch("embed", other, [1, 2], [3]), "2 positions are to be patched from 1"),
                            (Patch("embed", other, 1, 23), "not at 23|position 23 is never computed")):
        with pytest.raises(PlanError, match=sentence):
            expanded([patch], model.config, len(IDS))


def test_something_else_is_no_edit():
    with pytest.raises(PlanError, match="an edit is one of Add, Replace, Zero, Scale and Patch"):
        TracePlan(edits=("zero embed",))
    assert edit_from_json({"edit": "zero", "site": "embed"}, "x").positions is None
    assert assemble([], TracePlan().bind(ours(hugging_face(TINY["3:3"])).config, 1, 1), 1) == ({}, {})
