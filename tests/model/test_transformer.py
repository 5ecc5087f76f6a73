"""The parts of the network, each against transformers' own, and what the whole promises beside numbers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from llama.config import LlamaConfig, RopeScaling
from llama.model.ragged import RaggedBatch, Segment
from llama.model.transformer import FeedForward, Llama, RMSNorm
from tests.model.pairs import SHAPES, Pages, difference, hugging_face, joined, ours, random_ids

PUBLISHED = {  # hidden, layers, heads, kv heads, head_dim, intermediate, tied, factor: parameters
    "3.1 8B": (4096, 32, 32, 8, 128, 14336, False, 8.0, 8_030_261_248),
    "3.1 and 3.3 70B": (8192, 80, 64, 8, 128, 28672, False, 8.0, 70_553_706_496),
    "3.1 405B": (16384, 126, 128, 8, 128, 53248, False, 8.0, 405_853_388_800),
    "3.2 1B": (2048, 16, 32, 8, 64, 8192, True, 32.0, 1_235_814_400),
    "3.2 3B": (3072, 28, 24, 8, 128, 8192, True, 32.0, 3_212_749_824),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_shapes_are_built_with_the_published_number_of_weights(name):
    hidden, layers, heads, kv_heads, head_dim, intermediate, tied, factor, parameters = PUBLISHED[name]
    config = LlamaConfig(128256, hidden, intermediate, layers, heads, kv_heads, head_dim, 131072, 500000.0,
                         RopeScaling(factor, 1.0, 4.0, 8192), 1e-5, tied)
    model = Llama(config, torch.bfloat16, "meta")
    assert sum(weight.numel() for weight in model.parameters()) == parameters == config.num_parameters


def norms(eps: float, dtype: torch.dtype) -> tuple[RMSNorm, LlamaRMSNorm]:
    """Ours and transformers', with the same weight."""
    model, theirs = RMSNorm(96, eps, dtype, "cpu"), LlamaRMSNorm(96, eps).to(dtype)
    weight = torch.empty(96).uniform_(0.2, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    model.weight.copy_(weight)
    theirs.weight.data.copy_(weight)
    return model, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-3, 1.0, 300.0])
def test_rms_norm_is_bit_for_bit_that_of_transformers(dtype, size):
    model, theirs = norms(1e-5, dtype)
    x = size * torch.randn(200, 96, generator=torch.Generator().manual_seed(1))
    assert torch.equal(model(x.to(dtype)), theirs(x.to(dtype)))


