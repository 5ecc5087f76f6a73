"""Llama 3, top to bottom: token ids to logits.

    x = embed[ids]
    x = x + attention(norm(x))           \\ once for each block
    x = x + feed_forward(norm(x))        /
    logits = head(norm(x))

Letters as everywhere in this project: `tokens` is the ragged axis of `RaggedBatch`; weights are [out, in]. `at(name, x)`
is x: the places that have a name (`llama.model.sites`), where a plan may look at what flows, or change it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama.config import LlamaConfig
from llama.model.attention import ragged_attention
from llama.model.cache import KVCache
from llama.model.linear import Linear
from llama.model.ragged import RaggedBatch
from llama.model.rope import inverse_frequencies, rotate, rotation
from llama.model.tap import UNTOUCHED, Tap


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps), in float32, then times a weight in the model's dtype (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, dtype: torch.dtype, device: torch.device | str, site: str = "norm"):
        super().__init__()
        self.eps = eps
        self.site = site
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

    def forward(self, x: Tensor, at: Tap = UNTOUCHED) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + self.eps)  # [tokens, 1]
        scale = at(self.site + ".scale", scale)
        return at(self.site, self.weight * (wide * scale).to(x.dtype))


class Attention(nn.Module):
    """Grouped-query attention with rotary positions (arXiv:2305.13245, arXiv:2104.09864)."""

    def __init__(self, config: LlamaConfig, layer: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.layer = layer
        self.deterministic = False
        self.head_dim = config.head_dim
        self.sizes = (config.q_size, config.kv_size, config.kv_size)
        self.qkv = Linear(config.hidden_size, sum(self.sizes), dtype, device)
        self.out = Linear(config.q_size, config.hidden_size, dtype, device)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], batch: RaggedBatch, cache: KVCache | None,
                at: Tap = UNTOUCHED) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]; keys and values of these tokens enter the cache."""
        q, k, v = (at(site, part.unflatten(-1, (-1, self.head_dim)))  # [tokens, heads, head_dim]
                   for site, part in zip(("attn.q", "attn.k", "attn.v"), self.qkv(x).split(self.sizes, dim=-1)))
        q, k = at("attn.q_rot", rotate(q, *rotary)), at("attn.k_rot", rotate(k, *rotary))
        if cache is not None:
            cache.write(self.layer, batch.slots, k, v)
        heads = ragged_attention(q, k, v, batch, cache, self.layer, self.deterministic)
        heads = at("attn.heads", heads, q, k, v)  # [tokens, num_heads, head_dim]
        return at("attn_out", self.out(heads.flatten(1)), heads, self.out)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (arXiv:2002.05202).

    deterministic: silu row by row. Where a thread's share ends amid a vector, the last elements are computed in
    another way, an ulp apart; a row that is a call by itself is shared out the same in any company.
    """

    def __init__(self, config: LlamaConfig, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.deterministic = False
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, dtype, device)
        self.down = Linear(config.intermediate_size, config.hidden_size, dtype, device)

    def forward(self, x: Tensor, at: Tap = UNTOUCHED) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # [tokens, intermediate]
        gate, up = at("mlp.gate", gate), at("mlp.up", up)
        activated = torch.cat([F.silu(row) for row in gate.split(1)]) if self.deterministic else F.silu(gate)
        return at("mlp_out", self.down(at("mlp.act", activated * up)))


class Block(nn.Module):
    """One layer: attention, then feed-forward, each on the normalised residual stream and added to it."""

    def __init__(self, config: LlamaConfig, layer: int, dtype: torch.dtype, device: torch.device | str):
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device, "attn_norm")
        self.attention = Attention(config, layer, dtype, device)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device, "mlp_norm")
        self.feed_forward = FeedForward(config, dtype, device)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], batch: RaggedBatch, cache: KVCache | None,
                at: Tap = UNTOUCHED) -> Tensor:
        """[tokens, hidden] -> [tokens, hidden]."""
        x = at("resid_pre", x)
        x = at("resid_mid", x + self.attention(self.attention_norm(x, at), rotary, batch, cache, at))
        return at("resid_post", x + self.feed_forward(self.feed_forward_norm(x, at), at))


class Llama(nn.Module):
    """The whole network. Created uninitialised; `llama.checkpoint.load` fills it.

    dtype: torch.float32, torch.bfloat16 or torch.float16, of weights and activations alike. Norms, rotations,
    softmax and logits are float32 in any case.
    """

    def __init__(self, config: LlamaConfig, dtype: torch.dtype = torch.float32,
                 device: torch.device | str = "cpu"):
        super().__init__()
        self.config = config
        embedding = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.embed = nn.Embedding.from_pretrained(embedding, freeze=True)
        self.blocks = nn.ModuleList(Block(config, layer, dtype, device) for layer in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device, "final_norm")
        self.head = Linear(config.hidden_size, config.vocab_size, dtype,
                           "meta" if config.tie_word_embeddings else device)
        if config.tie_word_embeddings:
            self.head.weight = self.embed.weight
        self.register_buffer("frequencies", inverse_frequencies(config, device), persistent=False)

    @property
    def dtype(self) -> torch.dtype:
        """That of weights and activations."""
        return self.embed.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights lie."""
        return self.embed.weight.device

    def set_deterministic(self, deterministic: bool) -> None:
        """Whether a token's numbers are the same bits whatever else is in its step and however its sequence was
        cut into steps. Without it they agree to rounding; with it, products and attention are done in small
        pieces of one shape."""
        for module in self.modules():
            if isinstance(module, Linear | Attention | FeedForward):
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
        x = at("embed", self.embed(batch.ids))  # [tokens, hidden]
        for layer, block in enumerate(self.blocks):
            x = block(x, rotary, batch, cache, at.layer(layer))
        return x

    def logits(self, hidden: Tensor, at: Tap = UNTOUCHED) -> Tensor:
        """The final norm and the head: [rows, hidden] -> [rows, vocab], float32."""
        return at("logits", self.head(self.norm(hidden, at)).float())
