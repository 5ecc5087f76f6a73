"""The model against Meta's own `model.py` (the package llama-models), on the same random weights."""

import dataclasses

import pytest
import torch
import torch.distributed
from fairscale.nn.model_parallel import initialize as model_parallel
from llama_models.llama3.api.args import ModelArgs
from llama_models.llama3.reference_impl.model import Transformer, precompute_freqs_cis
from torch import Tensor

from llama.config import LlamaConfig
from llama.model.ragged import RaggedBatch
from llama.model.transformer import Llama
from tests.model.pairs import Pages, difference, joined, random_ids

PARAMS = {"dim": 256, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 181, "multiple_of": 32,
          "ffn_dim_multiplier": 1.3, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True}
TOLERANCE = 1e-4
# Hugging Face's names for Meta's.
NAMES = {"attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
         "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
         "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
         "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
         "feed_forward.w2": "mlp.down_proj",
         "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"}


@pytest.fixture(scope="module")
def one_process():
    """fairscale's layers ask for a process group, if only of one; nothing is ever sent."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    model_parallel.initialize_model_parallel(1)
    yield
    model_parallel.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[8, 4, 2], ids=["1:1 of 32", "2:1 of 64", "4:1 of 64"])
def pair(request, one_process):
    """Meta's model and ours, with the same weights."""
    heads = {8: (8, 8), 4: (4, 2), 2: (4, 1)}[request.param]
    params = PARAMS | dict(zip(("n_heads", "n_kv_heads"), heads))
    metas = meta_model(params)
    config = LlamaConfig.from_params(params)
    model = Llama(config)
    model.load_state_dict(joined(config, published(metas.state_dict(), config)))
    return metas, model


def meta_model(params: dict) -> Transformer:
    """Meta's model with random weights. As built it moves its cache to a GPU, so that call is taken away."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "cuda", lambda tensor: tensor)
        model = Transformer(ModelArgs(**params, max_batch_size=1, max_seq_len=4500))
    generator = torch.Generator().manual_seed(3)
    for weight in model.requires_grad_(False).parameters():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5, generator=generator)
        else:
            weight.normal_(0, 1.5 * weight.shape[1] ** -0.5, generator=generator)
    return model


def published(weights: dict[str, Tensor], config: LlamaConfig) -> dict[str, Tensor]:
    """Meta's tensors under Hugging Face's names, the rows of wq and wk from interleaved pairs to halves."""
    tensors = {}
    for name, weight in weights.items():
        name = name.removesuffix(".weight")
        if name.startswith("layers."):
            _, layer, name = name.split(".", 2)
            if name in ("attention.wq", "attention.wk"):
                heads = config.num_heads if name == "attention.wq" else config.num_kv_heads
                pairs = weight.view(heads, config.head_dim // 2, 2, config.hidden_size)
                weight = pairs.transpose(1, 2).reshape(weight.shape)
            tensors[f"model.layers.{layer}.{NAMES[name]}.weight"] = weight
        else:
            tensors[f"{NAMES[name]}.weight"] = weight
    return tensors


def test_prefill_and_decode_agree_with_meta(pair):
    metas, model = pair
    ids = random_ids(40)
    pages = Pages(model, 8, {"a": [5, 1, 2, 0, 4]})
    start = 0
    for count in (9, 1, 20, 8, 1, 1):  # prefill, a decode, chunks, decodes
        part = ids[start:start + count]
        expected = metas(torch.tensor([part]), start)[0]
        assert expected.std() > 1
        assert difference(pages.step(("a", part)), expected) < TOLERANCE
        start += count
    assert difference(model(RaggedBatch.whole(torch.tensor(ids)))[-1], expected[0]) < TOLERANCE


def test_decoding_past_four_thousand_positions_agrees_with_meta(one_process):
    params = PARAMS | {"dim": 128, "n_heads": 2, "n_kv_heads": 1}
    metas, config = meta_model(params), LlamaConfig.from_params(params)
    model = Llama(config)
    model.load_state_dict(joined(config, published(metas.state_dict(), config)))
    ids = random_ids(4402)
    pages = Pages(model, 128, {"a": [*range(34, -1, -1)]})
    for start in range(0, 4400, 400):
        expected = metas(torch.tensor([ids[start:start + 400]]), start)[0]
        assert difference(pages.step(("a", ids[start:start + 400])), expected) < TOLERANCE
    for start in (4400, 4401):
        expected = metas(torch.tensor([ids[start:start + 1]]), start)[0]
        assert difference(pages.step(("a", ids[start:start + 1])), expected) < TOLERANCE


def test_positions_up_to_131071_agree_with_meta(pair):
    metas, model = pair
    positions = [0, 1, 2, *range(8190, 8196), *range(70000, 70007), *range(131064, 131072)]
    ids = random_ids(24)
    with pytest.MonkeyPatch.context() as patch:
        table = precompute_freqs_cis(model.config.head_dim, 131072, 500000.0, use_scaled=True)
        patch.setattr(metas, "freqs_cis", table[positions])
        expected = metas(torch.tensor([ids]), 0)[0]
    batch = dataclasses.replace(RaggedBatch.whole(torch.tensor(ids)), positions=torch.tensor(positions))
    assert difference(model(batch), expected) < TOLERANCE
