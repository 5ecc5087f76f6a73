"""From what a person writes to the sites that it means: "layers.*.attn.pattern[head=2]", "layers.*.lens[top=5]"."""

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase

from llama.config import LlamaConfig
from llama.model.positions import PlanError
from llama.model.sites import Site, all_sites

_FORM = re.compile(r"(?P<names>[a-z0-9_.*?]+)(?:\[(?P<parts>[^\]]*)\])?")
_PART = re.compile(r"\s*(head|key|top)\s*=\s*(\d+)\s*")


@dataclass(frozen=True)
class Place:
    """One site of a model, or a part of it: of one head, of one position of the context (`key`), or the `top` largest.

    The largest of a value for every id are so many pairs, id and value, the largest first.
    """

    name: str
    layer: int | None
    site: Site
    head: int | None = None
    key: int | None = None
    top: int | None = None

    @property
    def label(self) -> str:
        """As it would be written: layers.3.attn.pattern[head=2]."""
        parts = (("head", self.head), ("key", self.key), ("top", self.top))
        chosen = [f"{word}={value}" for word, value in parts if value is not None]
        return self.name + (f"[{','.join(chosen)}]" if chosen else "")

    @property
    def index(self) -> tuple[int | slice, ...]:
        """What picks head and key out of [tokens, ...]: to follow the index of the tokens."""
        if self.key is not None:
            return (slice(None) if self.head is None else self.head, self.key)
        return () if self.head is None else (self.head,)

    def shape(self, config: LlamaConfig) -> tuple[int | None, ...]:
        """Sizes of one token's value, without what was picked; None for the context."""
        if self.top is not None:
            return self.top, 2
        sizes = self.site.shape(config)
        if self.key is not None:
            sizes = sizes[:-1]
        return sizes if self.head is None else sizes[1:]


def places(pattern: str, config: LlamaConfig, field: str) -> list[Place]:
    """The places that a pattern means, in the order of the computation. `*` stands for any characters, dots too.

    Raises PlanError, which names `field`, if it means none, or a head that is not there.
    """
    match = _FORM.fullmatch(pattern) if isinstance(pattern, str) else None
    if match is None:
        raise PlanError(field, f"{pattern!r} is no site: write it as layers.3.attn.pattern[head=2], with * for any "
                        "characters")
    parts = _parts(pattern, match["parts"], field)
    found = [Place(name, layer, site, **parts) for name, layer, site in all_sites(config)
             if fnmatchcase(name, match["names"])]
    if not found:
        raise PlanError(field, f"{pattern!r} matches no site of this model, which has {config.num_layers} layers; "
                        "`llama trace --sites` lists them")
    for place in found:
        _check_parts(place, config, field)
    return found


def changeable_places(pattern: str, config: LlamaConfig, field: str) -> list[Place]:
    """Those of a pattern's places from which something follows, so that there is a sense in changing them.

    Raises PlanError as `places` does, and if there is none among them.
    """
    found = places(pattern, config, field)
    for place in found:
        if place.top is not None:
            raise PlanError(field, f"{place.label}: top is for captures; what changes is {place.name} as a whole")
    kept = [place for place in found if not place.site.is_reading]
    if not kept:
        raise PlanError(field, f"{found[0].name} is only read, and nothing follows from it; change "
                        f"{found[0].name.replace(found[0].site.name, found[0].site.made_at)}, of which it is made")
    return kept


def _parts(pattern: str, text: str | None, field: str) -> dict[str, int]:
    parts: dict[str, int] = {}
    for part in [] if text is None else text.split(","):
        match = _PART.fullmatch(part)
        if match is None or match[1] in parts:
            raise PlanError(field, f"{pattern!r}: in brackets stand head=N, key=POSITION or both; or top=N")
        parts[match[1]] = int(match[2])
    return parts


def _check_parts(place: Place, config: LlamaConfig, field: str) -> None:
    axes, sizes = place.site.axes, place.site.shape(config)
    if place.head is not None and axes[0] not in ("num_heads", "num_kv_heads"):
        raise PlanError(field, f"{place.name} has no heads to choose from; its shape is [{', '.join(axes)}]")
    if place.head is not None and place.head >= sizes[0]:
        raise PlanError(field, f"{place.name} has heads 0 to {sizes[0] - 1}, and no head {place.head}")
    if place.top is not None and axes != ("vocab_size",):
        raise PlanError(field, f"{place.name} is not one number for each id, of which the largest could be picked; its "
                        f"shape is [{', '.join(axes)}]")
    if place.top is not None and not 1 <= place.top <= sizes[0]:
        raise PlanError(field, f"{place.name}: top is from 1 to the {sizes[0]:,} ids there are, not {place.top}")
    if place.key is not None and not place.site.is_attention:
        raise PlanError(field, f"{place.name} has no key positions to choose from; its shape is [{', '.join(axes)}]")
