"""A run as one page of pictures: one HTML file that needs nothing else, in the light, in the dark and on paper.

The page (`report.html`) is a template with one gap, for an object of JSON; here is what that object holds.
"""

import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama.config import LlamaConfig
from llama.internals.lens import LensTable, attribute, logit_lens, norms
from llama.internals.trace import Capture, Trace, TracePlan
from llama.model.transformer import Llama

MAX_BYTES = 1 << 30

# Of each head's own output at one position and all layers, what may be kept for attribution.
_HEAD_OUT_BYTES = 64 << 20

_TEMPLATE = Path(__file__).with_name("report.html")
_GAP = "/*DATA*/null"


def report_plan(config: LlamaConfig, num_prompt: int) -> TracePlan:
    """What the page needs of a run: everything at every token, but attribution only where tokens begin to be new."""
    one = 4 * config.num_layers * config.num_heads * config.hidden_size
    last = slice(num_prompt - 1, num_prompt - 1 + max(1, _HEAD_OUT_BYTES // one))
    late = ("layers.*.attn.head_out", "layers.*.mlp_out", "final_norm.scale")
    return TracePlan(("embed", "layers.*.resid_post", "layers.*.attn.pattern", *(Capture(site, last) for site in late)),
                     max_bytes=MAX_BYTES)


def gather(model: Llama, trace: Trace, token_text: Callable[[int], str], facts: Mapping[str, Any], k: int = 5
           ) -> dict[str, Any]:
    """Everything on the page, as JSON. trace: of `report_plan`. facts: what stands below the title, by name."""
    table = logit_lens(model, trace, k)
    config = model.config
    patterns = trace.stack("layers.*.attn.pattern")  # [layers, positions, heads, context]
    return {
        "facts": dict(facts), "tokens": list(trace.tokens), "numPrompt": trace.num_prompt,
        "lens": _lens(table, token_text),
        "attention": {"layers": config.num_layers, "heads": config.num_heads, "size": patterns.shape[1],
                      "bytes": _as_bytes(patterns.permute(0, 2, 1, 3))},
        "attribution": _attribution(model, trace),
        "norms": _rounded(norms(trace)),
        "cache": {"perToken": config.kv_bytes_per_token(str(model.dtype).removeprefix("torch."))},
    }


def html(data: Mapping[str, Any]) -> str:
    """The page. What stands in the data is data there too, whatever it contains."""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    template = _TEMPLATE.read_text("utf-8")
    assert template.count(_GAP) == 1
    for letter in "<\u2028\u2029":  # none of which can end the script, or a line of it
        text = text.replace(letter, f"\\u{ord(letter):04x}")
    return template.replace(_GAP, text)


def _lens(table: LensTable, token_text: Callable[[int], str]) -> dict[str, Any]:
    """Rows of cells; of each cell the k likeliest, as places in a list of distinct texts, and their probabilities."""
    texts = {token: place for place, token in enumerate(dict.fromkeys(table.ids.flatten().tolist()))}
    return {"names": list(table.names), "texts": [token_text(token) for token in texts],
            "top": [[[texts[token] for token in cell] for cell in row] for row in table.ids.tolist()],
            "p": _rounded(table.logprobs.exp(), 4),
            "next": [[None if value != value else round(value, 3) for value in row]
                     for row in table.next_logprobs.tolist()],
            "entropy": _rounded(table.entropy)}


def _attribution(model: Llama, trace: Trace) -> list[dict[str, Any]]:
    """Who said each token that came, as far as that was captured."""
    found = []
    for position in trace.positions["final_norm.scale"]:
        parts = attribute(model, trace, trace.ids[position + 1], position=position)
        found.append({"position": position, "embed": round(parts.embed, 3), "heads": _rounded(parts.heads),
                      "mlps": _rounded(parts.mlps), "logit": round(parts.logit, 3)})
    return found


def _as_bytes(shares: Tensor) -> str:
    """Numbers from 0 to 1 as bytes, in base64."""
    return base64.b64encode((shares.clamp(0, 1) * 255).round().to(torch.uint8).contiguous().numpy().tobytes()).decode()


def _rounded(values: Tensor, digits: int = 3) -> Any:
    def walk(part: Any) -> Any:
        return [walk(one) for one in part] if isinstance(part, list) else round(part, digits)

    return walk(values.tolist())
