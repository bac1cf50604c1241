"""How many layers can go, and who should choose them?

Sets of growing size are taken out, each chosen in another way, and what is lost of text and of every capability is a curve
against the number of layers removed:

    greedy            the layer whose removal costs least, again and again from what is left      SLEB, Song et al. 2024
    contiguous        the block l .. l+n of smallest arccos(cos(h_l, h_l+n)) / pi, mean over tokens   Gromov et al. 2024
    single loss       the layers that cost least alone
    block influence, angular distance, relative magnitude, prediction depth    lowest first (`layer_importance`)
    random            the control: sets drawn from the same layers, with the interval over draws

Gromov et al. measure the angle at the last token of each text, one sample a text; here it is the mean over tokens. The first
and the last layer stay by default, as in SLEB's code; random sets keep them too. Every number is that of the model really without
the layers (`pellucid.surgery.remove`, proven for the largest set of each choice). Greedy's steps are sweeps of the shortened
model; `cost` says what each choice took in plain forwards of the texts, the evaluation apart (one short forward a set).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from pellucid.anatomy.modes import running, uncached
from pellucid.anatomy.opening import main_output
from pellucid.causal.grid import described
from pellucid.changed import applied
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.surgery import importance
from pellucid.surgery.arranging import Arranged, Layers, block_list, layer_set, remove
from pellucid.technique import technique

CHOICES = ("greedy", "contiguous", "single loss", *importance.ESTIMATES)
CONTROL = "random"
Sets = dict[str, list[tuple[int, ...]]]  # by choice: the set of each size, from none


@technique
def removal(
    model: Model,
    texts: Any,
    capabilities: Mapping[str, Any] | None = None,
    *,
    most: int = 5,
    by: Sequence[str] = ("greedy", "contiguous", "single loss", "block influence"),
    layers: Layers | None = None,
    draws: int = 5,
    context: int = 96,
    tokens: int = 1024,
    batch: int = 2,
    seed: int = 0,
) -> Result:
    """What is lost when more and more layers are taken out, by how they are chosen, beside sets drawn at random.

    `texts` and `capabilities` are those of `layer_importance`; the texts choose as well as judge, so give many. Sets have up
    to `most` of `layers` (all but the first and the last). Gives over `choice` x `removed` (from 0) `loss` (nats a token, with
    `low` and `high`: over rows of text, of random sets over `draws`), `divergence`, `kept` and `set`; over `capability` x
    `choice` x `removed` `effect` (metric without the layers - metric); over `choice` `cost`. InputError as `layer_importance`,
    and for choices that are not there; Refused where layers cannot be removed.

    >>> removal(model, texts, layers=[3, 4, 5], most=2).loss
    <xarray.DataArray 'loss' (choice: 5, removed: 3)>...
    """
    at_least(1, most=most, batch=batch, tokens=tokens)
    at_least(2, draws=draws, context=context)
    if not by or isinstance(by, str) or not set(by) <= set(CHOICES):
        raise InputError(f"by={by!r}: expected a list of {', '.join(map(repr, CHOICES))}")
    stack, tasks = importance.predicting(model), importance.questions(model, capabilities or {})
    n = len(stack.blocks)
    able = list(range(1, n - 1)) if layers is None else layer_set(stack, layers)
    if most >= n or most > len(able):
        raise InputError(
            f"most={most}: of {len(able)} layers that may go (of {n}) no {most} can be taken, one must stay"
        )
    given = importance.rows_of(model, texts, context, tokens, batch)
    path, cost = block_list(stack), dict[str, float]()
    sets = _chosen(model, given, by, able, most, cost)
    rng = np.random.default_rng(seed)
    drawn = [rng.permutation(able).tolist() for _ in range(draws)]
    sets |= {f"{CONTROL} {i}": [tuple(sorted(order[:k])) for k in range(most + 1)] for i, order in enumerate(drawn)}
    for choice in by:
        if choice != "greedy":  # whose models were opened on the way
            remove(model, list(sets[choice][most]))
    unique = dict.fromkeys(s for each in sets.values() for s in each)
    trees = {s: model.module if not s else applied(model.module, [Arranged(path, tuple(i for i in range(n) if i not in s))]) for s in unique}  # fmt: skip

    def text(inputs: Inputs) -> Callable[[Tensor], Tensor]:
        return importance.reading(model.run(inputs))

    columns = _curves(_judged(trees, given, text), sets, by, seed, "")
    data = xr.Dataset(
        {"loss" if k == "value" else k: (("choice", "removed"), v[..., 0]) for k, v in columns.items()},
        {"choice": [*by, CONTROL], "removed": range(most + 1)},
    )
    data["divergence"], data["kept"] = ((("choice", "removed"), columns["value"][..., i]) for i in (1, 2))
    said = [[" ".join(map(str, s)) for s in sets[choice]] for choice in by]
    data["set"] = ("choice", "removed"), [*said, [f"{draws} sets"] * (most + 1)]
    data["cost"] = "choice", [*(cost[choice] for choice in by), 0.0]
    data.attrs["layers"] = able
    made: dict[str, list[np.ndarray]] = {}
    for asked in tasks.values():
        found = _judged(trees, [asked.inputs], partial(_score, asked.metric))
        values = {s: v - found[()] for s, v in found.items()}
        for key, column in _curves(values, sets, by, seed, "effect_").items():
            made.setdefault("effect" if key == "value" else key, []).append(column[..., 0])
        data = data.assign_coords(capability=list(tasks))
    for key, several in made.items():
        if len(several) == len(tasks):
            data[key] = ("capability", "choice", "removed"), np.stack(several)
    return Result(data, kind="removal curve", title=_title(model, data, most))


def _title(model: Model, data: xr.Dataset, most: int) -> str:
    last = data.sel(removed=most)
    control, own = last.sel(choice=CONTROL), last.drop_sel(choice=CONTROL)
    best = own.isel(choice=int(np.argmin(own["loss"].values)))
    random = f"random sets {float(control['loss']):.2f} [{float(control['low']):.2f}, {float(control['high']):.2f}]"
    found = f"{model.name} without {most} layers ({best['set'].item()}, {best['choice'].item()}) loses {float(best['loss']):.2f} nats"
    if float(best["loss"]) >= float(control["low"]):
        return f"No choice is better than random sets: {found}, {random}"
    worse = [str(c) for c in own["choice"].values if float(own["loss"].sel(choice=c)) >= float(control["low"])]
    return f"{found}, {random}" + (f"; no better than random: {', '.join(worse)}" if worse else "")


# ---- who chooses


def _chosen(
    model: Model, given: Sequence[Inputs], by: Sequence[str], able: list[int], most: int, cost: dict[str, float]
) -> Sets:
    n, made = len(model.anatomy.stacks[-1].blocks), dict[str, list[tuple[int, ...]]]()
    weights = [float(len(inputs)) for inputs in given]
    if {"greedy", "single loss"} & set(by):
        losses, paid = _singles(model, given, able, weights)
        order = sorted(able, key=losses.__getitem__)
        made["single loss"], cost["single loss"] = [tuple(sorted(order[:k])) for k in range(most + 1)], paid
        path = [(), (order[0],)]
        cost["greedy"] = paid
        for _ in progress(range(most - 1) if "greedy" in by else (), "greedy steps"):
            left = [i for i in range(n) if i not in path[-1]]
            shorter = remove(model, list(path[-1]))
            losses, paid = _singles(shorter, given, [left.index(i) for i in able if i in left], weights)
            cost["greedy"] += paid * len(left) / n
            path.append(tuple(sorted((*path[-1], left[min(losses, key=losses.__getitem__)]))))
        made["greedy"] = path
    if {"contiguous", *importance.ESTIMATES} & set(by):
        found, angles = _estimated(model, given, n, most, weights)
        for name, values in found.items():
            order = sorted(able, key=lambda i, values=values: values[i])  # type: ignore[misc]
            made[name], cost[name] = [tuple(sorted(order[:k])) for k in range(most + 1)], 1.0
        fits = {k: [i for i in range(n - k + 1) if set(range(i, i + k)) <= set(able)] for k in range(1, most + 1)}
        if "contiguous" in by and not fits[most]:
            raise InputError(f"by='contiguous': there are no {most} neighbours among the layers that may go, {able}")
        best = [min(fits[k], key=lambda i, k=k: angles[i, k]) for k in range(1, most + 1)]  # type: ignore[misc]
        made["contiguous"] = [(), *(tuple(range(i, i + k)) for k, i in enumerate(best, 1))]
        cost["contiguous"] = 1.0
    return {choice: made[choice] for choice in by}


def _singles(
    model: Model, given: Iterable[Inputs], able: Sequence[int], weights: Sequence[float]
) -> tuple[dict[int, float], float]:
    """What text loses without each layer, and what that took in plain forwards."""
    values, cost = [], []
    for inputs in given:
        run = importance.kept_run(model, inputs)
        edits = [[edit] for i in able if (edit := importance.without(model, run, "layer", i))]
        swept = model.sweep(inputs, edits, importance.reading(run))
        values.append(swept.values[..., 0].double().mean(1).numpy())
        cost.append(swept.plan.cost)
    return dict(zip(able, np.average(values, 0, weights), strict=True)), float(np.average(cost, weights=weights))


@torch.no_grad()
def _estimated(
    model: Model, given: Iterable[Inputs], n: int, most: int, weights: Sequence[float]
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Every estimate [layer], and the angle [layer, k] between what layer l and layer l + k are given."""
    estimates, angles = [], []
    for inputs in given:
        run, mask = importance.kept_run(model, inputs), inputs.stream("").mask.bool()
        estimates.append({name: x.mean(1) for name, x in importance.estimates(model, run, n).items()})
        states = [run.tensor(f"layers.{i}.resid_pre").float() for i in range(n)] + [run.tensor(f"layers.{n - 1}.resid_post").float()]  # fmt: skip
        angle = np.full((n, most + 1), np.inf)
        for i in range(n):
            for k in range(1, min(most, n - i) + 1):
                cos = torch.cosine_similarity(states[i], states[i + k], dim=-1).clamp(-1, 1)
                angle[i, k] = float((cos.arccos() / torch.pi * mask.to(cos)).sum(1).div(mask.sum(1).to(cos)).mean())
        angles.append(angle)
    names = importance.ESTIMATES
    return {x: np.average([e[x] for e in estimates], 0, weights) for x in names}, np.average(angles, 0, weights)


