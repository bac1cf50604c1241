"""Which of very many parts would matter if patched, at the price of a few passes? And how far is that guess off?

Attribution patching (Nanda 2023; Syed et al. 2023) is the first-order estimate of patching a node n of the run of x with its
value on x':

    estimate(n) = (n(x') - n(x)) . d metric / d n,  at x

AtP* (Kramar et al. 2024, "AtP*: An efficient and scalable method for localizing LLM behaviour to components") mends its two
blind spots:

    QK fix     a query or key acts through a softmax that may be saturated: its pattern is recomputed exactly,
               estimate(n) = sum (pattern(n(x')) - pattern(x)) . d metric / d pattern
    GradDrop   direct and indirect effects may cancel: the estimate is made once for every layer with the gradient through
               that layer's attention and MLP cut, and the sizes are averaged over the layers other than the node's own

To first order the estimate of a set of nodes is the sum of theirs. With GradDrop an estimate is a size, not a signed effect. The pattern of a patched key is recomputed by the family's own
attention (one run per key position, with everything behind the patterns held), so soft caps, biases and sinks count.
No estimate is given without its check: the exact effect of the nodes it ranks highest and of as many random others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import Asked, contrast, numbers
from pellucid.causal.grid import CONTRIBUTIONS, Grid, Over, described, over_prompts, shares, totals
from pellucid.engine.edits import Edit, Replace, Swap, aligned_values, left_aligned, swaps
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import block_of, locate
from pellucid.engine.pausing import pause
from pellucid.engine.run import Run, stream_of
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import spearman
from pellucid.technique import technique


@technique
def attribution_patching(
    model: Model,
    clean: Any,
    corrupted: Any = None,
    *,
    over: Over = "layers.*.attn.heads.*",
    metric: Any = None,
    qk_fix: bool = True,
    grad_drop: bool = False,
    denoise: bool = True,
    check: int = 20,
    decoder: Any = None,
    seed: int = 0,
) -> Result:
    """Estimated effects of patching every node of `over`: heads, their q or k, neurons, outputs, residuals, at positions,
    whole layers, sets; and `denoise`, as in `patching`.

    `qk_fix` concerns nodes that are queries or keys (a shared key is patched for all heads that share it); with
    `grad_drop` too it is AtP*. Gives `estimate` over the selectors of `over`, its interval over prompts and p, its `share`
    of the total effect (signed estimates only), and the check over `checked`, the `check` highest ranked nodes and as many
    random others: `exact` effects beside the estimates, their rank correlation `spearman` (of sizes) and, of signed
    estimates, `sign_agreement`. `missed` is the largest exact effect of a random node over the largest of all: well under
    1 where the ranking is right.

    >>> attribution_patching(model, prompts, over="layers.*.mlp.neurons.*@-1", grad_drop=True, check=4)
    Estimated effects (AtP*)
    attribution patching: estimate, low, high, ...
    """
    asked = contrast(model, clean, corrupted, metric, decoder)
    if asked.names:
        raise InputError("attribution patching takes the gradient of one metric: give one at a time")
    base, source = asked.sides(denoise)
    grid = Grid.of(model, over, base)
    estimator = Estimator.of(model, base, source, asked.metric, grid.groups, qk_fix, not grad_drop)
    per_prompt = estimator.with_drops() if grad_drop else estimator.estimates()
    unpatched, patched_from = (asked.score(model, each) for each in (estimator.base, estimator.other))
    columns = described("estimate", per_prompt, seed, test=not grad_drop)  # sizes have no sign to flip
    if not grad_drop:
        columns["share"] = shares(per_prompt, patched_from - unpatched, seed)["share"]
    data = grid.data(columns).assign(totals(unpatched, patched_from, seed, denoise=denoise))
    if check:
        data = data.assign(_check(model, asked, base, estimator.other, grid, columns["estimate"], check, seed))
        if grad_drop:  # sizes have no sign to agree
            data = data.drop_vars("sign_agreement")
    name = "AtP*" if qk_fix and grad_drop else "attribution patching"
    return Result(over_prompts(data, asked), kind="attribution patching", title=f"Estimated effects ({name})")


@dataclass(frozen=True, eq=False)
class Estimator:
    """What the gradients are multiplied with: each node's change, its own or that of the pattern it makes."""

    model: Model
    inputs: Inputs
    metric: Any
    groups: Sequence[Sequence[Site]]
    base: Run
    other: Run
    linear: dict[Site, Tensor]  # whole site -> change [batch, position, unit, ...]
    fixed: dict[Site, Tensor]  # whole site -> change of its layer's pattern, see _pattern_changes

    @classmethod
    def of(
        cls,
        model: Model,
        inputs: Inputs,
        source: Inputs,
        metric: Any,
        groups: Sequence[Sequence[Site]],
        qk_fix: bool,
        grad: bool,
    ) -> Estimator:
        """`grad`: whether the gradient is wanted of the very run the values are taken from."""
        wholes = list(dict.fromkeys(_source(node) for group in groups for node in group))
        fixed = [s for s in wholes if qk_fix and s.part in ("attn.q", "attn.k")]
        kept = [s.whole for s in wholes]
        with torch.no_grad():
            asked = [*kept, *map(_pattern, fixed), *map(_z, fixed)]
            base = model.run(inputs, keep=asked, grad_of=metric if grad else None)
            other = model.run(source, keep=kept)
        linear = {s: aligned_values(other, s.whole) - aligned_values(base, s.whole) for s in wholes if s not in fixed}
        patterns = dict(_pattern_changes(model, base, other, fixed))
        return cls(model, inputs, metric, groups, base, other, linear, patterns)

    def estimates(self, edits: Sequence[Edit] = ()) -> np.ndarray:
        """[prompt, group], from the gradient of a run under `edits` that leave all values as they are."""
        run = self.base
        if edits or not run.gradients:
            keep = [s.whole for s in self.linear] + [_pattern(s) for s in self.fixed]
            run = self.model.run(self.inputs, keep=keep, edits=edits, grad_of=self.metric)
        gradients = Run(run.anatomy, run.inputs, run.output, run.gradients, run.sites)  # to be read as values are
        products = {s: change * aligned_values(gradients, s.whole) for s, change in self.linear.items()}
        products |= {s: self._through_pattern(s, change, run) for s, change in self.fixed.items()}
        nodes = {n: numbers(self._of_node(n, products[_source(n)])) for group in self.groups for n in group}
        return np.stack([np.sum([nodes[n] for n in group], 0) for group in self.groups], 1)

    def _of_node(self, node: Site, product: Tensor) -> Tensor:
        """[prompt] the sum over a node's positions and width of a product [prompt, position, unit, ...]."""
        spot = locate(self.model.anatomy, node)
        x = product if spot.unit is None else product[:, :, spot.unit]
        stream = stream_of(self.inputs, node)
        columns = stream.find(node.at)
        if columns is not None:
            x = x[torch.arange(len(x), device=x.device)[:, None], columns - stream.starts[:, None]]
        return x.flatten(1).sum(1)

    def _through_pattern(self, site: Site, change: Tensor, run: Run) -> Tensor:
        """[prompt, position, unit]: a change of the pattern times its gradient, by the node that makes it."""
        product = change * run.grad(_pattern(site))
        real = stream_of(self.inputs, site).mask.bool()
        if site.part == "attn.q":
            return left_aligned(product.sum(-1).transpose(1, 2), real)[0]
        by_head = product.sum((-1, -2))  # [prompt, head], or [key, prompt, head]
        kv_heads = block_of(self.model.anatomy, site).attentions["attn"].kv_heads
        x = by_head.unflatten(-1, (kv_heads, -1)).sum(-1)  # query heads that share keys stand together
        return x[:, None] if site.at is None else left_aligned(x.transpose(0, 1), real)[0]

    def with_drops(self) -> np.ndarray:
        """GradDrop: the mean size of the estimate over the layers that are cut, a node's own layer left out (a residual
        lies in no layer)."""
        blocks = [(stack, block) for stack in self.model.anatomy.stacks for block in stack.blocks]
        own = [{(n.stack, n.layer) for n in group if not n.part.startswith("resid")} for group in self.groups]
        total, counted = np.zeros((len(self.inputs), len(own))), np.zeros(len(own))
        for i, (stack, block) in enumerate(blocks):
            pause(i, len(blocks))
            outs = [part for part in CONTRIBUTIONS if part in block.taps]
            cut = [Replace(f"{stack.prefix}layers.{block.index}.{part}", function=Tensor.detach) for part in outs]
            others = np.array([(stack.name, block.index) not in each for each in own])
            total += np.abs(self.estimates(cut)) * others
            counted += others
        return total / np.maximum(counted, 1)


