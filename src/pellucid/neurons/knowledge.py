"""Which neurons hold a fact?

The neurons of a layer are scaled from nothing to what they are at the position of the answer, and the gradient of the
answer's probability is summed on the way (Dai et al. 2022, "knowledge attribution"):

    attribution_i = w_i * mean over k = 0 .. steps - 1 of dP(answer)/dw_i at (k / steps) * w        (left Riemann sum)

w are the inputs of the down projection, that is, behind the activation; in gated MLPs act(gate) x up, where the EleutherAI
package takes GPT-2's before the activation. Layers are scaled one at a time, all neurons of a layer together.

Knowledge neurons of a fact are those which several wordings of it share ("refining"): of each wording the neurons above
`threshold` times its largest attribution, of these the ones in at least the part `shared` of the wordings, which is then moved
by .05 until 2 to 5 are left, as the released code does. Neurons that any fact would have ("an answer comes", "a city comes")
pass this test as well; `others` takes attributions of other facts, and drops what more than `common` of their wordings
have too (EleutherAI's package has such a filter, which does nothing there). The paper tests them by suppressing (times 0) and amplifying
(times 2): `knowledge_effect`, which does the same to as many random neurons, and to as many of the most active ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.edits import Scale
from pellucid.engine.inputs import Inputs
from pellucid.engine.places import answer_position
from pellucid.engine.slopes import Leaf, slopes
from pellucid.errors import InputError, Refused, at_least
from pellucid.metrics import Answers, BoundMetric, log_odds, probability
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique
from pellucid.workers.errand import Errand, Tensors, Values, Work, done
from pellucid.workers.job import get_inputs, get_metric, put_inputs, put_metric

GROUPS = 8  # of layers, that go out together
FEW, MANY = 2, 5  # neurons a fact ends up with
Neurons = Result | Sequence[str | tuple[int, int]]  # as `knowledge_neurons` gives them, by site, or (layer, neuron)


@technique
def knowledge_attribution(model: Model, prompt: Any, target: Answers, *, steps: int = 20, metric: Any = None) -> Result:
    """The share of every neuron of every layer of the last stack in the probability of `target`.

    `prompt` is one prompt or several (targets one each, or one for all), asked at its last position, or at its mask token
    in a masked model. `metric` replaces the probability. Gives `attribution` [layer, neuron] (with `prompt` in front for
    several), `activation`, likewise, and `score` and `nothing` [layer], the metric as it is and with a layer's neurons at
    zero. InputError for a target of several tokens or a prompt with no or several masks, Refused where no layer has
    neurons.

    >>> knowledge_attribution(model, "The capital of France is", " Paris").top(3)
    layer neuron site attribution activation score nothing
    ...
    """
    at_least(1, steps=steps)
    inputs, position = _asked(model, prompt)
    bound = model.bind(probability(target, position=position) if metric is None else metric, len(inputs))
    sites = neuron_sites(model)
    clean = _activations(model, inputs, sites, position)
    n = -(-len(sites) // GROUPS)
    errand = Errand(model, "neurons.knowledge:Facts", partial(_said, inputs, bound, steps, position), Facts.of(model, inputs, bound, steps, position))  # fmt: skip
    total: list[Tensor] = []
    below: list[Tensor] = []
    for _, found in done(errand, [sites[i : i + n] for i in range(0, len(sites), n)]):
        below.append(found.pop("nothing"))
        total += [found[str(i)] for i in range(len(found))]
    nothing = torch.cat(below, 1)
    with torch.no_grad():
        score = model.score(model.run(inputs), bound)
    data = xr.Dataset(
        {
            "attribution": (
                ("prompt", "layer", "neuron"),
                _stacked([g.to(w) * w for g, w in zip(total, clean, strict=True)]),
            ),
            "activation": (("prompt", "layer", "neuron"), _stacked(clean)),
            "score": ("prompt", score.float().cpu().numpy()),
            "nothing": (("prompt", "layer"), nothing.numpy()),
        },
        coords={"layer": [layer_of(site) for site in sites], "site": ("layer", np.array(sites, dtype=object))},
        attrs={"attributed": bound.name, "rule": "riemann-left"},
    )
    data = data.isel(prompt=0) if len(inputs) == 1 else data
    return Result(data, kind="knowledge attribution", title=f"Neurons behind {target!r}")


class Facts(Work):
    """The mean slope of some layers' neurons; a piece is their sites."""

    errand = "knowledge attribution"

    def __init__(self, model: Model, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        inputs, metric = get_inputs(about["inputs"], tensors, model), get_metric(about["metric"], tensors)
        self._begin(model, inputs, metric, about["steps"], about["position"])

    @classmethod
    def of(cls, *given: Any) -> Facts:
        made = cls.__new__(cls)
        made._begin(*given)
        return made

    def _begin(self, model: Model, inputs: Inputs, metric: BoundMetric, steps: int, position: int) -> None:
        self.model, self.inputs, self.metric, self.steps, self.position = model, inputs, metric, steps, position

    def __call__(self, piece: Sequence[str]) -> Tensors:
        """`nothing` [prompt, layer], and of each layer by number [prompt, neuron]."""
        leaves = [Leaf(f"{site}@{self.position}", _scaled(k / self.steps)) for site in piece for k in range(self.steps)]
        plan = self.model.plan(self.inputs, leaves, self.metric)
        total: list[Any] = [0.0] * len(piece)
        nothing = torch.zeros(len(self.inputs), len(piece))
        for slope in slopes(plan, leaves):
            layer, k = divmod(slope.index, self.steps)
            total[layer] = total[layer] + slope.gradient[:, 0].cpu() / self.steps
            if k == 0:
                nothing[:, layer] = slope.score.float().cpu()
        return {"nothing": nothing, **{str(i): each for i, each in enumerate(total)}}


def _said(inputs: Inputs, metric: BoundMetric, steps: int, position: int) -> Values:
    tensors: dict[str, Tensor] = {}
    about = {
        "inputs": put_inputs(inputs, tensors),
        "metric": put_metric(metric, tensors),
        "steps": steps,
        "position": position,
    }
    return about, tensors


@technique
def knowledge_neurons(
    attributions: Result,
    *,
    threshold: float = 0.2,
    shared: float = 0.7,
    adjust: bool = True,
    others: Result | None = None,
    common: float = 0.3,
) -> Result:
    """The neurons that wordings of one fact share, from their `knowledge_attribution` (several prompts).

    `others` is the attribution of prompts about other facts: neurons above the threshold in more than `common` of these
    are not kept.

    Gives over `neuron` (the most shared first) `shared`, the part of the wordings that have it, and the mean `attribution`;
    `neurons` are their sites, `layer` and `unit` their numbers; `needed` is the part that was asked for in the end. With
    `adjust` it is moved until 2 to 5 neurons are left (or it reaches 0 or 1). InputError for another result, attributions of
    another model, or numbers that are no parts.
    """
    parts = {"threshold": threshold, "shared": shared, "common": common}
    wrong = next((f"{name}={value}" for name, value in parts.items() if not 0 <= value <= 1), None)
    if wrong is not None:
        raise InputError(f"{wrong}: expected a number from 0 to 1")
    values = _attributions(attributions)
    array = np.nan_to_num(values.values)
    counts = _passing(array, threshold)
    if others is not None:
        rest, digests = (
            np.nan_to_num(_attributions(others).values),
            [attributions.provenance.digest, others.provenance.digest],
        )
        if rest.shape[1:] != array.shape[1:] or digests[0] != digests[1]:
            raise InputError(
                f"`others` are of {rest.shape[1:]} neurons (layers, width) of the weights {str(digests[1])[:12]}, "
                f"these of {array.shape[1:]} of {str(digests[0])[:12]}: attribute both in one model"
            )
        counts = np.where(_passing(rest, threshold) > common, 0.0, counts)
    needed = shared
    while adjust and not FEW <= (found := int((counts >= needed - 1e-9).sum())) <= MANY:
        step = 0.05 if found > MANY else -0.05
        if not 0 < needed + step <= 1 or (step < 0 and int((counts >= needed + step - 1e-9).sum()) > MANY):
            break  # one more would be too many, one less too few: the smaller set stands
        needed = round(needed + step, 2)
    kept = np.argwhere((counts >= needed - 1e-9) & (counts > 0))
    order = sorted(kept.tolist(), key=lambda at: (-counts[at[0], at[1]], -array.mean(0)[at[0], at[1]]))
    rows, units = [at[0] for at in order], [at[1] for at in order]
    data = xr.Dataset(
        {
            "shared": ("neuron", counts[rows, units]),
            "attribution": ("neuron", array.mean(0)[rows, units]),
            "neurons": ("neuron", np.array([f"{values.site.values[i]}.{n}" for i, n in order], dtype=object)),
            "needed": needed,
        },
        coords={"layer": ("neuron", values.layer.values[rows]), "unit": ("neuron", np.array(units, dtype=int))},
    )
    return Result(data, kind="knowledge neurons", title=f"{len(order)} knowledge neurons")


def _attributions(result: Result) -> xr.DataArray:
    """[prompt, layer, neuron]"""
    if not isinstance(result, Result):
        raise InputError(f"{result!r} is no result of knowledge_attribution")
    if "attribution" not in result.data or result.kind != "knowledge attribution":
        raise InputError(f"knowledge neurons are refined from knowledge attributions, not from {result.kind!r}")
    values = result.data["attribution"]
    values = values if "prompt" in values.dims else values.expand_dims("prompt")
    return values.transpose("prompt", "layer", "neuron")


def _passing(array: np.ndarray, threshold: float) -> np.ndarray:
    """[layer, neuron] the share of prompts in which a neuron is above `threshold` times the largest."""
    return (array > threshold * array.max((1, 2), keepdims=True)).mean(0)


@technique
def knowledge_effect(
    model: Model,
    prompt: Any,
    target: Answers,
    neurons: Neurons,
    *,
    factors: Sequence[float] = (0.0, 2.0),
    draws: int = 10,
    seed: int = 0,
) -> Result:
    """What scaling these neurons at the answer's position does to the log-odds of `target`, beside two controls.

    `neurons` are a `knowledge_neurons` result, sites, or (layer, neuron) pairs. Controls are `draws` draws of as many neurons
    of the same layers (`seed`), and as many with the largest activations on this prompt. Gives `effect` [group, factor], the change of the log-odds in nats (the mean over prompts), for the
    groups "neurons", "random" and "most active"; `spread`, the standard deviation over the random draws; `clean`.
    `factors`: 0 suppresses, 2 amplifies. InputError without neurons, or for
    some that the model does not have.

    >>> knowledge_effect(model, "The capital of France is", " Paris", [(20, 12), (23, 7)])
    Scaling 2 neurons
    knowledge effect: effect, spread, clean over group 3, factor 2...
    """
    at_least(1, draws=draws, factors=len(factors))
    inputs, position = _asked(model, prompt)
    bound = model.bind(log_odds(target, position=position), len(inputs))
    sites = {layer_of(site): site for site in neuron_sites(model)}
    clean = dict(zip(sites, _activations(model, inputs, list(sites.values()), position), strict=True))
    chosen = _numbered(model, neurons, {layer: values.shape[1] for layer, values in clean.items()})
    groups = [("neurons", chosen), ("most active", _most_active(clean, len(chosen)))]
    rng = np.random.default_rng(seed)
    for _ in range(draws):
        groups.append(("random", [(layer, int(rng.integers(clean[layer].shape[1]))) for layer, _ in chosen]))
    variants = [
        [Scale(f"{sites[layer]}.{n}@{position}", f) for layer, n in group] for _, group in groups for f in factors
    ]
    swept = model.sweep(inputs, variants, bound)
    change = (swept.values - swept.clean).mean(1).double().reshape(len(groups), len(factors)).numpy()
    of = {name: change[[g == name for g, _ in groups]] for name in ("neurons", "random", "most active")}
    data = xr.Dataset(
        {
            "effect": (
                ("group", "factor"),
                np.stack([rows.mean(0) if len(rows) else np.full(len(factors), np.nan) for rows in of.values()]),
            ),
            "spread": ("factor", of["random"].std(0, ddof=1) if draws > 1 else np.full(len(factors), np.nan)),
            "clean": float(swept.clean.double().mean()),
        },
        coords={"group": list(of), "factor": list(factors)},
    )
    return Result(data, kind="knowledge effect", title=f"Scaling {len(chosen)} neurons")


# ---- where


def _asked(model: Model, prompt: Any) -> tuple[Inputs, int]:
    """The prompts and the position at which they are answered. InputError where that is no single token."""
    inputs = model.inputs(prompt)
    position = answer_position(model, inputs)
    if position is None:
        raise InputError(f"{model.name} does not answer at one token, where its neurons could be read")
    return inputs, position


def neuron_sites(model: Model) -> list[str]:
    """The neurons of every layer of the last stack that has some on the map. Refused if none has."""
    stack = model.anatomy.stacks[-1]
    sites = [f"{stack.prefix}layers.{b.index}.mlp.neurons" for b in stack.blocks if "mlp.neurons" in b.taps]
    if not sites:
        why = next(
            (b.refused["mlp.neurons"] for b in stack.blocks if "mlp.neurons" in b.refused), "no MLP is on the map"
        )
        raise Refused(f"{model.name} has no neurons to attribute to: {why}")
    return sites


def layer_of(site: str) -> int:
    return int(site.partition("layers.")[2].partition(".")[0])


def _numbered(model: Model, neurons: Neurons, widths: dict[int, int]) -> list[tuple[int, int]]:
    """(layer, neuron) of each; `widths` by layer."""
    given = neurons["neurons"].values.tolist() if isinstance(neurons, Result) else list(neurons)
    if not given:
        raise InputError("there are no neurons to scale: refine with a lower `shared`, or name some as (layer, neuron)")
    found: list[tuple[int, int]] = []
    for each in given:
        if isinstance(each, str):
            sites = model.sites(each)
            wrong = next((s for s in sites if s.part != "mlp.neurons" or s.unit is None), None)
            if wrong is not None:
                raise InputError(f"{str(wrong)!r} is no neuron: name one as layers.3.mlp.neurons.17")
            found += [(site.layer, site.unit) for site in sites]  # type: ignore[misc]
        elif isinstance(each, tuple | list) and len(each) == 2 and all(isinstance(i, int | np.integer) for i in each):
            found.append((int(each[0]), int(each[1])))
        else:
            raise InputError(f"{each!r} is no neuron: name one as (layer, neuron) or as layers.3.mlp.neurons.17")
    for layer, n in found:
        if layer not in widths:
            raise InputError(f"layer {layer} of {model.name} has no neurons; those with neurons are {sorted(widths)}")
        if not isinstance(n, int) or not 0 <= n < widths[layer]:
            raise InputError(f"there is no neuron {n} in layer {layer} of {model.name}, which has {widths[layer]}")
    return found


def _activations(model: Model, inputs: Inputs, sites: Sequence[str], position: int) -> list[Tensor]:
    """Per site the neurons [prompt, neuron] at a position."""
    with torch.no_grad():
        run = model.run(inputs, keep=sites)
    return [run.tensor(f"{site}@{position}")[:, 0] for site in sites]


def _scaled(factor: float) -> Any:
    return lambda x: x * factor


def _stacked(parts: Sequence[Tensor]) -> np.ndarray:
    """[prompt, layer, neuron]; NaN where a layer is narrower."""
    widest = max(part.shape[1] for part in parts)
    grid = np.full((len(parts[0]), len(parts), widest), np.nan, dtype=np.float32)
    for i, part in enumerate(parts):
        grid[:, i, : part.shape[1]] = part.float().cpu().numpy()
    return grid


def _most_active(clean: dict[int, Tensor], count: int) -> list[tuple[int, int]]:
    """The neurons with the largest mean activation (by size) over the prompts."""
    layers = list(clean)
    grid = np.abs(np.nan_to_num(_stacked(list(clean.values())))).mean(0)
    top = np.argsort(-grid, axis=None, kind="stable")[:count]
    return [(layers[int(i)], int(n)) for i, n in zip(*np.unravel_index(top, grid.shape), strict=True)]
