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

With GradDrop an estimate is a size, not a signed effect. The pattern of a patched key is recomputed by the family's own
attention (one run per key position, with everything behind the patterns held), so soft caps, biases and sinks count.
No estimate is given without its check: the exact effect of the nodes it ranks highest and of as many random others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import (
    Contrast,
    Swap,
    aligned_values,
    bootstrap,
    lay_out,
    numbers,
    one_by_one,
    provenance,
    repeated,
    sides,
    swaps,
)
from pellucid.causal.grid import CONTRIBUTIONS
from pellucid.engine.edits import Edit, Replace, left_aligned
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import block_of, locate
from pellucid.engine.run import Run, stream_of
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import spearman


def attribution_patching(
    model: Model,
    clean: Any,
    corrupted: Any = None,
    *,
    over: str | Site | Iterable[str | Site] = "layers.*.attn.heads.*",
    metric: Any = None,
    qk_fix: bool = True,
    grad_drop: bool = False,
    denoise: bool = False,
    check: int = 20,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Estimated effects of patching every node of `over`: heads, their q or k, neurons, outputs, residuals, at positions.

    `qk_fix` concerns nodes that are queries or keys (a shared key is patched for all heads that share it); with
    `grad_drop` too it is AtP*. Gives `estimate` and its interval over prompts, laid out as layer x head (x position), and
    the check over `checked`, the `check` highest ranked nodes and as many random others: `exact` effects beside the
    estimates, their rank correlation `spearman` (of sizes) and, of signed estimates, `sign_agreement`. `missed` is the
    largest exact effect of a random node over the largest of all: well under 1 where the ranking is right.

    >>> attribution_patching(model, prompts, over="layers.*.mlp.neurons.*@-1", grad_drop=True)      # doctest: +SKIP
    """
    ours, theirs, metric = sides(model, clean, corrupted, metric)
    metric = model.bind(metric, len(ours))
    base, other = (theirs, ours) if denoise else (ours, theirs)
    nodes = one_by_one(model, base, over)
    estimator = Estimator.of(model, base, other, metric, nodes, qk_fix, not grad_drop)
    per_prompt = estimator.with_drops() if grad_drop else estimator.estimates()
    run, patched_from = (model.score(each, metric).detach() for each in (estimator.base, estimator.other))
    scores = (patched_from, run) if denoise else (run, patched_from)
    pair = Contrast(model, ours, theirs, metric, *scores)
    low, high = bootstrap(per_prompt, seed)
    estimate = per_prompt.mean(0)
    data = lay_out(nodes, {"estimate": estimate, "low": low, "high": high}).assign(pair.summary(seed))
    if check:
        data = data.assign(_check(pair, denoise, estimator.other, nodes, estimate, check, seed, progress))
        if grad_drop:  # sizes have no sign to agree
            data = data.drop_vars("sign_agreement")
    about = provenance(
        model, "attribution_patching", base, seed, corrupted=list(other.texts), over=over, metric=pair.metric.name,
        qk_fix=qk_fix, grad_drop=grad_drop, denoise=denoise, check=check,
    )  # fmt: skip
    name = "AtP*" if qk_fix and grad_drop else "attribution patching"
    return Result(data, kind="attribution patching", title=f"Estimated effects ({name})", provenance=about)


@dataclass(frozen=True, eq=False)
class Estimator:
    """What the gradients are multiplied with: each node's change, its own or that of the pattern it makes."""

    model: Model
    inputs: Inputs
    metric: Any
    nodes: Sequence[Site]
    base: Run
    other: Run
    linear: dict[Site, Tensor]  # whole site -> change [batch, position, unit, ...]
    fixed: dict[Site, Tensor]  # whole site -> change of its layer's pattern, see _pattern_changes

    @classmethod
    def of(
        cls, model: Model, inputs: Inputs, source: Inputs, metric: Any, nodes: Sequence[Site], qk_fix: bool, grad: bool
    ) -> Estimator:
        """`grad`: whether the gradient is wanted of the very run the values are taken from."""
        wholes = list(dict.fromkeys(map(_source, nodes)))
        fixed = [s for s in wholes if qk_fix and s.part in ("attn.q", "attn.k")]
        kept = [s.whole for s in wholes]
        with torch.no_grad():
            asked = [*kept, *map(_pattern, fixed), *map(_z, fixed)]
            base = model.run(inputs, keep=asked, grad_of=metric if grad else None)
            other = model.run(source, keep=kept)
        linear = {s: aligned_values(other, s.whole) - aligned_values(base, s.whole) for s in wholes if s not in fixed}
        patterns = dict(_pattern_changes(model, base, other, fixed))
        return cls(model, inputs, metric, nodes, base, other, linear, patterns)

    def estimates(self, edits: Sequence[Edit] = ()) -> np.ndarray:
        """[prompt, node], from the gradient of a run under `edits` that leave all values as they are."""
        run = self.base
        if edits or not run.gradients:
            keep = [s.whole for s in self.linear] + [_pattern(s) for s in self.fixed]
            run = self.model.run(self.inputs, keep=keep, edits=edits, grad_of=self.metric)
        gradients = Run(run.anatomy, run.inputs, run.output, run.gradients, run.sites)  # to be read as values are
        products = {s: change * aligned_values(gradients, s.whole) for s, change in self.linear.items()}
        products |= {s: self._through_pattern(s, change, run) for s, change in self.fixed.items()}
        return np.stack([numbers(self._of_node(n, products[_source(n)])) for n in self.nodes], 1)

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
        own = [(n.stack, None if n.part.startswith("resid") else n.layer) for n in self.nodes]
        total, counted = np.zeros((len(self.inputs), len(self.nodes))), np.zeros(len(self.nodes))
        for stack, block in blocks:
            outs = [part for part in CONTRIBUTIONS if part in block.taps]
            cut = [Replace(f"{stack.prefix}layers.{block.index}.{part}", function=Tensor.detach) for part in outs]
            others = np.array([each != (stack.name, block.index) for each in own])
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
            run = model.run(repeated(base.inputs, times), keep=map(_pattern, mine), edits=edits)
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
    pair: Contrast,
    denoise: bool,
    source: Run,
    nodes: Sequence[Site],
    estimate: np.ndarray,
    n: int,
    seed: int,
    progress: bool,
) -> dict[str, Any]:
    """Exact effects of the nodes ranked highest and of random others, beside their estimates."""
    base, _, scores = pair.sides(denoise)
    order = np.argsort(-np.abs(estimate), kind="stable")
    top = order[:n]
    others = np.random.default_rng(seed).permutation(order[n:])[:n]
    chosen = np.concatenate([top, others])
    edits = [swaps(pair.model, [nodes[i]], source) for i in chosen]
    sweep = pair.model.sweep(base, edits, pair.metric, progress=progress)
    exact = (numbers(sweep.values) - numbers(scores)).mean(1)
    guess = estimate[chosen]
    sizes = np.abs(exact)
    names = [str(nodes[i]) for i in chosen]
    return {
        "exact": xr.DataArray(exact, {"checked": names}, "checked"),
        "estimated": ("checked", guess),
        "ranked_high": ("checked", np.arange(len(chosen)) < len(top)),
        "spearman": spearman(np.abs(guess), sizes),
        "sign_agreement": float(np.mean(np.sign(guess[: len(top)]) == np.sign(exact[: len(top)]))),
        "missed": float(sizes[len(top) :].max(initial=0.0) / max(sizes.max(), 1e-12)),
    }
