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
    curve           f at the sizes of the MIB benchmark; CPR is its area with edges ranked by sign, CMD the
                    area of |1 - f| ranked by size (areas by the trapezoid rule over the share of edges)

Numbers depend on the ablation and hold for the prompts given: judge on prompts the circuit was not found on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.weights import linear_map
from pellucid.circuits.ablation import How
from pellucid.circuits.circuit import Circuit, touching
from pellucid.circuits.execution import Runner, capacity, chunks, wire
from pellucid.circuits.graph import Embedding, Graph
from pellucid.circuits.question import ask
from pellucid.circuits.scores import SIZES, EdgeScores, provenance, ranked
from pellucid.circuits.wiring import Wiring
from pellucid.errors import InputError
from pellucid.metrics import Metric
from pellucid.model import Model
from pellucid.results import Provenance, Result

Classes = Mapping[str, Sequence[str]]


def judge(
    model: Model,
    circuit: Circuit,
    prompts: Any,
    metric: Metric | Any = None,
    *,
    ablation: How,
    reference: Any = None,
    classes: Classes | None = None,
    samples: int = 10,
    greedy: int = 3,
    seed: int = 0,
) -> Result:
    """The verdict on a circuit, in one call.

    `classes`: sets of heads that belong together, for completeness and minimality; `samples`: random sets K
    and random circuits; `greedy`: size of the greedy K. Variables: `normalised` with its bootstrap interval
    `low`, `high`; `model_score`, `circuit_score`, `empty` (F), `difference`; `control` [which]; `in_model`,
    `in_circuit`, `incompleteness` [removed]; `minimality` [node].

    >>> judge(model, scores.circuit(fraction=0.02), held_out, ablation="resample").normalised # doctest: +SKIP
    """
    bench = Bench(model, circuit.graph, prompts, metric, ablation, reference, seed)
    classes = classes or bench.layers(circuit)
    rng = np.random.default_rng(seed)
    whole, empty, found = bench.each([circuit.graph.possible, torch.zeros_like(circuit.on), circuit.on])
    low, high = _interval(found, whole, empty, rng)
    control = bench.controls(circuit, samples, rng)
    removed = bench.completeness(circuit, classes, samples, greedy, rng)
    minimal = bench.minimality(circuit, classes)
    base, span = float(empty.mean()), float(whole.mean() - empty.mean())
    data = xr.Dataset(
        {
            "normalised": float((found.mean() - base) / span),
            "low": low,
            "high": high,
            "model_score": float(whole.mean()),
            "circuit_score": float(found.mean()),
            "empty": base,
            "difference": float((whole.mean() - found.mean()).abs()),
            "control": ("which", [(v - base) / span for v in control.values()]),
            "in_model": ("removed", [m for m, _ in removed.values()]),
            "in_circuit": ("removed", [c for _, c in removed.values()]),
            "incompleteness": ("removed", [abs(c - m) for m, c in removed.values()]),
            "minimality": ("node", list(minimal.values())),
        },
        {"which": list(control), "removed": list(removed), "node": list(minimal)},
        {"edges": len(circuit), "fraction": circuit.fraction, "ablation": ablation},
    )
    about = bench.provenance("judge", edges=len(circuit), samples=samples, greedy=greedy)
    return Result(
        data, kind="circuit verdict", title=f"Is the circuit of {len(circuit)} edges right?", provenance=about
    )


