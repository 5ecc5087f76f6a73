"""Names and shapes against transformers' own, and the joined weights without a row left over."""

import dataclasses

import pytest
import torch
import transformers

from llama.checkpoint.layout import places
from llama.config import LlamaConfig
from llama.model.transformer import Llama
from tests.checkpoint.drafts import CONFIG, HEAD, published_shapes

SMALL = LlamaConfig.from_dict(CONFIG)
AS_8B = dataclasses.replace(SMALL, vocab_size=128256, hidden_size=4096, intermediate_size=14336,
                            num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)
AS_1B = dataclasses.replace(SMALL, vocab_size=128256, hidden_size=2048, intermediate_size=8192, num_layers=16,
                            num_heads=32, num_kv_heads=8, head_dim=64, tie_word_embeddings=True)
CONFIGS = pytest.mark.parametrize("config", [SMALL, AS_8B, AS_1B], ids=["small", "8B", "1B"])


def test_names_and_shapes_are_the_published_ones() -> None:
    assert {name: list(place.shape) for name, place in places(SMALL).items()} == published_shapes()


@CONFIGS
def test_names_shapes_and_order_are_those_of_transformers(config: LlamaConfig) -> None:
    with torch.device("meta"):
        theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**config.to_dict())).state_dict()
    expected = [(name, tuple(tensor.shape)) for name, tensor in theirs.items()
                if not (config.tie_word_embeddings and name == HEAD)]
    assert [(name, place.shape) for name, place in places(config).items()] == expected


@CONFIGS
def test_places_fill_every_parameter_exactly(config: LlamaConfig) -> None:
    model = Llama(config, device="meta")
    parameters = {name: parameter.shape for name, parameter in model.named_parameters()}
    filled = dict.fromkeys(parameters, 0)
    for place in sorted(places(config).values(), key=lambda place: (place.parameter, place.first_row)):
        assert place.first_row == filled[place.parameter], place
        assert place.shape[1:] == parameters[place.parameter][1:], place
        filled[place.parameter] += place.shape[0]
    assert filled == {name: shape[0] for name, shape in parameters.items()}


def test_a_tied_head_has_no_place() -> None:
    assert HEAD in places(SMALL)
    assert HEAD not in places(dataclasses.replace(SMALL, tie_word_embeddings=True))


def test_8b_has_the_published_number_of_tensors() -> None:
    assert len(places(AS_8B)) == 291
