"""Captures through the engine: the same values, transformers' values, whichever way a request is computed."""

import pytest
import torch
import transformers

from llama.engine.propose import PromptLookup
from llama.engine.request import RequestError, SamplingParams, TraceEvent
from llama.internals.trace import Capture, Scale, TraceError, TracePlan, Zero, assemble
from llama.model import plan_tap
from llama.model.transformer import Llama
from tests.engine.running import TINY
from tests.internals.hooked import Hooked
from tests.internals.test_sites import assert_alike
from tests.internals.traced import on_every_path, request, run, small_engine
from tests.model.pairs import difference, hugging_face, ours, random_ids

PROMPT = random_ids(41)
NEW = 20
EVERYTHING = TracePlan(("*",))


@pytest.fixture(scope="module")
def pair():
    """transformers' model, ours, PROMPT with its greedy continuation, and transformers' values of that."""
    theirs = hugging_face(TINY["8:2"] | {"rope_parameters": TINY["8:2"]["rope_parameters"] | {"factor": 2.0}})
    model = ours(theirs)
    ids = PROMPT + run(small_engine(model), [request("x", PROMPT, None, NEW)])["x"][0]
    return theirs, model, ids[:-1], Hooked(theirs).run(ids[:-1])


def test_every_site_on_every_path_has_transformers_values(pair):
    _, model, ids, expected = pair
    for way, values in on_every_path(model, ids, len(PROMPT), EVERYTHING).items():
        assert_alike(values, expected, way)


def test_a_capture_in_a_cached_prefix_is_computed_and_one_after_it_is_not(pair):
    _, model, ids, expected = pair
    engine = small_engine(model)
    run(engine, [request("earlier", ids, None)])
    computed = []
    for positions, more in ((40, ()), (3, (Capture("embed", 40),))):
        before = engine.model.blocks[0].register_forward_hook(lambda _, args, __: computed.append(len(args[0])))
        values = run(engine, [request("x", ids, TracePlan((*more, "layers.1.attn.pattern"), positions))])["x"][1]
        before.remove()
        pattern = values["layers.1.attn.pattern"][0]
        wanted = expected["layers.1.attn.pattern"][positions, :, :positions + 1]
        assert (pattern[:, :positions + 1] - wanted).abs().max() < 5e-5
    assert computed == [len(ids) - 32, len(ids)]


def test_positions_and_heads_pick_rows_of_the_whole(pair):
    _, model, ids, expected = pair
    plan = TracePlan(("layers.*.attn.pattern[head=5]", "layers.1.attn.k_rot[head=1]", Capture("logits", [-1, 3]),
                      "layers.0.attn.scores[head=2,key=4]"), slice(-4, None))
    values = run(small_engine(model), [request("x", PROMPT, plan, NEW)])["x"][1]
    rows = slice(len(PROMPT) - 4, None)
    assert_alike(values, {
        "layers.0.attn.pattern[head=5]": expected["layers.0.attn.pattern"][rows, 5],
        "layers.1.attn.pattern[head=5]": expected["layers.1.attn.pattern"][rows, 5],
        "layers.1.attn.k_rot[head=1]": expected["layers.1.attn.k_rot"][rows, 1],
        "logits": expected["logits"][[3, len(PROMPT) - 1]],
        "layers.0.attn.scores[head=2,key=4]": expected["layers.0.attn.scores"][rows, 2, 4]})


def test_the_largest_are_picked_with_their_ids(pair, monkeypatch):
    _, model, _, expected = pair
    monkeypatch.setattr(plan_tap, "_ROWS", 3)  # so that a step's rows are read in several pieces
    plan = TracePlan(("layers.*.lens[top=4]", Capture("logits[top=181]", [-1, 2])), [0, 3, 4, 9, 40])
    values = run(small_engine(model, step_tokens=30), [request("x", PROMPT, plan, NEW)])["x"][1]
    wanted = {f"layers.{layer}.lens[top=4]": expected[f"layers.{layer}.lens"][[0, 3, 4, 9, 40]].topk(4)
              for layer in range(2)} | {"logits[top=181]": expected["logits"][[2, 40]].topk(181)}
    assert values.keys() == wanted.keys()
    for name, (largest, ids) in wanted.items():
        assert torch.equal(values[name][..., 0].long(), ids)
        assert difference(values[name][..., 1], largest) < 5e-5


def test_wrong_guesses_and_preemptions_leave_no_trace_in_a_trace(pair):
    _, model, ids, expected = pair
    repeated = (ids[:9] * 4)[:34]
    continued = repeated + run(small_engine(model), [request("x", repeated, None, NEW)])["x"][0]
    wanted = Hooked(pair[0]).run(continued[:-1])
    engine = small_engine(model, proposer=PromptLookup())
    assert_alike(run(engine, [request("x", repeated, EVERYTHING, NEW)])["x"][1], wanted)
    tight = small_engine(model, num_blocks=6)
    crowd = [request("first", random_ids(30, 5), None, 50), request("x", repeated, EVERYTHING, NEW)]
    assert_alike(run(tight, crowd)["x"][1], wanted)


@pytest.mark.parametrize("plan", [EVERYTHING, TracePlan(("logits",), edits=(Zero("layers.*.attn_out"),))])
def test_who_shares_a_step_with_a_traced_request_is_not_affected(pair, plan):
    _, model, ids, _ = pair
    others = [request(str(n), random_ids(20 + n, n), None, 12) for n in range(3)]
    model.set_deterministic(True)
    try:
        scored = [request(one.id, list(one.prompt_ids), None, 12) for one in others]
        scored = [type(one)(one.id, one.prompt_ids, SamplingParams(**{**vars(one.params), "logprobs": 3}))
                  for one in scored]
        alone, company = (_events(small_engine(model, step_tokens=24), scored, more)
                          for more in ([], [request("traced", PROMPT, plan, NEW)]))
    finally:
        model.set_deterministic(False)
    assert alone == company  # tokens and log probabilities, to the bit
    plain, beside = (run(small_engine(model, step_tokens=24), others + more)
                     for more in ([], [request("traced", PROMPT, plan, NEW)]))
    assert all(plain[one.id][0] == beside[one.id][0] for one in others)


