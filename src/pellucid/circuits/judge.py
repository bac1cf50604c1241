"""Is this circuit right? Faithful, complete, minimal, and better than circuits that know nothing.

M is the model, C the circuit, F the mean metric over prompts; what is outside a circuit is switched off.

    faithfulness    |F(M) - F(C)| (Wang et al. 2023), and normalised: f(C) = (F(C) - F(empty)) / (F(M) -
                    F(empty))
    completeness    |F(C \\ K) - F(M \\ K)| for sets of nodes K of C: random ones, classes (heads of a layer,
                    unless given) and a K grown greedily to make it large. A complete circuit breaks where the
                    model breaks.
    minimality      |F(C \\ (K + v)) - F(C \\ K)| for each head v, the larger over K = {} and K = the rest of
                    v's class
    controls        f of random circuits of the same size, and of the edges between the largest weights

Greedy search is dear, one pair of runs per head and step, so each step first ranks the heads to first order
(the derivative of F by the edges' masks, at C \\ K and at M \\ K) and measures the `screen` foremost; a K
found so is a lower bound of the worst one. All numbers reported are measured. They depend on the ablation and
hold for the prompts given: judge on prompts the circuit was not found on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.causal.contrast import ask
from pellucid.circuits.ablation import How
from pellucid.circuits.away import scored
from pellucid.circuits.circuit import Circuit, touching
from pellucid.circuits.execution import Runner, capacity, chunks, wire
from pellucid.circuits.graph import Graph, Split
from pellucid.circuits.scores import ranked
from pellucid.circuits.wiring import Wiring
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.metrics import Metric
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique

Classes = Mapping[str, Sequence[str]]


@technique
def judge(
    model: Model,
    circuit: Circuit,
    prompts: Any,
    metric: Metric | Any = None,
    *,
    how: How,
    reference: Any = None,
    classes: Classes | None = None,
    draws: int = 10,
    greedy: int = 3,
    screen: int = 8,
    seed: int = 0,
) -> Result:
    """The verdict on a circuit, in one call.

    `classes`: sets of heads that belong together, for completeness and minimality; `draws`: random sets K
    and random circuits; `greedy`: size of the greedy K; `screen`: how many heads each of its steps measures.

    Variables: `normalised`, its bootstrap interval over prompts `low`, `high`; `model_score`,
    `circuit_score`, `empty` (F), `difference`; `control` [which]; `in_model`, `in_circuit`, `incompleteness`
    [removed], and `sort`: random, class or greedy; `minimality` [node]; the last two with `_low` and `_high`.

    >>> judge(model, scores.circuit(fraction=0.02), held_out, how="resample").normalised
    <xarray.DataArray 'normalised' ()>...
    """
    bench = Bench(model, circuit.graph, prompts, metric, how, reference, seed)
    classes = classes or by_layer(circuit)
    rng = np.random.default_rng(seed)
    whole, empty, found = bench.each([circuit.graph.possible, torch.zeros_like(circuit.on), circuit.on])
    above, whole_above = ((x - empty).double().numpy() for x in (found, whole))
    low, high = interval(above, seed, over=whole_above)
    base, span = float(empty.mean()), float(whole.mean() - empty.mean())
    control = {k: (v - base) / span for k, v in controls(bench, circuit, draws, rng).items()}
    sets = [*_sets(circuit, classes, draws, rng), *_grown(bench, circuit, greedy, screen)]
    in_model, in_circuit = (bench.without(on, [k for *_, k in sets]) for on in (circuit.graph.possible, circuit.on))
    gap_low, gap_high = gap(in_circuit - in_model, seed)
    minimal = minimality(bench, circuit, classes)
    change = torch.stack(list(minimal.values())) if minimal else torch.zeros(0, len(found))
    change_low, change_high = gap(change, seed)
    data = xr.Dataset(
        {
            "normalised": float((found.mean() - base) / span),
            "low": float(low),
            "high": float(high),
            "model_score": float(whole.mean()),
            "circuit_score": float(found.mean()),
            "empty": base,
            "difference": float((whole.mean() - found.mean()).abs()),
            "control": ("which", list(control.values())),
            "sort": ("removed", [sort for sort, _, _ in sets]),
            "in_model": ("removed", in_model.mean(1).numpy()),
            "in_circuit": ("removed", in_circuit.mean(1).numpy()),
            "incompleteness": ("removed", (in_circuit - in_model).mean(1).abs().numpy()),
            "incompleteness_low": ("removed", gap_low),
            "incompleteness_high": ("removed", gap_high),
            "minimality": ("node", change.mean(1).abs().numpy()),
            "minimality_low": ("node", change_low),
            "minimality_high": ("node", change_high),
        },
        {"which": list(control), "removed": [name for _, name, _ in sets], "node": list(minimal)},
        {"edges": len(circuit), "fraction": circuit.fraction, "how": how},
    )
    return Result(data, kind="circuit verdict", title=f"Is the circuit of {len(circuit)} edges right?")


@technique
def test(
    model: Model,
    hypothesis: str | Sequence[str] | Classes,
    prompts: Any,
    metric: Any = None,  # noqa: PT028
    *,
    how: How,
    mlps: bool = True,  # noqa: PT028
    split: Split | None = None,  # noqa: PT028
    **options: Any,
) -> Result:
    """The verdict on a circuit written by hand: heads such as `9.9`, edges such as `embed -> 3.0.q`, or heads by
    class, `{"name movers": ["9.9", "10.0"], "induction": ["5.5"]}`.

    Heads mean all edges among them, the embedding, the logits and (unless `mlps=False`) every MLP; classes are
    taken out together for completeness. Other options are those of `judge`. InputError for a name the model does
    not have, with the nearest.

    >>> test(model, ["0.1", "1.2"], prompts, how="position_mean")
    Is the circuit of 23 edges right?
    circuit verdict: normalised, low, high, ... over which 11, removed 14, node 2...
    """
    classes = dict(hypothesis) if isinstance(hypothesis, Mapping) else None
    names = [n for each in classes.values() for n in each] if classes is not None else hypothesis
    names = [names] if isinstance(names, str) else list(names)
    if not names or not all(isinstance(n, str) for n in names):
        raise InputError("a hypothesis needs at least one head, such as '9.9', or edge, such as 'embed -> logits'")
    graph = wire(model, split).graph
    edges = [n for n in names if "->" in n]
    if edges and len(edges) < len(names):
        raise InputError("a hypothesis is either heads or edges, not both: write all of it as edges")
    if edges and classes:
        raise InputError("classes are of heads: name heads such as '9.9' in them, or give edges without classes")
    circuit = Circuit.from_edges(graph, edges) if edges else Circuit.from_nodes(graph, names, mlps=mlps)
    return judge(model, circuit, prompts, metric, how=how, classes=classes, **options)


test.__test__ = False  # type: ignore[attr-defined]  # pytest takes it for one of its own


# ---- where circuits are run


class Bench:
    """Runs circuits of one graph on some prompts. InputError if the graph is not this model's."""

    def __init__(
        self, model: Model, graph: Graph, prompts: Any, metric: Any, how: How, reference: Any, seed: int
    ) -> None:
        self.model, self.how, self.seed = model, how, seed
        self.wiring = wire(model, graph.split)
        self.graph = self.wiring.graph
        if self.graph != graph:
            raise InputError("the circuit belongs to another model: its graph has other sources or readers")
        self.question = ask(model, prompts, metric, reference)
        self.runner = Runner.of(self.wiring, self.question, how, seed)
        self._known: dict[bytes, Tensor] = {}

    def each(self, masks: Sequence[Tensor]) -> Tensor:
        """The metric [mask, batch] of each circuit [source, reader]; the same mask is run once, whoever asks."""
        keys = [np.packbits(m.numpy()).tobytes() for m in masks]
        new = {k: m for k, m in zip(keys, masks, strict=True) if k not in self._known}
        groups = chunks(list(new), min(4, capacity(self.runner)))
        found = scored(self.runner, self.how, self.seed, ([new[k] for k in some] for some in groups)) if groups else ()
        for some, scores in zip(progress(groups, "circuits run, a few at a time"), found, strict=True):
            self._known |= zip(some, scores.cpu(), strict=True)
        return torch.stack([self._known[k] for k in keys]) if keys else torch.zeros(0, len(self.question.inputs))

    def without(self, on: Tensor, sets: Sequence[Sequence[str]]) -> Tensor:
        """The metric [set, batch] of a circuit without the nodes of each set."""
        return self.each([on & ~self.gone(k) for k in sets])

    def gone(self, nodes: Sequence[str]) -> Tensor:
        """[source, reader] the edges that go with some nodes."""
        return touching(self.graph, self.graph.nodes(nodes))

    def slope(self, on: Tensor) -> Tensor:
        """[source, reader] the derivative of the mean metric by the mask, at a circuit."""
        mask = on.to(self.runner.replacements).requires_grad_()
        with torch.enable_grad():
            (found,) = torch.autograd.grad(self.runner.scores(mask).mean(), mask)
        return found.cpu()