def test_rms_norm_casts_to_the_models_dtype_before_it_multiplies_by_the_weight():
    model, _ = norms(1e-5, torch.bfloat16)
    x = torch.randn(200, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    assert torch.equal(model(x), model.weight * normed.bfloat16())
    other_order = (model.weight.float() * normed).bfloat16()
    assert not torch.equal(model(x), other_order)


def test_rms_norm_adds_its_own_epsilon_to_the_mean_square():
    x = torch.full((1, 96), 1e-3)  # mean square 1e-6, well below epsilon
    for eps in (1e-5, 1e-2):
        model, _ = norms(eps, torch.float32)
        model.weight.fill_(1)
        assert model(x)[0, 0].item() == pytest.approx(1e-3 / (1e-6 + eps) ** 0.5, rel=1e-6)
    zero = model(torch.zeros(1, 96))
    assert torch.equal(zero, torch.zeros(1, 96))


def test_every_norm_of_the_model_has_the_configured_epsilon():
    config = dataclasses.replace(ours(hugging_face(SHAPES["8:1 of 32, tied"])).config, rms_norm_eps=0.125)
    norms_ = [module for module in Llama(config).modules() if isinstance(module, RMSNorm)]
    assert len(norms_) == 2 * config.num_layers + 1
    assert {norm.eps for norm in norms_} == {0.125}


def test_the_gate_goes_through_silu_and_up_does_not():
    theirs = hugging_face(SHAPES["4:1 of 128, as 8B"])
    model = ours(theirs)
    mlp, feed_forward = theirs.model.layers[0].mlp, model.blocks[0].feed_forward
    assert isinstance(mlp, LlamaMLP) and isinstance(feed_forward, FeedForward)
    x = torch.randn(20, 192, generator=torch.Generator().manual_seed(0))
    assert difference(feed_forward(x), mlp(x)) < 1e-5
    exchanged = mlp.down_proj(F.silu(mlp.up_proj(x)) * mlp.gate_proj(x))
    assert difference(feed_forward(x), exchanged) > 1


def test_logits_are_computed_for_the_rows_that_are_asked_for_and_no_others():
    model = ours(hugging_face(SHAPES["4:1 of 64, as 1B"]))
    ids, seen = random_ids(20), []
    every = Pages(model, 8, {"a": [2, 0, 1]}).step(("a", ids))
    for module in (model.norm, model.head):
        module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    pages = Pages(model, 8, {"a": [2, 0, 1], "b": [5, 3, 4]})
    asked = pages.step(("a", ids[:20]), ("b", ids[:9]), logit_rows=[28, 19, 3])
    assert difference(asked, every[[8, 19, 3]]) < 1e-4
    assert seen == [3, 3]
    assert pages.step(("b", ids[9:12]), logit_rows=[]).shape == (0, 181)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logits_are_float32_and_weights_and_cache_are_not(dtype):
    model = ours(hugging_face(SHAPES["8:1 of 32, tied"]).to(dtype))
    pages = Pages(model, 8, {"a": [0]})
    assert model.dtype == pages.cache.keys.dtype == dtype
    assert pages.step(("a", [1, 2, 3])).dtype == torch.float32
    assert pages.step(("a", [4])).dtype == torch.float32
    assert model(RaggedBatch.whole(torch.tensor([1, 2, 3]))).dtype == torch.float32
    assert model.frequencies.dtype == torch.float32


@pytest.mark.parametrize("shape", ["4:1 of 64, as 1B", "4:1 of 128, as 8B"])
def test_a_tied_head_is_the_embedding_and_an_untied_one_is_not(shape):
    model = ours(hugging_face(SHAPES[shape]))
    tied = model.config.tie_word_embeddings
    assert (model.head.weight is model.embed.weight) == tied
    assert sum(weight.numel() for weight in model.parameters()) == model.config.num_parameters
    before = model(RaggedBatch.whole(torch.tensor([5])))
    model.embed.weight[7] += 1  # a token that is not in the input: only a tied head notices
    after = model(RaggedBatch.whole(torch.tensor([5])))
    assert (difference(before[:, 7:8], after[:, 7:8]) > 0.1) == tied
    assert difference(before[:, :7], after[:, :7]) == 0


@pytest.mark.parametrize("shape", ["3:1 of 128, as 3B", "4:1 of 128, as 8B"])
def test_gradients_of_whole_sequences_equal_those_of_transformers(shape):
    theirs = hugging_face(SHAPES[shape])
    model = ours(theirs).requires_grad_()
    theirs.requires_grad_()
    ids = torch.tensor([random_ids(21, seed) for seed in range(3)])
    logits = model(RaggedBatch.whole(ids))
    F.cross_entropy(logits.unflatten(0, ids.shape)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    F.cross_entropy(theirs(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = joined(model.config, {name: weight.grad for name, weight in theirs.named_parameters()})
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        scale = expected[name].abs().max().item()
        assert scale > 1e-4, name
        assert difference(gradient, expected[name]) < 1e-4 * scale, name


def test_gradients_of_sequences_of_unequal_lengths_are_the_sum_of_those_of_each_alone():
    model = ours(hugging_face(SHAPES["8:1 of 32, tied"])).requires_grad_()
    sequences = [torch.tensor(random_ids(length, seed=length)) for length in (5, 17, 9)]
    together = RaggedBatch(torch.cat(sequences), torch.cat([torch.arange(len(ids)) for ids in sequences]),
                           tuple(Segment(0, len(ids)) for ids in sequences))
    model(together).square().sum().backward()
    gradients = [weight.grad for weight in model.parameters()]
    model.zero_grad()
    for ids in sequences:
        model(RaggedBatch.whole(ids)).square().sum().backward()
    for gradient, weight in zip(gradients, model.parameters()):
        assert difference(gradient, weight.grad) < 1e-4 * weight.grad.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_in_deterministic_mode_logits_are_the_same_bits_alone_and_in_any_company(dtype):
    model = ours(hugging_face(SHAPES["3:1 of 128, as 3B"]).to(dtype))
    ids, others = random_ids(70), random_ids(70, seed=2)
    model.set_deterministic(True)
    alone = Pages(model, 8, {"a": [*range(9)]}).step(("a", ids))
    pages = Pages(model, 8, {"a": [5, 8, 9, 11, 13, 2, 0, 4, 3], "b": [12, 1, 7, 6, 10, 14, 15, 16, 17]})
    start = 0
    for count, company in ((1, 5), (37, 1), (1, 1), (30, 20), (1, 1)):
        logits = pages.step(("b", others[:company]), ("a", ids[start:start + count]))
        assert torch.equal(logits[company:], alone[start:start + count])
        start += count
    model.set_deterministic(False)
    assert difference(Pages(model, 8, {"a": [*range(9)]}).step(("a", ids)), alone) < (
        1e-4 if dtype == torch.float32 else 0.25 * alone.std())


def test_weights_take_no_gradient_unless_asked():
    model = ours(hugging_face(SHAPES["8:1 of 32, tied"]))
    assert not any(weight.requires_grad for weight in model.parameters())
    assert not model(RaggedBatch.whole(torch.tensor([1, 2]))).requires_grad
