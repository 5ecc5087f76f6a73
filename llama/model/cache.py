"""The paged key/value cache: two tensors a layer, addressed by slot.

Position p of a sequence lies in slot block_table[p // block_size] * block_size + p % block_size (paged
attention, arXiv:2309.06180). Which blocks a sequence has is the engine's business (`llama.engine.blocks`); here
are only the tensors.
"""

import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.model.formats import quantise_int8


class KVCache:
    """Keys (after rotation) and values of every layer: each [layers, num_slots, num_kv_heads, head_dim].

    A token's heads lie side by side, so that neighbouring blocks are one view of consecutive positions. dtype: of what
    is written and read. int8: kept as int8 with one float32 scale for each head of a token (`key_scales`,
    `value_scales`: [layers, num_slots, num_kv_heads], otherwise None): about half the memory, and its rounding.
    """

    def __init__(self, config: LlamaConfig, num_blocks: int, block_size: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu", int8: bool = False):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        shape = (config.num_layers, num_blocks * block_size, config.num_kv_heads, config.head_dim)
        self.keys, self.values = (torch.empty(shape, dtype=torch.int8 if int8 else dtype, device=device) for _ in range(2))
        self.key_scales, self.value_scales = (torch.empty(shape[:3], device=device) if int8 else None for _ in range(2))

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store this step's keys and values, each [tokens, num_kv_heads, head_dim], at slots [tokens]."""
        for new, kept, scales in ((k, self.keys, self.key_scales), (v, self.values, self.value_scales)):
            if scales is not None:
                new, scale = quantise_int8(new)
                scales[layer].index_copy_(0, slots, scale)
            kept[layer].index_copy_(0, slots, new)

    def read(self, layer: int, run: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The keys and values in a run of slots: each [run, num_kv_heads, head_dim]; views, unless they are kept as int8."""
        first, last = run
        keys, values = self.keys[layer, first:last], self.values[layer, first:last]
        if self.key_scales is None:
            return keys, values
        return ((keys * self.key_scales[layer, first:last, :, None]).to(self.dtype),
                (values * self.value_scales[layer, first:last, :, None]).to(self.dtype))

    def gather(self, layer: int, slots: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and values in these slots, in any order: each slots' shape + [num_kv_heads, head_dim]."""
        keys, values = self.keys[layer, slots], self.values[layer, slots]
        if self.key_scales is None:
            return keys, values
        return ((keys * self.key_scales[layer, slots][..., None]).to(self.dtype),
                (values * self.value_scales[layer, slots][..., None]).to(self.dtype))

    def copy_block(self, source: int, target: int) -> None:
        """Duplicate one block in all layers: the copy of copy-on-write."""
        for tensor in (self.keys, self.values, self.key_scales, self.value_scales):
            if tensor is not None:
                blocks = tensor.view(tensor.shape[0], self.num_blocks, self.block_size, *tensor.shape[2:])
                blocks[:, target] = blocks[:, source]
