"""Does it matter which parts are trained? Those that were found, as many random ones, the least important, and all.

    importance of a layer            sum |w g| over its parameters                  g the gradient of the loss on the training texts
    of a neuron or a head            mean over texts of |sum over tokens a . dL/da|    a its activation (a head: what it mixes)

Where something is read is not where it is best mended (Hase et al. 2023 for edits), so the table decides, and "found does not win"
is said first where it does not. Every arm starts from the same model and trains the answer's head too, which is also an arm
alone; what is outside an arm's choice keeps every bit, weight decay included, and `changed` counts what did not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.errors import InputError, among, one_of
from pellucid.model import Model
from pellucid.results import Result
from pellucid.statistics import interval
from pellucid.technique import technique
from pellucid.tuning.data import Encoded, Rationales
from pellucid.tuning.fit import Fit, Settings, run_arms, timed
from pellucid.tuning.objective import Opened, Pass, parts
from pellucid.tuning.parts import Only, choose

What = Literal["layers", "heads", "neurons"]
PART = {"heads": "attn.z", "neurons": "mlp.neurons"}


def importance(
    model: Model, data: Rationales | Encoded, what: What = "neurons", *, batch: int = 16
) -> dict[int, Tensor]:
    """How much the loss hangs on each unit of the last stack (see the module): by layer, [unit], of layers one number each.

    >>> importance(model, data, "heads")
    {0: tensor([...]), 1: tensor([...])}
    """
    one_of(what, What, "what=")
    encoded = data if isinstance(data, Encoded) else Encoded(model, data)
    stack, total = model.anatomy.stacks[-1], dict[int, Tensor]()
    own = choose(model, slice(None)) if what == "layers" else None
    here = own.model if own is not None else model
    sites = (
        []
        if what == "layers"
        else [s for b in stack.blocks for s in model.sites(Site(PART[what], b.index, stack.name))]
    )
    with torch.enable_grad():
        for p in own.parameters.values() if own is not None else ():
            p.requires_grad_(True)
        for start in range(0, len(encoded), batch):
            rows = encoded.batch(range(start, min(start + batch, len(encoded))))
            opened = [Opened(site) for site in sites]
            seen = Pass(here, rows, encoded, edits=opened)
            loss = rows.by_row(seen.task).sum() if sites else seen.task.sum() / len(encoded)
            if own is not None:
                loss.backward(inputs=list(own.parameters.values()))
                continue
            values = [each.put[-1] for each in opened]
            for site, a, g in zip(sites, values, torch.autograd.grad(loss, values), strict=True):
                along = (a * g).detach().float()
                along = along.sum(tuple(k for k in range(1, along.ndim) if k != 2)).abs().sum(0).cpu() / len(encoded)
                layer = int(str(site.layer))
                total[layer] = total[layer] + along if layer in total else along
    for b in stack.blocks if own is not None else ():
        assert own is not None
        met = [(p.detach(), p.grad) for n, p in own.parameters.items() if n.startswith(f"{b.module}.")]
        total[b.index] = torch.stack([(p * g).abs().sum() for p, g in met if g is not None]).sum()[None].cpu()
    return total


def chosen(
    scores: Mapping[int, Tensor], what: What, share: float, which: Literal["found", "random", "least"], seed: int = 0
) -> Only:
    """The `share` of the units (at least one) with the largest or least scores, or random ones, as `Only`.

    >>> chosen({0: torch.tensor([1.0, 3.0]), 1: torch.tensor([2.0, 0.0])}, "heads", 0.5, "found").heads
    {0: [1], 1: [0]}
    """
    units = [(layer, u) for layer, own in scores.items() for u in range(len(own))]
    values = torch.cat([own.float() for own in scores.values()])
    n = max(1, round(share * len(units)))
    if which == "random":
        order = torch.randperm(len(units), generator=torch.Generator().manual_seed(seed))
    else:
        order = values.argsort(descending=which == "found", stable=True)
    picked: dict[int, list[int]] = {}
    for k in sorted(order[:n].tolist()):
        picked.setdefault(units[k][0], []).append(units[k][1])
    if what == "layers":
        return Only(layers=list(picked))
    return Only(heads=picked) if what == "heads" else Only(neurons=picked)


@dataclass(frozen=True, eq=False)
class Compared:
    """What `compare_parts` gave: the `result`, and each arm's `models` and `only` at the first seed."""

    result: Result
    models: Mapping[str, Model] = field(repr=False)
    only: Mapping[str, Any] = field(repr=False)

    def __repr__(self) -> str:
        return f"<Compared: {self.result.title}>"