def _source(node: Site) -> Site:
    """What a node's change is read from: its whole site; keys at positions apart from keys at all of them."""
    return node.whole.at_position("*" if node.part == "attn.k" and node.at is not None else None)


# ---- the QK fix


def _pattern(node: Site) -> Site:
    return replace(node.whole, part="attn.pattern")


def _z(node: Site) -> Site:
    return replace(node.whole, part="attn.z")


def _pattern_changes(model: Model, base: Run, other: Run, sites: Sequence[Site]) -> Iterator[tuple[Site, Tensor]]:
    """How patterns change when queries or keys are patched: [batch, head, query, key] for queries (each changes its own
    row only) and for all keys together, [key position, batch, ...] for keys one by one. Behind the patterns z is held,
    so that layers do not mix and one run serves all of them."""
    for part, singly in (("attn.q", False), ("attn.k", False), ("attn.k", True)):
        mine = [s for s in sites if s.part == part and (s.at is not None) == singly]
        if not mine:
            continue
        n, length = base.inputs.stream("").ids.shape
        times = length if singly else 1
        edits: list[Edit] = [Replace(s.whole, function=_put(other.everywhere(s.whole)[0], n, singly)) for s in mine]
        for s in mine:
            edits.append(Swap(_z(s), aligned_values(base, _z(s)).repeat(times, 1, 1, 1)))
        with torch.no_grad():
            run = model.run(base.inputs.repeated(times), keep=map(_pattern, mine), edits=edits)
        for s in mine:
            pattern = run.tensor(_pattern(s))
            yield s, (pattern.unflatten(0, (length, n)) if singly else pattern) - base.tensor(_pattern(s))


