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
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import normalize

from pellucid.anatomy.sites import Site
from pellucid.causal.contrast import Asked, ask, numbers
from pellucid.changed import Copied
from pellucid.controls import random_directions
from pellucid.engine.edits import Clamp, Edit, Patch, Steer
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, Refused, at_least, listed
from pellucid.metrics import Metric, logit_difference
from pellucid.model import Model
from pellucid.probing.linear import LogisticProbe
from pellucid.probing.roc import area
from pellucid.results import Result
from pellucid.safety.contrast import Seen
from pellucid.safety.formats import in_weights
from pellucid.safety.price import Meter
from pellucid.safety.vector import Vector
from pellucid.statistics import interval, spearman
from pellucid.tasks.tokens import answer_ids
from pellucid.technique import technique
from pellucid.training import draws as batches_of
from pellucid.training import linear, train

LAST = "-1:"
KEEP = 0.95  # share of the passing prompts' right answers that a mitigation must leave to be chosen


@dataclass(frozen=True, eq=False)
class Mitigation:
    """What mends: edits from the prompt's last token on, or a changed model."""

    edits: tuple[Edit, ...] = ()
    model: Model | None = None
    control: bool = False

    def at(self, tokens: str) -> list[Edit]:
        return [replace(e, tokens=tokens) for e in self.edits]


@dataclass(eq=False)
class Failure:
    """A failure that was traced: the `result`, every mitigation by name, and the one that was `chosen` on the fitted part ("" for none)."""

    result: Result
    mitigations: dict[str, Mitigation] = field(repr=False)
    chosen: str = ""


@dataclass(frozen=True, eq=False)
class Cases:
    """Failing and passing prompts with the right and the wrong token of each."""

    model: Model
    failing: list[Any]
    passing: list[Any]
    right: list[int]
    wrong: list[int]
    groups: np.ndarray

    def take(self, rows: Sequence[int]) -> Cases:
        failing, passing, right, wrong = (
            [side[i] for i in rows] for side in (self.failing, self.passing, self.right, self.wrong)
        )
        return Cases(self.model, failing, passing, right, wrong, self.groups[list(rows)])

    @property
    def metric(self) -> Metric:
        return logit_difference([[i] for i in self.right], [[i] for i in self.wrong])

    def sides(self) -> tuple[Inputs, Inputs]:
        return self.model.inputs(self.failing), self.model.inputs(self.passing)

    def scores(self, mitigations: Sequence[Mitigation], inputs: Inputs) -> np.ndarray:
        """[mitigation, prompt] how far the right answer is before the wrong one."""
        return scores(self.model, inputs, self.metric, mitigations)


