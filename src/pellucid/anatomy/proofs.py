"""The map checked on the loaded model. Each proof compares numbers two ways; what rests on a failed one is
refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy import experts as moe
from pellucid.anatomy.checks import TOLERANCE, Beside, Off, error, mixture_error
from pellucid.anatomy.interfaces import listening
from pellucid.anatomy.structure import (
    Block,
    Linear,
    Path,
    Proof,
    Stack,
    State,
    Tap,
    Unembedding,
)  # fmt: skip
from pellucid.anatomy.trials import (
    Verdicts,
    ablation,
    experts_output,
    heads,
    is_wider,
    mixtures,
    position_wise,
    reads,
    rounding,
    values,
)  # fmt: skip
from pellucid.anatomy.weights import grain, linear_map
from pellucid.anatomy.wiretap import tapped
from pellucid.anatomy.writers import Writer
from pellucid.errors import Refused

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
    "writers": ("{}.heads.out", "{}.neurons.out"),
    "ablation": ("{}.z_out", "{}.heads"),
    "values": ("{}.z_out", "{}.heads", "{}.neurons"),
}


class Prover:
    """Runs the proofs over one traced map. `logits` says whether the model returns logits, which then need a
    head. With `only`, the same modules were proven with other weights: blocks (stack, index) whose weights are
    others are held against their weights again; what follows from how the code runs is not.
    """

    def __init__(
        self, module: nn.Module, forward: Callable[[], Any], read: Callable[[Any], Tensor],
        stacks: tuple[Stack, ...], head: Unembedding | None, batch: int, logits: bool,
        only: Collection[tuple[str, int]] | None = None,
    ) -> None:  # fmt: skip
        self.module, self.forward, self.read = module, forward, read
        self.stacks, self.head, self.batch, self.logits = stacks, head, batch, logits
        self.only = only
        self.blocks = [(s, b) for s in stacks for b in s.blocks if only is None or (s.name, b.index) in only]
        self.modules = dict(module.named_modules())
        self.native = read(forward()).detach().clone()
        floats = {p.dtype for p in module.parameters() if p.is_floating_point()}
        self.tolerance = max((TOLERANCE.get(dtype, 4e-2) for dtype in floats), default=TOLERANCE[torch.float32])
        linears = [linear for _, b in self.blocks for linear in b.linears]
        self.grains = {linear.module: grain(self.modules[linear.module], linear.shape) for linear in linears}
        coarsest = max(self.grains.values(), default=0.0)
        self.half = max(self.tolerance, coarsest) > TOLERANCE[torch.float32]
        self.floor = rounding(self, coarsest) if self.half else 0.0
        self.values: dict[Tap, Tensor] = {}
        self.beside = Beside()
        self.failed: dict[tuple[str, int], dict[tuple[str, str], str]] = {}  # (stack, block) -> (proof, part) -> why

    def prove(self) -> list[Proof]:
        taps = {t for _, b in self.blocks for t in (*b.taps.values(), *self.helpers(b))} - {None}
        ends = [s.blocks[-1].taps.get("resid_post") for s in self.stacks]  # the head reads one of them
        seams = [end for a, b in self.seams() for end in (a.taps.get("resid_post"), b.taps.get("resid_pre"))]
        embeds = [tap for s in self.stacks for tap in s.embeds.values()]
        taps |= {t for t in (*ends, *seams, *embeds) if t is not None}
        if self.head is not None and self.head.norm is not None:
            taps.add(self.head.norm)
        slow = {t for t in taps if t.port in ("scores", "pattern", *moe.EXPERT_PORTS)}  # not the native kernels
        self.values, output = self.met(taps - slow)
        self.logits_met = self.read(output)
        units = {replace(t, unit=0) if t.port != "router" else t for t in slow if t.port in moe.EXPERT_PORTS}
        ours = units | {t for t in taps if t.port in ("v", "z", "scores", "pattern")}
        self.ours, output = self.met(ours)
        with listening(self.beside):
            self.forward()
        missing = [t for t in (*taps - slow, *ours) if t not in self.values and t not in self.ours]
        attention, experts = (
            self.over_blocks("attention", self.attention),
            self.over_blocks("experts", self.experts),
        )
        step_by_step = None if False in (attention.holds, experts.holds) else error(self.read(output), self.native)
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
            self.over_blocks("heads", heads(self)) if self.only is None else as_read("heads"),
            self.over_blocks("neurons", self.neurons),
            self.over_blocks("writers", self.writers),
            experts,
            self.over_blocks("position-wise", position_wise(self)) if self.only is None else as_read("position-wise"),
            self.over_blocks("reads", reads(self)) if self.only is None else as_read("reads"),
            self.over_blocks("values", values(self)) if self.only is None else as_read("values"),
            self.unembedding(),
            ablation(self) if self.only is None else as_read("ablation"),
        ]

    # ---- machinery

    def met(self, taps: set[Tap]) -> tuple[dict[Tap, Tensor], Any]:
        """What one pass shows at `taps` (on the CPU: the model may be spread over devices), and its output."""
        values, output = tapped(self.module, taps, self.batch, self.forward)
        return {tap: value.cpu() for tap, value in values.items()}, output

    def value(self, block: Block, part: str) -> Tensor | None:
        tap = block.taps.get(part)
        return self.values.get(tap) if tap is not None else None

    def verdict(self, name: str, err: float, detail: str = "") -> Proof:
        return Proof(name, err <= max(self.tolerance, getattr(err, "allowed", 0.0)), err, detail)

    def same_logits(self, kept: float, step_by_step: float | None) -> Proof:
        """With everything kept the output is the native one; with attention and experts step by step, up to
        rounding.
        """
        if bool(self.native.isnan().any()):  # comparisons leave out what is not finite
            return Proof("logits", False, None, "the model itself returns NaN")
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

    def over_blocks(self, name: str, check: Callable[[Stack, Block], Verdicts]) -> Proof:
        """One claim about every block: the worst error, or where and why it fails."""
        worst, why = -1.0, []
        for stack, block in self.blocks:
            for part, result in check(stack, block):
                if isinstance(result, float) and result <= max(self.tolerance, getattr(result, "allowed", 0.0)):
                    worst = max(worst, result)
                    continue
                reason = result if isinstance(result, str) else f"off by {result:.1e}"
                self.failed.setdefault((stack.name, block.index), {})[name, part] = reason
                why.append(f"{stack.prefix}layers.{block.index}: {reason}")
        if why:
            return Proof(name, False, None, "; ".join(why[:3]) + (f"; and {len(why) - 3} more" if len(why) > 3 else ""))
        return Proof(name, True, worst) if worst >= 0 else Proof(name, None, None, "does not apply")

    def helpers(self, block: Block) -> Iterator[Tap]:
        """Taps only the proofs need: norms in the residual, carried states, outputs of the projections."""
        for state in block.states:
            inner = (state.norm_in, state.norm_out, *(term.carried for term in state.terms))
            yield from (tap for tap in inner if tap is not None)
        yield from (a.linear.made for a in block.attentions.values() if a.linear is not None)
        yield from (m.linear.made for m in block.mlps.values() if m.linear is not None)
        yield from (experts_output(block, mlp) for mlp in mixtures(block))
        found = [r for part in block.reads.values() for r in part]
        yield from (r.given if r.given is not None else r.tap for r in found)

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
        total: Any = 0.0 if state.constant is None else state.constant.cpu()
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
            c = term.coefficient
            total = total + value * (c.to(value) if isinstance(c, Tensor) else c)
        return total, drift

    def seams(self) -> list[tuple[Block, Block]]:
        """Blocks that hand over to one another, one of them to be proven."""
        own = {id(b) for _, b in self.blocks}
        pairs = [pair for s in self.stacks for pair in zip(s.blocks, s.blocks[1:], strict=False)]
        return [pair for pair in pairs if own & set(map(id, pair))]

    def chain(self) -> Proof:
        """Each block receives what the one before handed over."""
        met = [(self.value(a, "resid_post"), self.value(b, "resid_pre")) for a, b in self.seams()]
        worst = max((float("inf") if x is None or y is None else error(x, y) for x, y in met), default=0.0)
        return self.verdict("chain", worst, "" if worst <= self.tolerance else "something acts between the blocks")

    # ---- attention

    def attention(self, _: Stack, block: Block) -> Verdicts:
        """The pattern is a distribution over keys (sinks take a share); pattern times v is the native z."""
        yield from (("", why) for why in block.unmapped)
        for a in block.attentions.values():
            if a.route == "pieces":  # no pattern on the map
                continue
            taps = [block.taps.get(f"{a.part}.{p}") for p in ("pattern", "v", "z")]
            pattern, v, z = (self.ours.get(tap) if tap is not None else None for tap in taps)
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
        made = given.to(weight) @ weight
        off = error(made if bias is None else made + bias, self.values[linear.made])
        allowed = 3 * self.grains[linear.module]
        if path is None:
            return Off.of(off, allowed)
        target = block.taps.get(part)
        if target is None or target not in self.values:
            return f"{part} was not met"
        native = path.run(linear.made.layout.write(self.values[linear.made]))
        return Off.of(max(off, error(target.layout.read(native, self.batch), self.values[target])), allowed)

    # ---- MLPs

    def neurons(self, _: Stack, block: Block) -> Verdicts:
        """Neurons times the down projection make the MLP's contribution."""
        for mlp in block.mlps.values():
            if mlp.linear is not None:
                yield mlp.part, self.contribution(block, mlp.linear, mlp.path, f"{mlp.part}.out")
            elif mlp.experts is None and f"{mlp.part}.experts" not in block.refused:
                yield mlp.part, block.refused.get(f"{mlp.part}.neurons", "no down projection was found")

    def writers(self, stack: Stack, block: Block) -> Verdicts:
        """What heads, or neurons, write to the stream one by one adds up to the contribution."""
        for part in (*block.attentions, *block.mlps):
            port = f"{part}.z_out" if part in block.attentions else f"{part}.neurons"
            given, out = self.value(block, port), self.value(block, f"{part}.out")
            failed = self.failed.setdefault((stack.name, block.index), {})
            if given is None or out is None or {("projection", part), ("neurons", part)} & failed.keys():
                continue
            try:
                writer = Writer.of(self.module, block, part)
                yield part, Off.of(error(writer.total(given), out), 3 * self.grains.get(writer.linear.module, 0.0))
            except Refused as why:  # a refusal, not a failure: the whole contribution is as proven as ever
                failed["writers", part] = str(why)

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

    # ---- the head

    def unembedding(self) -> Proof:
        """The head, run on the last residual with the unembedding's own weights, gives the logits."""
        if not self.logits:
            return Proof("unembedding", None, None, "it makes no logits of tokens or labels from its last residual")
        if self.head is None:
            return Proof("unembedding", False, None, "the logits are not a chain of maps of the last residual alone")
        x = self.value(self.stacks[-1].blocks[-1], "resid_post")
        if x is None:
            return Proof("unembedding", False, None, "the last residual is laid out in an unknown order")
        width = x.shape[-1]
        for i, step in enumerate(self.head.steps):
            if i == self.head.after - 1 and self.head.unembed:
                weight, bias = linear_map(self.modules[self.head.unembed], x.shape[-1])
                x = x.to(weight) @ weight
                x = x if bias is None else x + bias
            else:
                x = step(x)
        off = error(x if self.head.chosen is None else self.head.chosen(x), self.logits_met)
        own = grain(self.modules[self.head.unembed], width) if self.head.unembed else 0.0
        return self.verdict("unembedding", Off.of(off, 3 * own))


def as_read(name: str) -> Proof:
    """A claim that was proven and that other weights cannot break."""
    return Proof(name, None, None, "follows from the code, which is the same")


def refused_parts(block: Block, failures: dict[tuple[str, str], str]) -> Block:
    """The block with the parts that rest on failed proofs taken off the map."""
    refused = dict(block.refused)
    for (proof, failed), why in failures.items():
        for part in (pattern.format(failed) for pattern in DEPENDS.get(proof, ())):
            heads = part.endswith((".heads", ".heads.out")) and failed in block.attentions
            if part in block.taps or heads or (part.endswith(".neurons.out") and failed in block.mlps):
                refused.setdefault(part, why if proof == "writers" else f"the proof '{proof}' failed: {why}")
    taps = {part: tap for part, tap in block.taps.items() if part not in refused}
    unread = {part: f"the proof 'reads' failed: {why}" for (proof, part), why in failures.items() if proof == "reads"}
    reads = {part: found for part, found in block.reads.items() if part not in unread}
    return replace(block, taps=taps, refused=refused, reads=reads, unread=block.unread | unread)