def test(
    model: Model,
    hypothesis: Sequence[str],
    prompts: Any,
    metric: Any = None,  # noqa: PT028
    *,
    mlps: bool = True,  # noqa: PT028
    **options: Any,
) -> Result:
    """The verdict on a circuit written by hand: heads such as `9.9`, or edges such as `embed -> 3.0.q`.

    Heads mean all edges among them, the embedding, the logits and (unless `mlps=False`) every MLP. Options
    are those of `judge`. InputError for a name the model does not have, with the nearest.

    >>> test(model, ["9.9", "10.0", "9.6"], prompts, ablation="position_mean")    # doctest: +SKIP
    """
    hypothesis = list(hypothesis)
    if not hypothesis:
        raise InputError("a hypothesis needs at least one head, such as '9.9', or edge, such as 'embed -> logits'")
    graph = wire(model).graph
    edges = [h for h in hypothesis if "->" in h]
    if edges and len(edges) < len(hypothesis):
        raise InputError("a hypothesis is either heads or edges, not both: write all of it as edges")
    about = Provenance(
        "hypothesis", model.name, digest=model.digest, arguments={"hypothesis": hypothesis, "mlps": mlps}
    )
    make = (
        Circuit.from_edges(graph, edges, provenance=about)
        if edges
        else Circuit.from_nodes(graph, hypothesis, mlps=mlps, provenance=about)
    )
    return judge(model, make, prompts, metric, **options)


test.__test__ = False  # type: ignore[attr-defined]  # pytest takes it for one of its own


def faithfulness_curve(
    model: Model,
    scores: EdgeScores,
    prompts: Any,
    metric: Metric | Any = None,
    *,
    ablation: How,
    reference: Any = None,
    sizes: Sequence[float] = SIZES,
    seed: int = 0,
) -> Result:
    """Normalised faithfulness at each size: `signed` and `sized` rankings, and a `random` one as control.

    Attributes: `CPR` (of `signed`; higher is better), `CMD` (of `sized`; lower is better), and both for
    random edges.
    """
    graph = scores.graph
    bench = Bench(model, graph, prompts, metric, ablation, reference, seed)
    counts = [max(1, round(size * len(graph))) for size in sizes]
    noise = torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(seed))
    rankings = {
        "signed": (scores.tensor, "sign"),
        "sized": (scores.tensor, "size"),
        "random": (noise, "size"),
    }
    whole, empty = (float(v.mean()) for v in bench.each([graph.possible, torch.zeros_like(graph.possible)]))
    found = {}
    for name, (key, by) in rankings.items():
        made = ranked(graph, key, counts, by, ablation, scores.provenance)  # type: ignore[arg-type]
        found[name] = np.array([(float(v.mean()) - empty) / (whole - empty) for v in bench.each([c.on for c in made])])
    share = np.asarray(sizes)
    areas = {
        "CPR": np.trapezoid(found["signed"], share), "CMD": np.trapezoid(abs(1 - found["sized"]), share),
        "CPR_random": np.trapezoid(found["random"], share),
        "CMD_random": np.trapezoid(abs(1 - found["random"]), share),
    }  # fmt: skip
    data = xr.Dataset(
        {name: ("size", f) for name, f in found.items()},
        {"size": share, "edges": ("size", counts)},
        {**{k: float(v) for k, v in areas.items()}, "model": whole, "empty": empty, "ablation": ablation},
    )
    about = bench.provenance("faithfulness_curve", sizes=list(sizes), scores=scores.kind)
    return Result(data, kind="faithfulness curve", title="Faithfulness by circuit size", provenance=about)


def stability(scores: EdgeScores, n: int, *, samples: int = 200, seed: int = 0) -> Result:
    """How much of the circuit of `n` edges stays when the prompts are drawn anew: Jaccard overlap over
    bootstraps.

    Costs no pass of the model: scores are known prompt by prompt. Variables: `jaccard` [sample], `kept`
    [source, reader], the share of bootstraps in which each edge of the circuit is found.
    """
    rng = np.random.default_rng(seed)
    base = scores.circuit(n)
    overlap, kept = [], torch.zeros(base.on.shape)
    for _ in range(samples):
        rows = torch.from_numpy(rng.integers(0, len(scores.each), len(scores.each)))
        (again,) = ranked(scores.graph, scores.each[rows].mean(0), [n], "size", scores.ablation, scores.provenance)
        overlap.append(base.jaccard(again))
        kept += again.on
    shares = (kept / samples).masked_fill(~base.on, float("nan")).numpy()
    data = xr.Dataset(
        {"jaccard": ("sample", overlap), "kept": (("source", "reader"), shares)},
        {"source": scores.data["source"], "reader": scores.data["reader"]},
        {
            "mean": float(np.mean(overlap)),
            "low": float(np.quantile(overlap, 0.025)),
            "high": float(np.quantile(overlap, 0.975)),
        },
    )
    about = Provenance("stability", scores.provenance.model, arguments={"n": n, "samples": samples}, seed=seed)
    return Result(data, kind="circuit stability", title=f"Which of {n} edges stay", provenance=about)


