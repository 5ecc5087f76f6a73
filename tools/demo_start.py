"""Where the demo model's training begins: random weights in which one induction circuit is laid out.

Induction (Olsson et al., In-context learning and induction heads, 2022) takes two layers: heads of the first
find the token before, heads of the second find what followed the same token earlier. From a random start a
model of this size needs millions of tokens before such heads appear, and copying, recall, JSON and tool calls
all wait for them. So they are given here; training is free to keep, move or undo them, and makes the rest.
"""

import math

import torch
from torch import Tensor, nn

from llama.model.transformer import Llama

# Radians per position: pairs of dimensions that tell neighbours apart, and those that hardly turn at all.
FAST, SLOW = 0.05, 0.0035
# Sizes of what the circuit adds: scores of the token before, scores of a match, and what both heads write.
POSITION, MATCH, WRITE, COPY = 1.26, 1.5, 0.1, 0.3


def initialise(model: Llama, seed: int) -> None:
    """Fill a float32 model with its starting weights, and make them trainable."""
    config, generator = model.config, torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            nn.init.ones_(parameter)
            continue
        deviation = 0.02 if name == "embed.weight" else 0.5 * parameter.shape[1] ** -0.5
        if name.endswith(("attention.out.weight", "feed_forward.down.weight")):
            deviation /= 4 * math.sqrt(2 * config.num_layers)
        nn.init.normal_(parameter, std=deviation, generator=generator)
    _lay_circuit(model, generator)
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def _lay_circuit(model: Llama, generator: torch.Generator) -> None:
    """The first group of heads: in the first layer for the tokens before, in the second for induction."""
    config, width = model.config, model.config.head_dim
    # A direction that all embeddings share, from which a query and a key of position alone can be made; and
    # three sets of directions at right angles to it and to each other.
    shared = torch.randn(config.hidden_size, generator=generator).sign() / math.sqrt(config.hidden_size)
    model.embed.weight += 0.01 * math.sqrt(config.hidden_size) * shared
    noise = torch.randn(config.hidden_size, config.hidden_size - 1, generator=generator)
    axes = torch.linalg.qr(torch.cat((shared[:, None], noise), dim=1))[0].T  # [hidden, hidden], rows
    token, before, copied = axes[1:].split(width)[:3]  # each [head_dim, hidden]

    key, value = config.q_size, config.q_size + config.kv_size  # where these rows begin in qkv
    first, second = model.blocks[0].attention, model.blocks[1].attention
    for offset in range(1, config.group_size + 1):
        rows = slice((offset - 1) * width, offset * width)
        first.qkv.weight[rows] = POSITION * _facing_back(model.frequencies, offset)[:, None] * shared
        second.qkv.weight[rows] = MATCH * _on_slow_pairs(model.frequencies) @ token
    first.qkv.weight[key:key + width] = POSITION * _facing_back(model.frequencies, 0)[:, None] * shared
    first.qkv.weight[value:value + width] = token
    first.out.weight[:, :width] = WRITE * before.T
    second.qkv.weight[key:key + width] = MATCH * _on_slow_pairs(model.frequencies) @ before
    second.qkv.weight[value:value + width] = copied
    second.out.weight[:, :width] = COPY * copied.T


def _facing_back(frequencies: Tensor, offset: int) -> Tensor:
    """A query [head_dim] that, rotated, agrees best with the same key `offset` positions before it."""
    fast = frequencies > FAST
    return torch.cat(((offset * frequencies).cos() * fast, -(offset * frequencies).sin() * fast))


def _on_slow_pairs(frequencies: Tensor) -> Tensor:
    """A matrix [head_dim, head_dim] that puts what it is given on dimensions which position hardly turns."""
    places = (frequencies < SLOW).repeat(2).nonzero()[:, 0]
    chosen = torch.zeros(2 * len(frequencies), 2 * len(frequencies))
    chosen[places, torch.arange(len(places))] = 1.0
    return chosen
