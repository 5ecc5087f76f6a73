"""The start of the demo model's training: an induction circuit among random weights."""

import torch

from llama.model.transformer import Llama
from tools.demo_eval import attention_patterns, induction_scores
from tools.demo_start import initialise
from tools.train_demo import CONFIG


def started(seed=1):
    model = Llama(CONFIG)
    initialise(model, seed)
    return model


def test_heads_of_the_first_layer_look_back_by_one_and_by_two():
    ids = torch.randint(0, CONFIG.bos_token_id, (200,), generator=torch.Generator().manual_seed(3))
    pattern = attention_patterns(started(), ids)[0]
    for head in range(CONFIG.group_size):
        back = [pattern[head].diagonal(-offset).mean() for offset in range(5)]
        assert torch.stack(back).argmax() == head + 1
        assert back[head + 1] > 0.5


def test_a_head_of_the_second_layer_finds_what_followed_before():
    scores = induction_scores(started())
    assert scores[1, :CONFIG.group_size].min() > 0.3
    assert scores[0].max() < 0.1 and scores[2:].max() < 0.1


def test_the_seed_decides_and_everything_is_trainable():
    first, again, other = started(), started(), started(seed=2)
    for name, parameter in first.named_parameters():
        assert parameter.requires_grad and torch.isfinite(parameter).all()
        assert torch.equal(parameter, again.get_parameter(name))
    assert not torch.equal(first.embed.weight, other.embed.weight)
