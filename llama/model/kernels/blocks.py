"""All blocks of a step that only decodes, in one call of `blocks.c`, instead of a dozen calls for each of them."""

import ctypes
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from llama.model.cache import KVCache
from llama.model.formats import FORMATS
from llama.model.kernels import native
from llama.model.linear import PackedLinear
from llama.model.ragged import RaggedBatch


class _Matrix(ctypes.Structure):
    """As in blocks.c."""

    _fields_ = [("format", ctypes.c_int64), ("outs", ctypes.c_int64), ("ins", ctypes.c_int64),
                ("weight", ctypes.c_void_p), ("scale", ctypes.c_void_p)]


class _Block(ctypes.Structure):
    """As in blocks.c."""

    _fields_ = [(name, _Matrix) for name in ("qkv", "out", "gate_up", "down")] + \
               [(name, ctypes.c_void_p) for name in ("attention_norm", "feed_forward_norm")]


class _Blocks(ctypes.Structure):
    """As in blocks.c."""

    _fields_ = [("blocks", ctypes.c_void_p),
                *((name, ctypes.c_int64) for name in ("num_blocks", "rows", "hidden", "intermediate")),
                ("kernels", ctypes.c_int32 * len(FORMATS)), ("eps", ctypes.c_float),
                *((name, ctypes.c_void_p) for name in ("x", "cos", "sin", "slots")),
                ("attention", native.Attention), ("num_slots", ctypes.c_int64), ("scratch", ctypes.c_void_p)]


class CompiledBlocks:
    """Where the weights of a model's blocks lie, for as long as they lie there: its `Block` modules, all of whose matrices
    are packed, with bfloat16 activations."""

    def __init__(self, blocks: nn.ModuleList):
        self._modules = blocks  # whose memory it is
        self._blocks = (_Block * len(blocks))(*(
            _Block(*map(_matrix, matrices(block)), block.attention_norm.weight.data_ptr(),
                   block.feed_forward_norm.weight.data_ptr()) for block in blocks))

    def run(self, x: Tensor, rotary: tuple[Tensor, Tensor], batch: RaggedBatch, cache: KVCache) -> Tensor:
        """The residual stream after the last block, from that before the first: [tokens, hidden], bfloat16. Keys and values
        enter the cache. Only where `serves`; the same bits as block by block."""
        x = x.clone()
        (rows, hidden), (cos, sin) = x.shape, rotary
        kernels = (ctypes.c_int32 * len(FORMATS))(*(native.kernel_for(fmt, rows) for fmt in FORMATS.values()))
        num_heads = self._blocks[0].out.ins // cache.keys.shape[-1]
        attention = native.attention_call(cache, 0, batch.decodes, num_heads)
        call = _Blocks(ctypes.addressof(self._blocks), len(self._blocks), rows, hidden, self._blocks[0].down.ins, kernels,
                       self._modules[0].attention_norm.eps, x.data_ptr(), cos.data_ptr(), sin.data_ptr(),
                       batch.slots.data_ptr(), attention, cache.keys.shape[1], None)
        reference = ctypes.byref(call)
        scratch = torch.empty(native.library().blocks_scratch(reference), dtype=torch.uint8)
        call.scratch = scratch.data_ptr()
        native.library().blocks(reference)
        return x


def are_packed(blocks: nn.ModuleList) -> bool:
    """Whether all matrices of a model's blocks are packed, so that `CompiledBlocks` knows them."""
    return all(isinstance(matrix, PackedLinear) for block in blocks for matrix in matrices(block))


def serves(x: Tensor, batch: RaggedBatch, cache: KVCache | None) -> bool:
    """Whether `CompiledBlocks` computes this step, if the matrices are packed: one token of each sequence."""
    return cache is not None and cache.dtype == torch.bfloat16 and cache.quantised != "fp8" \
        and cache.keys.shape[-1] % 32 == 0 and native.serves(x) \
        and len(batch.segments) == len(x) and all(segment.length == 1 for segment in batch.segments)


def matrices(block: nn.Module) -> Iterable[nn.Module]:
    """A block's, in the order of blocks.c."""
    return block.attention.qkv, block.attention.out, block.feed_forward.gate_up, block.feed_forward.down


def _matrix(linear: PackedLinear) -> _Matrix:
    outs, ins = linear.shape
    scale = None if linear.scale is None else linear.scale.data_ptr()
    return _Matrix(linear.format.code, outs, ins, linear.blocks.data_ptr(), scale)
