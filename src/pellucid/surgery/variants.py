"""Two variants of the same layers side by side: which of them should a token take, and does choosing gain anything?

The model's blocks before the span run once; every variant's span runs on that state; a route makes one state of theirs, per token,
and the model's own blocks go on:

    mean         the average of the states
    confidence   the variant whose state, after the model's next block and read by its head, has the lowest entropy
    gate         the variant a fitted `Gate` names from the state before the span
    random       one drawn for each token: the control that choosing must beat

The average needs no choice and is the other control. `oracle` (the best variant of each text) and `oracle per token` are told from
each variant's own loss: the second is a minimum over noise and no ceiling that a gate could reach. Routing by confidence can be
worse than chance: the surer variant is often the one that is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import numpy as np
import torch
import xarray as xr

from pellucid.corpus import inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, among, at_least, nearest
from pellucid.lenses.lens import Layers
from pellucid.lenses.tuned_lens import corpus_rows
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.surgery.abreast import Route, Seen, Span
from pellucid.surgery.gate import Gate
from pellucid.technique import technique


@technique
def ensemble(
    model: Model,
    variants: Mapping[str, Model],
    texts: Any,
    *,
    layers: Layers,
    routes: Sequence[Route] = ("mean", "confidence", "random"),
    gate: Gate | None = None,
    tokens: int = 1024,
    context: int | None = 64,
    draws: int = 3,
    seed: int = 0,
) -> Result:
    """The loss of texts with each variant of a span of `layers` alone, and with every route between them.

    `variants` are models that differ from `model` in these layers only, by name (`model` itself may be one). Gives over `route`
    (the variants' names, the routes, the oracles) `nll` (nats a token, with `low`, `high` over texts) and `gain`, what it is
    below the random route, with `gain_low`, `gain_high`; over `route` x `variant` `taken`, the share of tokens that took each.
    The title names routes that gain nothing over the random one or the mean. InputError for variants that differ elsewhere, fewer
    than two, no span; Refused for variants of another shape or other kinds of layers, and models that do not say the next token from left to right in one stack.

    >>> ensemble(model, {"a": one, "b": other}, texts, layers=slice(2, 6), gate=gate).nll
    <xarray.DataArray 'nll' (route: 8)>...
    """
    at_least(1, tokens=tokens, draws=draws)
    asked = list(dict.fromkeys([*routes, *(["gate"] if gate is not None else []), "random", "mean"]))
    if unknown := [r for r in asked if not among(r, Route)]:
        raise InputError(f"route {unknown[0]!r}{nearest(str(unknown[0]), get_args(Route))}")
    if "gate" in asked:
        _check_gate(gate, model, variants)
    span = Span.of(model, variants, layers)
    names = [*variants, *asked, "oracle per text", "oracle per token"]
    rows: list[np.ndarray] = []
    taken = np.zeros((len(names), len(variants)))
    taken[: len(variants)] = np.eye(len(variants))
    sizes = []
    for number, row in enumerate(progress(corpus_rows(model, texts, tokens, context), "ensemble")):
        seen = Seen.of(span, inputs(model, [row]))
        each = torch.stack([span.nll(seen, state) for state in seen.states])
        found = [*each.mean(1)]
        for route in asked:
            values = []
            for draw in range(draws if route == "random" else 1):
                state, chosen = span.routed(seen, route, gate, (seed * 1009 + number) * 1009 + draw)
                values.append(span.nll(seen, state).mean())
                if chosen is not None:
                    taken[len(found)] += np.bincount(chosen[0, :-1].cpu().numpy(), minlength=len(variants)) / (
                        draws if route == "random" else 1
                    )
                else:
                    taken[len(found)] += (each.shape[1]) / len(variants)
            found.append(torch.stack(values).mean())
        rows.append(np.array([*map(float, found), float(each.mean(1).min()), float(each.min(0).values.mean())]))
        sizes.append(each.shape[1])
    lost, size = np.stack(rows), np.array(sizes, dtype=float)[:, None]  # [text, route]
    low, high = interval(lost * size, seed, over=np.broadcast_to(size, lost.shape))
    gain = lost[:, [names.index("random")]] - lost
    gain_low, gain_high = interval(gain * size, seed, over=np.broadcast_to(size, gain.shape))
    total = size.sum()
    taken[len(variants) : -2] /= np.maximum(taken[len(variants) : -2].sum(1, keepdims=True), 1e-12)
    taken[-2:] = np.nan
    data = xr.Dataset({"nll": ("route", (lost * size).sum(0) / total), "low": ("route", low), "high": ("route", high), "gain": ("route", (gain * size).sum(0) / total),
                       "gain_low": ("route", gain_low), "gain_high": ("route", gain_high), "taken": (("route", "variant"), taken)},
                      {"route": names, "variant": list(variants)}, {"unit": "nats", "tokens": int(total)})  # fmt: skip
    idle = [
        r
        for r in asked
        if r not in ("random", "mean")
        and (
            float(data.gain_low.sel(route=r)) <= 0 or float(data.nll.sel(route=r)) >= float(data.nll.sel(route="mean"))
        )
    ]
    note = f"; no gain over the random route and the average: {', '.join(idle)}" if idle else ""
    alone, ways = data.sel(route=list(variants)), data.sel(route=asked)
    one, best = (each.isel(route=int(each.nll.values.argmin())) for each in (alone, ways))
    where = f"layer {span.first}" if span.first == span.last else f"layers {span.first} to {span.last}"
    said = f"{best.route.item()} of {len(variants)} variants of {where} loses {float(best.nll):.3f} nats a token, {one.route.item()} alone {float(one.nll):.3f}, at random {float(data.nll.sel(route='random')):.3f}"  # fmt: skip
    return Result(data, kind="ensemble", title=said[0].upper() + said[1:] + note)


@technique
def chosen_variants(
    model: Model,
    variants: Mapping[str, Model],
    prompt: Any,
    *,
    layers: Layers,
    route: Route = "confidence",
    gate: Gate | None = None,
    seed: int = 0,
) -> Result:
    """Which variant each token of one prompt takes: over `position` (with `token`) `chosen`, its number, and `nll` of what follows.

    `attrs["variants"]` are their names by number. Raises as `ensemble` does.

    >>> chosen_variants(model, {"a": one, "b": other}, "The film was", layers=slice(2, 6)).chosen
    <xarray.DataArray 'chosen' (position: 3)>...
    """
    if route == "mean" or not among(route, Route):
        raise InputError(f"route={route!r} chooses nothing: expected 'confidence', 'gate' or 'random'")
    if route == "gate":
        _check_gate(gate, model, variants)
    span = Span.of(model, variants, layers)
    given = model.inputs(prompt)
    if len(given) != 1:
        raise InputError(f"{len(given)} prompts: expected one")
    given = given.alone(0)
    seen = Seen.of(span, given)
    state, chosen = span.routed(seen, route, gate, seed)
    assert chosen is not None
    nll = np.append(span.nll(seen, state).double().numpy(), np.nan)
    labels = list(given.stream("").labels[0])
    data = xr.Dataset({"chosen": ("position", chosen[0].cpu().numpy()), "nll": ("position", nll)}, {"position": range(len(labels)), "token": ("position", labels)},
                      {"variants": list(variants)})  # fmt: skip
    shares = [f"{float((data.chosen == i).mean()):.0%} of tokens take {name} ({i})" for i, name in enumerate(variants)]
    return Result(data, kind="chosen variants", title=f"By {route} {', '.join(shares)}")


def _check_gate(gate: Any, model: Model, variants: Mapping[str, Model]) -> None:
    if not isinstance(gate, Gate):
        raise InputError("the route 'gate' needs gate=Gate().fit(...)")
    gate.check(model, variants)
