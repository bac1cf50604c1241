"""From addresses to taps: expand selectors on a model's map, and find where a concrete site is met."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any

from pellucid.anatomy.map import Anatomy
from pellucid.anatomy.sites import EXPERT_PORTS, HEAD_PORTS, PARTS, WHOLE, Site, choose
from pellucid.anatomy.structure import Block, Stack, Tap
from pellucid.errors import PellucidError, Refused, SiteError, nearest


@dataclass(frozen=True)
class Spot:
    """A concrete site on a model: the tap its tensor is met at, and which unit of it (None: all of it).

    `stream` names the tokens its positions are counted on, `keys` those a query of it looks at.
    """

    site: Site
    tap: Tap
    unit: int | None
    unit_axis: int
    position_axis: int
    stream: str
    keys: str


def stack_of(anatomy: Anatomy, site: Site) -> Stack:
    for stack in anatomy.stacks:
        if stack.name == site.stack:
            return stack
    if not site.stack and site.layer is None:
        return anatomy.stacks[-1]
    names = [f"{s.name}.{replace(site, stack='')}" for s in anatomy.stacks if s.name]
    hint = (
        f": write {' or '.join(repr(n) for n in names)}"
        if names
        else f": it has one stack, write '{replace(site, stack='')}'"
    )
    raise SiteError(f"{str(site)!r} does not say which stack of this model is meant" + hint)


def block_of(anatomy: Anatomy, site: Site) -> Block:
    stack = stack_of(anatomy, site)
    (layer,) = choose(site.layer if site.layer is not None else 0, len(stack.blocks), "layer", site)
    return stack.blocks[layer]


def expand(anatomy: Anatomy, text: str | Site) -> list[Site]:
    """The concrete sites an address with selectors names, in order; see `spots`."""
    return [spot.site for spot in spots(anatomy, text)]


def spots(anatomy: Anatomy, text: str | Site) -> list[Spot]:
    """Where the concrete sites that an address names are met, in order; several layers may lack it, but not all.

    SiteError or Refused where nothing is left, with the reason of the first block that was asked.
    """
    try:
        site = Site.parse(text)
    except SiteError:
        if not (sites := _parts(anatomy, str(text))):
            raise
        return _met(lambda each: spots(anatomy, each), sites)
    if site.layer is None:
        return [locate(anatomy, site)]
    blocks = stack_of(anatomy, site).blocks
    layers = choose(site.layer, len(blocks), "layer", site)

    def met(layer: int) -> list[Spot]:
        return [locate(anatomy, each) for each in _units(blocks[layer], replace(site, layer=layer))]

    return met(layers[0]) if len(layers) == 1 else _met(met, layers)


def _met(where: Callable[[Any], list[Spot]], asked: Sequence[Any]) -> list[Spot]:
    """All that is met of what is asked for; the first reason where nothing is."""
    found: list[Spot] = []
    missing: list[PellucidError] = []
    for each in asked:
        try:
            found += where(each)
        except (SiteError, Refused) as reason:
            missing.append(reason)
    if missing and not found:
        raise missing[0]
    return found


def _parts(anatomy: Anatomy, text: str) -> list[str]:
    """What a `*` in the place of parts stands for: `layers.*.attn.*`, `layers.5.attn.heads.9.*`, `decoder.*`, or `*`, everything."""
    path, sign, at = text.strip().partition("@")
    match = re.fullmatch(r"((?:encoder|decoder|stack\d+)\.)?(?:(layers|blocks)\.([^.]+)\.)?(.*\*.*)", path)
    if match is None:
        return []
    stack, layer, part = match[1] or "", match[3], match[4]
    if layer is None:  # `*` alone
        prefixes = [stack] if stack else [s.prefix for s in anatomy.stacks]
        whole = [f"{stack}{name}" for name in WHOLE if name != "logits"]
        names = [*whole, *(f"{p}layers.*.{each}" for p in prefixes for each in PARTS)] if part == "*" else []
    else:
        unit = re.fullmatch(r"((?:attn|cross)\.heads|mlp\.experts)\.([^.]+)\.\*", part)
        ports = () if unit is None else EXPERT_PORTS if unit[1] == "mlp.experts" else HEAD_PORTS
        found = (
            [f"{unit[1]}.{unit[2]}.{port}" for port in ports] if unit else [p for p in PARTS if fnmatchcase(p, part)]
        )
        names = [f"{stack}layers.{layer}.{each}" for each in found]
    return [f"{name}{sign}{at}" for name in names]


def _units(block: Block, site: Site) -> list[Site]:
    """A block's site, once for each of its units that are named."""
    if site.unit is None:
        return [site]
    size = unit_count(block, site)
    if size:
        return [replace(site, unit=u) for u in choose(site.unit, size, site.unit_dim.removeprefix("kv_"), site)]
    if isinstance(site.unit, int) and site.unit >= 0:  # told when it is met
        return [site]
    part = _met_at(site)
    if part not in block.taps:
        raise _missing(block, part, site)
    raise Refused(f"how many units {str(site)!r} has is not known before running: name them by number")