class Bench:
    """Runs circuits of one graph on the judging prompts."""

    def __init__(
        self, model: Model, graph: Graph, prompts: Any, metric: Any, ablation: How, reference: Any, seed: int
    ) -> None:
        embedding: Embedding = "parts" if graph.sources[0].name != "embed" else "whole"
        self.model, self.wiring, self.seed, self.ablation = model, wire(model, embedding), seed, ablation
        self.graph = self.wiring.graph
        if self.graph != graph:
            raise InputError("the circuit belongs to another model: its graph has other sources or readers")
        self.question = ask(model, prompts, metric, reference)
        self.runner = Runner.of(self.wiring, self.question, ablation, seed)
        self._known: dict[bytes, float] = {}

    def each(self, masks: Sequence[Tensor]) -> Tensor:
        """The metric [mask, batch] of each circuit."""
        size = min(4, capacity(self.runner))
        return torch.cat(
            [self.runner.scores(torch.stack([masks[i] for i in some])) for some in chunks(range(len(masks)), size)]
        )

    def mean(self, masks: Sequence[Tensor]) -> list[float]:
        """F of each circuit; the same mask is run once, whoever asks for it."""
        keys = [np.packbits(m.numpy()).tobytes() for m in masks]
        new = {k: m for k, m in zip(keys, masks, strict=True) if k not in self._known}
        if new:
            self._known |= zip(new, self.each(list(new.values())).mean(1).tolist(), strict=True)
        return [self._known[k] for k in keys]

    def provenance(self, method: str, **arguments: Any) -> Provenance:
        return provenance(method, self.model, self.question, self.seed, ablation=self.ablation, **arguments)

    def layers(self, circuit: Circuit) -> dict[str, list[str]]:
        """The circuit's heads by layer."""
        found: dict[str, list[str]] = {}
        for name in circuit.heads:
            found.setdefault(name.partition(".heads.")[0], []).append(name)
        return found

    def controls(self, circuit: Circuit, samples: int, rng: np.random.Generator) -> dict[str, float]:
        places = circuit.graph.possible.flatten().nonzero().flatten()
        masks = {}
        for i in range(samples):
            on = torch.zeros(circuit.on.numel(), dtype=torch.bool)
            on[places[torch.from_numpy(rng.permutation(len(places))[: len(circuit)])]] = True
            masks[f"random {i}"] = on.reshape(circuit.on.shape)
        (top,) = ranked(self.graph, weight_scores(self.wiring), [len(circuit)], "size", "", circuit.provenance)
        masks["largest weights"] = top.on
        return dict(zip(masks, self.mean(list(masks.values())), strict=True))

    def completeness(
        self, circuit: Circuit, classes: Classes, samples: int, greedy: int, rng: np.random.Generator
    ) -> dict[str, tuple[float, float]]:
        heads = circuit.heads
        sets: dict[str, list[str]] = {name: list(nodes) for name, nodes in classes.items()}
        for i in range(samples if heads else 0):
            chosen = rng.random(len(heads)) < 0.5
            sets[f"random {i}"] = [h for h, c in zip(heads, chosen, strict=True) if c]
        found = dict(zip(sets, self._without(circuit, list(sets.values())), strict=True))
        grown: list[str] = []
        for _ in range(min(greedy, len(heads))):
            tried = [[*grown, h] for h in heads if h not in grown]
            gaps = self._without(circuit, tried)
            best = max(range(len(tried)), key=lambda i: abs(gaps[i][0] - gaps[i][1]))
            grown = tried[best]
            found[f"greedy {' '.join(_short(h) for h in grown)}"] = gaps[best]
        return found

    def _without(self, circuit: Circuit, sets: Sequence[Sequence[str]]) -> list[tuple[float, float]]:
        """(F(M without K), F(C without K)) for each K."""
        gone = [touching(self.graph, self.graph.nodes(k)) for k in sets]
        values = self.mean([m & ~g for g in gone for m in (self.graph.possible, circuit.on)])
        return list(zip(values[::2], values[1::2], strict=True))

    def minimality(self, circuit: Circuit, classes: Classes) -> dict[str, float]:
        where = {str(self.graph.source(n)): name for name, nodes in classes.items() for n in nodes}
        pairs: dict[str, list[list[str]]] = {}
        for head in circuit.heads:
            mates = classes.get(where.get(str(self.graph.source(head)), ""), [])
            rest = [n for n in mates if self.graph.source(n) != self.graph.source(head)]
            pairs[head] = [[], rest] if rest else [[]]
        sets = [k for ks in pairs.values() for k in ks]
        masks = [circuit.without(k).on for k in sets] + [
            circuit.without([*k, h]).on for h, ks in pairs.items() for k in ks
        ]
        values = self.mean(masks)
        changes = [abs(a - b) for a, b in zip(values[: len(sets)], values[len(sets) :], strict=True)]
        found, i = {}, 0
        for head, ks in pairs.items():
            found[head] = max(changes[i : i + len(ks)])
            i += len(ks)
        return found


