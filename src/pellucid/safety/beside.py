"""What would a reader read that knows nothing? The rows that stand beside `ConceptReader`, and its trap.

Each control is a function of the rows to learn from, the rows to score and the site, so that it is fitted and asked in the folds of the reader.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.controls import random_directions, shuffled_labels
from pellucid.errors import PellucidError
from pellucid.probing.erasure import Leace
from pellucid.results import Result
from pellucid.safety.judging import Numbers, form_scores, in_pairs, text_scores
from pellucid.safety.networks import Learnt
from pellucid.safety.statements import Statements

DIRECTIONS = 200
Asked = Callable[
    [np.ndarray, np.ndarray, int], Numbers
]  # rows to learn from, rows to score, site -> scores [draw, row]
Plan = Sequence[tuple[np.ndarray, np.ndarray, int]]  # the same, part by part


class Settings(Protocol):
    """What a reader says of itself here."""

    kind: Any
    controls: Sequence[str]
    draws: int
    seed: int


def rows(
    reader: Settings, learn: Callable[..., list[Learnt]], read: tuple[Tensor, Tensor], untrained: Callable[[], Tensor],
    data: Statements, texts: Sequence[str],
) -> tuple[dict[str, Asked], str]:  # fmt: skip
    """The controls of a reader by name, each to be asked in its folds, and why there is no untrained model, where there is none.

    `learn` fits the reader on values [site, prompt, vector, d] and their mask; `untrained` reads the model with its weights drawn anew.
    """
    x, mask = read
    n, refused = len(data), ""

    def learnt_on(values: Tensor, train: np.ndarray, ask: np.ndarray, s: int, **how: Any) -> Numbers:
        made = learn((values[s : s + 1, :n], mask[:n]), data, train, **how)[0]
        return said(made, values[s, ask], mask[ask])

    def by_text(score: Callable[..., Numbers]) -> Asked:
        return lambda train, ask, s: score([texts[int(i)] for i in np.flatnonzero(train)], data.labels[train],
                                           [texts[i] for i in ask])[None]  # fmt: skip

    def random(train: np.ndarray, ask: np.ndarray, s: int) -> Numbers:
        drawn = random_directions(DIRECTIONS, x.shape[-1], seed=reader.seed)
        centred = x[s, ask][mask[ask]].reshape(-1, x.shape[-1]).mean(0)
        return (drawn @ ((x[s, ask] - centred) * mask[ask][..., None]).sum(1).T).double().numpy()

    def shuffled(train: np.ndarray, ask: np.ndarray, s: int) -> Numbers:
        same = data.topics if data.loose else data.pairs
        drawn = range(reader.seed, reader.seed + reader.draws)
        if reader.kind.endswith("ccs"):
            return np.stack([learnt_on(x, train, ask, s, seed=i, repaired=True) for i in drawn])
        made = [shuffled_labels(data.labels, i, within=same.tolist()) for i in drawn]
        return np.stack([learnt_on(x, train, ask, s, labels=y) for y in made])

    made: dict[str, Asked] = {
        "text": by_text(text_scores),
        "form": by_text(form_scores),
        "random": random,
        "shuffled": shuffled,
    }
    made = {name: ask for name, ask in made.items() if name in reader.controls}
    if "untrained" in reader.controls:
        try:
            other = untrained()
            made["untrained"] = lambda train, ask, s: learnt_on(other, train, ask, s)[None]
        except PellucidError as why:
            refused = str(why)
    return made, refused


def trap(
    searched: Callable[..., Any], own: tuple[Tensor, Tensor], spoken: Tensor, data: Statements, planted: Statements, sites: Sequence[str],
    site: str,
) -> Result:  # fmt: skip
    """The search at all sites on pairs as they are, with a planted speaker, and with the speaker erased, unlabelled and all seen."""
    runs = {"plain": own[0], "planted": spoken}
    z = planted.nuisances["speaker"]
    runs["planted, erased"] = torch.stack(
        [Leace().fit(v[:, -1], z).transform(v[:, -1])[:, None].float() for v in runs["planted"]]
    )
    found: dict[str, Any] = {"truth": [], "speaker": [], "loss": [], "repaired_loss": []}
    for x in runs.values():
        made, search = searched(x, data)
        scores = [said(each, x[s], own[1]) for s, each in enumerate(made)]
        for name, couples in (("truth", data.couples), ("speaker", split(planted, z))):
            found[name].append([max(a := in_pairs(v, couples), 1 - a) for v in scores])
        found["loss"].append(search.loss.tolist())
        found["repaired_loss"].append(searched(x, data, repaired=True)[1].loss.tolist())
    made_of = xr.Dataset(
        {k: (("run", "site"), np.array(v)) for k, v in found.items()}, {"run": list(runs), "site": list(sites)}
    )
    at = made_of.sel(site=site)
    t, q, loss = at.truth.values, at.speaker.values, at.loss.values
    what = f"the speaker ({q[1]:.2f}) instead of the labels ({t[1]:.2f})" if q[1] > t[1] else f"the labels ({t[1]:.2f})"
    title = f"With a planted speaker it reads {what}, at a loss of {loss[1]:.4f} against {loss[0]:.4f} without; speaker erased: labels {t[2]:.2f}"
    return Result(made_of, kind="reader trap", title=title)


def by_plan(ask: Asked, plan: Sequence[tuple[np.ndarray, np.ndarray, int]], n: int) -> Numbers:
    made: Numbers | None = None
    for train, rows, site in plan:
        found = ask(train, rows, site)
        made = np.full((len(found), n), np.nan) if made is None else made
        made[:, rows] = found
    assert made is not None
    return made


def split(data: Statements, nuisance: np.ndarray) -> np.ndarray:
    """Couples [2, pair] by the nuisance: its larger value first; pairs that have it alike are left out."""
    a, b = data.couples
    differ = nuisance[a] != nuisance[b]
    a, b = a[differ], b[differ]
    return np.where(nuisance[a] > nuisance[b], [a, b], [b, a])


def told_apart(scores: Numbers, couples: np.ndarray, fold: np.ndarray) -> float:
    """The share of couples told apart, in each fold with the better sign: readers of different folds may have another one."""
    folds = [couples[:, fold[couples[0]] == f] for f in np.unique(fold)]
    found = [(max(a := in_pairs(scores, each), 1 - a), each.shape[1]) for each in folds if each.size]
    return float(np.average([a for a, _ in found], weights=[n for _, n in found])) if found else float("nan")


def dataset(table: Mapping[str, Mapping[str, Mapping[str, float]]], instead: Mapping[str, float]) -> xr.Dataset:
    rows = list(next(iter(table.values())))
    measures = list(next(iter(next(iter(table.values())).values())))
    values = {
        m: (("set", "row"), np.array([[t[r].get(m, np.nan) for r in rows] for t in table.values()])) for m in measures
    }
    made = xr.Dataset(values, {"set": list(table), "row": rows})
    return (
        made.assign(instead=("nuisance", list(instead.values()))).assign_coords(nuisance=list(instead))
        if instead
        else made
    )


def said(learnt: Learnt, x: Tensor, mask: Tensor) -> Numbers:
    with torch.no_grad():
        found: Numbers = learnt(x, mask).double().numpy()
    return found
