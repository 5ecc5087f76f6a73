"""Small random models, in transformers and in ours with the same weights; and a paged cache to drive."""

from typing import Any

import torch
import transformers
from torch import Tensor

from llama.checkpoint.layout import places
from llama.config import LlamaConfig
from llama.model.cache import KVCache
from llama.model.ragged import RaggedBatch, Segment
from llama.model.transformer import Llama


def rope(factor: float | None) -> dict[str, Any]:
    """Llama 3.1's own numbers, with the given factor or without scaling."""
    if factor is None:
        return {"rope_type": "default", "rope_theta": 500000.0}
    return {"rope_type": "llama3", "rope_theta": 500000.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def _shape(hidden: int, heads: int, kv_heads: int, head_dim: int, factor: float | None, tied: bool,
           layers: int = 2) -> dict[str, Any]:
    return {"vocab_size": 181, "hidden_size": hidden, "intermediate_size": hidden + 40,
            "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
            "head_dim": head_dim, "rope_parameters": rope(factor), "tie_word_embeddings": tied,
            "rms_norm_eps": 1e-5, "max_position_embeddings": 131072, "bos_token_id": 0, "eos_token_id": 1}


# Between them: tied and untied; 1:1, 3:1, 4:1 and 8:1 heads; head_dim 32, 64 and 128; a hidden size that is
# the width of all heads and one that is not; scaling by 8, by 32 and none.
SHAPES = {
    "1:1 of 64, plain rope": _shape(256, 4, 4, 64, None, tied=False),
    "4:1 of 128, as 8B": _shape(192, 8, 2, 128, 8.0, tied=False),
    "8:1 of 128, as 70B": _shape(128, 16, 2, 128, 8.0, tied=False),
    "4:1 of 64, as 1B": _shape(512, 8, 2, 64, 32.0, tied=True),
    "3:1 of 128, as 3B": _shape(240, 6, 2, 128, 32.0, tied=True),
    "8:1 of 32, tied": _shape(96, 16, 2, 32, 8.0, tied=True, layers=3),
}


def hugging_face(shape: dict[str, Any], seed: int = 0) -> transformers.LlamaForCausalLM:
    """A random model in float32, with weights so large that attention is far from uniform, and norms far from
    1: with transformers' own initialisation most mistakes would vanish in the tolerance."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape)).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if weight.dim() == 1:
            weight.uniform_(0.5, 1.5)
        else:
            weight.normal_(0, 1.5 * weight.shape[1] ** -0.5 if "_proj" in name else 0.4)
    return model


def ours(model: transformers.LlamaForCausalLM) -> Llama:
    """Our model with the configuration, the weights and the dtype of transformers' one."""
    config = LlamaConfig.from_dict(model.config.to_dict())
    built = Llama(config, model.dtype)
    built.load_state_dict(joined(config, model.state_dict()), strict=not config.tie_word_embeddings)
    return built


def joined(config: LlamaConfig, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors under Hugging Face's names as ours: q, k, v in one, gate and up in another."""
    parts: dict[str, dict[int, Tensor]] = {}
    for name, place in places(config).items():
        assert tensors[name].shape == place.shape
        parts.setdefault(place.parameter, {})[place.first_row] = tensors[name]
    return {name: torch.cat([rows[first] for first in sorted(rows)]) for name, rows in parts.items()}


def plain_config(model: transformers.LlamaForCausalLM) -> dict[str, Any]:
    """What `tests.reference` reads: the configuration in its older spelling."""
    config = model.config.to_dict()
    parameters = config.pop("rope_parameters")
    scaling = parameters if parameters["rope_type"] == "llama3" else None
    return config | {"rope_theta": parameters["rope_theta"], "rope_scaling": scaling}


class Pages:
    """Sequences in one paged cache, each in the blocks that the test names.

    Slots that were never written hold NaN, so that reading one shows in the logits.
    """

    def __init__(self, model: Llama, block_size: int, tables: dict[str, list[int]]):
        self.model, self.block_size, self.tables = model, block_size, tables
        num_blocks = 1 + max(block for table in tables.values() for block in table)
        self.cache = KVCache(model.config, num_blocks, block_size, model.dtype, model.device)
        self.cache.keys.fill_(float("nan"))
        self.cache.values.fill_(float("nan"))
        self.lengths = dict.fromkeys(tables, 0)

    def step(self, *parts: tuple[str, list[int]], logit_rows: list[int] | None = None) -> Tensor:
        """Run the next ids of some sequences, given as (name, ids), in one step. Returns the logits."""
        return self.model(self.batch(*parts, logit_rows=logit_rows), self.cache)

    def batch(self, *parts: tuple[str, list[int]], logit_rows: list[int] | None = None) -> RaggedBatch:
        """The step as the model is given it; the sequences grow by it."""
        positions, slots, segments = [], [], []
        for name, ids in parts:
            start = self.lengths[name]
            self.lengths[name] += len(ids)
            every_slot = [self._slot(name, position) for position in range(self.lengths[name])]
            positions += range(start, self.lengths[name])
            slots += every_slot[start:]
            segments.append(Segment(start, len(ids), runs_of(every_slot)))
        ids = torch.tensor([token for _, ids in parts for token in ids])
        rows = None if logit_rows is None else torch.tensor(logit_rows, dtype=torch.int64)
        return RaggedBatch(ids, torch.tensor(positions), tuple(segments), torch.tensor(slots), rows)

    def _slot(self, name: str, position: int) -> int:
        block, offset = divmod(position, self.block_size)
        return self.tables[name][block] * self.block_size + offset


def runs_of(slots: list[int]) -> tuple[tuple[int, int], ...]:
    """Slots in order, as half-open ranges."""
    runs: list[tuple[int, int]] = []
    for slot in slots:
        if runs and runs[-1][1] == slot:
            runs[-1] = (runs[-1][0], slot + 1)
        else:
            runs.append((slot, slot + 1))
    return tuple(runs)


def random_ids(count: int, seed: int = 1) -> list[int]:
    """Ids of the small vocabulary above."""
    return torch.randint(0, 181, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def difference(a: Tensor, b: Tensor) -> float:
    """The largest absolute difference; NaN where either has one."""
    assert a.shape == b.shape
    return (a.double() - b.double()).abs().max().item()
