"""How faithful are circuits of every size, and do other prompts give the same circuit?

curve       f(C) = (F(C) - F(empty)) / (F(M) - F(empty)) at the sizes of the MIB benchmark, F the mean metric;
            CPR is its area with edges ranked by sign, CMD the area of |1 - f| ranked by size (areas by the
            trapezoid rule over the share of edges)
stability   Jaccard overlap of the circuit with those of bootstrapped prompts
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from pellucid.circuits.ablation import How
from pellucid.circuits.judge import Bench
from pellucid.circuits.scores import SIZES, By, EdgeScores, ranked
from pellucid.engine.pausing import progress
from pellucid.metrics import Metric
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import weights
from pellucid.technique import technique


@technique
def faithfulness_curve(
    model: Model,
    scores: EdgeScores,
    prompts: Any,
    metric: Metric | Any = None,
    *,
    how: How,
    reference: Any = None,
    sizes: Sequence[float] = SIZES,
    seed: int = 0,
) -> Result:
    """Normalised faithfulness at each size: `signed` and `sized` rankings, and a `random` one as control.

    Attributes: `CPR` (of `signed`; higher is better), `CMD` (of `sized`; lower is better), and both for
    random edges.

    >>> faithfulness_curve(model, scores, held_out, how="resample").sized
    <xarray.DataArray 'sized' (size: 10)>...
    """
    graph = scores.graph
    bench = Bench(model, graph, prompts, metric, how, reference, seed)
    counts = [max(1, round(size * len(graph))) for size in sizes]
    noise = torch.rand(graph.possible.shape, generator=torch.Generator().manual_seed(seed))
    rankings: dict[str, tuple[torch.Tensor, By]] = {
        "signed": (-scores.tensor, "sign"), "sized": (-scores.tensor, "size"), "random": (noise, "size"),
    }  # fmt: skip
    whole, empty = (float(v.mean()) for v in bench.each([graph.possible, torch.zeros_like(graph.possible)]))
    found = {}
    for name, (key, by) in rankings.items():
        made = ranked(graph, key, counts, by, how)
        found[name] = (bench.each([c.on for c in made]).mean(1).numpy() - empty) / (whole - empty)
    share = np.asarray(sizes)
    areas = {
        "CPR": np.trapezoid(found["signed"], share), "CMD": np.trapezoid(abs(1 - found["sized"]), share),
        "CPR_random": np.trapezoid(found["random"], share),
        "CMD_random": np.trapezoid(abs(1 - found["random"]), share),
    }  # fmt: skip
    data = xr.Dataset(
        {name: ("size", f) for name, f in found.items()},
        {"size": share, "edges": ("size", counts)},
        {**{k: float(v) for k, v in areas.items()}, "model": whole, "empty": empty, "how": how},
    )
    return Result(data, kind="faithfulness curve", title="Faithfulness by circuit size")


@technique
def stability(scores: EdgeScores, n: int, *, draws: int = 200, seed: int = 0) -> Result:
    """How much of the circuit of `n` edges stays when the prompts are drawn anew: Jaccard overlap over
    bootstraps.

    Costs no pass of the model: scores are known prompt by prompt. Variables: `jaccard` [sample], `kept`
    [source, reader], the share of bootstraps in which each edge of the circuit is found.
    """
    base = scores.circuit(n)
    overlap, kept = [], torch.zeros(base.on.shape)
    for counts in progress(weights(len(scores.each), draws, seed), "circuits drawn"):
        mean = torch.from_numpy(counts).to(scores.each) @ scores.each.flatten(1) / len(scores.each)
        (again,) = ranked(scores.graph, -mean.reshape(base.on.shape), [n], "size", scores.how)
        overlap.append(base.jaccard(again))
        kept += again.on
    shares = (kept / draws).masked_fill(~base.on, float("nan")).numpy()
    low, high = np.quantile(overlap, (0.025, 0.975))
    data = xr.Dataset(
        {"jaccard": ("sample", overlap), "kept": (("source", "reader"), shares)},
        {name: scores.result[name].values for name in ("source", "reader")},
        {"mean": float(np.mean(overlap)), "low": float(low), "high": float(high)},
    )
    return Result(data, kind="circuit stability", title=f"Which of {n} edges stay")
