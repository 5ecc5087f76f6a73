"""Rotary position embeddings (arXiv:2104.09864) with the frequency scaling of Llama 3.1 (arXiv:2407.21783).

Everything here is float32, tables and rotation, whatever the model's dtype: at position 100,000 a bfloat16
angle would be off by whole turns.
"""

import math

import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.model.kernels import native


def inverse_frequencies(config: LlamaConfig) -> Tensor:
    """Radians that each pair of dimensions turns per position: [head_dim / 2], float32.

    f_i = theta^(-2i/d). With `config.rope_scaling`, frequencies whose wavelength 2π/f exceeds
    original/low_freq_factor are divided by `factor`, those below original/high_freq_factor stay as they are,
    and the band between is interpolated. Always on the CPU: a GPU's powers may differ in the last bit, which 100,000
    positions on is a hundredth of a radian.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
    smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)  # 0: stretched by the factor; 1: kept
    return (1 - smooth) * frequencies / scaling.factor + smooth * frequencies


def rotation(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every position's angles: two of [tokens, 1, head_dim / 2], float32.

    positions: [tokens], integers. The product is taken in float32, as in both reference implementations: the
    weights were trained with its rounding.
    """
    angles = positions.to(torch.float32)[:, None, None] * frequencies  # [tokens, 1, head_dim / 2]
    return angles.cos(), angles.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_{i + head_dim/2}) of each head by the position's angles.

    x: [tokens, heads, head_dim] in any float dtype, which the result keeps; computed in float32. Pairing
    halves is Hugging Face's layout; Meta's interleaved pairs are the same function once wq and wk are permuted.
    """
    if native.serves(x) and x.shape[2] % 32 == 0 and cos.is_contiguous() and sin.is_contiguous():
        return native.rotate(x, cos, sin)
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
