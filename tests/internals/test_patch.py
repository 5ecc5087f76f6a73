"""Sweeps of patches against one run for each patch; steering; keys and values held, changed, put in force."""

import pytest
import torch

from llama.engine.request import Request
from llama.internals import kv
from llama.internals.patch import logit_difference, steering_vector, sweep
from llama.internals.trace import PlanError, Replace, Trace, TraceError, TracePlan
from tests.engine.running import TINY
from tests.internals.traced import logits_of, request, run, small_engine
from tests.model.pairs import difference, hugging_face, ours, random_ids

CLEAN = random_ids(40)
CORRUPTED = CLEAN[:4] + random_ids(2, seed=8) + CLEAN[6:20] + random_ids(1, seed=9) + CLEAN[21:]
METRIC = logit_difference(11, 60)


@pytest.fixture(scope="module")
def theirs():
    """transformers' model."""
    return hugging_face(TINY["8:2"] | {"num_hidden_layers": 3})


@pytest.fixture(scope="module")
def model(theirs):
    """Ours."""
    return ours(theirs)


def patched_by_hooks(theirs, path: str, layer: int, position: int, columns: slice) -> float:
    """The metric of transformers' corrupted run in which one module's output, or input, is the clean run's."""
    name, is_input = path.replace("N", str(layer)).removesuffix(":in"), path.endswith(":in")
    module, clean = theirs.get_submodule(name), []

    def patch(value):
        value = value.clone()
        value[0, position, columns] = clean[0][0, position, columns]
        return value

    def record(_, args, *output):
        clean.append(args[0] if is_input else output[0])

    def replace(_, args, *output):
        return (patch(args[0]),) if is_input else patch(output[0])

    register = module.register_forward_pre_hook if is_input else module.register_forward_hook
    hook = register(record)
    theirs(torch.tensor([CLEAN]))
    hook.remove()
    hook = register(replace)
    logits = theirs(torch.tensor([CORRUPTED])).logits[0, -1:]
    hook.remove()
    return METRIC(logits).item()


@pytest.mark.parametrize("site, path", [("resid_post", "model.layers.N"), ("mlp_out", "model.layers.N.mlp"),
                                        ("attn_out", "model.layers.N.self_attn.o_proj"),
                                        ("mlp.act", "model.layers.N.mlp.down_proj:in")])
def test_a_sweep_is_one_run_of_transformers_with_hooks_for_each_patch(theirs, model, site, path):
    positions = [0, 4, 5, 20, 39]
    found = sweep(model, CLEAN, CORRUPTED, METRIC, site, positions=positions, step_tokens=64)
    assert found.values.shape == (3, 5)
    for layer in range(3):
        for column, position in enumerate(positions):
            expected = patched_by_hooks(theirs, path, layer, position, slice(None))
            assert found.values[layer, column].item() == pytest.approx(expected, abs=1e-4)
    assert found.clean == pytest.approx(METRIC(theirs(torch.tensor([CLEAN])).logits[0, -1:]).item(), abs=1e-4)
    assert found.corrupted == pytest.approx(METRIC(theirs(torch.tensor([CORRUPTED])).logits[0, -1:]).item(), abs=1e-4)
    assert (found.values - found.corrupted).abs().max() > 0.01


def test_a_sweep_by_head_patches_one_heads_columns(theirs, model):
    found = sweep(model, CLEAN, CORRUPTED, METRIC, "attn.heads", by_head=True, layers=[0, 2], positions=[4, 39])
    assert found.values.shape == (2, 2, 8)
    for row, layer in enumerate((0, 2)):
        for column, position in enumerate((4, 39)):
            for head in (0, 5):
                expected = patched_by_hooks(theirs, "model.layers.N.self_attn.o_proj:in", layer, position,
                                            slice(head * 16, head * 16 + 16))
                assert found.values[row, column, head].item() == pytest.approx(expected, abs=1e-4)


