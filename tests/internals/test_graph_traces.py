"""Trace plans in captured graphs: the same values, to the bit, as when the same step is computed by Python."""

from collections import Counter
from dataclasses import replace

import pytest
import torch

from llama.engine import graphs as graphs_module
from llama.engine.propose import PromptLookup
from llama.engine.request import TraceEvent
from llama.internals.trace import Add, Capture, Replace, Scale, TracePlan, Zero
from tests.engine.recording import RecordingDevice, watch
from tests.internals.hooked import Hooked
from tests.internals.test_sites import assert_alike
from tests.internals.traced import random_vector, request, run, small_engine
from tests.model.pairs import random_ids

PROMPT, NEW = random_ids(21), 16


class PythonDevice(RecordingDevice):
    """Has Python compute what it would otherwise replay."""

    def capture(self, run):
        """See RecordingDevice."""
        self.num_graphs += 1
        result = run()

        def replay():
            self.num_replays += 1
            result.copy_(run())

        return replay, result


def events_of(model, plans, device, **chosen):
    """What requests with these plans bring, those without one among them; and the engine."""
    engine = small_engine(model, device=device, **chosen)
    for place, plan in enumerate(plans):
        one = request(f"r{place}", [*PROMPT, place], plan, NEW + place)
        engine.submit(replace(one, params=replace(one.params, logprobs=2)))
    events = []
    while engine.has_work:
        events += engine.step()
    return events, engine


def assert_same_events(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected):
        if isinstance(one, TraceEvent):
            assert (one.request_id, one.site, one.positions) == (other.request_id, other.site, other.positions)
            assert one.values.dtype == other.values.dtype == "float32" and one.values.tobytes() == other.values.tobytes()
        else:
            assert one == other


STEADY = {
    "what passes by": TracePlan(("embed", "layers.*.resid_*", "layers.*norm*", "layers.*.attn.?", "layers.*.attn.?_rot",
                                 "layers.*.mlp*", "layers.*.attn.heads", "layers.*.attn_out", "final*", "logits")),
    "recomputed and picked": TracePlan(("layers.*.lens[top=3]", "layers.1.attn.head_out", "layers.0.attn.q[head=2]",
                                        "logits[top=5]", "layers.0.lens")),
    "edits": TracePlan(("logits",), edits=(Add("layers.0.resid_post", random_vector(48)), Zero("layers.1.attn.v[head=0]"),
                                           Scale("layers.1.mlp_out", 0.5), Replace("layers.0.attn.head_out[head=3]", 0.25))),
    "no captures": TracePlan((), edits=(Scale("layers.*.attn_out", 1.5),)),
}


@pytest.mark.parametrize("name", STEADY)
@pytest.mark.parametrize("company", [0, 3])
def test_a_plan_is_replayed_and_brings_the_same_bits(model, name, company):
    plans = [*[None] * company, STEADY[name], *[None] * company]
    found, engine = events_of(model, plans, RecordingDevice())
    expected, _ = events_of(model, plans, PythonDevice())
    assert_same_events(found, expected)
    assert engine._device.num_replays >= NEW - 1 and engine._device.num_graphs <= 4 + company


def test_it_brings_what_it_does_on_a_cpu(model):
    for plan in STEADY.values():
        requests = [request("other", PROMPT[:7], None, NEW), request("x", PROMPT, plan, NEW)]
        found, expected = (run(small_engine(model, **chosen), requests)["x"]
                           for chosen in ({"device": RecordingDevice()}, {}))
        assert found[0] == expected[0]
        assert_alike(found[1], expected[1])


def test_every_site_has_transformers_values_replayed_or_not(theirs, model):
    ids, values = run(small_engine(model, device=RecordingDevice()), [request("x", PROMPT, TracePlan(("*",)), NEW)])["x"]
    assert_alike(values, Hooked(theirs).run(PROMPT + ids[:-1]))


def test_without_a_plan_nothing_changes(model):
    plans = [None, STEADY["edits"], None]
    alone, _ = events_of(model, [None, None, None], RecordingDevice())
    model.set_deterministic(True)
    try:
        beside, _ = events_of(model, plans, RecordingDevice())
        alone, _ = events_of(model, [None, None, None], RecordingDevice())
    finally:
        model.set_deterministic(False)
    for name in ("r0", "r2"):
        assert [one for one in alone if one.request_id == name] == [one for one in beside if one.request_id == name]


