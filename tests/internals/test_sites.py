"""Every named place of the forward pass, value by value against transformers with hooks."""

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llama.model import transformer
from llama.model.pattern import PatternError
from llama.model.plan import TracePlan
from llama.model.plan_tap import PlanTap
from llama.model.ragged import RaggedBatch
from llama.model.sites import FIRST, LAST, LAYER, all_sites, documentation
from llama.model.tap import UNTOUCHED
from tests.internals.hooked import Hooked
from tests.internals.tapped import bound, by_label, tapped, whole
from tests.model.pairs import SHAPES, Pages, difference, hugging_face, ours, random_ids

TOLERANCE = 5e-5  # absolute, float32
IDS = random_ids(37)
EVERYTHING = TracePlan(("*",))


@pytest.fixture(scope="module", params=["1:1 of 64, plain rope", "8:1 of 32, tied", "3:1 of 128, as 3B"])
def pair(request):
    """transformers' model, ours, and transformers' values of IDS at every site."""
    theirs = hugging_face(SHAPES[request.param])
    return theirs, ours(theirs), Hooked(theirs).run(IDS)


def assert_alike(got: dict[str, Tensor], expected: dict[str, Tensor], way: str = "") -> None:
    """Every site is there, and every value is near: to 5e-5, or of values above 1 to that share of the largest."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        seen = value.isfinite()
        assert got[name].shape == value.shape, (name, way)
        assert torch.equal(seen, got[name].isfinite()), (name, way)
        largest = max(1.0, value[seen].abs().max().item())
        assert difference(got[name][seen], value[seen]) < TOLERANCE * largest, (name, way)


def test_a_whole_sequence_has_transformers_values_at_every_site(pair):
    _, model, expected = pair
    logits, captured = whole(model, IDS, EVERYTHING)
    assert_alike(by_label(captured), expected)
    assert torch.equal(logits, by_label(captured)["logits"])


@pytest.mark.parametrize("cuts", [[37], [1, 8, 24, 35, 36, 37], list(range(1, 38))],
                         ids=["prefill", "chunks", "decode"])
def test_a_cached_sequence_has_transformers_values_at_every_site(pair, cuts):
    _, model, expected = pair
    pages, plan = Pages(model, 8, {"a": [5, 3, 4, 0, 7]}), bound(model, EVERYTHING, len(IDS))
    captured = [one for first, last in zip([0, *cuts], cuts)
                for one in tapped(pages, {"a": plan}, ("a", IDS[first:last]))[1]["a"]]
    assert_alike(by_label(captured), expected)


def test_sequences_that_share_a_step_have_their_own_values(pair):
    _, model, expected = pair
    pages = Pages(model, 8, {"a": [*range(5)], "b": [9, 5, 6, 7, 8], "c": [10]})
    plan = bound(model, EVERYTHING, len(IDS))
    captured = []
    for chunk in (IDS[:20], IDS[20:]):
        _, found = tapped(pages, {"b": plan}, ("a", random_ids(len(chunk), 3)), ("b", chunk), ("c", [7]))
        captured += found["b"]
    assert_alike(by_label(captured), expected)


def test_past_position_8192_every_site_still_has_transformers_values():
    shape = SHAPES["8:1 of 32, tied"] | {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    theirs = hugging_face(shape)
    model, ids, start = ours(theirs), random_ids(8205), 8190
    oracle = Hooked(theirs)
    oracle.skip(ids[:start])
    pages = Pages(model, 512, {"a": [*range(17)]})
    pages.step(("a", ids[:start]), logit_rows=[])
    plan = bound(model, TracePlan(("*",), slice(start, None)), len(ids))
    for chunk in (ids[start:start + 12], *([token] for token in ids[start + 12:])):
        _, captured = tapped(pages, {"a": plan}, ("a", chunk))
        expected = oracle.run(chunk)
        assert_alike(by_label(captured["a"]), expected)


def test_a_kernel_that_is_not_its_pattern_times_the_values_is_found_out(pair, monkeypatch):
    _, model, _ = pair
    kernel = transformer.ragged_attention
    monkeypatch.setattr(transformer, "ragged_attention", lambda *args: kernel(*args) * 1.01)
    with pytest.raises(PatternError, match="layers.0.attn.pattern: the attention kernel is .* away from the recomp"):
        whole(model, IDS, TracePlan(("layers.0.attn.scores",)))
    whole(model, IDS, TracePlan(("layers.0.attn.heads",)))  # who does not ask is not stopped


# ---- without a plan, nothing is different ------------------------------------------------------------------


class Operators(TorchDispatchMode):
    """Every operator that reaches a kernel, in order."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


NORM = ["pow", "mean", "add", "rsqrt", "mul", "mul"]
ROTATE = ["mul", "mul", "sub", "mul", "mul", "add", "cat"]
BEFORE_ATTENTION = [*NORM, "product", *ROTATE, *ROTATE]
AFTER_ATTENTION = ["product", "add", *NORM, "product", "silu", "mul", "product", "add"]
# They make a view of a tensor, or none, and are no kernels.
VIEWS = ("view", "slice", "transpose", "unsqueeze", "squeeze", "detach", "alias", "expand", "as_strided", "split",
         "select", "t", "reshape", "unbind", "_unsafe_view")


def test_without_a_plan_the_forward_pass_runs_the_kernels_of_the_equations_and_no_others(pair):
    _, model, _ = pair
    with Operators() as seen, torch.no_grad():
        model(RaggedBatch.whole(torch.tensor(IDS)))
    names = [name.removeprefix("aten.").split(".")[0] for name in seen.names]
    names = ["product" if "mm" in name or "linear" in name else name for name in names]
    kernels = [name for name in names if name not in VIEWS and not name.startswith("split")]
    first = kernels.index("embedding") + 1
    for _ in range(model.config.num_layers):
        attention = first + len(BEFORE_ATTENTION)
        after = kernels.index("product", attention)
        assert kernels[first:attention] == BEFORE_ATTENTION
        assert 1 <= after - attention <= 3  # whatever kernels attention is made of
        first = after + len(AFTER_ATTENTION)
        assert kernels[after:first] == AFTER_ATTENTION
    assert kernels[first:] == [*NORM, "product"]


def test_a_tap_that_captures_nothing_here_gives_the_same_bits(pair):
    _, model, _ = pair
    batch = RaggedBatch.whole(torch.tensor(IDS))
    plain = model(batch)
    assert torch.equal(model(batch, None, UNTOUCHED), plain)
    assert torch.equal(model(batch, None, PlanTap([], None, model.logits)), plain)
    assert torch.equal(whole(model, IDS, EVERYTHING)[0], plain)


def test_the_documentation_has_every_site_once_in_the_order_of_the_computation(pair):
    _, model, _ = pair
    head = (" ", "Sites", "*", "Brackets")
    lines = [line for line in documentation().splitlines() if line and not line.startswith(head)]
    names = [line.split()[0].rstrip("*").removeprefix("layers.N.") for line in lines]
    assert names == [site.name for site in (*FIRST, *LAYER, *LAST)]
    assert all(len(line) <= 120 for line in documentation().splitlines())
    order = [one.label for one in whole(model, IDS[:3], TracePlan(("layers.0.*",)))[1]]
    assert order == [name for name, layer, _ in all_sites(model.config) if layer == 0]