def weight_scores(wiring: Wiring) -> Tensor:
    """[source, reader] the product of the Frobenius norms of what the source writes with and the reader reads
    with.

    Norms are taken relative to their mean among sources (readers) of the same kind; a control that has seen
    no data.
    """
    out, into = torch.ones(len(wiring.graph.sources)), torch.ones(len(wiring.graph.readers))
    blocks = wiring.model.anatomy.stacks[0].blocks
    for w in wiring.writings:
        if w.attention is not None and w.projection is not None:
            weight, _ = linear_map(w.projection, w.attention.heads * w.attention.d_value)
            out[w.first : w.first + w.count] = (
                weight.detach().unflatten(0, (w.count, -1)).flatten(1).norm(dim=1).float()
            )
        elif (name := blocks[w.layer].down_proj) is not None:
            out[w.first] = float(
                sum(p.detach().float().norm() for p in wiring.model.module.get_submodule(name).parameters())
            )
    for r in wiring.readings:
        if r.columns is not None:
            into[r.readers] = r.weights()[0].flatten(1).norm(dim=1).float()
    kinds = [[i.kind for i in items] for items in (wiring.graph.sources, wiring.graph.readers)]
    for values, each in zip((out, into), kinds, strict=True):
        for kind in set(each):
            rows = [n for n, k in enumerate(each) if k == kind]
            values[rows] = values[rows] / values[rows].mean().clamp_min(1e-12)
    return out[:, None] * into[None]


def _interval(found: Tensor, whole: Tensor, empty: Tensor, rng: np.random.Generator) -> tuple[float, float]:
    """The 95% bootstrap interval over prompts of normalised faithfulness."""
    rows = torch.from_numpy(rng.integers(0, len(found), (1000, len(found))))
    f, m, e = (x.cpu()[rows].mean(1) for x in (found, whole, empty))
    values = ((f - e) / (m - e)).numpy()
    return float(np.quantile(values, 0.025)), float(np.quantile(values, 0.975))


def _short(head: str) -> str:
    words = head.split(".")
    return f"{words[1]}.{words[-1]}"
