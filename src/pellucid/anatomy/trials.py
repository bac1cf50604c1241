"""The proofs that change something and look at what follows: heads switched off, tokens exchanged, rounding.

Proofs that compare what one untouched pass shows are in `proofs.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from pellucid.anatomy.checks import error, size, spread, without_heads
from pellucid.anatomy.structure import Attention, Block, Linear, Mlp, Proof, Stack, Tap
from pellucid.anatomy.wiretap import Handler, Wiretap

# About one part of a block: an error, or why the claim cannot hold. Parts it does not apply to are left out.
Verdicts = Iterator[tuple[str, float | str]]
Check = Callable[[Stack, Block], Verdicts]
Where = tuple[Stack, Block, Attention, Linear]


class Prover(Protocol):
    """What the trials ask of the proofs' `Prover`."""

    module: nn.Module
    modules: dict[str, nn.Module]
    blocks: list[tuple[Stack, Block]]
    batch: int
    native: Tensor  # the logits of an untouched pass
    values: dict[Tap, Tensor]  # what one shows at the taps
    tolerance: float
    failed: dict[tuple[str, int], dict[tuple[str, str], str]]  # (stack, block) -> (proof, part) -> why

    @property
    def forward(self) -> Callable[[], Any]: ...

    @property
    def read(self) -> Callable[[Any], Tensor]: ...

    def through_the_model(self, name: str, err: float) -> Proof: ...


def rounding(prover: Prover, grain: float = 0.0) -> float:
    """How far the logits move when every residual is off by half a unit in the last place, or by `grain`, what quantised
    modules do to what they are given.
    """
    taps = [b.taps["resid_pre"] for _, b in prover.blocks if "resid_pre" in b.taps]
    generator = torch.Generator().manual_seed(0)

    def jitter(x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=generator).to(x.device) - 0.5
        return (x.float() * (1 + noise * max(torch.finfo(x.dtype).eps, grain))).to(x.dtype)

    return error(passing(prover, dict.fromkeys(taps, jitter)), prover.native)


def passing(prover: Prover, handlers: dict[Tap, Handler]) -> Tensor:
    """The logits of a pass with handlers on taps."""
    with Wiretap(prover.module, handlers, prover.batch):
        return prover.read(prover.forward())


def heads(prover: Prover) -> Check:
    """Where something sits between z and the projection, head h of z_out is made of head h of z; where more
    work follows the projection, it reads z and nothing else: with z at zero it makes the same at every
    position.
    """
    found: dict[tuple[str, int], dict[str, float | str]] = {}
    every: list[Where] = [
        (s, b, a, a.linear)
        for s, b in prover.blocks
        for a in b.attentions.values()
        if f"{a.part}.z" in b.taps and a.linear is not None
    ]
    gated = [where for where in every if where[2].gated and not is_wider(where[2])]
    met = switched_off(prover, gated, whole=False)
    for s, b, a, linear in gated:
        verdict = same_head(prover, (s, b, a, linear), met[linear.given])
        found.setdefault((s.name, b.index), {})[a.part] = verdict
    worked_on = [where for where in every if where[2].path is None]
    met = switched_off(prover, worked_on, whole=True)
    for s, b, a, linear in worked_on:
        rest = float(spread(met[linear.made]).max())
        reads_z = rest if rest <= prover.tolerance else f"{linear.module} reads more than z"
        found.setdefault((s.name, b.index), {}).setdefault(a.part, reads_z)
    return lambda stack, block: iter(found.get((stack.name, block.index), {}).items())


def switched_off(prover: Prover, which: list[Where], whole: bool) -> dict[Tap, Tensor]:
    """What projections read and make when z, or one head of it, is zero."""
    kept: dict[Tap, Tensor] = {}
    handlers: dict[Tap, Handler] = {}
    for _, b, a, linear in which:
        handlers[b.taps[f"{a.part}.z"]] = zero_head(slice(None) if whole else b.index % a.heads)
        handlers |= {tap: keeper(kept, tap) for tap in (linear.given, linear.made)}
    if handlers:
        passing(prover, handlers)
    return kept


def same_head(prover: Prover, where: Where, z_out: Tensor) -> float | str:
    """Head h of z was zero: head h of z_out holds nothing of a token (or nothing but it changed), others do."""
    _, block, a, linear = where
    h = block.index % a.heads
    if z_out.shape[2] != a.heads:
        return f"z has {a.heads} heads, but what enters the projection has {z_out.shape[2]}"
    left = spread(z_out).amax((0, 1, 3))
    others = torch.cat([left[:h], left[h + 1 :]])
    if len(others) and float(others.min()) <= prover.tolerance:
        return "switching off one head of z switches off others in z_out"
    if float(left[h]) <= prover.tolerance:
        return float(left[h])
    alone = switched_off(prover, [where], whole=False)[linear.given]
    change = (alone - prover.values[linear.given]).abs().amax((0, 1, 3)) / size(alone)
    if float(change[h]) <= prover.tolerance:
        return f"head {h} of z is not what head {h} of z_out is made of"
    return float(torch.cat([change[:h], change[h + 1 :], change.new_zeros(1)]).max())


