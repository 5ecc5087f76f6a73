"""The paged key/value cache: two tensors a layer, addressed by slot.

Position p of a sequence lies in slot block_table[p // block_size] * block_size + p % block_size (paged
attention, arXiv:2309.06180). Which blocks a sequence has is the engine's business (`llama.engine.blocks`); here
are only the tensors.
"""

import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.model.formats import quantise_fp8, quantise_int8

_STORED = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}
_QUANTISE = {"int8": quantise_int8, "fp8": quantise_fp8}


class KVCache:
    """Keys (after rotation) and values of every layer: each [layers, num_slots, num_kv_heads, head_dim].

    A token's heads lie side by side, so that neighbouring blocks are one view of consecutive positions. dtype: of what
    is written and read. quantised: "int8" or "fp8", kept so with one float32 scale for each head of a token (`key_scales`,
    `value_scales`: [layers, num_slots, num_kv_heads], otherwise None): about half the memory, and its rounding.

    One block more than num_blocks stands at the end: from `spare_slot` on is room that no sequence has, for the keys and
    values of tokens that only fill a step up.
    """

    def __init__(self, config: LlamaConfig, num_blocks: int, block_size: int, dtype: torch.dtype,
                 device: torch.device | str = "cpu", quantised: str | None = None):
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.dtype = dtype
        self.quantised = quantised
        shape = (config.num_layers, (num_blocks + 1) * block_size, config.num_kv_heads, config.head_dim)
        stored = dtype if quantised is None else _STORED[quantised]
        self.keys, self.values = (torch.empty(shape, dtype=stored, device=device) for _ in range(2))
        self.key_scales, self.value_scales = (None if quantised is None else torch.empty(shape[:3], device=device)
                                              for _ in range(2))

    @property
    def spare_slot(self) -> int:
        """The first slot of the block that belongs to nobody."""
        return self.num_blocks * self.block_size

    def write(self, layer: int, slots: Tensor, k: Tensor, v: Tensor) -> None:
        """Store this step's keys and values, each [tokens, num_kv_heads, head_dim], at slots [tokens]."""
        for new, kept, scales in ((k, self.keys, self.key_scales), (v, self.values, self.value_scales)):
            if scales is not None:
                new, scale = _QUANTISE[self.quantised](new)
                scales[layer].index_copy_(0, slots, scale)
                new, kept = new.view(torch.int8), kept.view(torch.int8)  # torch does not copy rows of float8
            kept[layer].index_copy_(0, slots, new)

    def read(self, layer: int, run: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """The keys and values in a run of slots: each [run, num_kv_heads, head_dim]; views, unless they are quantised."""
        return self.gather(layer, slice(*run))

    def gather(self, layer: int, slots: Tensor | slice) -> tuple[Tensor, Tensor]:
        """The keys and values in these slots, in any order: each slots' shape + [num_kv_heads, head_dim]."""
        keys, values = self.keys[layer, slots], self.values[layer, slots]
        if self.quantised is None:
            return keys, values
        return ((keys.float() * self.key_scales[layer, slots][..., None]).to(self.dtype),
                (values.float() * self.value_scales[layer, slots][..., None]).to(self.dtype))

    def copy_block(self, source: int, target: int) -> None:
        """Duplicate one block in all layers: the copy of copy-on-write."""
        for tensor in (self.keys, self.values, self.key_scales, self.value_scales):
            if tensor is not None:
                blocks = tensor.unflatten(1, (-1, self.block_size))  # [layers, blocks, block_size, ...]
                blocks[:, target] = blocks[:, source]
