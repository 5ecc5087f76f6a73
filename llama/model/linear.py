"""y = x Wᵀ: the one operation in which nearly all weights and nearly all time are spent."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Rows of every product in deterministic mode: as many as a decode can bear.
TILE_ROWS = 32


class Linear(nn.Module):
    """A matrix [out_features, in_features] in float32, bfloat16 or float16, without bias.

    Created uninitialised: the loader, or a training tool, fills `weight`. Several matrices that read the same
    input lie in one, their rows one below the other (q over k over v, gate over up).

    deterministic: multiply TILE_ROWS rows at a time, whatever there are. A library chooses its way of summing by
    the shape of the product; with one shape there is one way, so that a row's result is the same bits in any
    company.
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.deterministic = False

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features], in the dtype of the weight."""
        return self._by_tiles(x) if self.deterministic else F.linear(x, self.weight)

    def _by_tiles(self, x: Tensor) -> Tensor:
        padded = F.pad(x, (0, 0, 0, -len(x) % TILE_ROWS))
        return torch.cat([F.linear(tile, self.weight) for tile in padded.split(TILE_ROWS)])[:len(x)]
