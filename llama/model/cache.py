"""The paged key/value cache: two tensors a layer, addressed by slot.

Position p of a sequence lies in slot block_table[p // block_size] * block_size + p % block_size (paged
attention, arXiv:2309.06180). Which blocks a sequence has is the engine's business (`llama.engine.blocks`); here
are only the tensors.
"""

import torch
from torch import Tensor

from llama.config import LlamaConfig


class KVCache:
    """Keys (after rotation) and values of every layer: each [num_slots, num_kv_heads, head_dim].

    A token's heads lie side by side, so that neighbouring blocks are one view of consecutive positions.
    """

    def __init__(self, config: LlamaConfig, num_blocks: int, block_size: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu"):
        self.num_blocks = num_blocks
        self.block_size = block_size
        shape = (config.num_layers, num_blocks * block_size, config.num_kv_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store this step's keys and values, each [tokens, num_kv_heads, head_dim], at slots [tokens]."""
        self.keys[layer].index_copy_(0, slots, k)
        self.values[layer].index_copy_(0, slots, v)

    def read(self, layer: int, run: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Views of the keys and values in a run of slots: each [run, num_kv_heads, head_dim]."""
        first, last = run
        return self.keys[layer, first:last], self.values[layer, first:last]

    def copy_block(self, source: int, target: int) -> None:
        """Duplicate one block in all layers: the copy of copy-on-write."""
        for tensor in (self.keys, self.values):
            blocks = tensor.view(tensor.shape[0], self.num_blocks, self.block_size, *tensor.shape[2:])
            blocks[:, target] = blocks[:, source]
