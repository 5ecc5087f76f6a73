"""Rotary positions against the published float64 figures, transformers, Meta's own code and the equations.

A wrong or missing scaling shows only past some thousand positions, so everything here goes to 131,071.
"""

import dataclasses

import pytest
import torch
import transformers
from llama_models.llama3.reference_impl.model import apply_rotary_emb, apply_scaling, precompute_freqs_cis
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from llama.config import LlamaConfig
from llama.model.ragged import RaggedBatch, Segment
from llama.model.rope import inverse_frequencies, rotate, rotation
from llama.model.transformer import Llama
from tests import reference
from tests.model.pairs import SHAPES, Pages, difference, hugging_face, ours, plain_config, random_ids

NUM_POSITIONS = 131072
# By factor and head_dim: f_i in float64, as published for Llama 3.1 and 3.2.
FIGURES = {
    (8.0, 128): {0: 1.0, 1: 0.81461723386, 16: 3.7606030931e-2, 28: 3.2114459948e-3, 29: 2.1665707635e-3,
                 30: 1.3718935678e-3, 31: 8.5675141292e-4, 32: 5.2484616099e-4, 33: 3.1269375038e-4,
                 34: 1.7850781277e-4, 35: 9.5562123540e-5, 63: 3.0689259889e-7},
    (32.0, 64): {15: 1.2905479282e-3, 16: 4.2955679656e-4, 17: 9.7082878026e-5, 18: 1.9461638185e-5,
                 31: 9.4183067254e-8},
}
SUM_OF_ALL = 5.386058200729  # factor 8, head_dim 128


def config_of(factor: float | None, head_dim: int) -> dict:
    """A `config.json` object with Llama 3.1's rotary numbers."""
    scaling = factor and {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0,
                          "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    return {"model_type": "llama", "vocab_size": 8, "hidden_size": head_dim, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": head_dim, "rms_norm_eps": 1e-5,
            "max_position_embeddings": NUM_POSITIONS, "rope_theta": 500000.0, "rope_scaling": scaling}


def every_position():
    """All positions of the context, some thousands at a time."""
    return torch.arange(NUM_POSITIONS).split(16384)


