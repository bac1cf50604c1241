"""How does each kind of `ConceptReader` learn from values, and at which site does it do best on folds that it did not see?

Values are [site, prompt, vector, d] with a mask [prompt, vector]; one reader is learnt for each site. All is nested: for each test fold the
site is chosen by folds among the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.corpus import read_each
from pellucid.engine.edits import left_aligned
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.model import Model
from pellucid.probing.erasure import Leace
from pellucid.probing.linear import LogisticProbe
from pellucid.safety import beside, ccs
from pellucid.safety.contrast import direction
from pellucid.safety.judging import Numbers, in_pairs, platt, within
from pellucid.safety.networks import Learnt, Linear, learn
from pellucid.safety.statements import Statements


class Settings(Protocol):
    """What a reader says of itself here."""

    kind: Any
    erase: Sequence[str]
    restarts: int
    steps: int
    learning_rate: float
    seed: int


def learnt(
    reader: Settings, own: tuple[Tensor, Tensor], data: Statements, rows: np.ndarray, labels: np.ndarray | None = None,
    seed: int | None = None, repaired: bool = False,
) -> list[Learnt]:  # fmt: skip
    """A reader for each site [site, prompt, vector, d], learnt from some rows of the data; under other `labels`."""
    x, mask = own
    at = np.flatnonzero(rows)
    x, mask, part = x[:, at], mask[at], data[at]
    y, seed = part.labels if labels is None else labels[at], reader.seed if seed is None else seed
    erasers = []
    if reader.erase:
        z = np.concatenate([np.eye(len(u := np.unique(part.nuisances[e])))[np.searchsorted(u, part.nuisances[e])] for e in reader.erase], 1)  # fmt: skip
        erasers = [Leace().fit(each[:, -1], z) for each in x]
        x = torch.stack([e.transform(each[:, -1])[:, None].float() for e, each in zip(erasers, x, strict=True)])
    made: list[Learnt] = []
    if reader.kind.endswith("ccs"):
        made = list(searched(reader, x, part, seed, repaired)[0])
    else:
        true, false = part.couples
        if labels is not None:
            true, false = np.where(y[true], true, false), np.where(y[true], false, true)
        for each in x:
            if reader.kind in ("mlp", "attention"):
                made.append(learn(reader.kind, each, mask, torch.as_tensor(y), seed=seed))
                continue
            v = each[:, -1]
            plus, minus = (v[true], v[false]) if reader.kind.startswith("pca") else (v[y], v[~y])
            w = weight(reader.kind, plus, minus, np.concatenate([part.groups[y], part.groups[~y]]), seed)
            made.append(Linear(w, -float((plus.mean(0) + minus.mean(0)) @ w) / 2))
    for i, e in enumerate(erasers):
        if isinstance(each := made[i], Linear):
            made[i] = each.after(e.left_, e.right_, e.mean_)
    return made


def searched(
    reader: Settings, x: Tensor, part: Statements, seed: int, repaired: bool = False
) -> tuple[list[Linear], ccs.Found]:
    true, false = part.couples
    rng = np.random.default_rng(
        (seed, 1)
    )  # not the stream of `planted`: alike, the sets' means would take the speaker out
    if repaired:
        false = rng.permutation(false)
    holds = rng.integers(0, 2, len(true)).astype(bool)  # which member comes first says nothing
    first, second = (x[:, np.where(holds == side, true, false), -1] for side in (True, False))
    found = ccs.search(
        first, second, torch.as_tensor(holds), supervised=reader.kind == "supervised_ccs", restarts=reader.restarts,
        steps=reader.steps, learning_rate=reader.learning_rate, seed=seed,
    )  # fmt: skip
    return [Linear(w, b) for w, b in zip(found.weight, found.bias, strict=True)], found


def nested(
    reader: Settings, own: tuple[Tensor, Tensor], data: Statements, fold: np.ndarray
) -> dict[tuple[int, int], Numbers]:
    """By two folds that are left out (one twice: the test): scores [site, prompt] of those in either."""
    k, made = int(fold.max()) + 1, {}
    both = [(f, g) for f in range(k) for g in range(f, k)]
    for f, g in progress(both, "folds of readers"):
        each_site = learnt(reader, own, data, (fold != f) & (fold != g))
        asked = (fold == f) | (fold == g)
        scores = np.full((len(each_site), len(fold)), np.nan)
        for s, each in enumerate(each_site):
            scores[s, asked] = beside.said(each, own[0][s, asked], own[1][asked])
        made[f, g] = made[g, f] = scores
    return made


def chosen(
    nested: dict[tuple[int, int], Numbers], data: Statements, fold: np.ndarray
) -> tuple[list[int], list[tuple[float, float]], Numbers, Numbers]:
    """By test fold the site and its slope and offset from the other folds; how well all did there [fold, site]; scores
    [site, prompt] of readers that did not see the prompt. Pairs are judged as pairs."""
    k, labels, couples = int(fold.max()) + 1, data.labels, data.couples
    paired = 2 * couples.shape[1] == len(data)
    sites, curve, chosen, slopes = len(nested[0, 0]), [], [], []
    for f in range(k):
        inner = np.select([fold == g for g in range(k)], [nested[f, g] for g in range(k)])
        rest = fold != f
        if paired:
            well = [in_pairs(each, couples[:, rest[couples[0]]]) for each in inner]
        else:
            well = [float(within(inner[s, rest], labels[rest], fold[rest])[0]) for s in range(sites)]
        chosen.append(int(np.argmax(well)))
        slopes.append(platt(inner[chosen[-1], rest], labels[rest]))
        curve.append(well)
    folded = np.select([fold == g for g in range(k)], [nested[g, g] for g in range(k)])
    return chosen, slopes, np.array(curve), folded


def weight(kind: str, plus: Tensor, minus: Tensor, groups: np.ndarray, seed: int) -> Tensor:
    """[d] from values [example, d] of either kind."""
    if kind == "logistic":
        fit = LogisticProbe(seed=seed, folds=min(3, len(np.unique(groups))))
        fit.fit(torch.cat([plus, minus]), [1] * len(plus) + [0] * len(minus), groups)
        return fit.weight_[:, 1] - fit.weight_[:, 0]
    if kind == "mass_mean":
        x = torch.cat([plus - plus.mean(0), minus - minus.mean(0)]).double()
        inverse = torch.linalg.pinv(x.T @ x / len(x), hermitian=True)
        return (inverse @ (plus.mean(0) - minus.mean(0)).double()).float()
    return direction(kind, plus, minus, seed)  # type: ignore[arg-type]


def vectors(
    model: Model, prompts: Sequence[Any], sites: Sequence[str], last: int | None = None, *, batch: int = 16
) -> tuple[Tensor, Tensor]:
    """Values [site, prompt, vector, d] of the `last` tokens of each prompt (all but the first by default), the end of each prompt in
    the last column, and which of them are real [prompt, vector]; in float32 on the CPU."""
    found: list[list[Tensor]] = []
    read_each(model, list(prompts))
    for start in progress(range(0, len(prompts), batch), "batches of prompts"):
        run = model.run(model.inputs(list(prompts[start : start + batch])), keep=list(sites), logits=False)
        rows = [left_aligned(*run.everywhere(Site.parse(s))) for s in sites]
        if any(x.ndim != 3 for x, _ in rows) or len({x.shape[2] for x, _ in rows}) > 1:
            raise InputError(
                "a reader needs sites of one vector of equal width for each token, such as layers.*.resid_post"
            )
        lengths = rows[0][1].tolist()
        stacked = torch.stack([x.detach().float().cpu() for x, _ in rows])
        for i, n in enumerate(lengths):
            found.append([stacked[:, i, min(1, n - 1) if last is None else max(0, n - last) : n]])
    most = max(each[0].shape[1] for each in found)
    x = found[0][0].new_zeros(len(sites), len(found), most, found[0][0].shape[2])
    mask = torch.zeros(len(found), most, dtype=torch.bool)
    for i, (each,) in enumerate(found):
        x[:, i, most - each.shape[1] :], mask[i, most - each.shape[1] :] = each, True
    return x, mask