def _put(source: Tensor, n: int, singly: bool) -> Callable[[Tensor], Tensor]:
    """Patch all positions, or in row block i of [position * batch, position, ...] position i alone."""

    def put(x: Tensor) -> Tensor:
        if not singly:
            return source
        x = x.clone().unflatten(0, (-1, n))
        for position in range(len(x)):
            x[position, :, position] = source[:, position]
        return x.flatten(0, 1)

    return put


# ---- the check


def _check(
    model: Model, asked: Asked, base: Inputs, source: Run, grid: Grid, estimate: np.ndarray, n: int, seed: int
) -> dict[str, Any]:
    """Exact effects of the nodes ranked highest and of random others, beside their estimates."""
    order = np.argsort(-np.abs(estimate), kind="stable")
    top = order[:n]
    others = np.random.default_rng(seed).permutation(order[n:])[:n]
    chosen = np.concatenate([top, others])
    sweep = model.sweep(base, [swaps(grid.groups[i], source) for i in chosen], asked.metric)
    exact = numbers(sweep.values - sweep.clean.to(sweep.values)).mean(1)
    guess = estimate[chosen]
    sizes = np.abs(exact)
    return {
        "exact": xr.DataArray(exact, {"checked": [grid.names[i] for i in chosen]}, "checked"),
        "estimated": ("checked", guess),
        "ranked_high": ("checked", np.arange(len(chosen)) < len(top)),
        "spearman": spearman(np.abs(guess), sizes),
        "sign_agreement": float(np.mean(np.sign(guess[: len(top)]) == np.sign(exact[: len(top)]))),
        "missed": float(sizes[len(top) :].max(initial=0.0) / max(sizes.max(), 1e-12)),
    }