def test_two_plans_in_a_step_have_their_own_values_wherever_their_rows_come_to_stand(model):
    """The first ends before the others, so that their rows move up in a graph of the same kind."""
    plans = [None, STEADY["recomputed and picked"], None, STEADY["edits"]]
    found, engine = events_of(model, plans, RecordingDevice())
    expected, _ = events_of(model, plans, PythonDevice())
    assert_same_events(found, expected)
    assert len(engine._graphs._traced) <= 4  # by rows and plans, not by where the plans stand


def test_guesses_beside_a_plan_are_computed_by_python(model):
    repeated = (PROMPT[:7] * 4)[:25]
    requests = [request("x", repeated, STEADY["recomputed and picked"], NEW)]
    found, expected = (run(small_engine(model, proposer=PromptLookup(min_ngram=1), **chosen), requests)["x"]
                       for chosen in ({"device": RecordingDevice()}, {}))
    assert found[0] == expected[0]
    assert_alike(found[1], expected[1])


# ---- what a graph is for ------------------------------------------------------------------------------------------


def traced_graphs(model, plan):
    """How many graphs a request needs that are its own, and how many of its steps they do."""
    engine = watch(small_engine(model, device=RecordingDevice()), Counter())
    run(engine, [request("x", PROMPT, plan, NEW)])
    return len(engine._graphs._traced), engine._device.num_replays


@pytest.mark.parametrize("plan, graphs, replays", [
    (TracePlan(("logits",)), 1, 15), (TracePlan(("logits",), -1), 1, 15),  # the second: one that does nothing
    (TracePlan(("logits",), slice(25, None)), 2, 15), (TracePlan(("logits",), slice(25, 30)), 2, 15),
    (TracePlan((Capture("logits", slice(25, None)), Capture("embed", slice(28, None)))), 3, 15),
    (TracePlan(("logits",), [25, 26]), 1, 13),  # two steps by Python
    (TracePlan(("layers.0.attn.pattern",)), 0, 0), (TracePlan(("layers.0.attn.scores[key=2]",), slice(0, 30)), 1, 6),
    (TracePlan((), edits=(Scale("layers.0.attn.pattern", 1.0),)), 0, 0),
    (TracePlan((), edits=(Add("embed", torch.ones(2, 48), positions=[22, 24]),)), 1, 13)])
def test_a_step_is_replayed_where_it_does_what_another_did(model, plan, graphs, replays):
    assert traced_graphs(model, plan) == (graphs, replays)


def test_the_same_plan_sent_again_finds_its_graph_and_another_vector_is_another_plan(model):
    engine = small_engine(model, device=RecordingDevice())
    for number, (vector, graphs) in enumerate(((1, 1), (1, 1), (2, 2))):
        plan = TracePlan((), edits=(Add("embed", random_vector(48, vector)),))
        run(engine, [request(f"x{number}", PROMPT, plan, NEW)])
        assert len(engine._graphs._traced) == graphs


def test_graphs_with_plans_are_kept_in_bounds(model, monkeypatch):
    monkeypatch.setattr(graphs_module, "MAX_TRACED", 2)
    engine = small_engine(model, device=RecordingDevice())
    for site, num_graphs in (("embed", 1), ("logits", 2), ("embed", 2), ("final_norm", 3), ("embed", 3), ("logits", 4)):
        run(engine, [request("x", PROMPT, TracePlan((site,)), 4)])  # the third takes the place of the second
        assert engine._device.num_graphs == num_graphs and len(engine._graphs._traced) <= 2


def test_what_an_ended_request_would_have_captured_is_not_reported(model):
    """It ends by a token that the host sees when the step after is on its way, for itself and another."""
    plain, _ = run(small_engine(model), [request("x", PROMPT, None, NEW)])["x"]
    one = request("x", PROMPT, TracePlan(("logits",)), NEW)
    engine = small_engine(model, device=RecordingDevice())
    engine.submit(replace(one, params=replace(one.params, stop_token_ids=(plain[5],))))
    engine.submit(request("other", PROMPT[:9], None, NEW))
    events = []
    while engine.has_work:
        events += engine.step()
    positions = [position for event in events if isinstance(event, TraceEvent) for position in event.positions]
    assert sorted(positions) == [*range(len(PROMPT) + plain.index(plain[5]))]