def position_wise(prover: Prover) -> Check:
    """What neurons and experts make at a position depends on the residual at that position alone."""
    watched = {
        (s.name, b.index, m.part): experts_output(b, m) if m.linear is None else m.linear.given
        for s, b in prover.blocks
        for m in b.mlps.values()
        if m.linear is not None or m in mixtures(b)
    }
    taken = {r.tap for _, b in prover.blocks for m in b.mlps for r in b.reads.get(m, ())}
    kept: dict[Tap, Tensor] = {}

    def other(tap: Tap) -> Handler:  # the residual as it was, with another token's in the last place
        value = prover.values[tap]
        return lambda x: torch.cat([value[:, :-1], value[:, :1]], 1).to(x.device)

    if watched:
        passing(prover, {t: other(t) for t in taken} | {t: keeper(kept, t) for t in watched.values()})

    def check(stack: Stack, block: Block) -> Verdicts:
        for part in block.mlps:
            tap = watched.get((stack.name, block.index, part))
            if tap is None:
                continue
            change = (kept[tap] - prover.values[tap]).abs() / size(prover.values[tap])
            if float(change[:, -1].max()) > 0:
                yield part, float(change[:, :-1].max())
            else:
                yield part, "where it reads the residual was not found"

    return check


def reads(prover: Prover) -> Check:
    """Changed columns of a projection change the head or neuron they belong to, and no other.

    One unit in every row of the batch, in all blocks at once: what projections read and make is put back after it.
    """
    generator = torch.Generator().manual_seed(0)
    kept: dict[Tap, Tensor] = {}
    changes: dict[Tap, list[Tensor]] = {}
    given: set[Any] = {b.taps["resid_pre"] for _, b in prover.blocks if "resid_pre" in b.taps}
    first: dict[Tap, int] = {}  # where a unit is met -> the first unit changed there (a block may be in two stacks)
    for _, b in prover.blocks:
        for part, found in b.reads.items():
            if found[0].columns is None or b.taps[part] in first:
                continue
            first[b.taps[part]] = b.index
            for r in found:
                assert r.columns is not None
                rows = [r.columns[(b.index + row) % len(r.columns)] for row in range(prover.batch)]
                changes.setdefault(r.tap, []).append(torch.stack(rows))
                given |= {r.given} - {None}

    def back(tap: Tap, show: Handler = lambda x: None) -> Handler:  # nothing that is changed goes any further
        return lambda x: (show(x), prover.values[tap].to(x))[1]

    def damage(owned: list[Tensor]) -> Handler:
        def handler(x: Tensor) -> Tensor:
            changed, large = x.clone(), 3 * max(size(x), 1.0)
            for row, columns in ((row, own[row]) for own in owned for row in range(len(x))):
                noise = large * (1 + torch.rand(len(columns), generator=generator)).to(x)  # no norm takes it away
                changed[row][..., columns.to(x.device)] += noise if row % 2 == 0 else -noise
            return changed

        return handler

    handlers = {tap: back(tap) for tap in given} | {tap: damage(owned) for tap, owned in changes.items()}
    handlers |= {tap: back(tap, keeper(kept, tap)) for tap in first}
    if handlers:
        passing(prover, handlers)

    def check(_: Stack, block: Block) -> Verdicts:
        for part in (p for p, found in block.reads.items() if p in block.taps and found[0].columns is not None):
            tap = block.taps[part]
            change = ((kept[tap] - prover.values[tap]).abs() / size(kept[tap])).amax(1)
            change = change.flatten(2).amax(2) if change.ndim > 2 else change  # [row, unit]
            rows = torch.arange(len(change))
            units = (first[tap] + rows) % change.shape[1]
            own = change[rows, units].clone()
            change[rows, units] = 0.0
            yield part, float(change.max()) if float(own.max()) > prover.tolerance else "changed columns change nothing"

    return check


