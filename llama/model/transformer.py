"""Llama 3, top to bottom: token ids to logits.

    x = embed[ids]
    x = x + attention(norm(x))           \\ once for each block
    x = x + feed_forward(norm(x))        /
    logits = head(norm(x))

Every sum but the last is normalised at once, and so the norms do the adding, in one pass: what a part adds is handed on
as `delta`.

Letters as everywhere in this project: `tokens` is the ragged axis of `RaggedBatch`; weights are [out, in]. `at(name, x)`
is x: the places that have a name (`llama.model.sites`), where a plan may look at what flows, or change it.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from llama.config import LlamaConfig
from llama.model.attention import ragged_attention, rotate_and_write
from llama.model.cache import KVCache
from llama.model.device_linear import DeviceLinear
from llama.model.elementwise import add_norm, norm_scale, normalise, rms_norm, swiglu
from llama.model.formats import QUANTISED
from llama.model.kernels import blocks as compiled
from llama.model.linear import Linear, PackedLinear, make_linear
from llama.model.ragged import RaggedBatch
from llama.model.rope import inverse_frequencies, rotation
from llama.model.tap import UNTOUCHED, Tap

MakeLinear = Callable[..., Linear | PackedLinear | DeviceLinear]  # from in_features and the rows of each matrix in it
MakeNorm = Callable[[str], "RMSNorm"]  # from its site


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), in float32, then times a weight in the model's dtype (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str, site: str = "norm"):
        super().__init__()
        self.eps = eps
        self.site = site
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor, at: Tap = UNTOUCHED) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        if at is UNTOUCHED:
            return rms_norm(x, self.weight, self.eps)
        scale = at(self.site + ".scale", norm_scale(x, self.eps))  # [tokens, 1]
        return at(self.site, normalise(x, scale, self.weight))

    def add(self, x: Tensor, delta: Tensor | None, site: str, at: Tap = UNTOUCHED) -> tuple[Tensor, Tensor]:
        """x + delta, which is the site's value, and its norm: each [tokens, hidden]. delta None: x is the sum already."""
        if at is UNTOUCHED and delta is not None:
            return add_norm(x, delta, self.weight, self.eps)
        x = at(site, x if delta is None else x + delta)
        return x, self(x, at)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (arXiv:2305.13245, arXiv:2104.09864)."""

    def __init__(self, config: LlamaConfig, layer: int, linear: MakeLinear):
        super().__init__()
        self.layer = layer
        self.deterministic = False
        self.head_dim = config.head_dim
        self.sizes = (config.q_size, config.kv_size, config.kv_size)
        self.qkv = linear(config.hidden_size, *self.sizes)
        self.out = linear(config.q_size, config.hidden_size)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], batch: RaggedBatch, cache: KVCache | None,
                at: Tap = UNTOUCHED) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]; keys and values of these tokens enter the cache."""
        q, k, v = (at(site, part.unflatten(-1, (-1, self.head_dim)))  # [tokens, heads, head_dim]
                   for site, part in zip(("attn.q", "attn.k", "attn.v"), self.qkv(x).split(self.sizes, dim=-1)))
        q, k = rotate_and_write(q, k, v, rotary, cache, self.layer, batch.slots, at)
        heads = ragged_attention(q, k, v, batch, cache, self.layer, self.deterministic)
        heads = at("attn.heads", heads, q, k, v)  # [tokens, num_heads, head_dim]
        return at("attn_out", self.out(heads.flatten(1)), heads, self.out)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202)."""

    def __init__(self, config: LlamaConfig, linear: MakeLinear):
        super().__init__()
        self.deterministic = False
        self.gate_up = linear(config.hidden_size, config.intermediate_size, config.intermediate_size)
        self.down = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor, at: Tap = UNTOUCHED) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [tokens, intermediate]
        gate, up = at("mlp.gate", gate), at("mlp.up", up)
        return at("mlp_out", self.down(at("mlp.act", swiglu(gate, up, row_by_row=self.deterministic))))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised residual stream and added to it: the first sum by
    the norm between them, the second by the next layer's."""

    def __init__(self, config: LlamaConfig, layer: int, norm: MakeNorm, linear: MakeLinear):
        super().__init__()
        self.attention_norm = norm("attn_norm")
        self.attention = Attention(config, layer, linear)
        self.feed_forward_norm = norm("mlp_norm")
        self.feed_forward = FeedForward(config, linear)

    def forward(self, x: Tensor, delta: Tensor | None, rotary: tuple[Tensor, Tensor], batch: RaggedBatch,
                cache: KVCache | None, at: Tap = UNTOUCHED) -> tuple[Tensor, Tensor | None]:
        """The stream [tokens, hidden] and what is still to be added to it, if anything -> the same after this layer."""
        x, normed = self.attention_norm.add(x, delta, "resid_pre", at)
        delta = self.attention(normed, rotary, batch, cache, at)
        x, normed = self.feed_forward_norm.add(x, delta, "resid_mid", at)
        delta = self.feed_forward(normed, at)
        return (x, delta) if at is UNTOUCHED else (at("resid_post", x + delta), None)


