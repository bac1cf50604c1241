"""How alike are what two models (or two depths of one) make of the same text, whatever basis they write it in?

X [row, d] and Y [row, e] are the residuals at the same places of the same texts, columns centred.

    cka            |Y'X|^2 / (|X'X| |Y'Y|)                                            Kornblith et al. 2019
    unbiased_cka   the same with the unbiased estimate of HSIC: 0 on average for what is unrelated     Nguyen et al. 2021
    svcca          mean canonical correlation of the directions that hold `variance` of each           Raghu et al. 2017
    pwcca          the same, weighted by how much of X lies along each (so not symmetric)              Morcos et al. 2018
    neighbours     share of the k nearest rows of X, by cosine, that are among the k of Y              Huh et al. 2024

Orthogonal maps leave all of these as they are, so a rotated copy is "identical": whether one model can go on from the other's
states only a stitch can say (`stitching`, which has unbiased CKA beside it). Biased measures are high for nothing where rows
are few for the width: the control, the same rows of Y in another order, says how high, and the title which. The first position,
often an attention sink a hundred times longer than all others, is left out; `cka_with_sink` is CKA with it. PWCCA is taken on
SVCCA's directions, the paper's on all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.pausing import progress
from pellucid.errors import InputError, at_least
from pellucid.lenses.lens import Layers, layer_numbers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.surgery.aligned import pairs, residuals, rows, states
from pellucid.technique import technique

MEASURES = ("cka", "unbiased_cka", "svcca", "pwcca", "neighbours")


@technique
def similarity(
    model: Model,
    other: Model,
    texts: Any,
    *,
    layers: Layers = None,
    other_layers: Layers = None,
    k: int = 10,
    variance: float = 0.99,
    tokens: int = 2048,
    context: int = 64,
    draws: int = 2,
    seed: int = 0,
) -> Result:
    """Every measure between the residuals after each of `layers` of a model and each of `other_layers` of another (or of itself).

    All layers of the stack that reads the text, unless given; at most `tokens` tokens of text, at places both tokenizers cut
    alike. Gives over `measure` x `layer` x `other` `similarity` and `control`, the mean over `draws` orders of the other's rows;
    over `layer` x `other` `cka_with_sink`; over `layer` and `other` `sink`, how many times longer the first position's residual is
    than the others' median; `rows`, over how many places. InputError for fewer than k + 4 places.

    >>> similarity(model, model, texts, layers=slice(0, 8, 4), other_layers=slice(0, 8, 4)).similarity
    <xarray.DataArray 'similarity' (measure: 5, layer: 2, other: 2)>...
    """
    at_least(1, k=k, tokens=tokens, draws=draws)
    if not 0 < variance <= 1:
        raise InputError(f"variance={variance!r}: expected a share above 0, at most 1")
    found = pairs(model, other, texts, tokens, context)
    a, b = (residuals(m, layer_numbers(m, which, 0)) for m, which in ((model, layers), (other, other_layers)))
    mine, yours = (
        states(model, [p.sender for p in found], [*a.values()], "first"),
        states(other, [p.receiver for p in found], [*b.values()], "second"),
    )
    first = [rows(found, mine, yours, site, next(iter(b.values())))[0] for site in a.values()]
    second = [rows(found, mine, yours, next(iter(a.values())), site)[1] for site in b.values()]
    n = len(first[0])
    if n < k + 4:
        raise InputError(f"{n} places of text for {k} neighbours: give more text, or a smaller k")
    x, y = ([_Seen(each, k, variance) for each in progress(side, "directions")] for side in (first, second))
    generator = torch.Generator().manual_seed(seed)
    orders = [torch.randperm(n, generator=generator) for _ in range(draws)]
    values, control = (np.zeros((len(MEASURES), len(x), len(y))) for _ in range(2))
    for j, right in enumerate(progress(y, "layers")):
        mixed = [right.ordered(order) for order in orders]
        for i, left in enumerate(x):
            values[:, i, j] = _measures(left, right)
            control[:, i, j] = np.mean([_measures(left, each) for each in mixed], 0)
    whole = [replace(p, inner=torch.ones_like(p.inner), exact=p.exact | (torch.arange(len(p)) == 0)) for p in found]
    sunk = np.array([[cka(*rows(whole, mine, yours, s, t)) for t in b.values()] for s in a.values()])
    data = xr.Dataset({"similarity": (("measure", "layer", "other"), values), "control": (("measure", "layer", "other"), control), "cka_with_sink": (("layer", "other"), sunk),
                       "sink": ("layer", [longer(mine, s) for s in a.values()]), "other_sink": ("other", [longer(yours, s) for s in b.values()]), "rows": n},
                      {"measure": list(MEASURES), "layer": [*a], "other": [*b]})  # fmt: skip
    high = [m for m, v, c in zip(MEASURES, values, control, strict=True) if c.mean() > 0.5 * v.mean()]
    note = f"; mostly what unrelated rows give: {', '.join(high)}" if high else ""
    return Result(data, kind="similarity", title=f"{model.name} and {other.name}: {_told(data)}{note}")


def _told(data: xr.Dataset) -> str:
    """The most and the least alike layers, by a measure that unrelated rows do not raise and by nearest neighbours."""
    said = []
    for name in ("unbiased_cka", "neighbours"):
        flat = data.similarity.sel(measure=name).stack(pair=("layer", "other"))
        most, least = flat[int(flat.values.argmax())], flat[int(flat.values.argmin())]
        said.append(f"{name} {float(most):.2f} (layers {int(most.layer)}, {int(most.other)}) to {float(least):.2f} ({int(least.layer)}, {int(least.other)})")  # fmt: skip
    return ", ".join(said)


def longer(found: Sequence[dict[str, Tensor]], site: str) -> float:
    """How many times longer the first position's residual is than the median of the others."""
    rest = torch.cat([x[site][1:].norm(dim=1) for x in found]).median()
    return float(torch.stack([x[site][0].norm() for x in found]).mean() / rest.clamp_min(1e-12))


