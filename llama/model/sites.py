"""Every named place in the forward pass: what is there, in which shape, and what Hugging Face calls it.

The forward pass (`llama.model.transformer`) calls its tap at each of these with the value there. `llama trace --sites`
prints this table, and the tests read from it where in transformers to look for the same numbers. No torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from llama.config import LlamaConfig


@dataclass(frozen=True)
class Site:
    """One named place, for every token of a step.

    name: within its layer, or of the whole. equation: in the letters of the other names. axes: of one token's value, by
    field of LlamaConfig; "context" stands for the positions that the token sees, "1" for a single number.
    hugging_face: the same in `LlamaForCausalLM`, in which N is the layer. made_at: the site at which this one is
    recomputed if asked for, because no kernel leaves it in memory; None for what the forward pass computes anyhow.
    is_reading: nothing follows from it, so that it can be captured and not be edited.
    """

    name: str
    equation: str
    axes: tuple[str, ...]
    hugging_face: str
    made_at: str | None = None
    is_reading: bool = False

    @property
    def is_attention(self) -> bool:
        """Whether its last axis is the context, which grows from token to token."""
        return self.axes[-1] == "context"

    def shape(self, config: LlamaConfig) -> tuple[int | None, ...]:
        """Sizes of one token's value; None for the context."""
        fixed = {"context": None, "1": 1}
        return tuple(fixed[axis] if axis in fixed else getattr(config, axis) for axis in self.axes)


_HIDDEN, _WIDE, _VOCAB, _ONE = ("hidden_size",), ("intermediate_size",), ("vocab_size",), ("1",)
_HEADS, _KV_HEADS, _SEEN = ("num_heads", "head_dim"), ("num_kv_heads", "head_dim"), ("num_heads", "context")

FIRST = (
    Site("embed", "embedding[id]", _HIDDEN, "output of model.embed_tokens"),
)

LAYER = (
    Site("resid_pre", "embed in the first layer, else resid_post of the one before", _HIDDEN,
         "input of model.layers.N"),
    Site("attn_norm.scale", "1 / sqrt(mean(resid_pre²) + eps)", _ONE, "of the input of model.layers.N"),
    Site("attn_norm", "weight * (resid_pre * scale)", _HIDDEN, "output of model.layers.N.input_layernorm"),
    Site("attn.q", "Wq attn_norm", _HEADS, "output of model.layers.N.self_attn.q_proj"),
    Site("attn.k", "Wk attn_norm", _KV_HEADS, "output of model.layers.N.self_attn.k_proj"),
    Site("attn.v", "Wv attn_norm", _KV_HEADS, "output of model.layers.N.self_attn.v_proj"),
    Site("attn.q_rot", "q turned by its position's angles", _HEADS, "q after apply_rotary_pos_emb"),
    Site("attn.k_rot", "k turned by its position's angles; what the cache holds", _KV_HEADS,
         "past_key_values.layers[N].keys"),
    Site("attn.scores", "q_rot · k_rot / sqrt(head_dim), for each position up to the token's own", _SEEN,
         "logarithm of attentions[N], up to a constant a row", made_at="attn.heads"),
    Site("attn.pattern", "softmax(scores)", _SEEN, "attentions[N], of attn_implementation=\"eager\"",
         made_at="attn.heads"),
    Site("attn.heads", "pattern v", _HEADS, "input of model.layers.N.self_attn.o_proj"),
    Site("attn.head_out", "Wo heads, of each head alone; they add up to attn_out", ("num_heads", "hidden_size"),
         "a head's columns of o_proj.weight times its part of o_proj's input", made_at="attn_out"),
    Site("attn_out", "Wo heads", _HIDDEN, "output of model.layers.N.self_attn.o_proj"),
    Site("resid_mid", "resid_pre + attn_out", _HIDDEN, "input of model.layers.N.post_attention_layernorm"),
    Site("mlp_norm.scale", "1 / sqrt(mean(resid_mid²) + eps)", _ONE,
         "of the input of model.layers.N.post_attention_layernorm"),
    Site("mlp_norm", "weight * (resid_mid * scale)", _HIDDEN, "output of model.layers.N.post_attention_layernorm"),
    Site("mlp.gate", "Wgate mlp_norm", _WIDE, "output of model.layers.N.mlp.gate_proj"),
    Site("mlp.up", "Wup mlp_norm", _WIDE, "output of model.layers.N.mlp.up_proj"),
    Site("mlp.act", "silu(gate) * up", _WIDE, "input of model.layers.N.mlp.down_proj"),
    Site("mlp_out", "Wdown act", _HIDDEN, "output of model.layers.N.mlp.down_proj"),
    Site("resid_post", "resid_mid + mlp_out", _HIDDEN, "output of model.layers.N"),
    Site("lens", "log softmax(Whead norm(resid_post)), the norm being final_norm; only to be read", _VOCAB,
         "log_softmax(lm_head(model.norm(output of model.layers.N)))", made_at="resid_post", is_reading=True),
)

LAST = (
    Site("final_norm.scale", "1 / sqrt(mean(resid_post²) + eps), of the last layer's", _ONE,
         "of the input of model.norm"),
    Site("final_norm", "weight * (resid_post * scale)", _HIDDEN, "output of model.norm"),
    Site("logits", "Whead final_norm", _VOCAB, "output of lm_head"),
)


def all_sites(config: LlamaConfig) -> Iterator[tuple[str, int | None, Site]]:
    """Every place of a model in the order of the computation: full name, layer, site.

    A place in a layer is called `layers.3.attn.q`; those before the first and after the last are in no layer.
    """
    yield from ((site.name, None, site) for site in FIRST)
    for layer in range(config.num_layers):
        yield from ((f"layers.{layer}.{site.name}", layer, site) for site in LAYER)
    yield from ((site.name, None, site) for site in LAST)


def documentation() -> str:
    """The table of all sites, as text of at most 120 columns."""
    lines = ["Sites: the named places of the forward pass. N is a layer; a shape is that of one token's value.",
             "* is recomputed when it is asked for; everything else is what the forward pass computes anyhow.",
             "Brackets pick a part: [head=2]; [key=7] of a context; [top=5], the 5 largest of vocab_size, as id and value.",
             ""]
    for prefix, sites in (("", FIRST), ("layers.N.", LAYER), ("", LAST)):
        for site in sites:
            name = prefix + site.name + ("*" if site.made_at else "")
            lines.append(f"{name:26} {site.equation}")
            lines.append(f"{'':26} [{', '.join(site.axes)}]; {site.hugging_face}")
    return "\n".join(lines)
