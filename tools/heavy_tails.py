"""What trained weights have and normally distributed ones have not, and what quantisation fails on first.

Of trained Llamas the weights' tails are heavier than a normal distribution's, a few channels of the residual stream
are ten and more times larger than the others, the same ones in all layers (arXiv:2208.07339), and so are a few
between gate and down (arXiv:2402.17762). Here weights follow Student's t with DEGREES degrees of freedom, at the same
standard deviation, and one channel in OUTLIERS is enlarged 8 to 64 times.
"""

import hashlib
import math

import torch
from torch import Tensor

DEGREES = 6  # even, so that chi-squared is a product of uniforms
OUTLIERS = 200


def heavy_block(length: int, generator: torch.Generator) -> Tensor:
    """Independent draws from Student's t, scaled to a standard deviation of 1: [length], float32."""
    normal = torch.empty(length).normal_(generator=generator)
    uniform = torch.empty(DEGREES // 2, length).uniform_(1e-12, 1, generator=generator)
    chi_squared = -2 * uniform.log().sum(dim=0)
    return normal / (chi_squared / DEGREES).sqrt() * math.sqrt((DEGREES - 2) / DEGREES)


def element_sizes(name: str, shape: tuple[int, ...], first: int, length: int, seed: int) -> Tensor:
    """What elements first .. first + length - 1 of a tensor are multiplied by: [length], float32.

    What writes to the residual stream does so in the channels' sizes, and norms take back their square root, the
    last one more, since the head may be the embedding. What enters `down` is enlarged by `up`, and taken back by
    `down`.
    """
    places = torch.arange(first, first + length)
    columns = places % shape[-1]
    if len(shape) == 1:
        return channel_sizes(shape[0], "residual", seed)[columns] ** (-1.5 if name == "model.norm.weight" else -0.5)
    rows = places // shape[-1]
    if "embed_tokens" in name:
        return channel_sizes(shape[1], "residual", seed)[columns]
    if "up_proj" in name:
        return channel_sizes(shape[0], "feed-forward", seed)[rows]
    if "o_proj" in name:
        return channel_sizes(shape[0], "residual", seed)[rows]
    if "down_proj" in name:
        inner = channel_sizes(shape[1], "feed-forward", seed)[columns]
        return channel_sizes(shape[0], "residual", seed)[rows] / inner
    return torch.ones(length)


def channel_sizes(count: int, kind: str, seed: int) -> Tensor:
    """The size of each of so many channels: [count], float32. At least one is an outlier."""
    digest = hashlib.sha256(f"{seed}/{kind}/{count}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little"))
    sizes = torch.ones(count)
    outliers = torch.randperm(count, generator=generator)[:max(count // OUTLIERS, 1)]
    sizes[outliers] = 8 * 8 ** torch.rand(len(outliers), generator=generator)
    return sizes
