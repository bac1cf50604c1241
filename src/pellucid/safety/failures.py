"""Which parts carry a failure, what mends it, and what does that cost its neighbours?

Given prompts at which the model fails, beside the same questions at which it does not (with and without a misleading claim, say):

    attribution   (n at passing - n at failing) . d metric / d n at failing, of every component n at the answered token
    exact         metric with n held at its mean over passing prompts - metric, of those ranked highest and of as many random ones
    probe         held-out area of a probe at each layer that says at which failing prompts the wrong answer comes

Attribution ranks where the difference is, not what mends it: a component's clean value carries the very answer of its prompt, which a mean
over prompts deletes. So candidates are scored by the intervention that will be used. Fitted on one part of the prompts (whole groups):

    mean ablation       the best components by exact effect, held together at their passing mean, as many as mend most fitted prompts (and
                        as many as do so and leave the passing ones right); and the first by attribution
    steering            + mean(passing - failing) at the layer where that does most
    projection          the part along this direction set to its passing mean (there)
    weight projection   this direction, without its part in first tokens, projected out of all weights that write to the stream
    retraining          chosen layers trained on the failing and passing prompts' right answers (a changed model; yours is left as it is)

and measured on the other, beside random components and random directions. Prices are measured on the neighbours that are named and
on ordinary text; on text alone an edit that takes other abilities looks free.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from pellucid.causal.contrast import Asked, ask
from pellucid.engine.edits import Edit, Patch
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, Refused, among, at_least, listed
from pellucid.model import Model
from pellucid.probing.linear import LogisticProbe
from pellucid.probing.roc import area
from pellucid.results import Result
from pellucid.safety.contrast import Seen
from pellucid.safety.mending import (
    KEEP,
    LAST,
    Cases,
    Goal,
    Mitigation,
    attribution,
    directions,
    retrained,
    scores,
    sizes,
)
from pellucid.safety.price import Meter
from pellucid.statistics import interval, spearman
from pellucid.tasks.tokens import answer_ids
from pellucid.technique import technique


@dataclass(eq=False)
class Failure:
    """A failure that was traced: the `result`, every mitigation by name, and the one that was `chosen` on the fitted part ("" for none)."""

    result: Result
    mitigations: dict[str, Mitigation] = field(repr=False)
    chosen: str = ""


@technique
def trace_failure(
    model: Model,
    failing: Any,
    passing: Any,
    target: Sequence[Any],
    against: Sequence[Any],
    *,
    groups: Sequence[Any] | None = None,
    held_out: Sequence[Any] | None = None,
    over: str = "layers.*.attn.heads.*",
    layers: Sequence[int] | None = None,
    goal: Goal = "right",
    also: Mapping[str, Sequence[Edit]] | None = None,
    top: int = 8,
    exact: int = 24,
    draws: int = 3,
    retrain: Sequence[int] = (),
    tasks: Mapping[str, Any] | None = None,
    texts: Sequence[Any] = (),
    seed: int = 0,
) -> Failure:
    """From failing prompts, each beside its passing twin, to the components that carry the failure and to what mends it.

    `target` and `against` are the right and the wrong answer of each pair (by their first token). `groups` (a relation, a template) are
    held out whole, about half or those that `held_out` names; without them half of the pairs. `layers` are tried for steering (default: eight, evenly spaced), `retrain` are trained (default: none).
    `goal`: the answer to failing prompts should be "right", or twins should be answered "alike" (a bias). `also` are edits of your own, measured
    beside. `tasks` and `texts` are those of `price.Meter`. Of the first `exact` components by attribution the exact effect is measured, and of as many
    random ones; `top` are ablated by attribution and in the random controls.

    `result` over `mitigation` on held-out pairs: `preferred`, the share of failing prompts where the right answer is before the wrong one, with
    its 95 % interval `low` to `high`, groups drawn whole; `passing`, the same of passing prompts; `gap`, by how many nats the passing twin is further on the
    right side, with `gap_low` and `gap_high`; `fitted`, the measure of `goal` on the fitted pairs; each task (for "alike" on every second row: the others decide);
    `kl` and `top1`; `control` marks the random ones. `by_group` over `group` too. Over `component` `attribution`, over `checked` `exact` with
    `estimated`; over `layer` `probe`. Chosen is what mends most on the fitted pairs, and more than every control, of what keeps 95 % of the passing
    prompts' right answers (for "alike" of every task's).
    InputError for fewer than eight pairs, answers with one first token, or prompts at which nothing fails.

    >>> failure = trace_failure(model, claimed, plain, true, false, groups=relations, layers=[12], exact=2)
    """
    at_least(1, top=top, exact=exact, draws=draws)
    cases = _cases(model, failing, passing, target, against, groups, goal)
    if retrain and goal == "alike":
        raise InputError(
            "layers are retrained towards right answers, and with goal='alike' there are none: leave retrain= out"
        )
    rng = np.random.default_rng(seed)
    fitted, test = _parted(cases, rng, held_out)
    base = fitted.margins([Mitigation()], passing=False)
    if fitted.mended(base)[0] == (1 if goal == "right" else 0):
        raise InputError(
            "nothing fails here: on the fitted part the right answer is before the wrong one at every failing prompt, or twins are answered alike"
        )
    # ---- where it is
    sites = model.sites(over)
    means, estimate = attribution(model, fitted, sites)
    order = np.argsort(-estimate)
    rest = rng.permutation(order[exact:])
    checked = [*order[:exact].tolist(), *rest[:exact].tolist()]

    def held(which: Sequence[int]) -> tuple[Edit, ...]:
        return tuple(Patch(sites[i], means[i], tokens=LAST) for i in which)

    effect = fitted.effects([Mitigation(held([i])) for i in checked])
    # ---- what mends it
    best = [checked[i] for i in np.argsort(-effect) if effect[i] > 0]
    found = {f"mean ablation of {k} by exact effect": Mitigation(held(best[:k])) for k in sizes(fitted, best, held)}
    found[f"mean ablation of {top} by attribution"] = Mitigation(held(order[:top].tolist()))
    n = len(model.anatomy.stacks[-1].blocks)
    even = dict.fromkeys(np.linspace(0, n - 1, 9)[1:].round().astype(int).tolist())
    found |= directions(model, fitted, list(even if layers is None else layers), draws, seed)
    for i in range(draws):
        which = rng.choice(len(sites), min(top, len(sites)), replace=False).tolist()
        found[f"random components {i + 1}"] = Mitigation(held(which), control=True)
    if retrain:
        found[f"retraining of layers {', '.join(map(str, retrain))}"] = Mitigation(
            model=retrained(model, fitted, retrain, seed)
        )
    found |= {name: Mitigation(tuple(edits)) for name, edits in (also or {}).items()}
    # ---- what that does, and what it costs
    named = {"none": Mitigation(), **found}
    all_ = list(named.values())
    own, out = fitted.margins(all_), test.margins(all_)
    mended, gap = fitted.mended(own), out[1] - out[0]
    low, high = interval((out[0] > 0).T.astype(float), seed, groups=test.groups, within=(0, 1))
    gap_low, gap_high = interval(gap.T, seed, groups=test.groups)
    columns: dict[str, Any] = {
        "preferred": (out[0] > 0).mean(1), "low": low, "high": high, "passing": (out[1] > 0).mean(1),
        "gap": gap.mean(1), "gap_low": gap_low, "gap_high": gap_high, "fitted": np.abs(mended),
    }  # fmt: skip
    guards = [(own[1] > 0).mean(1)] if goal == "right" else []
    for name, task in (tasks or {}).items():
        asked: Asked = ask(model, *(task if isinstance(task, tuple) else (task,)))
        right = scores(model, asked.inputs, asked.metric, all_) > 0
        columns[name] = (right if goal == "right" else right[:, 1::2]).mean(1)
        guards += [] if goal == "right" else [right[:, ::2].mean(1)]
    if texts:
        meter = Meter.of(model, texts)
        prices = [meter(m.at("1:"), m.model) for m in progress(all_, "prices")]
        columns |= {key: np.array([p[key] for p in prices]) for key in ("kl", "top1")}
    columns["control"] = np.array([m.control for m in all_])
    first = "preferred" if goal == "right" else "gap"  # what a view shows
    data = xr.Dataset(
        {k: ("mitigation", columns[k]) for k in dict.fromkeys((first, *columns))}, {"mitigation": list(named)}
    )
    kinds = np.unique(test.groups)
    each = (out[0] > 0).astype(float) if goal == "right" else gap
    data = data.assign(
        by_group=xr.DataArray(np.stack([each[:, test.groups == k].mean(1) for k in kinds], 1), {"group": kinds}, ("mitigation", "group")),
        attribution=xr.DataArray(estimate, {"component": [str(s) for s in sites]}, "component"),
        exact=xr.DataArray(effect, {"checked": [str(sites[i]) for i in checked]}, "checked"),
        estimated=("checked", estimate[checked]), spearman=spearman(estimate[checked], effect),
        probe=xr.DataArray(_probes(model, fitted, test, out[0][0] > 0, base[0][0] > 0, seed), {"layer": range(n)}, "layer"),
    )  # fmt: skip
    controls = mended[data.control.values].max(initial=mended[0])
    able = [
        i for i, m in enumerate(all_)
        if i and not m.control and all(g[i] >= KEEP * g[0] for g in guards) and mended[i] > controls
    ]  # fmt: skip
    chosen = list(named)[max(able, key=lambda i: float(mended[i]))] if able else ""
    return Failure(Result(data, kind="failure", title=_title(data, chosen, goal, list(tasks or {}))), found, chosen)


def _title(data: xr.Dataset, chosen: str, goal: str, tasks: Sequence[str]) -> str:
    if goal == "alike":
        return _alike(data, chosen, tasks)
    before, control = float(data.preferred[0]), float(data.preferred[data.control.values].max())
    if not chosen:
        return f"Right at {before:.2f} of failing prompts; nothing mends more than random controls and keeps the passing ones"
    here = data.sel(mitigation=chosen)
    held = "" if float(here.preferred) > max(before, control) else ": no more than random on held-out pairs"
    said = f"{chosen}: right at {before:.2f} to {float(here.preferred):.2f} of failing prompts (random {control:.2f})"
    return f"{said}, {float(data.passing[0]):.2f} to {float(here.passing):.2f} of passing ones{held}"


def _alike(data: xr.Dataset, chosen: str, tasks: Sequence[str]) -> str:
    before, control = float(data.gap[0]), float(np.abs(data.gap[data.control.values]).min())
    if not chosen:
        return f"Twins are answered {before:.2f} nats apart; nothing mends more than random controls and keeps what is beside"
    here = data.sel(mitigation=chosen)
    held = "" if abs(float(here.gap)) < min(abs(before), control) else ": no more than random on held-out pairs"
    said = f"{chosen}: twins are answered {before:.2f} to {float(here.gap):.2f} nats apart (random {control:.2f})"
    return said + "".join(f", {t} {float(data[t][0]):.2f} to {float(here[t]):.2f}" for t in tasks) + held


# ---- the parts


def _cases(model: Model, failing: Any, passing: Any, target: Any, against: Any, groups: Any, goal: Goal) -> Cases:
    if not among(goal, Goal):
        raise InputError(f"goal={goal!r}: expected 'right' or 'alike'")
    sides = [listed(n, x, "several prompts") for n, x in (("failing", failing), ("passing", passing))]
    right, wrong = list(target), list(against)
    if (
        len({len(x) for x in (*sides, right, wrong)}) > 1
        or len(right) < 8
        or (groups is not None and len(groups) != len(right))
    ):
        sizes = ", ".join(str(len(x)) for x in (*sides, right, wrong))
        raise InputError(
            f"{sizes} failing and passing prompts, right and wrong answers: expected one of each in a pair, and at least 8 pairs"
        )
    if (
        len(model.anatomy.stacks) > 1
        or model.anatomy.answering.meaning != "tokens"
        or not model.anatomy.stacks[-1].causal
    ):
        raise Refused(f"{model.name} does not predict the next token of a prompt: a failure is traced in those that do")
    ids = [[_first(model, answer) for answer in side] for side in (right, wrong)]
    same = next((i for i, (a, b) in enumerate(zip(*ids, strict=True)) if a == b), None)
    if same is not None:
        raise InputError(
            f"the answers of pair {same}, {right[same]!r} and {wrong[same]!r}, begin with the same token: leave it out"
        )
    own = np.asarray(groups if groups is not None else range(len(right)))
    return Cases(model, sides[0], sides[1], ids[0], ids[1], own, goal)


def _first(model: Model, answer: Any) -> int:
    """The first token of an answer."""
    if isinstance(answer, str) and model.tokenizer is None:
        raise InputError("this model was opened without a tokenizer: give answers as token ids")
    return answer_ids(model.tokenizer, answer)[0] if isinstance(answer, str) else int(answer)


def _parted(cases: Cases, rng: np.random.Generator, held_out: Sequence[Any] | None) -> tuple[Cases, Cases]:
    """Fitted and held out, about half each, groups whole."""
    kinds = rng.permutation(np.unique(cases.groups))
    sizes = np.cumsum([(cases.groups == k).sum() for k in kinds])
    cut = int(np.clip(np.searchsorted(sizes, len(cases.right) / 2) + 1, 1, max(1, len(kinds) - 1)))
    test = np.isin(cases.groups, kinds[cut:] if held_out is None else list(held_out))
    if test.all() or not test.any():
        raise InputError("all pairs are on one side: give pairs of at least two groups, and of those hold some out")
    return cases.take(np.flatnonzero(~test).tolist()), cases.take(np.flatnonzero(test).tolist())


def _probes(model: Model, fitted: Cases, test: Cases, there: np.ndarray, here: np.ndarray, seed: int) -> np.ndarray:
    """[layer] held-out area of a probe that says at which failing prompts the right answer comes; NaN where one part is all alike."""
    n = len(model.anatomy.stacks[-1].blocks)
    if len(np.unique(here)) < 2 or len(np.unique(there)) < 2:
        return np.full(n, np.nan)
    sites = model.sites("layers.*.resid_post")
    x, y = (Seen.of(model, c.failing, sites).values for c in (fitted, test))
    found = []
    for a, b in zip(x, y, strict=True):
        probe = LogisticProbe(l2=100.0, seed=seed).fit(a, here)
        score = probe.decision_function(b)
        found.append(area((score[:, 1] - score[:, 0]).double().numpy(), there))
    return np.array(found)
