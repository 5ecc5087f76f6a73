"""Llama once more, as plain as the equations: no cache, no batch, no fused kernel, float64 throughout.

An oracle for tests. It imports nothing of `llama`, takes the object of a `config.json` and the tensors under
their published names, and does each thing another way than `llama.model` does: frequencies by the cases of
their wavelength, rotation as a product of complex numbers, attention one head and one token at a time.
"""

import math
from typing import Any

import torch
from torch import Tensor


def logits(weights: dict[str, Tensor], config: dict[str, Any], ids: list[int],
           positions: list[int] | None = None) -> Tensor:
    """Next-token logits of one sequence: [len(ids), vocab_size], float64.

    weights: by Hugging Face's names, in any float dtype; without `lm_head.weight` the head is the embedding.
    positions: where the tokens stand, by default 0, 1, 2, ...; a token sees those before it in `ids`.
    """
    weights = {name: tensor.double() for name, tensor in weights.items()}
    eps, num_layers = config["rms_norm_eps"], config["num_hidden_layers"]
    embedding = weights["model.embed_tokens.weight"]
    angles = rotary_angles(config, list(range(len(ids))) if positions is None else positions)
    x = embedding[torch.tensor(ids)]  # [tokens, hidden]
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}."
        w = {name.removeprefix(prefix).removesuffix(".weight"): tensor
             for name, tensor in weights.items() if name.startswith(prefix)}
        x = x + attention_layer(rms_norm(x, w["input_layernorm"], eps), w, config, angles)
        x = x + feed_forward(rms_norm(x, w["post_attention_layernorm"], eps), w)
    x = rms_norm(x, weights["model.norm.weight"], eps)
    return x @ weights.get("lm_head.weight", embedding).T


def attention_layer(x: Tensor, w: dict[str, Tensor], config: dict[str, Any], angles: Tensor) -> Tensor:
    """[tokens, hidden] -> [tokens, hidden], with the layer's weights `w` by their short names."""
    q, k, v = (x @ w[f"self_attn.{name}_proj"].T for name in "qkv")
    head_dim = head_dim_of(config)
    q, k, v = (part.unflatten(1, (-1, head_dim)) for part in (q, k, v))  # [tokens, heads, head_dim]
    return attention(rotate(q, angles), rotate(k, angles), v).flatten(1) @ w["self_attn.o_proj"].T


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention: q [tokens, heads, head_dim], k and v [tokens, kv_heads, head_dim] -> q's shape."""
    tokens, heads, head_dim = q.shape
    out = torch.empty_like(q)
    for head in range(heads):
        kv_head = head // (heads // k.shape[1])
        for token in range(tokens):
            scores = k[:token + 1, kv_head] @ q[token, head] / math.sqrt(head_dim)  # [seen]
            weights = torch.exp(scores - scores.max())
            out[token, head] = (weights / weights.sum()) @ v[:token + 1, kv_head]
    return out


def feed_forward(x: Tensor, w: dict[str, Tensor]) -> Tensor:
    """SwiGLU: [tokens, hidden] -> [tokens, hidden]."""
    gate, up = x @ w["mlp.gate_proj"].T, x @ w["mlp.up_proj"].T
    return (gate / (1 + torch.exp(-gate)) * up) @ w["mlp.down_proj"].T


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """[tokens, hidden] -> [tokens, hidden]."""
    return x / torch.sqrt((x * x).sum(1, keepdim=True) / x.shape[1] + eps) * weight


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """x [tokens, heads, head_dim]: entries i and i + head_dim/2 are a complex number, turned by its angle."""
    real, imaginary = x.chunk(2, dim=2)
    turned = torch.complex(real, imaginary) * torch.exp(1j * angles)[:, None]
    return torch.cat((turned.real, turned.imag), dim=2)


def rotary_angles(config: dict[str, Any], positions: list[int]) -> Tensor:
    """Radians: [positions, head_dim / 2], float64."""
    return torch.outer(torch.tensor(positions, dtype=torch.float64),
                       torch.tensor(frequencies(config), dtype=torch.float64))


def frequencies(config: dict[str, Any]) -> list[float]:
    """Radians per position of each pair, case by case as Llama 3.1 defines them."""
    head_dim, scaling = head_dim_of(config), config.get("rope_scaling")
    plain = [config["rope_theta"] ** (-2 * i / head_dim) for i in range(head_dim // 2)]
    if scaling is None:
        return plain
    original, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    scaled = []
    for frequency in plain:
        wavelength = 2 * math.pi / frequency
        if wavelength < original / high:
            scaled.append(frequency)
        elif wavelength > original / low:
            scaled.append(frequency / factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            scaled.append((1 - smooth) * frequency / factor + smooth * frequency)
    return scaled


def head_dim_of(config: dict[str, Any]) -> int:
    """As configured, or the hidden size shared out among the heads."""
    return config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
