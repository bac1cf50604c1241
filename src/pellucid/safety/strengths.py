"""How hard must a model be pushed along a vector, at which layer, for what effect, and at what price?

Every cell (site, strength, direction) is tried on one half of the prompts: the vector, its negative, and several random vectors of
the same length, which are not neutral (a text that is broken by a random push is also less cheerful). Chosen is the cell that
moves the judge furthest the way that is asked for, among those that

    move it further than every random vector at that site and strength, and
    write text of at most `budget` times the plain text's perplexity (`pellucid.safety.price`);

where there is none, none is chosen, and the title says so. The other half of the prompts sees the chosen cell, its negative, and its
random vectors only, so what is reported there has not been selected. Steering moves many single prompts the other way (Tan et al.
2024): `wrong_way` is their share.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from safetensors import safe_open

from pellucid.controls import random_directions
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import pause, progress
from pellucid.errors import InputError, Refused, at_least, listed
from pellucid.model import Model
from pellucid.results import Result
from pellucid.safety.contrast import Contrast
from pellucid.safety.price import Meter, written
from pellucid.safety.vector import KEY, Form, Vector
from pellucid.statistics import interval
from pellucid.technique import technique

Judge = Callable[[Sequence[str]], Sequence[float]]


@technique
def strengths(
    model: Model,
    vectors: Contrast | Vector | Sequence[Vector],
    prompts: Any,
    judge: Any,
    *,
    strengths: Sequence[float] = (0.15, 0.3, 0.6),
    aim: Literal["higher", "lower"] = "higher",
    form: Form = "add",
    draws: int = 4,
    budget: float = 1.25,
    validation: float = 0.5,
    texts: Sequence[Any] = (),
    tasks: Mapping[str, Any] | None = None,
    max_new_tokens: int = 20,
    seed: int = 0,
) -> Result:
    """Effect and price of steering with `vectors` at their sites, each with every strength; `form` as in `Vector.edit`.

    `judge` is a function of the written texts that gives a number for each, or a metric of the next token (`pl.metrics`). Gives over
    `site` x `strength` x `direction` (vector, -vector, random 1 ..) on the validation prompts `effect`, the change of the judge's
    mean, with `wrong_way`, `perplexity` and `repetition` of the written text; over `site` x `strength` what `texts` and `tasks`
    (see `price.Meter`) cost under the vector at all tokens but the first: `kl`, `top1`, and each task, with `..._plain` of the model as it is;
    over `site` x `strength` `beats_random`. `base` and `base_perplexity` are of the plain model.

    Where a cell is chosen: `chosen_site`, `chosen_strength`, `chosen_direction`, and on the test prompts over `direction` `test_effect`
    with `test_low`, `test_high`, `test_perplexity`, `test_wrong_way`, with `test_base`, `test_base_perplexity`. InputError for fewer than four prompts.

    >>> strengths(model, contrast.at(12), prompts, sentiment, draws=2, max_new_tokens=4).effect
    <xarray.DataArray 'effect' (site: 1, strength: 3, direction: 4)>...
    """
    given = (
        [*vectors.vectors_.values()]
        if isinstance(vectors, Contrast)
        else [vectors]
        if isinstance(vectors, Vector)
        else list(vectors)
    )
    prompts = listed("prompts", prompts, "several prompts")
    at_least(1, draws=draws, max_new_tokens=max_new_tokens)
    if len(model.anatomy.stacks) > 1:
        raise Refused(f"{model.name} is an encoder-decoder: the price of a written text is measured on decoders")
    if not given or len({v.site for v in given}) < len(given):
        raise InputError("give one or more vectors, each at a site of its own")
    for vector in given:
        vector.check(model)
    cut = round(len(prompts) * validation)
    if min(cut, len(prompts) - cut) < 2:
        raise InputError(f"{len(prompts)} prompts at validation={validation}: expected at least two on either side")
    order = np.random.default_rng(seed).permutation(len(prompts))
    halves = [[prompts[i] for i in part] for part in (order[:cut], order[cut:])]
    sign = {"higher": 1.0, "lower": -1.0}.get(aim)
    if sign is None:
        raise InputError(f"aim={aim!r}: expected 'higher' or 'lower'")
    names = ["vector", "-vector", *(f"random {i + 1}" for i in range(draws))]
    found, test = (_Half(model, half, judge, max_new_tokens) for half in halves)
    base, meter = found([]), Meter.of(model, texts, tasks)
    plain = meter()
    cells: list[dict[str, np.ndarray]] = []
    costs: list[dict[str, float]] = []
    for vector in progress(given, "sites"):
        for c in strengths:
            cells += [found([v.edit(c, form=form)]) for v in _beside(vector, draws, seed)]
            costs.append(meter([vector.edit(c, form=form, tokens="1:")]) if plain else {})
    shape = (len(given), len(strengths), len(names))
    dims = ("site", "strength", "direction")
    values = {k: np.stack([cell[k] for cell in cells]).reshape(*shape, -1) for k in cells[0]}
    change = values["score"] - base["score"]
    effect, perplexity = change.mean(-1), np.exp(np.nanmean(values["nll"], -1))
    base_perplexity = float(np.exp(np.nanmean(base["nll"])))
    gain = sign * effect
    better = gain[..., :2] > gain[..., 2:].max(-1, keepdims=True)
    allowed = better & (gain[..., :2] > 0) & (perplexity[..., :2] <= budget * base_perplexity)
    wrong = np.stack([(s * sign * change[:, :, i] < 0).mean(-1) for i, s in enumerate([1, -1] + [1] * draws)], -1)
    columns: dict[str, Any] = {
        "effect": (dims, effect), "perplexity": (dims, perplexity), "repetition": (dims, values["repetition"].mean(-1)),
        "wrong_way": (dims, wrong), "beats_random": (dims[:2], better.any(-1)), "base": base["score"].mean(), "base_perplexity": base_perplexity,
    }  # fmt: skip
    for name, before in plain.items():
        columns[name] = dims[:2], np.array([cost[name] for cost in costs]).reshape(shape[:2])
        columns |= {} if name == "kl" else {f"{name}_plain": before}
    what = getattr(judge, "name", getattr(judge, "__name__", "the judge"))
    title = f"Nothing moves {what} {aim} further than {draws} random vectors do, at {budget:g} times the perplexity"
    if allowed.any():
        i, j, k = map(int, np.unravel_index(int(np.where(allowed, gain[..., :2], -np.inf).argmax()), allowed.shape))
        vector, c = given[i], float(strengths[j])
        made, other = _tested(test, _beside(vector, draws, seed), c, form, seed)
        columns |= made | {"chosen_site": vector.site, "chosen_strength": c, "chosen_direction": names[k]}
        gains = sign * other
        holds = gains[k] > max(0.0, float(gains[2:].max()))
        title = f"{names[k]} at {vector.site}, strength {c:g}, moves {what} by {other[k]:+.2f} on test prompts"
        title += f" (random {other[2:].min():+.2f} to {other[2:].max():+.2f})" + (
            "" if holds else ": no further than random"
        )
    data = xr.Dataset(
        columns, {"site": [v.site for v in given], "strength": list(map(float, strengths)), "direction": names}
    )
    return Result(data.assign_attrs(judge=what), kind="strengths", title=title)


def _tested(
    test: _Half, vectors: Sequence[Vector], c: float, form: Form, seed: int
) -> tuple[dict[str, Any], np.ndarray]:
    """What the test prompts say of the chosen cell, its negative and its random vectors."""
    base = test([])
    rows = [test([v.edit(c, form=form)]) for v in vectors]
    change = np.stack([row["score"] - base["score"] for row in rows], 1)
    low, high = interval(change, seed)
    effect = change.mean(0)
    made = {
        "test_effect": effect, "test_low": low, "test_high": high,
        "test_perplexity": np.array([np.exp(np.nanmean(row["nll"])) for row in rows]),
        "test_wrong_way": (change * np.sign(effect) < 0).mean(0),
    }  # fmt: skip
    about = {"test_base": base["score"].mean(), "test_base_perplexity": float(np.exp(np.nanmean(base["nll"])))}
    return {k: ("direction", v) for k, v in made.items()} | about, effect


def _beside(vector: Vector, draws: int, seed: int) -> list[Vector]:
    """The vector, its negative, and random ones."""
    drawn = random_directions(draws, vector.direction, seed=seed)
    return [vector, -vector, *(replace(vector, vector=u, name=f"random {i + 1}") for i, u in enumerate(drawn))]


class _Half:
    """Some prompts: called with edits it gives for each the judge's number, the plain model's loss on what is written, and its repetition."""

    def __init__(self, model: Model, prompts: Sequence[Any], judge: Any, tokens: int) -> None:
        self.model, self.prompts, self.tokens = model, prompts, tokens
        self.inputs: Inputs = model.inputs(prompts)
        self.judge: Any = judge
        self.metric = None
        if hasattr(judge, "bind"):
            self.metric = model.bind(judge, len(prompts), self.inputs)
        elif not callable(judge):
            raise InputError(
                f"judge={judge!r}: expected a function of texts, or a metric such as pl.metrics.logit_difference(...)"
            )

    def __call__(self, edits: Sequence[Any]) -> dict[str, np.ndarray]:
        pause()
        made = self.model.generate(self.prompts, edits=edits, max_new_tokens=self.tokens)
        if self.metric is None:
            score = np.asarray(self.judge(list(made.texts)), dtype=float)
            if score.shape != (len(self.prompts),):
                raise InputError(
                    f"the judge gave {list(score.shape)} numbers for {len(self.prompts)} texts: expected one for each"
                )
        else:
            with torch.no_grad():
                score = self.model.score(self.model.run(self.inputs, edits=edits), self.metric).double().cpu().numpy()
        return {"score": score, **written(self.model, made)}


# ---- kept beside the vectors


def prices(result: Result) -> dict[str, Any]:
    """What a sweep found, for the file of its vectors: `save_vectors(vectors, path, about=prices(result))`.

    For every site and signed strength the effect on the judge, the furthest of the random vectors either way, and the perplexity of the
    written text beside that of the plain model.
    """
    rows: list[dict[str, Any]] = []
    found = result.data
    for site in found.site.values.tolist():
        for c in found.strength.values.tolist():
            cell = found.sel(site=site, strength=c)
            random = [float(cell.effect.sel(direction=d)) for d in found.direction.values.tolist() if d.startswith("random")]  # fmt: skip
            for name, sign in (("-vector", -1.0), ("vector", 1.0)):
                own = cell.sel(direction=name)
                rows.append({
                    "site": site, "strength": sign * c, "effect": float(own.effect), "perplexity": float(own.perplexity),
                    "base_perplexity": float(found.base_perplexity), "random_low": min(random), "random_high": max(random),
                })  # fmt: skip
    return {"prices": {"judge": str(result.data.attrs.get("judge", "")), "rows": rows}}


def load_prices(path: str | Path) -> dict[str, Any]:
    """The `prices` in a file of vectors; {} where it holds none."""
    if str(path).endswith(".gguf"):
        return {}
    with safe_open(str(path), framework="pt") as file:
        about = (file.metadata() or {}).get(KEY)
    found: dict[str, Any] = json.loads(about).get("prices", {}) if about else {}
    return found