def gap(values: Tensor, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The interval over prompts of the absolute mean of `values` [..., batch]."""
    x = values.detach().double().movedim(-1, 0).flatten(1).numpy()
    ends = interval(lambda w: np.abs(w @ x) / w.sum(1, keepdims=True), seed, n=len(x), within=(0, np.inf))
    return ends[0].reshape(values.shape[:-1]), ends[1].reshape(values.shape[:-1])


# ---- completeness

Removed = tuple[str, str, list[str]]  # sort, name, nodes


def by_layer(circuit: Circuit) -> dict[str, list[str]]:
    """The circuit's heads by layer."""
    found: dict[str, list[str]] = {}
    for name in circuit.heads:
        found.setdefault(name.partition(".heads.")[0], []).append(name)
    return found


def _sets(circuit: Circuit, classes: Classes, draws: int, rng: np.random.Generator) -> list[Removed]:
    """The classes, and random sets in which each head is with probability one half."""
    heads = circuit.heads
    drawn = [[h for h, c in zip(heads, rng.random(len(heads)) < 0.5, strict=True) if c] for _ in range(draws)]
    found: list[Removed] = [("class", name, list(nodes)) for name, nodes in classes.items()]
    return found + [("random", f"random {i}", k) for i, k in enumerate(drawn) if heads]


def _grown(bench: Bench, circuit: Circuit, steps: int, screen: int) -> list[Removed]:
    """K grown head by head so that the circuit without K and the model without K drift apart."""
    grown: list[str] = []
    found: list[Removed] = []
    for _ in range(min(steps, len(circuit.heads))):
        rest = [h for h in circuit.heads if h not in grown]
        tried = [[*grown, h] for h in rest]
        if len(rest) > screen:
            guess = _first_order(bench, circuit.on, grown, tried) - _first_order(
                bench, circuit.graph.possible, grown, tried
            )
            tried = [tried[i] for i in guess.abs().argsort(descending=True)[:screen].tolist()]
        gaps = (bench.without(circuit.on, tried) - bench.without(circuit.graph.possible, tried)).mean(1).abs()
        grown = tried[int(gaps.argmax())]
        found.append(("greedy", f"greedy {' '.join(map(_short, grown))}", grown))
    return found


def _first_order(bench: Bench, on: Tensor, grown: list[str], tried: list[list[str]]) -> Tensor:
    """[set] F of a circuit without each set, estimated from its slope without what is gone already."""
    left = on & ~bench.gone(grown)
    slope = bench.slope(left)
    falls = torch.stack([slope[left & bench.gone(k)].sum() for k in tried])
    return bench.each([left]).mean() - falls


# ---- minimality


def minimality(bench: Bench, circuit: Circuit, classes: Classes) -> dict[str, Tensor]:
    """head -> the change [batch] that taking it out makes, where it makes the larger one."""
    number = bench.graph.source
    mates = {number(n): nodes for nodes in classes.values() for n in nodes}
    pairs: dict[str, list[tuple[list[str], list[str]]]] = {}  # head -> (K, K + v)
    for head in circuit.heads:
        rest = [n for n in mates.get(number(head), []) if number(n) != number(head)]
        pairs[head] = [(k, [*k, head]) for k in ([], rest) if k is not rest or rest]
    bench.without(circuit.on, [k for ks in pairs.values() for pair in ks for k in pair])  # all at once; kept
    found = {}
    for head, ks in pairs.items():
        before, after = (bench.without(circuit.on, sets) for sets in zip(*ks, strict=True))
        changes = after - before
        found[head] = changes[changes.mean(1).abs().argmax()]
    return found


# ---- controls


def controls(bench: Bench, circuit: Circuit, draws: int, rng: np.random.Generator) -> dict[str, float]:
    """F of random circuits of the same size, and of the edges between the largest weights."""
    places = circuit.graph.possible.flatten().nonzero().flatten()
    masks = {}
    for i in range(draws):
        on = torch.zeros(circuit.on.numel(), dtype=torch.bool)
        on[places[torch.from_numpy(rng.permutation(len(places))[: len(circuit)])]] = True
        masks[f"random {i}"] = on.reshape(circuit.on.shape)
    (top,) = ranked(bench.graph, weight_scores(bench.wiring), [len(circuit)], "size", "")
    masks["largest weights"] = top.on
    return dict(zip(masks, bench.each(list(masks.values())).mean(1).tolist(), strict=True))


def weight_scores(wiring: Wiring) -> Tensor:
    """[source, reader] the product of the Frobenius norms of what the source writes with and the reader reads
    with.

    Norms are taken relative to their mean among sources (readers) of the same kind; a control that has seen
    no data.
    """
    out, into = torch.ones(len(wiring.base.sources)), torch.ones(len(wiring.base.readers))
    blocks = [b for s in wiring.model.anatomy.stacks for b in s.blocks]
    for w in wiring.writings:
        if w.heads and w.writer is not None:
            out[w.first : w.first + w.count] = w.writer.weight()[0][: w.count].flatten(1).norm(dim=1).float()
        elif (name := blocks[w.depth].down_proj) is not None and w.tap == blocks[w.depth].taps.get("mlp.out"):
            out[w.first] = float(
                sum(p.detach().float().norm() for p in wiring.model.module.get_submodule(name).parameters())
            )
    for r in wiring.readings:
        if r.columns is not None and not r.chain:
            into[r.readers] = r.weights()[0].flatten(1).norm(dim=1).float().cpu()
    kinds = [[i.kind for i in items] for items in (wiring.base.sources, wiring.base.readers)]
    for values, each in zip((out, into), kinds, strict=True):
        for kind in set(each):
            rows = [n for n, k in enumerate(each) if k == kind]
            values[rows] = values[rows] / values[rows].mean().clamp_min(1e-12)
    every = (out[:, None] * into[None])[..., None].expand(-1, -1, max(1, len(wiring.graph.split.places)))
    return wiring.graph.unfold(every)


def _short(head: str) -> str:
    words = head.split(".")
    return f"{words[1]}.{words[-1]}"