# ---- what it costs


@torch.no_grad()
def _judged(
    trees: Mapping[tuple[int, ...], nn.Module],
    given: Sequence[Inputs],
    reading: Callable[[Inputs], Callable[[Tensor], Tensor]],
) -> dict[tuple[int, ...], np.ndarray]:
    """[row, measure] of every model."""
    found: dict[tuple[int, ...], list[np.ndarray]] = {}
    for inputs in given:
        read = reading(inputs)
        for without, tree in progress(list(trees.items()), "shortened models"):
            with running(tree):
                value = read(main_output(tree(**{**inputs.tensors, **uncached(tree)})))
            found.setdefault(without, []).append(value.double().reshape(len(value), -1).cpu().numpy())
    return {without: np.concatenate(each) for without, each in found.items()}


def _score(metric: BoundMetric, inputs: Inputs) -> Callable[[Tensor], Tensor]:
    return lambda logits: metric.score(logits, inputs.stream("").mask)


def _curves(
    values: Mapping[tuple[int, ...], np.ndarray], sets: Sets, by: Sequence[str], seed: int, prefix: str
) -> dict[str, np.ndarray]:
    """[choice and control, removed, measure] of the means and their intervals: over rows, of random sets over draws."""
    own = np.stack([[values[s] for s in sets[choice]] for choice in by])  # [choice, removed, row, measure]
    made = described("value", np.moveaxis(own, 2, 0), seed, prefix)
    drawn = np.stack([[values[s].mean(0) for s in each] for name, each in sets.items() if name.startswith(CONTROL)])
    ends = interval(drawn, seed)
    control = {"value": drawn.mean(0), f"{prefix}low": ends[0], f"{prefix}high": ends[1]}
    made = {"value": made["value"]} | {key: made.get(key, np.full(own.shape[:2] + own.shape[3:], np.nan)) for key in (f"{prefix}low", f"{prefix}high")}  # fmt: skip
    return {key: np.concatenate([made[key], control[key][None]]) for key in made}