def unit_count(block: Block, site: Site) -> int:
    """How many heads, neurons or experts the block has for this site; 0 where it is not known before running."""
    area = site.part.partition(".")[0]
    attention = block.attentions.get(area)
    if attention is not None:
        shared = site.unit_dim == "kv_head" and site.port != "heads"
        return attention.kv_heads if shared else attention.heads
    return block.sizes.get("expert" if "expert" in site.part or site.part == "mlp.router" else site.unit_dim, 0)


def locate(anatomy: Anatomy, site: Site) -> Spot:
    """Where a concrete site is met. SiteError if the model has no such site, Refused if a proof it needs failed."""
    if site not in anatomy.located:
        anatomy.located[site] = _locate(anatomy, site)
    spot: Spot = anatomy.located[site]
    return spot


def _locate(anatomy: Anatomy, site: Site) -> Spot:
    if site.part == "embed":
        return replace(locate(anatomy, Site("resid_pre", 0, stack_of(anatomy, site).name)), site=site)
    if site.part in ("embed.tokens", "embed.positions"):
        stack, what = stack_of(anatomy, site), site.part.removeprefix("embed.")
        if what not in stack.embeds:
            raise Refused(
                f"{str(site)!r} is refused on this model: it does not look its input {what} up in an embedding"
            )
        return Spot(site, stack.embeds[what], None, 2, 1, stack.name, stack.name)
    if site.part == "final_norm":
        if anatomy.head is None or anatomy.head.norm is None:
            raise SiteError("this model has no final norm between its last block and its head")
        name = anatomy.stacks[-1].name
        return Spot(site, anatomy.head.norm, None, 2, 1, name, name)
    if site.part == "logits":
        raise SiteError("logits are read from a run (run.logits), not kept or edited; edit 'final_norm' or a residual")
    block = block_of(anatomy, site)
    part = _met_at(site)
    tap = block.taps.get(part)
    if tap is None:
        raise _missing(block, part, site)
    keys = "encoder" if part.startswith("cross.") else site.stack
    stream = keys if part.endswith((".k", ".v")) else site.stack
    if part.startswith("mlp.experts."):
        assert isinstance(site.unit, int)
        (unit,) = choose(site.unit, unit_count(block, site), "expert", site)
        return Spot(site, replace(tap, unit=unit), None, 2, 1, stream, keys)
    dims = PARTS[part]
    position_axis = dims.index("query" if "query" in dims else "position")
    unit_dim = next((d for d in dims if d in ("head", "kv_head")), dims[-1])
    return Spot(site, tap, _unit(block, site, part), dims.index(unit_dim), position_axis, stream, keys)


def _met_at(site: Site) -> str:
    """The part at whose tap a site is met: what a head writes is computed from what enters the output projection."""
    return site.part.replace(".out", ".z_out") if site.port == "heads" and site.part.endswith(".out") else site.part


def _unit(block: Block, site: Site, part: str) -> int | None:
    if site.unit is None:
        return None
    size = unit_count(block, site)
    unit = site.unit
    if size:
        (unit,) = choose(site.unit, size, site.unit_dim.removeprefix("kv_"), site)
    assert isinstance(unit, int)
    attention = block.attentions.get(part.partition(".")[0])
    if attention is not None and site.port == "heads" and part.endswith((".k", ".v")):
        return unit // (attention.heads // attention.kv_heads)  # several query heads share one key-value head
    return unit


def _missing(block: Block, part: str, site: Site) -> PellucidError:
    area = part.partition(".")[0]
    reason = block.refused.get(part) or block.refused.get(area)
    if reason is None and part in ("resid_mid", "attn.out", "mlp.out"):
        reason = block.refused.get("resid")
    if reason is not None:
        return Refused(f"{str(site)!r} is refused on this model: {reason}")
    return SiteError(f"layer {site.layer} of this model has no {part!r}{nearest(part, [*block.taps, *WHOLE])}")