def values(prover: Prover) -> Check:
    """Random values put in for all heads, or all neurons, make what the model makes when it comes to have them itself.

    It comes to have them where z, or what the neurons are made from, is random; what that makes at the taps of z_out and
    neurons is then put in there alone. A second reader of these values (an adapter beside the tapped layer) goes on
    reading the old ones, and the contribution is another.
    """
    generator = torch.Generator().manual_seed(0)
    own: dict[
        tuple[str, int, str], tuple[Tap, Tap]
    ] = {}  # (stack, block, part) -> where values are put in, what they make
    sources: set[Tap] = set()
    for s, b in prover.blocks:
        parts: list[Attention | Mlp] = [*b.attentions.values(), *b.mlps.values()]
        for part in (p for p in parts if p.linear is not None and f"{p.part}.out" in b.taps):
            if isinstance(part, Attention):
                above = {b.taps[f"{part.part}.z"]} if f"{part.part}.z" in b.taps else set()
            else:
                above = {r.given for r in b.reads.get(f"{part.part}.neurons", ()) if r.given is not None}
            if above and part.linear is not None:
                sources |= above
                own[s.name, b.index, part.part] = part.linear.given, b.taps[f"{part.part}.out"]

    def drawn(x: Tensor) -> Tensor:
        return (torch.randn(x.shape, generator=generator) * size(x)).to(x)

    def met(handlers: dict[Tap, Handler], taps: set[Tap]) -> dict[Tap, Tensor]:  # each block on the residual it had
        kept: dict[Tap, Tensor] = {}
        back = {b.taps["resid_pre"] for _, b in prover.blocks if "resid_pre" in b.taps} - handlers.keys()
        handlers = handlers | {tap: put(prover.values[tap]) for tap in back}
        passing(prover, handlers | {tap: then(handlers.get(tap), keeper(kept, tap)) for tap in taps})
        return kept

    made = {tap for pair in own.values() for tap in pair}
    native = met(dict.fromkeys(sources, drawn), made) if own else {}
    again = met({given: put(native[given]) for given, _ in own.values()}, made) if own else {}

    def check(stack: Stack, block: Block) -> Verdicts:
        for part in (p for p in (*block.attentions, *block.mlps) if (stack.name, block.index, p) in own):
            out = own[stack.name, block.index, part][1]
            off = error(again[out], native[out])
            yield (
                part,
                off if off <= prover.tolerance else f"something else than the tapped module reads it ({off:.1e})",
            )

    return check


def put(value: Tensor) -> Handler:
    """A handler that puts this in the place of what is met."""
    return lambda x: value.to(x)


def then(first: Handler | None, show: Handler) -> Handler:
    """A handler that shows what another one made."""

    def handler(x: Tensor) -> Tensor | None:
        new = None if first is None else first(x)
        show(x if new is None else new)
        return new

    return handler


def ablation(prover: Prover) -> Proof:
    """Zeroing a head of every attention through z_out does what zeroing its rows of the projection does."""
    # projection -> head, its width, shape of the projection's input
    zeroed: dict[str, tuple[int, int, tuple[int, ...]]] = {}
    handlers: dict[Tap, Handler] = {}
    for stack, block in prover.blocks:
        failed = prover.failed.get((stack.name, block.index), {})
        for a in block.attentions.values():
            if a.linear is not None and ("projection", a.part) not in failed:
                head = block.index % a.heads, a.d_value, a.linear.shape
                handlers[a.linear.given] = zero_head(zeroed.setdefault(a.linear.module, head)[0])
    if not handlers:
        return Proof("ablation", None, None, "no head can be switched off by its weights")
    through_z = passing(prover, handlers)
    with without_heads(prover.modules, zeroed):
        by_weights = prover.read(prover.forward())
    if float((through_z - prover.native).abs().max()) == 0.0:
        return Proof("ablation", False, None, "switching heads off changes nothing")
    proof = prover.through_the_model("ablation", error(through_z, by_weights))
    if proof.holds is False:
        for stack, block in prover.blocks:
            why = dict.fromkeys((("ablation", part) for part in block.attentions), "it is not what the weights say")
            prover.failed.setdefault((stack.name, block.index), {}).update(why)
    return proof


def zero_head(h: int | slice) -> Handler:
    """A handler for [b, p, h, e] that switches one head (or all) off."""

    def handler(x: Tensor) -> Tensor:
        x = x.clone()
        x[:, :, h] = 0
        return x

    return handler


def keeper(kept: dict[Tap, Tensor], tap: Tap) -> Handler:
    """A handler that keeps a copy of what is met."""
    return lambda x: kept.update({tap: x.detach().cpu().clone()})


def is_wider(a: Attention) -> bool:
    """Whether the output projection reads other things beside the heads."""
    return a.linear is not None and a.linear.width > a.heads * a.d_value


def mixtures(block: Block) -> Iterator[Mlp]:
    """The mixtures of experts of a block whose experts are on the map."""
    return (m for m in block.mlps.values() if m.experts is not None and f"{m.part}.experts.out" in block.taps)


def experts_output(block: Block, mlp: Mlp) -> Tap:
    """What a mixture of experts returns natively."""
    router = block.taps[f"{mlp.part}.router"]
    return Tap(router.module, "out", router.layout, nth=router.nth)