@technique
def compare_parts(
    model: Model, data: Rationales, objectives: Any = (), *, what: What = "neurons", share: float = 0.05, found: Only | None = None,
    test: Rationales | None = None, shifts: Mapping[str, Rationales] | None = None, seeds: Sequence[int] = (0, 1, 2), steps: int = 60,
    batch: int = 16, learning_rate: float = 3e-4, head_learning_rate: float | None = None, weight_decay: float = 0.01, warmup: int = 5,
    clip: float | None = 1.0, truncate: int | None = None,
) -> Compared:  # fmt: skip
    """Train only what matters most, as many random units, the least, the head alone, and all: which arm is worth it?

    `what` are layers, heads or neurons of the last stack, `share` of them is trained; `found` says which, where tracing said it
    (by default importance does). Other options as in `fit`. Gives over `arm` ("all", "found", "random", "least", "head"): `accuracy`
    [arm, split] with `low` and `high` over seeds (over texts where there is one), `trained` (entries that may change), `changed` (tensors outside
    the choice that did: 0), `cost` (CPU time of a step over that of all). The random arm is drawn anew for each seed.

    >>> compare_parts(model, data, what="layers", share=0.5, test=other, seeds=[0], steps=2)
    <Compared: ...>
    """
    if not among(what, What) or not 0 < share < 1:
        raise InputError(
            f"what={what!r}, share={share!r}: expected one of {', '.join(get_args(What))}, and a share between 0 and 1"
        )
    encoded, given = Encoded(model, data, truncate), parts(objectives)
    for each in given:
        each.check(model, encoded)
    splits = {"test": Encoded(model, test, truncate) if test is not None else encoded}
    splits |= {name: Encoded(model, each, truncate) for name, each in (shifts or {}).items()}
    scores = importance(model, encoded, what, batch=batch)
    options = (steps, batch, 1, learning_rate, head_learning_rate, weight_decay, warmup, clip)
    fixed: dict[str, Any] = {
        "all": slice(None), "found": found or chosen(scores, what, share, "found"), "random": None,
        "least": chosen(scores, what, share, "least"), "head": Only(),
    }  # fmt: skip
    name = "objective" if given else "plain"
    met: dict[tuple[str, int], dict[str, np.ndarray]] = {}
    changed, only, models, fits = dict.fromkeys(fixed, 0), dict[str, Any](), dict[str, Model](), dict[str, Fit]()
    for seed in seeds:
        for arm, own in fixed.items():
            own = chosen(scores, what, share, "random", seed) if arm == "random" else own
            settings = Settings(model, encoded, own, *options)
            measures, made, moved, *_ = run_arms(settings, {name: given}, splits, (), [seed])
            met[arm, seed] = measures[name, seed].right
            changed[arm] += len(moved)
            if seed == seeds[0]:
                models[arm], only[arm], fits[arm] = made[name], own, Fit(settings, given, seed)
    accuracy = np.array([[[met[a, s][n].mean() for n in splits] for s in seeds] for a in fixed])
    low, high = np.zeros((2, len(fixed), len(splits)))
    for i, a in enumerate(fixed):
        for j, n in enumerate(splits):
            low[i, j], high[i, j] = interval(
                accuracy[i, :, j] if len(seeds) > 1 else met[a, seeds[0]][n], 0, within=(0, 1)
            )
    cost = timed(fits, "all")
    frame = xr.Dataset(
        {
            "accuracy": (("arm", "split"), accuracy.mean(1)), "low": (("arm", "split"), low), "high": (("arm", "split"), high),
            "trained": ("arm", [_entries(fits[a]) for a in fixed]), "changed": ("arm", list(changed.values())),
            "cost": ("arm", [cost[a] for a in fixed]),
        },
        {"arm": list(fixed), "split": list(splits)},
    )  # fmt: skip
    title = _said(frame, what, share, len(splits["test"]) * len(seeds))
    return Compared(Result(frame, kind="parts", title=title), models, only)


def _entries(fit: Fit) -> int:
    own = fit.chosen
    return sum(int(own.masks[n].sum()) if n in own.masks else p.numel() for n, p in own.parameters.items())


def _said(frame: xr.Dataset, what: str, share: float, texts: int) -> str:
    worst = frame["accuracy"].min("split") if frame.sizes["split"] > 1 else frame["accuracy"].isel(split=0)
    at = {a: float(worst.sel(arm=a)) for a in frame["arm"].values.tolist()}
    error = np.sqrt(max(at["found"] * (1 - at["found"]), 0.04) / texts)
    where = "on the worst split" if frame.sizes["split"] > 1 else "on the test texts"
    told = f"{share:.0%} of the {what}, found {at['found']:.2f}, random {at['random']:.2f}, least {at['least']:.2f}; all {at['all']:.2f}, the head alone {at['head']:.2f} ({where})"
    others = max(at["random"], at["least"])
    said = "Found does not win" if others >= at["found"] - 1.4 * error else "Found wins over random ones"
    said += "; something outside changed" if int(frame["changed"].sum()) else ""
    return f"{said}: {told}"
