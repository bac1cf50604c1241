"""The map checked on the loaded model. Each proof compares numbers two ways; what rests on a failed one is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy import experts as moe
from pellucid.anatomy.checks import Beside, error, mixture_error, size, spread, without_heads
from pellucid.anatomy.interfaces import listening
from pellucid.anatomy.structure import (
    Attention,
    Block,
    Head,
    Linear,
    Mlp,
    Path,
    Proof,
    Stack,
    State,
    Tap,
)  # fmt: skip
from pellucid.anatomy.weights import linear_map
from pellucid.anatomy.wiretap import Handler, Wiretap, tapped

# Largest relative error each dtype is allowed.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}
# In half precision logits may differ by three times what rounding does to them, but never by more than this.
DROWNED = 0.1

# Parts of a block that are refused when a proof fails on it; {} is the attention or MLP it failed on.
DEPENDS = {
    "residual": ("resid_mid", "attn.out", "cross.out", "mixer.out", "mlp.out"),
    "attention": ("{}.v", "{}.pattern", "{}.scores", "{}.z"),
    "projection": ("{}.z_out", "{}.heads"),
    "heads": ("{}.z_out", "{}.heads"),
    "neurons": ("{}.neurons",),
    "position-wise": ("{}.neurons",),
    "experts": ("{}.router", "{}.experts", "{}.experts.neurons", "{}.experts.out"),
    "ablation": ("{}.z_out", "{}.heads"),
}

# About one part of a block: an error, or why the claim cannot hold. Parts it does not apply to are left out.
Verdicts = Iterator[tuple[str, float | str]]


class Prover:
    """Runs the proofs over one traced map. `logits` says whether the model returns logits, which then need a
    head.
    """

    def __init__(
        self, module: nn.Module, forward: Callable[[], Any], read: Callable[[Any], Tensor], stacks: tuple[Stack, ...],
        head: Head | None, batch: int, logits: bool,
    ) -> None:  # fmt: skip
        self.module, self.forward, self.read = module, forward, read
        self.stacks, self.head, self.batch, self.logits = stacks, head, batch, logits
        self.blocks = [(s, b) for s in stacks for b in s.blocks]
        self.modules = dict(module.named_modules())
        self.native = read(forward()).detach().clone()
        floats = {p.dtype for p in module.parameters() if p.is_floating_point()}
        self.tolerance = max(
            (TOLERANCE.get(dtype, 4e-2) for dtype in floats), default=TOLERANCE[torch.float32]
        )
        self.half = self.tolerance > TOLERANCE[torch.float32]
        self.floor = self.rounding() if self.half else 0.0
        self.values: dict[Tap, Tensor] = {}
        self.beside = Beside()
        self.failed: dict[
            tuple[str, int], dict[tuple[str, str], str]
        ] = {}  # (stack, block) -> (proof, part) -> why

    def prove(self) -> list[Proof]:
        taps = {t for _, b in self.blocks for t in (*b.taps.values(), *self.helpers(b))} - {None}
        if self.head is not None and self.head.norm is not None:
            taps.add(self.head.norm)
        slow = {
            t for t in taps if t.port in ("scores", "pattern", *moe.EXPERT_PORTS)
        }  # not the native kernels
        self.values, output = tapped(self.module, taps - slow, self.batch, self.forward)
        self.logits_met = self.read(output)
        units = {replace(t, unit=0) if t.port != "router" else t for t in slow if t.port in moe.EXPERT_PORTS}
        ours = units | {t for t in taps if t.port in ("v", "z", "scores", "pattern")}
        self.ours, output = tapped(self.module, ours, self.batch, self.forward)
        with listening(self.beside):
            self.forward()
        missing = [t for t in (*taps - slow, *ours) if t not in self.values and t not in self.ours]
        attention, experts = (
            self.over_blocks("attention", self.attention),
            self.over_blocks("experts", self.experts),
        )
        step_by_step = (
            None if False in (attention.holds, experts.holds) else error(self.read(output), self.native)
        )
        return [
            Proof(
                "taps",
                not missing,
                None,
                f"{len(missing)} taps never fired" if missing else "every tap fires",
            ),
            self.same_logits(error(self.logits_met, self.native), step_by_step),
            self.over_blocks("residual", self.residual),
            self.chain(),
            attention,
            self.over_blocks("projection", self.projection),
            self.over_blocks("heads", self.heads()),
            self.over_blocks("neurons", self.neurons),
            experts,
            self.over_blocks("position-wise", self.position_wise()),
            self.unembedding(),
            self.ablation(),
        ]

    # ---- machinery

    def value(self, block: Block, part: str) -> Tensor | None:
        tap = block.taps.get(part)
        return self.values.get(tap) if tap is not None else None

    def verdict(self, name: str, err: float, detail: str = "") -> Proof:
        return Proof(name, err <= self.tolerance, err, detail)

    def same_logits(self, kept: float, step_by_step: float | None) -> Proof:
        """With everything kept the output is the native one; with attention and experts step by step, up to
        rounding.
        """
        if kept > self.tolerance or step_by_step is None:
            return self.verdict("logits", kept)
        proof = self.through_the_model("logits", step_by_step)
        return self.verdict("logits", kept, proof.detail) if proof.holds is None else proof

    def through_the_model(self, name: str, err: float) -> Proof:
        """For errors that went through the whole model: in half precision they add up, and a router may
        choose otherwise.
        """
        if err <= max(self.tolerance, min(3 * self.floor, DROWNED)):
            return Proof(name, True, err)
        chooses = any(m.linear is None for _, b in self.blocks for m in b.mlps.values())
        if self.half and (chooses or self.floor > DROWNED):
            return Proof(
                name,
                None,
                err,
                "rounding makes routers choose otherwise in this precision: prove it in float32",
            )
        return Proof(name, False, err)

    def rounding(self) -> float:
        """How far the untouched model's logits move when every residual is off by half a unit in the last
        place.
        """
        taps = [b.taps["resid_pre"] for _, b in self.blocks if "resid_pre" in b.taps]
        generator = torch.Generator().manual_seed(0)

        def jitter(x: Tensor) -> Tensor:
            noise = torch.rand(x.shape, generator=generator).to(x.device) - 0.5
            return (x.float() * (1 + noise * torch.finfo(x.dtype).eps)).to(x.dtype)

        with Wiretap(self.module, dict.fromkeys(taps, jitter), self.batch):
            return error(self.read(self.forward()), self.native)

    def over_blocks(self, name: str, check: Callable[[Stack, Block], Verdicts]) -> Proof:
        """One claim about every block: the worst error, or where and why it fails."""
        worst, why = -1.0, []
        for stack, block in self.blocks:
            for part, result in check(stack, block):
                if isinstance(result, float) and result <= self.tolerance:
                    worst = max(worst, result)
                    continue
                reason = result if isinstance(result, str) else f"off by {result:.1e}"
                self.failed.setdefault((stack.name, block.index), {})[name, part] = reason
                why.append(f"{stack.prefix}layers.{block.index}: {reason}")
        if why:
            return Proof(
                name, False, None, "; ".join(why[:3]) + (f"; and {len(why) - 3} more" if len(why) > 3 else "")
            )
        return Proof(name, True, worst) if worst >= 0 else Proof(name, None, None, "does not apply")

    def helpers(self, block: Block) -> Iterator[Tap]:
        """Taps only the proofs need: norms inside the residual, carried states, outputs of the projections.
        """
        for state in block.states:
            yield from (
                t for t in (state.norm_in, state.norm_out, *(x.carried for x in state.terms)) if t is not None
            )
        linears = [x.linear for x in (*block.attentions.values(), *block.mlps.values())]
        yield from (linear.made for linear in linears if linear is not None)
        yield from (experts_output(block, mlp) for mlp in mixtures(block))
        yield from (tap for mlp in block.mlps.values() for tap in mlp.reads)

    # ---- the residual stream

    def residual(self, _: Stack, block: Block) -> Verdicts:
        """Every residual state is the previous ones plus the contributions (through the norm in post-norm
        families).
        """
        if "resid" in block.refused:
            yield "", block.refused["resid"]
            return
        added = {term.source for state in block.states for term in state.terms}
        for part in block.attentions:
            if f"{part}.out" not in added:
                yield "", "the block attends, but nothing it adds to the residual comes from attention"
        values: dict[str, Tensor] = {}
        for i, state in enumerate(block.states):
            total, drift = self.total(block, state, values)
            if isinstance(total, str):
                yield "", total
                return
            yield "", drift
            if state.norm_in is not None:
                yield "", error(total, self.values[state.norm_in])
            values[f"state {i}"] = self.values[state.norm_out] if state.norm_out is not None else total
        made = self.value(block, "resid_post")
        last = values[f"state {len(block.states) - 1}"]
        yield "", "the residual is laid out in an unknown order" if made is None else error(last, made)

    def total(self, block: Block, state: State, states: dict[str, Tensor]) -> tuple[Tensor | str, float]:
        """The sum of a state's terms, and how far carried states are from mixtures of their sources."""
        total: Any = 0.0 if state.constant is None else state.constant
        drift = 0.0
        for term in state.terms:
            value = self.value(block, "resid_pre" if term.source == "in" else term.source)
            value = states.get(term.source) if value is None else value
            if value is None:
                return f"{term.source}: {block.refused.get(term.source, 'not met')}", 0.0
            if term.carried is not None:
                streams = dict(term.carried.layout.sizes).get("s", 1)
                drift = max(drift, mixture_error(value, self.values[term.carried], streams))
                value = self.values[term.carried]
            total = total + value * term.coefficient
        return total, drift

    def chain(self) -> Proof:
        """Each block receives what the one before handed over."""
        pairs = [(a, b) for s in self.stacks for a, b in zip(s.blocks, s.blocks[1:], strict=False)]
        met = [(self.value(a, "resid_post"), self.value(b, "resid_pre")) for a, b in pairs]
        worst = max((float("inf") if x is None or y is None else error(x, y) for x, y in met), default=0.0)
        return self.verdict(
            "chain", worst, "" if worst <= self.tolerance else "something acts between the blocks"
        )

    # ---- attention

    def attention(self, _: Stack, block: Block) -> Verdicts:
        """The pattern is a distribution over keys (sinks may take a share), and pattern times v is the native
        z.
        """
        yield from (("", why) for why in block.unmapped)
        for a in block.attentions.values():
            if a.route == "pieces":  # no pattern on the map
                continue
            pattern, v, z = (self.ours.get(block.taps.get(f"{a.part}.{p}")) for p in ("pattern", "v", "z"))
            if pattern is None or v is None or z is None:
                yield a.part, "pattern, v or z was not met"
                continue
            if float(pattern.sum(-1).max()) > 1 + 1e-2 or float(pattern.min()) < 0:
                yield a.part, "the pattern is not a distribution over keys"
                continue
            v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
            yield (
                a.part,
                error(torch.einsum("bhqk,bkhe->bqhe", pattern.to(v.dtype), v[:, : pattern.shape[-1]]), z),
            )
            if a.route == "interface":
                yield (
                    a.part,
                    self.beside.errors.get((self.modules[a.module], a.nth), "it was not called again"),
                )

    def projection(self, _: Stack, block: Block) -> Verdicts:
        """z (where nothing sits in between) enters the output projection, whose weights make the
        contribution.
        """
        for a in block.attentions.values():
            if a.linear is None:
                yield a.part, block.refused.get(f"{a.part}.z_out", "no output projection was found")
                continue
            z_out, z = self.values[a.linear.given], self.value(block, f"{a.part}.z")
            if z is not None and (not a.gated or is_wider(a)):
                yield a.part, error(z.reshape(*z_out.shape[:2], a.heads, -1), z_out[:, :, : a.heads])
            yield a.part, self.contribution(block, a.linear, a.path, f"{a.part}.out")

    def contribution(self, block: Block, linear: Linear, path: Path | None, part: str) -> float | str:
        """A projection's weights times its input give its output, and from there the path leads to the
        contribution.
        """
        given = self.values[linear.given].flatten(2)
        weight, bias = linear_map(self.modules[linear.module], linear.shape)
        made = given.to(weight.dtype) @ weight
        off = error(made if bias is None else made + bias, self.values[linear.made])
        if path is None:
            return off
        target = block.taps.get(part)
        if target is None or target not in self.values:
            return f"{part} was not met"
        native = path.run(linear.made.layout.write(self.values[linear.made]))
        return max(off, error(target.layout.read(native, self.batch), self.values[target]))

    def heads(self) -> Callable[[Stack, Block], Verdicts]:
        """Where something sits between z and the projection, head h of z_out is made of head h of z; where
        more work follows the projection, it reads z and nothing else (with z at zero it makes the same at
        every position).
        """
        found: dict[tuple[str, int], dict[str, float | str]] = {}
        every = [
            (s, b, a)
            for s, b in self.blocks
            for a in b.attentions.values()
            if f"{a.part}.z" in b.taps and a.linear
        ]
        gated = [(s, b, a) for s, b, a in every if a.gated and not is_wider(a)]
        met = self.switched_off(gated, whole=False)
        for s, b, a in gated:
            found.setdefault((s.name, b.index), {})[a.part] = self.same_head(s, b, a, met[a.linear.given])
        worked_on = [(s, b, a) for s, b, a in every if a.path is None]
        met = self.switched_off(worked_on, whole=True)
        for s, b, a in worked_on:
            rest = float(spread(met[a.linear.made]).max())
            reads_z = rest if rest <= self.tolerance else f"{a.linear.module} reads more than z"
            found.setdefault((s.name, b.index), {}).setdefault(a.part, reads_z)
        return lambda stack, block: iter(found.get((stack.name, block.index), {}).items())

    def switched_off(self, which: list[tuple[Stack, Block, Any]], whole: bool) -> dict[Tap, Tensor]:
        """What projections read and make when z, or one head of it, is zero."""
        kept: dict[Tap, Tensor] = {}
        handlers: dict[Tap, Handler] = {}
        for _, b, a in which:
            handlers[b.taps[f"{a.part}.z"]] = zero_head(slice(None) if whole else b.index % a.heads)
            handlers |= {tap: keeper(kept, tap) for tap in (a.linear.given, a.linear.made)}
        if handlers:
            with Wiretap(self.module, handlers, self.batch):
                self.forward()
        return kept

    def same_head(self, stack: Stack, block: Block, a: Any, z_out: Tensor) -> float | str:
        """Head h of z was zero: nothing of a token is left in head h of z_out (or nothing else changed), but
        in others.
        """
        h = block.index % a.heads
        if z_out.shape[2] != a.heads:
            return f"z has {a.heads} heads, but what enters the projection has {z_out.shape[2]}"
        left = spread(z_out).amax((0, 1, 3))
        others = torch.cat([left[:h], left[h + 1 :]])
        if len(others) and float(others.min()) <= self.tolerance:
            return "switching off one head of z switches off others in z_out"
        if float(left[h]) <= self.tolerance:
            return float(left[h])
        alone = self.switched_off([(stack, block, a)], whole=False)[a.linear.given]
        change = (alone - self.values[a.linear.given]).abs().amax((0, 1, 3)) / size(alone)
        if float(change[h]) <= self.tolerance:
            return f"head {h} of z is not what head {h} of z_out is made of"
        return float(torch.cat([change[:h], change[h + 1 :], change.new_zeros(1)]).max())

    # ---- MLPs

    def neurons(self, _: Stack, block: Block) -> Verdicts:
        """Neurons times the down projection make the MLP's contribution."""
        for mlp in block.mlps.values():
            if mlp.linear is not None:
                yield mlp.part, self.contribution(block, mlp.linear, mlp.path, f"{mlp.part}.out")
            elif mlp.experts is None and f"{mlp.part}.experts" not in block.refused:
                yield mlp.part, block.refused.get(f"{mlp.part}.neurons", "no down projection was found")

    def experts(self, _: Stack, block: Block) -> Verdicts:
        """The experts' routed contributions add up to the native output; so do their neurons times W_down
        times weight.
        """
        for mlp in block.mlps.values():
            if mlp.experts is None:
                continue
            beside = self.beside.errors.get(
                (self.modules[mlp.experts.module], mlp.experts.nth), "it was not called again"
            )
            yield mlp.part, block.refused.get(f"{mlp.part}.experts", beside)

    def position_wise(self) -> Callable[[Stack, Block], Verdicts]:
        """What neurons and experts make at a position depends on the residual at that position alone."""
        watched = {
            (s.name, b.index, m.part): experts_output(b, m) if m.linear is None else m.linear.given
            for s, b in self.blocks
            for m in b.mlps.values()
            if m.linear is not None or m in mixtures(b)
        }
        reads = {tap for _, b in self.blocks for m in b.mlps.values() for tap in m.reads}
        kept: dict[Tap, Tensor] = {}

        def other(tap: Tap) -> Handler:  # the residual as it was, with another token's in the last place
            return lambda _: torch.cat([self.values[tap][:, :-1], self.values[tap][:, :1]], 1)

        if watched:
            handlers = {t: other(t) for t in reads} | {t: keeper(kept, t) for t in watched.values()}
            with Wiretap(self.module, handlers, self.batch):
                self.forward()

        def check(stack: Stack, block: Block) -> Verdicts:
            for mlp in block.mlps.values():
                tap = watched.get((stack.name, block.index, mlp.part))
                if tap is None:
                    continue
                change = (kept[tap] - self.values[tap]).abs() / size(self.values[tap])
                moved = float(change[:, -1].max()) > 0
                yield (
                    mlp.part,
                    float(change[:, :-1].max()) if moved else "where it reads the residual was not found",
                )

        return check

    # ---- the head and head ablation

    def unembedding(self) -> Proof:
        """The head, run on the last residual with the unembedding's own weights, gives the logits."""
        if not self.logits:
            return Proof("unembedding", None, None, "the model has no head: it returns hidden states")
        if self.head is None:
            return Proof(
                "unembedding", False, None, "the logits are not a chain of maps of the last residual alone"
            )
        x = self.value(self.stacks[-1].blocks[-1], "resid_post")
        if x is None:
            return Proof("unembedding", False, None, "the last residual is laid out in an unknown order")
        for i, step in enumerate(self.head.steps):
            if i == self.head.after - 1 and self.head.unembed:
                weight, bias = linear_map(self.modules[self.head.unembed], x.shape[-1])
                x = x.to(weight.dtype) @ weight
                x = x if bias is None else x + bias
            else:
                x = step(x)
        return self.verdict(
            "unembedding", error(x if self.head.chosen is None else self.head.chosen(x), self.logits_met)
        )

    def ablation(self) -> Proof:
        """Zeroing one head of every attention through z_out does what zeroing its rows of the output
        projection does.
        """
        zeroed: dict[
            str, tuple[int, int, tuple[int, ...]]
        ] = {}  # projection -> head, its width, shape of its input
        handlers: dict[Tap, Handler] = {}
        for stack, block in self.blocks:
            for a in block.attentions.values():
                if a.linear is None or ("projection", a.part) in self.failed.get(
                    (stack.name, block.index), {}
                ):
                    continue
                h, *_ = zeroed.setdefault(a.linear.module, (block.index % a.heads, a.d_value, a.linear.shape))
                handlers[a.linear.given] = zero_head(h)
        if not handlers:
            return Proof("ablation", None, None, "no head can be switched off by its weights")
        with Wiretap(self.module, handlers, self.batch):
            through_z = self.read(self.forward())
        with without_heads(self.modules, zeroed):
            by_weights = self.read(self.forward())
        if float((through_z - self.native).abs().max()) == 0.0:
            return Proof("ablation", False, None, "switching heads off changes nothing")
        proof = self.through_the_model("ablation", error(through_z, by_weights))
        if proof.holds is False:
            for stack, block in self.blocks:
                for part in block.attentions:
                    why = "head ablation is not what the weights say"
                    self.failed.setdefault((stack.name, block.index), {})["ablation", part] = why
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
    return lambda x: kept.update({tap: x.detach().clone()})


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


def refused_parts(block: Block, failures: dict[tuple[str, str], str]) -> Block:
    """The block with the parts that rest on failed proofs taken off the map."""
    refused = dict(block.refused)
    for (proof, failed), why in failures.items():
        for part in (pattern.format(failed) for pattern in DEPENDS.get(proof, ())):
            if part in block.taps or part.endswith(".heads"):
                refused.setdefault(part, f"the proof '{proof}' failed: {why}")
    taps = {part: tap for part, tap in block.taps.items() if part not in refused}
    return replace(block, taps=taps, refused=refused)