def scores(model: Model, inputs: Inputs, metric: Any, mitigations: Sequence[Mitigation]) -> np.ndarray:
    """[mitigation, prompt] of a metric: edits in one sweep, changed models one by one."""
    edited = [m for m in mitigations if m.model is None]
    swept = iter(numbers(model.sweep(inputs, [list(m.edits) for m in edited], metric).values) if edited else [])
    return np.stack(
        [next(swept) if m.model is None else numbers(m.model.score(m.model.run(inputs), metric)) for m in mitigations]
    )


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
    `tasks` and `texts` are those of `price.Meter`. Of the first `exact` components by attribution the exact effect is measured, and of as many
    random ones; `top` are ablated by attribution and in the random controls.

    `result` over `mitigation` on held-out pairs: `preferred`, the share of failing prompts where the right answer is before the wrong one, with
    its 95 % interval `low` to `high`, groups drawn whole; `passing`, the same of passing prompts; `fitted`; each task; `kl` and `top1`; `control` marks the
    random ones. Over `component` `attribution`, over `checked` `exact` with `estimated`; over `layer` `probe`. Chosen is, of the mitigations that keep
    95 % of the passing prompts' right answers, the one that mends most on the fitted pairs, and more than every control.
    InputError for fewer than eight pairs, answers with one first token, or prompts at which nothing fails.

    >>> trace_failure(model, claimed, plain, true, false, groups=relations).chosen                        # doctest: +SKIP
    """
    at_least(1, top=top, exact=exact, draws=draws)
    cases = _cases(model, failing, passing, target, against, groups)
    rng = np.random.default_rng(seed)
    fitted, test = _parted(cases, rng, held_out)
    fail, passed = fitted.sides()
    base = fitted.scores([Mitigation()], fail)[0]
    if (base > 0).all():
        raise InputError(
            "the right answer is before the wrong one at every failing prompt of the fitted part: nothing fails here"
        )
    # ---- where it is
    sites = model.sites(over)
    means, attribution = _attribution(model, fitted, sites, fail, passed)
    order = np.argsort(-attribution)
    rest = rng.permutation(order[exact:])
    checked = [*order[:exact].tolist(), *rest[:exact].tolist()]

    def held(which: Sequence[int]) -> tuple[Edit, ...]:
        return tuple(Patch(sites[i], means[i], tokens=LAST) for i in which)

    effect = fitted.scores([Mitigation(held([i])) for i in checked], fail).mean(1) - base.mean()
    # ---- what mends it
    best = [checked[i] for i in np.argsort(-effect) if effect[i] > 0]
    found = {f"mean ablation of {k} by exact effect": Mitigation(held(best[:k])) for k in _numbers(fitted, best, held, fail, passed)}  # fmt: skip
    found[f"mean ablation of {top} by attribution"] = Mitigation(held(order[:top].tolist()))
    n = len(model.anatomy.stacks[-1].blocks)
    layers = (
        list(dict.fromkeys(np.linspace(0, n - 1, 9)[1:].round().astype(int).tolist()))
        if layers is None
        else list(layers)
    )
    found |= _directions(model, fitted, layers, draws, seed)
    for i in range(draws):
        found[f"random components {i + 1}"] = Mitigation(
            held(rng.choice(len(sites), min(top, len(sites)), replace=False).tolist()), control=True
        )
    if retrain:
        found[f"retraining of layers {', '.join(map(str, retrain))}"] = Mitigation(
            model=_retrained(model, fitted, retrain, seed)
        )
    # ---- what that does, and what it costs
    named = {"none": Mitigation(), **found}
    all_ = list(named.values())
    own = [fitted.scores(all_, side) > 0 for side in (fail, passed)]
    out = [test.scores(all_, side) > 0 for side in test.sides()]
    low, high = interval(out[0].T.astype(float), seed, groups=test.groups, within=(0, 1))
    columns: dict[str, Any] = {
        "preferred": out[0].mean(1),
        "low": low,
        "high": high,
        "passing": out[1].mean(1),
        "fitted": own[0].mean(1),
    }
    for name, task in (tasks or {}).items():
        asked: Asked = ask(model, *(task if isinstance(task, tuple) else (task,)))
        columns[name] = (scores(model, asked.inputs, asked.metric, all_) > 0).mean(1)
    if texts:
        meter = Meter.of(model, texts)
        prices = [meter(m.at("1:"), m.model) for m in progress(all_, "prices")]
        columns |= {key: np.array([p[key] for p in prices]) for key in ("kl", "top1")}
    columns["control"] = np.array([m.control for m in all_])
    data = xr.Dataset({k: ("mitigation", v) for k, v in columns.items()}, {"mitigation": list(named)})
    data = data.assign(
        attribution=xr.DataArray(attribution, {"component": [str(s) for s in sites]}, "component"),
        exact=xr.DataArray(effect, {"checked": [str(sites[i]) for i in checked]}, "checked"),
        estimated=("checked", attribution[checked]), spearman=spearman(attribution[checked], effect),
        probe=xr.DataArray(_probes(model, fitted, test, out[0][0], base > 0, seed), {"layer": range(n)}, "layer"),
    )  # fmt: skip
    controls = own[0][data.control.values].mean(1).max(initial=own[0][0].mean())
    able = [
        i
        for i, m in enumerate(all_)
        if i and not m.control and own[1][i].mean() >= KEEP * own[1][0].mean() and own[0][i].mean() > controls
    ]
    chosen = list(named)[max(able, key=lambda i: float(own[0][i].mean()))] if able else ""
    return Failure(Result(data, kind="failure", title=_title(data, chosen)), found, chosen)


def _numbers(fitted: Cases, best: list[int], held: Any, fail: Inputs, passed: Inputs) -> list[int]:
    """How many of the best components, taken together, mend most fitted pairs; and how many of those that keep the passing prompts right."""
    if not best:
        return []
    sets = [Mitigation(), *(Mitigation(held(best[:k])) for k in range(1, len(best) + 1))]
    mended, kept = ((fitted.scores(sets, side) > 0).mean(1) for side in (fail, passed))
    able = np.flatnonzero(kept[1:] >= KEEP * kept[0]) + 1
    return sorted({int(mended[1:].argmax()) + 1} | ({int(able[mended[able].argmax()])} if len(able) else set()))


def _title(data: xr.Dataset, chosen: str) -> str:
    before, control = float(data.preferred[0]), float(data.preferred[data.control.values].max())
    if not chosen:
        return f"Right at {before:.2f} of failing prompts; nothing mends more than random controls and keeps the passing ones"
    here = data.sel(mitigation=chosen)
    held = "" if float(here.preferred) > max(before, control) else ": no more than random on held-out pairs"
    said = f"{chosen}: right at {before:.2f} to {float(here.preferred):.2f} of failing prompts (random {control:.2f})"
    return f"{said}, {float(data.passing[0]):.2f} to {float(here.passing):.2f} of passing ones{held}"


# ---- the parts


def _cases(model: Model, failing: Any, passing: Any, target: Any, against: Any, groups: Any) -> Cases:
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
    return Cases(model, sides[0], sides[1], ids[0], ids[1], own)


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


def _attribution(
    model: Model, cases: Cases, sites: Sequence[Site], fail: Inputs, passed: Inputs
) -> tuple[list[Tensor], np.ndarray]:
    """The mean of each component over passing prompts [...], and its attribution, at the answered token."""
    wholes = list(dict.fromkeys(str(s.whole) + "@-1" for s in sites))
    clean = model.run(passed, keep=wholes)
    run = model.run(fail, keep=wholes, grad_of=cases.metric)
    means, estimates = [], []
    for site in (s.at_position(-1) for s in sites):
        there, here, slope = clean.tensor(site), run.tensor(site), run.grad(site)
        means.append(there.mean(0, keepdim=True).detach())
        estimates.append(float(((there - here) * slope).flatten(1).sum(1).mean()))
    return means, np.array(estimates)


def _directions(model: Model, cases: Cases, layers: Sequence[int], draws: int, seed: int) -> dict[str, Mitigation]:
    """Steering and projection at the layer that does most on the fitted pairs, random directions there, and the weight projection."""
    sites = [Site.parse(f"layers.{i}.resid_post") for i in layers]
    n = len(cases.right)
    seen = Seen.of(model, [*cases.passing, *cases.failing], sites)
    here = dict(zip(layers, seen.values[:, :n], strict=True))
    change = {i: here[i].mean(0) - x.mean(0) for i, x in zip(layers, seen.values[:, n:], strict=True)}

    def steering(i: int, v: Tensor, control: bool = False) -> Mitigation:
        return Mitigation((Steer(f"layers.{i}.resid_post", v, tokens=LAST),), control=control)

    def projection(i: int) -> Mitigation:
        u = normalize(change[i], dim=0)
        return Mitigation((Clamp(f"layers.{i}.resid_post", u, float((here[i] @ u).mean()), tokens=LAST),))

    fail = cases.sides()[0]
    made: dict[str, Mitigation] = {}
    for name, kind in (("steering", lambda i: steering(i, change[i])), ("projection", projection)):
        all_ = [kind(i) for i in layers]
        done = (cases.scores(all_, fail) > 0).mean(1)
        i = int(done.argmax())
        made[f"{name} at layer {layers[i]}"] = all_[i]
        if name == "steering":
            best = layers[i]
    for k, u in enumerate(random_directions(draws, change[best], norm=float(change[best].norm()), seed=seed)):
        made[f"random direction {k + 1}"] = steering(best, u, control=True)
    first = seen.first[list(layers).index(best)]
    vector = Vector(f"layers.{best}.resid_post", change[best], first=first, digest=model.digest).spared()
    with suppress(Refused):  # a norm behind the projections, quantised weights: there is none, which the result shows
        made["weight projection"] = Mitigation(model=in_weights(model, vector, form="project"))
    return made


def _retrained(model: Model, cases: Cases, layers: Sequence[int], seed: int) -> Model:
    """A changed model whose layers were trained towards the right answers of both sides."""
    stack = model.anatomy.stacks[-1]
    prefixes = tuple(f"{stack.blocks[i].module}." for i in layers)
    names = tuple(
        name for name, p in model.module.named_parameters() if name.startswith(prefixes) and p.is_floating_point()
    )
    made = model.changed(Copied(names))
    own = dict(made.module.named_parameters())
    prompts, right = [*cases.failing, *cases.passing], torch.tensor(cases.right * 2)

    def loss(rows: Tensor, step: int) -> Tensor:
        run = made.run(made.inputs([prompts[i] for i in rows.tolist()]), grad=True)
        stream = run.inputs.stream("")
        z = run.logits[torch.arange(len(rows)), stream.starts + stream.lengths - 1].float()
        return torch.nn.functional.cross_entropy(z, right[rows].to(z.device))

    batches = batches_of(len(prompts), 16, 3, seed)
    train(
        {k: own[k] for k in names}, batches, loss, lambda ps: torch.optim.Adam(ps, lr=1e-4), schedule=linear, seed=seed
    )
    return made


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
