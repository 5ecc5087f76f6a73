"""transformers' model with hooks: what it computes at every site, found by what `llama.model.sites` says of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.llama import modeling_llama

from llama.config import LlamaConfig
from llama.model.sites import Site, all_sites


class Hooked:
    """One sequence through transformers, chunk by chunk; `values` has every site of the last chunk's tokens."""

    def __init__(self, model: transformers.LlamaForCausalLM):
        self.model = model
        self.config = LlamaConfig.from_dict(model.config.to_dict())
        self.cache = transformers.DynamicCache()
        self.values: dict[str, Tensor] = {}

    @torch.no_grad()
    def skip(self, ids: list[int]) -> None:
        """Run a chunk without looking, by the fused kernel."""
        self.model.set_attn_implementation("sdpa")
        self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, logits_to_keep=1)

    @torch.no_grad()
    def run(self, ids: list[int]) -> dict[str, Tensor]:
        """Run a chunk by the eager implementation: by name, [tokens, ...] in the shapes of our sites."""
        self.model.set_attn_implementation("eager")
        with _recorded(self.model) as (modules, turned):
            out = self.model(torch.tensor([ids]), past_key_values=self.cache, use_cache=True, output_attentions=True)
        self.values = {}
        for name, layer, site in all_sites(self.config):
            value = self._value(site, layer, modules, turned, out)
            shape = site.shape(self.config)
            self.values[name] = value if None in shape else value.reshape(len(ids), *shape)
        return self.values

    def _value(self, site: Site, layer: int | None, modules: dict[str, Tensor], turned: list[tuple[Tensor, Tensor]],
               out: Any) -> Tensor:
        where = site.hugging_face.replace("N", str(layer))
        if where in modules:
            return modules[where]
        if site.name.endswith("scale"):
            x = modules[where.removeprefix("of the ")].double()
            return (x.square().mean(dim=-1) + self.config.rms_norm_eps).rsqrt().float()
        if site.name in ("attn.q_rot", "attn.k_rot"):
            return turned[layer][site.name == "attn.k_rot"][0].transpose(0, 1)  # from [1, heads, tokens, head_dim]
        if site.name == "attn.pattern":
            return out.attentions[layer][0].transpose(0, 1)
        if site.name == "attn.scores":
            keys = modeling_llama.repeat_kv(self.cache.layers[layer].keys, self.config.group_size)[0]
            scores = turned[layer][0][0] @ keys.transpose(1, 2) / self.config.head_dim**0.5
            allowed = out.attentions[layer][0].new_ones(scores.shape).tril(scores.shape[2] - scores.shape[1]).bool()
            return scores.masked_fill(~allowed, -torch.inf).transpose(0, 1)
        if site.name == "lens":
            return self.model.lm_head(self.model.model.norm(modules[f"output of model.layers.{layer}"])).log_softmax(-1)
        assert site.name == "attn.head_out", site.name
        heads = modules[f"input of model.layers.{layer}.self_attn.o_proj"].unflatten(-1, (self.config.num_heads, -1))
        weight = self.model.model.layers[layer].self_attn.o_proj.weight.unflatten(1, (self.config.num_heads, -1))
        return torch.einsum("tnd,hnd->tnh", heads, weight)


@contextmanager
def _recorded(model: transformers.LlamaForCausalLM) -> Iterator[tuple[dict[str, Tensor], list]]:
    """Inputs and outputs of all modules, without their batch axis; and q, k after every rotation."""
    modules: dict[str, Tensor] = {}
    turned: list[tuple[Tensor, Tensor]] = []
    rotate = modeling_llama.apply_rotary_pos_emb

    def record(name: str):
        def hook(_, args, output):
            given = [one for one in args if isinstance(one, Tensor)]
            if given:
                modules[f"input of {name}"] = given[0][0]
            modules[f"output of {name}"] = (output[0] if isinstance(output, tuple) else output)
            if isinstance(modules[f"output of {name}"], Tensor):
                modules[f"output of {name}"] = modules[f"output of {name}"][0]
        return hook

    def recorded_rotate(*args, **options):
        turned.append(rotate(*args, **options))
        return turned[-1]

    hooks = [module.register_forward_hook(record(name)) for name, module in model.named_modules() if name]
    modeling_llama.apply_rotary_pos_emb = recorded_rotate
    try:
        yield modules, turned
    finally:
        modeling_llama.apply_rotary_pos_emb = rotate
        for hook in hooks:
            hook.remove()