def test_what_is_recovered_is_a_share_of_the_way(model):
    found = sweep(model, CLEAN, CORRUPTED, METRIC, layers=[2], positions=[0, 39])
    assert found.recovered[0].tolist() == pytest.approx([0.0, 1.0], abs=1e-4)  # nothing at the first, all at the last


def test_prompts_of_unequal_length_are_not_swept(model):
    with pytest.raises(PlanError, match="the prompts have 40 and 39 tokens"):
        sweep(model, CLEAN, CORRUPTED[:-1], METRIC)


def test_a_steering_vector_is_the_difference_of_means():
    def at_last(*numbers):
        return Trace((0, 0), ("", ""), 2, {"s": torch.tensor([[9.0, 9.0], list(numbers)])}, {"s": (0, 1)}, TracePlan())

    vector = steering_vector([at_last(1.0, 2.0), at_last(3.0, 6.0)], [at_last(1.0, 1.0)], "s")
    assert vector.tolist() == [1.0, 3.0]
    with pytest.raises(TraceError, match="at least one trace on each side"):
        steering_vector([], [at_last(1.0, 1.0)], "s")


# ---- keys and values ----------------------------------------------------------------------------------------


def salted(ids: list[int], salt: str, plan: TracePlan | None = None) -> Request:
    """A request that sees the prefix cache under this salt."""
    one = request("x", ids, plan, 6)
    return Request(one.id, one.prompt_ids, one.params, salt, plan)


def test_computed_keys_and_values_are_those_of_transformers(theirs, model):
    state = kv.compute(model, CLEAN)
    cache = theirs(torch.tensor([CLEAN]), use_cache=True).past_key_values
    for layer in range(3):
        assert difference(state.keys[layer], cache.layers[layer].keys[0].transpose(0, 1)) < 5e-5
        assert difference(state.values[layer], cache.layers[layer].values[0].transpose(0, 1)) < 5e-5


def test_what_a_running_request_has_in_the_cache_can_be_seen(model):
    engine = small_engine(model, step_tokens=13)
    engine.submit(request("x", CLEAN, None, 3))
    for count in (13, 26, 39, 40):
        engine.step()
        state = kv.view(engine, "x")
        assert state.ids == tuple(CLEAN[:count])
        assert difference(state.keys, kv.compute(model, CLEAN[:count]).keys) < 5e-5
    with pytest.raises(TraceError, match="no request 'y' is running"):
        kv.view(engine, "y")


def test_installed_keys_and_values_are_taken_by_their_salt_and_by_no_other(model, tmp_path):
    kv.compute(model, CLEAN).save(tmp_path / "kv.safetensors")
    state = kv.KVState.load(tmp_path / "kv.safetensors")
    state.values[2] = 0  # an edit: the last layer's values are gone, in whole blocks of 16
    engine = small_engine(model)
    assert kv.install(engine, state, "edited") == 32
    plan = TracePlan(("logits",), slice(32, None))
    plain, edited = (run(engine, [salted(CLEAN, salt, plan)])["x"][1]["logits"][:8] for salt in ("", "edited"))
    expected = logits_of(model, CLEAN, [Replace("layers.2.attn.v", 0.0, range(32))])
    assert difference(plain, logits_of(model, CLEAN)[32:]) < 5e-5
    assert difference(edited, expected[32:]) < 5e-5 < 0.01 < difference(edited, plain)


def test_keys_and_values_that_cannot_be_installed_are_refused(model, tmp_path):
    state, engine = kv.compute(model, CLEAN), small_engine(model, num_blocks=1)
    for refused, salt, sentence in (
            (state, "s", "2 blocks are needed, and 1 of the KV cache's 1 are free"), (state, "", "give a salt"),
            (kv.KVState(state.ids, state.keys[:2], state.values), "s", r"this model has \[3, 40, 2, 16\]")):
        with pytest.raises(TraceError, match=sentence):
            kv.install(engine, refused, salt)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    with pytest.raises(TraceError, match="no.safetensors: no keys and values can be read"):
        kv.KVState.load(tmp_path / "no.safetensors")