class _Seen:
    """Rows of one layer, and what is worked out of them once."""

    def __init__(self, x: Tensor, k: int, variance: float) -> None:
        self.x = x.double() - x.double().mean(0)
        u, s, _ = torch.linalg.svd(self.x, full_matrices=False)
        share = (s**2).cumsum(0) / (s**2).sum()
        self.u = u[:, : int((share < variance - 1e-12).sum()) + 1]  # [row, kept] orthonormal
        unit = torch.nn.functional.normalize(x.double(), dim=1)
        self.near = torch.stack(
            [(unit @ row).index_fill(0, torch.tensor(i), -2).topk(k).indices for i, row in enumerate(unit)]
        )

    def ordered(self, order: Tensor) -> _Seen:
        """The same rows in another order."""
        made = object.__new__(_Seen)
        made.x, made.u = self.x[order], self.u[order]
        place = torch.argsort(order)
        made.near = place[self.near[order]]
        return made


def _measures(x: _Seen, y: _Seen) -> list[float]:
    h, rho, _ = torch.linalg.svd(x.u.T @ y.u, full_matrices=False)
    rho = rho.clamp(0, 1)
    weight = (
        ((x.u @ h).T @ x.x).abs().sum(1)
    )  # [correlation] how much of X's columns lies along each canonical variable
    shared = (x.near[:, :, None] == y.near[:, None, :]).any(2).double().mean()
    return [
        cka(x.x, y.x),
        unbiased_cka(x.x, y.x),
        float(rho.mean()),
        float((weight * rho).sum() / weight.sum()),
        float(shared),
    ]


def cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA of rows [row, d] and [row, e]."""
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    size = (x.T @ x).norm() * (y.T @ y).norm()
    return float((x.T @ y).norm() ** 2 / size.clamp_min(1e-30))


def unbiased_cka(x: Tensor, y: Tensor) -> float:
    """Linear CKA with the unbiased HSIC (Song et al. 2012) of rows [row, d] and [row, e]; of no more than products of features."""
    x, y = x.double(), y.double()
    n = len(x)

    def hsic(a: Tensor, b: Tensor) -> Tensor:
        p, q = (a * a).sum(1), (b * b).sum(1)  # the diagonals, which are left out
        one, two = a @ a.sum(0) - p, b @ b.sum(0) - q
        both = (a.T @ b).norm() ** 2 - p @ q
        return both + one.sum() * two.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ two)

    return float(hsic(x, y) / (hsic(x, x) * hsic(y, y)).clamp_min(1e-30).sqrt())