def test_who_is_traced_in_the_same_step_has_other_values(pair):
    theirs, model, _, expected = pair
    site, other = "layers.1.resid_post", random_ids(33, 8)
    requests = [request("other", other, TracePlan((site,)), 1), request("mine", PROMPT, TracePlan((site,)), NEW)]
    found = run(small_engine(model, step_tokens=24), requests)
    assert difference(found["mine"][1][site], expected[site]) < 5e-5
    assert difference(found["other"][1][site], Hooked(theirs).run(other)[site]) < 5e-5


def _events(engine, requests, more):
    for one in requests + more:
        engine.submit(one)
    events = []
    while engine.has_work:
        events += engine.step()
    return {one.id: [event for event in events if event.request_id == one.id] for one in requests}


REFUSED = [
    (TracePlan(("layers.7.resid_post",)), r"capture\[0\]: 'layers.7.resid_post' matches no site .* which has 2 layers"),
    (TracePlan(("logits", "attn pattern")), r"capture\[1\]: 'attn pattern' is no site"),
    (TracePlan(("layers.0.attn.q[head=8]",)), "layers.0.attn.q has heads 0 to 7, and no head 8"),
    (TracePlan(("layers.*.attn.v[head=2]",)), "layers.0.attn.v has heads 0 to 1, and no head 2"),
    (TracePlan(("embed[head=0]",)), r"embed has no heads to choose from; its shape is \[hidden_size\]"),
    (TracePlan(("layers.0.attn.q[key=0]",)), "layers.0.attn.q has no key positions"),
    (TracePlan(("layers.0.attn.q[dim=0]",)), "in brackets stand head=N, key=POSITION or both; or top=N"),
    (TracePlan(("layers.*.mlp.act[top=3]",)), r"layers.0.mlp.act is not one number for each id.* \[intermediate_size\]"),
    (TracePlan(("layers.1.lens[top=0]",)), "layers.1.lens: top is from 1 to the 181 ids there are, not 0"),
    (TracePlan(("logits[top=182]",)), "logits: top is from 1 to the 181 ids there are, not 182"),
    (TracePlan(("layers.1.lens[head=0]",)), "layers.1.lens has no heads"),
    (TracePlan(("logits",), 41), "position 41 is never computed: the prompt has 41 tokens"),
    (TracePlan(("logits",), -42), "position -1 is never computed"),
    (TracePlan(("logits",), slice(9, 9)), "the range 9:9 is empty"),
    (TracePlan(("logits",), [3, 3]), "name one twice"),
    (TracePlan(("embed", Capture("embed", 3))), r"capture\[1\]: embed is captured twice, at other positions"),
    (TracePlan(("embed", "logits"), max_bytes=10_000),
     r"capture\[1\]: with 'logits' the captures take 37,556 bytes, and max_bytes is 10,000"),
    (TracePlan(("layers.*.lens[top=5]",), max_bytes=3279), "the captures take 3,280 bytes, and max_bytes is 3,279"),
]


@pytest.mark.parametrize("plan, sentence", REFUSED)
def test_a_plan_that_cannot_be_carried_out_is_refused_at_the_door(pair, plan, sentence):
    with pytest.raises(RequestError, match=f"trace plan, .*{sentence}") as caught:
        small_engine(pair[1]).submit(request("x", PROMPT, plan))
    assert caught.value.field == "trace"


def test_several_samples_have_no_trace(pair):
    params = SamplingParams(n=2, max_tokens=1, temperature=0.0)
    with pytest.raises(RequestError, match="a request with a trace plan has one sample") as caught:
        small_engine(pair[1]).submit(type(request("x", PROMPT, None))("x", tuple(PROMPT), params, trace=EVERYTHING))
    assert caught.value.field == "n"


def test_what_was_asked_for_and_never_came_is_an_error(pair):
    theirs: transformers.LlamaForCausalLM = pair[0]
    model: Llama = pair[1]
    first = int(theirs(torch.tensor([PROMPT])).logits[0, -1].argmax())
    stops = SamplingParams(max_tokens=NEW, temperature=0.0, stop_token_ids=(first,), top_p=1.0, top_k=-1,
                           repetition_penalty=1.0)
    for plan, sentence in ((TracePlan(("embed",), 45), "embed was never captured: only 41 positions were computed"),
                           (TracePlan(edits=(Scale("embed", 1), Zero("layers.1.mlp_out", [44, 45]))),
                            r"edits\[1\], Zero at layers.1.mlp_out, never fired: only 41 positions were computed")):
        with pytest.raises(TraceError, match=sentence):
            run(small_engine(model), [type(request("x", PROMPT, None))("x", tuple(PROMPT), stops, trace=plan)])


def test_guesses_beyond_the_end_do_not_count(pair):
    bound = TracePlan(("embed",)).bind(pair[1].config, 2, 5)
    event = TraceEvent("x", "embed", (0, 1, 2, 3), torch.arange(4.0)[:, None].expand(4, 48).numpy())
    values, positions = assemble([event], bound, 3)
    assert positions == {"embed": (0, 1, 2)} and values["embed"][:, 0].tolist() == [0, 1, 2]