class Llama(nn.Module):
    """The whole network. Created uninitialised; `llama.checkpoint.load` fills it.

    dtype: torch.float32, torch.bfloat16 or torch.float16, of weights and activations alike. Norms, rotations,
    softmax and logits are float32 in any case. weights: a format of `llama.model.formats` for the matrices; None: as
    they are, in `dtype`. A quantised one keeps embedding and head at 8 bits.
    """

    def __init__(self, config: LlamaConfig, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu",
                 weights: str | None = None):
        super().__init__()
        self.config = config
        linear = partial(make_linear, dtype=dtype, device=device, fmt=weights)
        norm = partial(RMSNorm, config.hidden_size, config.rms_norm_eps, dtype, device)
        ends = "int8" if weights in QUANTISED else weights
        looked_up = ends if config.tie_word_embeddings or ends == "int8" else None  # rows as they are are found fastest
        self.embed = linear(config.hidden_size, config.vocab_size, fmt=looked_up)
        self.blocks = nn.ModuleList(Block(config, layer, norm, linear) for layer in range(config.num_layers))
        self.norm = norm("final_norm")
        tied = config.tie_word_embeddings
        self.head = self.embed if tied else linear(config.hidden_size, config.vocab_size, fmt=ends)
        self.register_buffer("frequencies", inverse_frequencies(config).to(device), persistent=False)
        self._are_packed = compiled.are_packed(self.blocks)
        self._compiled: compiled.CompiledBlocks | None = None

    @property
    def dtype(self) -> torch.dtype:
        """That of activations, and of weights that are not packed."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.norm.weight.device

    @property
    def num_bytes(self) -> int:
        """What all weights take."""
        tensors = (*self.parameters(), *self.buffers())
        return sum(tensor.nbytes for tensor in tensors if tensor is not self.frequencies)

    def _apply(self, *args, **kwargs):
        self._compiled = None  # weights that are moved or converted come to lie elsewhere
        return super()._apply(*args, **kwargs)

    def set_deterministic(self, deterministic: bool) -> None:
        """Whether a token's numbers are the same bits whatever else is in its step and however its sequence was
        cut into steps. Without it they agree to rounding; with it, products and attention are done in small
        pieces of one shape."""
        for module in self.modules():
            if isinstance(module, Linear | DeviceLinear | Attention | FeedForward):
                module.deterministic = deterministic

    def forward(self, batch: RaggedBatch, cache: KVCache | None = None, at: Tap = UNTOUCHED) -> Tensor:
        """Next-token logits [rows, vocab], float32, of the rows that `batch.logit_rows` asks for."""
        hidden = self.hidden(batch, cache, at)
        if batch.logit_rows is None:
            return self.logits(hidden, at)
        return self.logits(hidden[batch.logit_rows], at.rows(batch.logit_rows))

    def hidden(self, batch: RaggedBatch, cache: KVCache | None = None, at: Tap = UNTOUCHED) -> Tensor:
        """The residual stream after the last block: [tokens, hidden]."""
        rotary = rotation(batch.positions, self.frequencies)
        x = at("embed", self.embed.rows(batch.ids))  # [tokens, hidden]
        if self._are_packed and at is UNTOUCHED and compiled.serves(x, batch, cache):
            self._compiled = self._compiled or compiled.CompiledBlocks(self.blocks)
            return self._compiled.run(x, rotary, batch, cache)
        delta = None
        for layer, block in enumerate(self.blocks):
            x, delta = block(x, delta, rotary, batch, cache, at.layer(layer))
        return x if delta is None else x + delta

    def logits(self, hidden: Tensor, at: Tap = UNTOUCHED) -> Tensor:
        """The final norm and the head: [rows, hidden] -> [rows, vocab], float32."""
        return at("logits", self.head(self.norm(hidden, at), wide=True))
