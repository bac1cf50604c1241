"""The map checked on the loaded model. Each proof compares numbers two ways; what rests on a failed one is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pellucid.anatomy.layout import TOKENS, Layout
from pellucid.anatomy.structure import Block, Head, Proof, Stack, State, Tap
from pellucid.anatomy.weights import linear_map
from pellucid.anatomy.wiretap import Wiretap, tapped

# Largest relative error each dtype is allowed.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.float16: 1e-2, torch.bfloat16: 4e-2}

# Parts of a block that are refused when a proof fails on it.
DEPENDS = {
    "residual": ("resid_mid", "attn.out", "cross.out", "mixer.out", "mlp.out"),
    "attention": ("{a}.v", "{a}.pattern", "{a}.scores", "{a}.z"),
    "projection": ("{a}.z_out", "{a}.heads"),
    "ablation": ("{a}.z_out", "{a}.heads"),
    "neurons": ("mlp.neurons",),
}


def error(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference relative to the larger of 1 and the largest magnitude."""
    if a.shape != b.shape:
        return float("inf")
    a, b = a.double(), b.double()
    finite = torch.isfinite(b) & (b.abs() < 1e30)  # masked scores and logits are the same on both sides or not compared
    if not bool(finite.any()):
        return 0.0
    return float((a - b)[finite].abs().max() / max(1.0, float(b[finite].abs().max())))