@pytest.mark.parametrize("factor, head_dim", FIGURES)
def test_frequencies_are_the_published_figures(factor, head_dim):
    raw = config_of(factor, head_dim)
    frequencies = inverse_frequencies(LlamaConfig.from_dict(raw))
    assert frequencies.dtype == torch.float32 and frequencies.shape == (head_dim // 2,)
    exact = reference.frequencies(raw)
    for index, figure in FIGURES[factor, head_dim].items():
        assert exact[index] == pytest.approx(figure, rel=1e-10), index
        assert frequencies[index].item() == pytest.approx(figure, rel=1e-6), index


def test_the_sum_of_all_frequencies_is_the_published_figure():
    raw = config_of(8.0, 128)
    assert sum(reference.frequencies(raw)) == pytest.approx(SUM_OF_ALL, rel=1e-12)
    total = inverse_frequencies(LlamaConfig.from_dict(raw)).double().sum().item()
    assert total == pytest.approx(SUM_OF_ALL, rel=1e-7)


@pytest.mark.parametrize("factor, head_dim", [(8.0, 128), (32.0, 64), (None, 128)])
def test_every_position_up_to_131071_agrees_with_transformers(factor, head_dim):
    raw = config_of(factor, head_dim)
    theirs = LlamaRotaryEmbedding(transformers.LlamaConfig(**raw))
    frequencies = inverse_frequencies(LlamaConfig.from_dict(raw))
    for positions in every_position():
        cos, sin = (part[:, 0] for part in rotation(positions, frequencies))
        expected = (part[0, :, :head_dim // 2] for part in theirs(torch.empty(0), positions[None]))
        # One rounding of the frequency and one of the product, each 2^-24 of the angle, on either side.
        rounding = 2.0**-22 * positions[:, None] * frequencies + 1e-7
        for actual, wanted in zip((cos, sin), expected):
            assert actual.dtype == torch.float32
            assert ((actual - wanted).abs() <= rounding).all()


@pytest.mark.parametrize("factor, head_dim", [(8.0, 128), (32.0, 64), (None, 128)])
def test_every_position_up_to_131071_agrees_with_the_equations(factor, head_dim):
    raw = config_of(factor, head_dim)
    frequencies = inverse_frequencies(LlamaConfig.from_dict(raw))
    for positions in every_position():
        angles = reference.rotary_angles(raw, positions.tolist())
        cos, sin = (part[:, 0] for part in rotation(positions, frequencies))
        # theta^(2i/d) in float32 is right to some 1e-6: its exponent, of size 13 in base e, is rounded first.
        rounding = 1.2e-6 * angles + 1e-7
        assert ((cos - angles.cos()).abs() <= rounding).all()
        assert ((sin - angles.sin()).abs() <= rounding).all()


def test_every_position_up_to_131071_agrees_with_meta():
    frequencies = inverse_frequencies(LlamaConfig.from_dict(config_of(8.0, 128)))
    plain = inverse_frequencies(LlamaConfig.from_dict(config_of(None, 128)))
    assert ((frequencies - apply_scaling(plain)).abs() <= 2.0**-22 * frequencies).all()
    for use_scaled, ours_ in ((True, frequencies), (False, plain)):
        table = torch.view_as_real(precompute_freqs_cis(128, NUM_POSITIONS, 500000.0, use_scaled))
        for positions in every_position():
            rounding = 2.0**-22 * positions[:, None] * ours_ + 1e-7
            for part, actual in enumerate(rotation(positions, ours_)):
                assert ((actual[:, 0] - table[positions, :, part]).abs() <= rounding).all()


def test_the_rotation_is_transformers_and_metas():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(33, heads, 64, generator=generator) for heads in (6, 2))
    positions = torch.randint(0, NUM_POSITIONS, (33,), generator=generator)
    cos, sin = rotation(positions, inverse_frequencies(LlamaConfig.from_dict(config_of(8.0, 64))))
    ours_ = [rotate(x, cos, sin) for x in (q, k)]
    theirs = apply_rotary_pos_emb(q, k, *(part.repeat(1, 1, 2) for part in (cos, sin)), unsqueeze_dim=0)
    table = torch.complex(cos, sin)[:, 0]
    pairs = (torch.stack(x[None].chunk(2, -1), -1).flatten(-2) for x in (q, k))  # Meta's interleaved order
    metas = [torch.cat((x[0, ..., 0::2], x[0, ..., 1::2]), -1) for x in apply_rotary_emb(*pairs, table)]
    for actual, hugging, meta in zip(ours_, theirs, metas):
        assert difference(actual, hugging[0]) < 1e-6
        assert difference(actual, meta) < 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rotation_is_rounded_once_in_half_precision(dtype):
    x = torch.randn(50, 2, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    frequencies = inverse_frequencies(LlamaConfig.from_dict(config_of(8.0, 64)))
    rotary = rotation(torch.arange(131022, 131072), frequencies)
    assert torch.equal(rotate(x, *rotary), rotate(x.float(), *rotary).to(dtype))


# Where the tokens of one sequence stand in the tests of a whole model.
FAR = [*range(12), *range(4000, 4012), *range(8186, 8198), *range(60000, 60012), *range(131060, 131072)]


@pytest.fixture(scope="module", params=["4:1 of 128, as 8B", "4:1 of 64, as 1B"])
def far_pair(request):
    """transformers' model, ours, and ids that stand at the positions FAR."""
    theirs = hugging_face(SHAPES[request.param])
    return theirs, ours(theirs), random_ids(len(FAR))


def at_positions(model, ids, positions):
    """Our logits of one sequence whose tokens stand at these positions, with the keys in a cache."""
    pages = Pages(model, 8, {"a": [3, 1, 2, 5, 6, 7, 0, 4]})
    logits, tokens = [], 0
    for count in (7, 25, len(ids) - 33, 1):  # chunks, the last one a decode
        batch = pages.batch(("a", ids[tokens:tokens + count]))
        moved = dataclasses.replace(batch, positions=torch.tensor(positions[tokens:tokens + count]))
        logits.append(model(moved, pages.cache))
        tokens += count
    return torch.cat(logits)


def test_far_positions_agree_with_transformers(far_pair):
    theirs, model, ids = far_pair
    expected = theirs(torch.tensor([ids]), position_ids=torch.tensor([FAR])).logits[0]
    whole = RaggedBatch(torch.tensor(ids), torch.tensor(FAR), (Segment(0, len(ids)),))
    assert difference(model(whole), expected) < 1e-4
    assert difference(at_positions(model, ids, FAR), expected) < 1e-4


def test_far_positions_agree_with_the_equations(far_pair):
    theirs, model, ids = far_pair
    exact = reference.logits(theirs.state_dict(), plain_config(theirs), ids, FAR)
    # An angle of 131,071 is only good to 0.008 in float32, here as in every other implementation.
    assert difference(at_positions(model, ids, FAR), exact) < 0.05 * exact.std()


@pytest.mark.parametrize("change", [
    pytest.param(lambda scaling: None, id="scaling removed"),
    pytest.param(lambda scaling: dataclasses.replace(
        scaling, low_freq_factor=scaling.high_freq_factor, high_freq_factor=scaling.low_freq_factor),
        id="low and high swapped"),
    pytest.param(lambda scaling: dataclasses.replace(scaling, factor=40.0 - scaling.factor),
                 id="the other factor"),  # 8 for 32, 32 for 8
])
def test_a_wrong_or_missing_scaling_shows_far_out(far_pair, change):
    _, model, ids = far_pair
    changed = Llama(dataclasses.replace(model.config, rope_scaling=change(model.config.rope_scaling)))
    changed.load_state_dict(model.state_dict())
    assert difference(at_positions(changed, ids, FAR), at_positions(model, ids, FAR)) > 1


def test_a_prompt_of_8500_tokens_agrees_with_transformers():
    theirs = hugging_face(SHAPES["4:1 of 64, as 1B"] | {"hidden_size": 64, "num_attention_heads": 2,
                                                        "num_key_value_heads": 1, "intermediate_size": 64})
    model, ids = ours(theirs), random_ids(8501)
    expected = theirs(torch.tensor([ids]), logits_to_keep=400).logits[0]
    pages = Pages(model, 256, {"a": [*range(20, 40), *range(20)]})
    pages.step(("a", ids[:8101]), logit_rows=[0])
    logits = torch.cat([pages.step(("a", ids[8101:8500])), pages.step(("a", ids[8500:]))])
    assert difference(logits, expected) < 1e-4
