"""Keys and values as things to hold: computed from ids, looked at, written to a file, changed, and put in force."""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llama.engine.blocks import block_digest, root_digest
from llama.engine.engine import Engine
from llama.internals.direct import cached_batch
from llama.internals.store import write_safetensors
from llama.internals.trace import TraceError
from llama.model.cache import KVCache
from llama.model.transformer import Llama


@dataclass(frozen=True, eq=False)
class KVState:
    """The keys (after rotation) and values of some tokens: each [layers, tokens, num_kv_heads, head_dim].

    The tensors may be changed in place; `install` puts them in force as they then are.
    """

    ids: tuple[int, ...]
    keys: Tensor
    values: Tensor

    def save(self, path: str | Path) -> None:
        """Write it as safetensors, atomically."""
        ids = torch.tensor(self.ids, dtype=torch.int64)
        write_safetensors(Path(path), {"ids": ids, "keys": self.keys, "values": self.values}, {"format": "kv"})

    @classmethod
    def load(cls, path: str | Path) -> "KVState":
        """Read what `save` wrote. Raises TraceError, which names the file."""
        try:
            with safe_open(path, "pt") as file:
                ids, keys, values = (file.get_tensor(name) for name in ("ids", "keys", "values"))
        except (OSError, SafetensorError) as error:
            raise TraceError(f"{path}: no keys and values can be read from it: {error}") from error
        if keys.shape != values.shape or keys.dim() != 4 or keys.shape[1:2] != ids.shape:
            raise TraceError(f"{path}: keys {list(keys.shape)}, values {list(values.shape)} and ids {list(ids.shape)} "
                             "do not go together")
        return cls(tuple(ids.tolist()), keys, values)


@torch.inference_mode()
def compute(model: Llama, ids: Sequence[int]) -> KVState:
    """What the model writes into its cache for a text."""
    cache = KVCache(model.config, len(ids), 1, model.dtype, model.device)
    model.hidden(cached_batch(ids, cache), cache)
    return _read(cache, ids, ((0, len(ids)),))


def view(engine: Engine, request_id: str) -> KVState:
    """A copy of what the cache holds for a running request by now. Raises TraceError if it does not run."""
    for sequence in engine.scheduler.running:
        if sequence.request.id == request_id:
            size = engine.cache.block_size
            runs = [(block * size, min(size, sequence.num_computed - place * size) + block * size)
                    for place, block in enumerate(sequence.table) if place * size < sequence.num_computed]
            return _read(engine.cache, sequence.ids[:sequence.num_computed], runs)
    raise TraceError(f"no request {request_id!r} is running")


def _read(cache: KVCache, ids: Sequence[int], runs: Sequence[tuple[int, int]]) -> KVState:
    layers = [[cache.read(layer, run) for run in runs] for layer in range(len(cache.keys))]
    keys, values = (torch.stack([torch.cat([one[part] for one in layer]) for layer in layers]) for part in (0, 1))
    return KVState(tuple(ids), keys.clone(), values.clone())


@torch.inference_mode()
def install(engine: Engine, state: KVState, salt: str) -> int:
    """Put keys and values into the engine's prefix cache, as if computed there. Returns for how many tokens.

    A request with this salt whose prompt begins with these ids takes them, in whole blocks, instead of computing them.
    The salt keeps everyone else from them: give one that nobody else uses. They stay as long as nobody needs the room.
    Raises TraceError if they are of another shape than the model's, or there is no room.
    """
    cache, pool = engine.cache, engine.scheduler.pool
    expected = (cache.keys.shape[0], len(state.ids), *cache.keys.shape[2:])
    if state.keys.shape != expected or state.values.shape != expected:
        raise TraceError(f"the keys are {list(state.keys.shape)}, the values {list(state.values.shape)}; for "
                         f"{len(state.ids)} tokens this model has {list(expected)}")
    if not salt:
        raise TraceError("give a salt: without one, every request that begins with these ids would take them")
    size = pool.block_size
    count = len(state.ids) // size
    if count > pool.num_available:
        raise TraceError(f"{count} blocks are needed, and {pool.num_available} of the KV cache's {pool.num_blocks} are "
                         "free")
    blocks, digest = pool.allocate(count), root_digest(salt)
    for place, block in enumerate(blocks):
        tokens = slice(place * size, (place + 1) * size)
        slots = torch.arange(block * size, (block + 1) * size, device=cache.keys.device)
        for layer in range(len(cache.keys)):
            cache.write(layer, slots, *(part[layer, tokens].to(cache.dtype) for part in (state.keys, state.values)))
        digest = block_digest(digest, array("q", state.ids[tokens]))
        pool.publish(block, digest)
    pool.release(blocks)
    return count * size