class Prover:
    """Runs the proofs over one traced map; `native` is the output of the untouched model."""

    def __init__(
        self, module: nn.Module, forward: Callable[[], Any], read: Callable[[Any], Tensor], stacks: tuple[Stack, ...],
        head: Head | None, batch: int,
    ) -> None:  # fmt: skip
        self.module, self.forward, self.read = module, forward, read
        self.stacks, self.head, self.batch = stacks, head, batch
        self.modules = dict(module.named_modules())
        with torch.no_grad():
            self.native = read(forward()).detach().clone()
        dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
        self.tolerance = TOLERANCE.get(dtype, 4e-2)
        self.values: dict[Tap, Tensor] = {}
        self.failed: dict[tuple[str, int], dict[str, str]] = {}  # (stack, block) -> proof -> why

    def prove(self) -> list[Proof]:
        taps = {t for _, b in self.blocks() for t in (*b.taps.values(), *self.helpers(b))}
        if self.head is not None and self.head.norm is not None:
            taps.add(self.head.norm)
        self.values, output = tapped(self.module, taps, self.batch, self.forward)
        logits = self.read(output)
        missing = [t for t in taps if t not in self.values]
        return [
            self.verdict("logits", error(logits, self.native), "everything kept, the output stays the same"),
            Proof("taps", not missing, None, f"{len(missing)} taps never fired" if missing else "every tap fires"),
            self.over_blocks("residual", self.residual),
            self.chain(),
            self.over_blocks("attention", self.attention),
            self.over_blocks("projection", self.projection),
            self.over_blocks("neurons", self.neurons),
            self.unembedding(),
            self.ablation(),
        ]

    def blocks(self) -> Iterator[tuple[Stack, Block]]:
        return ((s, b) for s in self.stacks for b in s.blocks)

    def verdict(self, name: str, err: float, detail: str) -> Proof:
        return Proof(name, err <= self.tolerance, err, detail)

    def over_blocks(self, name: str, check: Callable[[Block], float | str | None]) -> Proof:
        """One claim about every block: None where it does not apply, a string where it cannot hold, else an error."""
        worst, why, applied = 0.0, [], 0
        for stack, block in self.blocks():
            result = check(block)
            if result is None:
                continue
            applied += 1
            if isinstance(result, float) and result <= self.tolerance:
                worst = max(worst, result)
                continue
            reason = result if isinstance(result, str) else f"off by {result:.1e}"
            self.failed.setdefault((stack.name, block.index), {})[name] = reason
            why.append(f"{stack.prefix}layers.{block.index}: {reason}")
        if not applied:
            return Proof(name, None, None, "does not apply")
        if why:
            return Proof(name, False, None, "; ".join(why[:3]) + (f"; and {len(why) - 3} more" if len(why) > 3 else ""))
        return Proof(name, True, worst)

    # ---- what is compared

    def helpers(self, block: Block) -> Iterator[Tap]:
        """Taps only the proofs need: norms inside the residual, outputs of the projections."""
        for state in block.states:
            yield from (t for t in (state.norm_in, state.norm_out) if t is not None)
        for part in ("attn.z_out", "cross.z_out", "mlp.neurons"):
            if part in block.taps:
                yield output_tap(block.taps[part])

    def residual(self, block: Block) -> float | str | None:
        """Every residual state is the previous ones plus the contributions (through the norm in post-norm families)."""
        if "resid" in block.refused:
            return block.refused["resid"]
        worst = 0.0
        values: dict[str, Tensor] = {}
        for i, state in enumerate(block.states):
            total = self.total(block, state, values)
            if isinstance(total, str):
                return total
            target = state.norm_in or block.taps.get("resid_post")
            if target not in self.values:
                return "the residual is laid out in an unknown order"
            worst = max(worst, error(total, self.values[target]))
            values[f"state {i}"] = self.values[state.norm_out] if state.norm_out is not None else total
        if "resid_post" in block.taps:
            worst = max(worst, error(values[f"state {len(block.states) - 1}"], self.values[block.taps["resid_post"]]))
        return worst

    def total(self, block: Block, state: State, states: dict[str, Tensor]) -> Tensor | str:
        total: Any = 0.0 if state.constant is None else state.constant
        for term in state.terms:
            if term.source == "in":
                value = self.values.get(block.taps.get("resid_pre"))  # type: ignore[arg-type]
            else:
                value = states.get(term.source)
                if value is None:
                    value = self.values.get(block.taps.get(term.source))  # type: ignore[arg-type]
            if value is None:
                return f"{term.source}: {block.refused.get(term.source, 'not met')}"
            total = total + value * term.coefficient
        return total

    def chain(self) -> Proof:
        """Each block receives what the one before handed over."""
        worst = 0.0
        for stack in self.stacks:
            for a, b in zip(stack.blocks, stack.blocks[1:], strict=False):
                post, pre = a.taps.get("resid_post"), b.taps.get("resid_pre")
                if post in self.values and pre in self.values:
                    worst = max(worst, error(self.values[post], self.values[pre]))
        return self.verdict("chain", worst, "" if worst <= self.tolerance else "something acts between the blocks")

    def attention(self, block: Block) -> float | str | None:
        """The pattern is a distribution over keys (sinks may take a share) and pattern times v is z."""
        worst: float | None = None
        for a in block.attentions.values():
            met = {p: self.values.get(block.taps.get(f"{a.part}.{p}")) for p in ("pattern", "v", "z")}  # type: ignore[arg-type]
            pattern, v, z = met["pattern"], met["v"], met["z"]
            if pattern is None or v is None or z is None:
                return "pattern, v or z was not met"
            if float(pattern.sum(-1).max()) > 1 + 1e-2 or float(pattern.min()) < 0:
                return "the pattern is not a distribution over keys"
            v = v.repeat_interleave(pattern.shape[1] // v.shape[2], 2)
            made = torch.einsum("bhqk,bkhe->bqhe", pattern.to(v.dtype), v[:, : pattern.shape[-1]])
            worst = max(worst or 0.0, error(made, z))
        return worst

    def projection(self, block: Block) -> float | str | None:
        """z (where nothing sits in between) enters the output projection, whose weights give its output."""
        worst: float | None = None
        for a in block.attentions.values():
            tap = block.taps.get(f"{a.part}.z_out")
            if tap is None or a.o_proj is None:
                return block.refused.get(f"{a.part}.z_out", "no output projection was found")
            z_out = self.values[tap]
            z = self.values.get(block.taps.get(f"{a.part}.z"))  # type: ignore[arg-type]
            if not a.gated and z is not None:
                worst = max(worst or 0.0, error(z.reshape(z_out.shape), z_out))
            worst = max(worst or 0.0, self.linear(a.o_proj, z_out.flatten(2), self.values[output_tap(tap)]))
        return worst

    def neurons(self, block: Block) -> float | str | None:
        """Neurons times the down projection give its output."""
        if block.down_proj is None:
            if "mlp.out" in block.taps and block.experts is None:
                return block.refused.get("mlp.neurons")
            return None
        if "mlp.neurons" not in block.taps:
            return block.refused.get("mlp.neurons")
        tap = block.taps["mlp.neurons"]
        return self.linear(block.down_proj, self.values[tap], self.values[output_tap(tap)])

    def linear(self, name: str, given: Tensor, made: Tensor) -> float:
        weight, bias = linear_map(self.modules[name], given.shape[-1])
        out = given.to(weight.dtype) @ weight
        return error(out if bias is None else out + bias, made)

    def unembedding(self) -> Proof:
        """The head, run on the last residual with the unembedding's own weights, gives the logits."""
        if self.head is None:
            return Proof("unembedding", None, None, "no linear map from the last residual to the output was found")
        tap = self.stacks[-1].blocks[-1].taps.get("resid_post")
        if tap is None:
            return Proof("unembedding", False, None, "the last residual is laid out in an unknown order")
        x: Tensor = self.values[tap]
        with torch.no_grad():
            for i, step in enumerate(self.head.steps):
                if i == self.head.after - 1:
                    weight, bias = linear_map(self.modules[self.head.unembed], x.shape[-1])
                    x = x.to(weight.dtype) @ weight
                    x = x if bias is None else x + bias
                else:
                    x = step(x)
        native = self.native
        if x.ndim == 3 and native.ndim == 2:  # a classifier reads one position
            return self.verdict("unembedding", min(error(x[:, i], native) for i in range(x.shape[1])), "")
        return self.verdict("unembedding", error(x[:, -native.shape[1] :], native), "")

    def ablation(self) -> Proof:
        """Zeroing one head of every attention through z_out does what zeroing its rows of the output projection does."""
        handlers, weights = {}, {}
        named = dict(self.module.named_parameters(remove_duplicate=False))
        seen: set[str] = set()
        for stack, block in self.blocks():
            for a in block.attentions.values():
                tap = block.taps.get(f"{a.part}.z_out")
                bad = self.failed.get((stack.name, block.index), {})
                if tap is None or a.o_proj is None or "projection" in bad:
                    continue
                h = block.index % a.heads if a.o_proj not in seen else 0
                weight = named.get(f"{a.o_proj}.weight")
                if weight is None or not weight.is_floating_point() or weight.ndim != 2 or a.o_proj in seen:
                    h = -1 if weight is None else next((n for t, n in handlers.values() if t == a.o_proj), h)
                if h < 0:
                    continue
                handlers[tap] = (a.o_proj, h)
                if a.o_proj not in seen:
                    seen.add(a.o_proj)
                    weights[f"{a.o_proj}.weight"] = self.without_head(weight, a.o_proj, h, a.d_value, a.heads)
        if not handlers:
            return Proof("ablation", None, None, "no head can be switched off by its weights")

        def zero(h: int) -> Callable[[Tensor], Tensor]:
            def handler(x: Tensor) -> Tensor:
                x = x.clone()
                x[:, :, h] = 0
                return x

            return handler

        with torch.no_grad():
            with Wiretap(self.module, {t: zero(h) for t, (_, h) in handlers.items()}, self.batch):
                through_z = self.read(self.forward())
            by_weights = self.read(self.with_parameters(weights))
        if float((through_z - self.native).abs().max()) == 0.0:
            return Proof("ablation", False, None, "switching heads off changes nothing")
        proof = self.verdict("ablation", error(through_z, by_weights), "")
        if not proof.holds:
            for stack, block in self.blocks():
                self.failed.setdefault((stack.name, block.index), {})["ablation"] = "head ablation is not what weights say"
        return proof

    def without_head(self, weight: Tensor, name: str, h: int, e: int, heads: int) -> Tensor:
        weight = weight.detach().clone()
        matrix, _ = linear_map(self.modules[name], heads * e)
        rows = slice(h * e, (h + 1) * e)
        if matrix.data_ptr() == self.modules[name].weight.data_ptr() and matrix.stride() == weight.stride():
            weight[rows] = 0
        else:
            weight[:, rows] = 0
        return weight

    def with_parameters(self, weights: dict[str, Tensor]) -> Any:
        """The forward pass with some parameters replaced, for this call only."""
        modules = self.modules
        saved = {}
        for name, value in weights.items():
            owner, _, leaf = name.rpartition(".")
            saved[name] = modules[owner]._parameters[leaf]
            modules[owner]._parameters[leaf] = nn.Parameter(value, requires_grad=False)
        try:
            return self.forward()
        finally:
            for name, old in saved.items():
                owner, _, leaf = name.rpartition(".")
                modules[owner]._parameters[leaf] = old


def output_tap(tap: Tap) -> Tap:
    """The output of the linear module whose input `tap` is."""
    native = tap.layout.native.replace("(h e)", "d").replace("h e", "d")
    return Tap(tap.module, "out", Layout(native, TOKENS), nth=tap.nth)


def refused_parts(block: Block, failures: dict[str, str]) -> Block:
    """The block with the parts that rest on failed proofs taken off the map."""
    refused = dict(block.refused)
    for proof, why in failures.items():
        for pattern in DEPENDS.get(proof, ()):
            for part in {pattern.format(a=a) for a in ("attn", "cross")}:
                if part in block.taps or part.endswith("heads"):
                    refused.setdefault(part, f"the proof '{proof}' failed: {why}")
    taps = {part: tap for part, tap in block.taps.items() if part not in refused}
    return replace(block, taps=taps, refused=refused)
