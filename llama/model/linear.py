"""y = x Wᵀ: the one operation in which nearly all weights and nearly all time are spent."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Module):
    """A matrix [out_features, in_features] in float32, bfloat16 or float16, without bias.

    Created uninitialised: the loader, or a training tool, fills `weight`. Several matrices that read the same
    input lie in one, their rows one below the other (q over k over v, gate over up).
    """

    def __init__(self, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        weight = torch.empty(out_features, in_features, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, in_features] -> [tokens, out_features], in the dtype of the weight."""
        return F.linear(x, self.weight)
