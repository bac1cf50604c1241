"""What does it cost to go on from another's residual: every layer of one model into every layer of another, beside what knows nothing?

What a penalty means is said by its controls, `stitching(controls=...)`: a sender with its weights shuffled or redrawn; the
sender's token embeddings alone (what the map makes without any block of the sender); a map fitted on states that belong to
other positions (its own capacity: a constant, nearly); a receiver that was redrawn (whether the map alone can say the answer)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.controls import redrawn, shuffled
from pellucid.errors import InputError, among, at_least, listed, nearest
from pellucid.lenses.lens import Layers, layer_numbers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.surgery.aligned import Pair, pairs, residuals, rows, states
from pellucid.surgery.joined import ends, measured
from pellucid.surgery.maps import Kind
from pellucid.surgery.similarity import longer, unbiased_cka
from pellucid.surgery.stitch import Stitch
from pellucid.technique import technique

CONTROLS = ("shuffled", "redrawn", "tokens", "permuted", "redrawn receiver")
EMBED = "layers.0.resid_pre"


@technique
def stitching(
    sender: Model,
    receiver: Model,
    texts: Any,
    *,
    after: Layers = None,
    into: Layers = None,
    kinds: Sequence[Kind] = ("identity", "orthogonal", "affine"),
    controls: Sequence[str] = ("shuffled", "tokens", "permuted"),
    rank: int = 32,
    ridge: float = 1e-3,
    tokens: int = 4096,
    held_out: int = 512,
    context: int = 64,
    steps: int = 100,
    seed: int = 0,
) -> Result:
    """What each join of a layer of the sender and one of the receiver costs, beside what knows nothing.

    The last `held_out` of `tokens + held_out` tokens of text are measured, the rest fitted. `after` and `into` are five layers
    evenly apart unless given. Gives over `map` x `after` x `into` `penalty` (nats a token, with `low` and `high` over texts),
    `error` (the share of the receiver's variance a map leaves); over `control` x `map` x `after` x `into` `control_penalty`, the
    penalty of the same map fitted with what knows nothing; over `after` and `into` `sink`, how many times longer the first
    position's residual is than the others' median; over `map` x `after` x `into` `sink_error`, the squared error at the first
    position as a share of its squared norm; over `after` x `into` `cka`,
    the unbiased one of the same states, which sees no difference of basis. NaN where a map does not exist (identity across widths, or of permuted states). The title names a control that does as well.

    >>> stitching(model, model, texts, after=[1, 4], into=[1, 4], held_out=64).penalty
    <xarray.DataArray 'penalty' (map: 3, after: 2, into: 2)>...
    """
    at_least(1, tokens=tokens, held_out=held_out)
    kinds, controls = listed("kinds", kinds, "names of maps"), listed("controls", controls, "names")
    if unknown := [k for k in kinds if not among(k, Kind)] + [c for c in controls if c not in CONTROLS]:
        raise InputError(
            f"{unknown[0]!r} is no map and no control{nearest(str(unknown[0]), [*get_args(Kind), *CONTROLS])}"
        )
    layers = [_spread(m, chosen) for m, chosen in ((sender, after), (receiver, into))]
    for i in layers[0]:
        ends(sender, receiver, i, layers[1][0])
    found = pairs(sender, receiver, texts, tokens + held_out, context)
    fitted, test = _split(found, held_out)
    table = _Table(kinds, layers[0], layers[1], fitted, test, rank, ridge, steps, seed)
    main = table.of(sender, receiver)
    plain, sizes = main.plain, main.sizes
    shape = (len(kinds), len(layers[0]), len(layers[1]))
    low, high = interval(
        np.moveaxis(main.values - plain, -1, 0) * sizes.reshape(-1, 1, 1, 1),
        seed,
        over=np.broadcast_to(sizes.reshape(-1, 1, 1, 1), (len(sizes), *shape)),
    )
    dims = ("map", "after", "into")
    size = sizes.sum()
    data = xr.Dataset({"penalty": (dims, (main.values - plain) @ sizes / size), "low": (dims, low), "high": (dims, high), "error": (dims, main.errors),
                       "sink_error": (dims, main.sinks), "receiver": float(plain @ sizes / size)},
                      {"map": kinds, "after": layers[0], "into": layers[1]}, {"unit": "nats", "tokens": int(size), "texts": len(test)})  # fmt: skip
    for dim, lengths in zip(("after", "into"), (main.mine, main.yours), strict=True):
        data[f"sink_{dim}"] = (dim, lengths)
    data["cka"] = (("after", "into"), main.cka)
    if controls:
        known = [_knowing_nothing(table, name, sender, receiver, seed).values for name in controls]
        data["control_penalty"] = (("control", *dims), (np.stack(known) - plain) @ sizes / size)
        data = data.assign_coords(control=controls)
    return Result(data, kind="stitching", title=f"{sender.name} into {receiver.name}: {_told(data)}{_warned(data)}")


def _told(data: xr.Dataset) -> str:
    """The cheapest and the dearest join of every map, and the best that a control does."""
    said = []
    for name in data["map"].values:
        flat = data.penalty.sel(map=name).stack(join=("after", "into")).dropna("join")
        if flat.size:
            low, high = flat[int(flat.values.argmin())], flat[int(flat.values.argmax())]
            said.append(f"{name} {float(low):+.2f} nats (block {int(low.after)} into {int(low['into'])}) to {float(high):+.2f} ({int(high.after)} into {int(high['into'])})")  # fmt: skip
    if "control_penalty" in data:
        best = data.control_penalty.min(("map", "after", "into"))
        said.append(f"knowing nothing {float(best.min()):+.2f} ({best['control'].values[int(best.values.argmin())]})")
    return ", ".join(said)


def _warned(data: xr.Dataset) -> str:
    said = ""
    if "control_penalty" in data:
        beaten = (data.control_penalty <= data.penalty + 0.05) & np.isfinite(data.penalty)
        names = [f"{c} ({', '.join(data['map'].values[beaten.sel(control=c).any(('after', 'into')).values])})" for c in data["control"].values if bool(beaten.sel(control=c).any())]  # fmt: skip
        said = f"; as well or better in places: {', '.join(names)}" if names else ""
    return said + ("; a trained map is an upper bound, not a likeness" if "trained" in data["map"].values else "")


def _knowing_nothing(table: _Table, name: str, sender: Model, receiver: Model, seed: int) -> _Measured:
    if name in ("shuffled", "redrawn"):
        return table.of((shuffled if name == "shuffled" else redrawn)(sender, seed=seed), receiver)
    if name == "redrawn receiver":
        return table.of(sender, redrawn(receiver, seed=seed))
    return table.of(sender, receiver, name)


def _spread(model: Model, layers: Layers) -> list[int]:
    n = len(model.anatomy.stacks[-1].blocks)
    return sorted(
        set(
            layer_numbers(model, layers)
            if layers is not None
            else np.linspace(0, n - 1, 5).round().astype(int).tolist()
        )
    )


def _split(found: list[Pair], held_out: int) -> tuple[list[Pair], list[Pair]]:
    """The last texts, of about so many tokens, apart."""
    at, size = len(found), 0
    while at > 1 and size < held_out:
        at -= 1
        size += len(found[at])
    if at < 1 or size < held_out / 4 or at == len(found):
        raise InputError(f"there are {len(found)} texts, too few to fit and to measure on others: give more")
    return found[:at], found[at:]


@dataclass
class _Measured:
    values: np.ndarray  # [map, after, into, text] nll of stitched models
    plain: np.ndarray  # [text]
    sizes: np.ndarray  # [text] tokens
    errors: np.ndarray  # [map, after, into]
    sinks: np.ndarray
    mine: np.ndarray  # [after], [into] norm of the first position over the others' median
    yours: np.ndarray
    cka: np.ndarray  # [after, into]


@dataclass
class _Table:
    kinds: list[Kind]
    after: list[int]
    into: list[int]
    fitted: list[Pair]
    test: list[Pair]
    rank: int
    ridge: float
    steps: int
    seed: int

    def of(self, sender: Model, receiver: Model, name: str = "") -> _Measured:
        """Every map fitted and measured; `name` "permuted" or "tokens" for a control that the sender itself gives."""
        both = [*self.fitted, *self.test]
        a, b = residuals(sender, self.after), residuals(receiver, self.into)
        sites = dict.fromkeys(a, EMBED) if name == "tokens" else a
        mine = states(sender, [p.sender for p in both], [*sites.values()], "sender")
        yours = states(receiver, [p.receiver for p in both], [*b.values()], "receiver")
        n = len(self.fitted)
        shape = (len(self.kinds), len(a), len(b))
        errors, sinks = np.full(shape, np.nan), np.full(shape, np.nan)
        put: dict[tuple[int, ...], tuple[str, list[Tensor]]] = {}
        for cell in np.ndindex(shape):
            kind, site, other = self.kinds[cell[0]], [*sites.values()][cell[1]], [*b.values()][cell[2]]
            x, y = rows(self.fitted, mine[:n], yours[:n], site, other)
            if kind == "identity" and (x.shape[1] != y.shape[1] or name == "permuted"):
                continue
            if name == "tokens" and cell[1]:
                continue  # the embeddings are the same for every `after`
            if name == "permuted":
                x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(self.seed))]
            stitch = Stitch(
                kind, rank=self.rank, ridge=self.ridge, steps=self.steps, into=self.into[cell[2]], seed=self.seed
            )
            stitch._learn(receiver, self.fitted, [m[site] for m in mine[:n]], x, y)
            errors[cell] = stitch.error_
            moved = [stitch.translate(m[site][p.columns]) for p, m in zip(self.test, mine[n:], strict=True)]
            truth = [r[other] for r in yours[n:]]
            sinks[cell] = float(
                sum((m[0] - t[0]).pow(2).sum() for m, t in zip(moved, truth, strict=True))
                / sum(t[0].pow(2).sum() for t in truth)
            )
            put[cell] = (other, moved)
        nll, plain, sizes = measured(receiver, self.test, put)
        values = np.full((*shape, len(self.test)), np.nan)
        for cell, row in nll.items():
            values[cell] = row
        if name == "tokens":
            values[:], errors[:] = values[:, :1], errors[:, :1]
        lengths = [np.array([longer(each, s) for s in where.values()]) for each, where in ((mine, sites), (yours, b))]
        cka = np.array([[unbiased_cka(*rows(both, mine, yours, s, t)) for t in b.values()] for s in sites.values()])
        return _Measured(values, plain, sizes, errors, sinks, lengths[0], lengths[1], cka)
