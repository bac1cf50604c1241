"""Weights that are exactly 0: how many can go, and what does it cost?

SparseWeights    after each update all but the largest weights of every matrix are set to 0; the share that is 0 grows to its target
                 over the first half of the steps, s (1 - (1 - 2t)^3) (Zhu and Gupta 2017), and the rest is retraining. A weight may come back
                 by growing above the threshold. Zeros are zeros in the saved file
                 control: the same share, chosen at random once and for all
WeightL1         mean |w| / sqrt(mean w^2), mean over matrices: .8 of normal ones; many small weights, and hardly a zero

`pruned` cuts a model once without training, as a change that can be undone. `weight_sparsity` has all three in one table: cut
after plain training, cut while training, cut at random while training.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.changed import Replaced
from pellucid.errors import InputError, Refused, among
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique
from pellucid.tuning.data import Encoded, Rationales
from pellucid.tuning.fit import Settings, run_arms
from pellucid.tuning.measuring import measured
from pellucid.tuning.objective import Objective, Pass, check_trained

Choice = Literal["magnitude", "random"]


def matrices(model: Model, layers: Sequence[int] | None = None) -> list[str]:
    """Names of the matrices inside the blocks (of all stacks, or some layers of the last)."""
    stacks = model.anatomy.stacks
    blocks = [b for s in stacks for b in s.blocks] if layers is None else [stacks[-1].blocks[i] for i in layers]
    inside = tuple(f"{b.module}." for b in blocks)
    named = [(n, p) for n, p in model.module.named_parameters() if n.startswith(inside)]
    return [name for name, p in named if p.ndim == 2 and p.is_floating_point()]


def kept(name: str, w: Tensor, share: float, by: Choice, seed: int) -> Tensor:
    """Which entries stay when `share` of them go."""
    gone = int(share * w.numel())
    if by == "magnitude":
        scores = w.detach().float().abs()
    else:
        drawn = torch.Generator().manual_seed(zlib.crc32(name.encode()) + seed)
        scores = torch.rand(w.shape, generator=drawn).to(w.device)
    mask = torch.ones(w.numel(), dtype=torch.bool, device=w.device)
    mask[scores.flatten().topk(gone, largest=False).indices] = False
    return mask.reshape(w.shape)


@dataclass(frozen=True)
class SparseWeights(Objective):
    """`share` of the entries of every trained matrix in `layers` (None: all blocks) end as 0 (see the module). No loss of its own.

    >>> SparseWeights(0.9).by
    'magnitude'
    """

    share: float = 0.9
    layers: Sequence[int] | None = None
    by: Choice = field(default="magnitude", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < 1 or not among(self.by, Choice):
            raise InputError(
                f"share={self.share!r}, by={self.by!r}: expected a share between 0 and 1, and 'magnitude' or 'random'"
            )

    def control(self) -> Objective | None:
        return replace(self, by="random")

    def check(self, model: Model, data: Encoded) -> None:
        check_trained(model, matrices(model, self.layers), self.name)

    def after(self, model: Model, parameters: Mapping[str, Tensor], done: float, seed: int) -> None:
        share = self.share * (1 - (1 - min(1.0, 2 * done)) ** 3)
        with torch.no_grad():
            for name in matrices(model, self.layers):
                if name in parameters:
                    w = parameters[name]
                    w.mul_(kept(name, w, share, self.by, seed))  # in place: the optimiser holds this tensor

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class WeightL1(Objective):
    """Many middling weights cost, few large ones do not (see the module); has no scale, as norms do not care for one.

    >>> WeightL1(weight=0.1).layers
    """

    layers: Sequence[int] | None = None

    def check(self, model: Model, data: Encoded) -> None:
        check_trained(model, matrices(model, self.layers), self.name)

    def loss(self, seen: Pass, generator: torch.Generator) -> Tensor:
        named, found = dict(seen.model.module.named_parameters()), []
        for name in matrices(seen.model, self.layers):
            w = named[name].float()
            found.append(w.abs().mean() / w.square().mean().sqrt().clamp_min(1e-12))
        return torch.stack(found).mean()

    def __hash__(self) -> int:
        return hash(repr(self))


def pruned(
    model: Model, share: float, layers: Sequence[int] | None = None, *, by: Choice = "magnitude", seed: int = 0
) -> Model:
    """The model with `share` of the entries of every matrix of its blocks set to 0, once and without training; `.undo()` gives it back.

    >>> pruned(model, 0.5)
    <Model BertForSequenceClassification + ...: BertForSequenceClassification, 2 layers, ...>
    """
    if not 0 <= share < 1 or not among(by, Choice):
        raise InputError(
            f"share={share!r}, by={by!r}: expected a share of at least 0 and below 1, and 'magnitude' or 'random'"
        )
    named = dict(model.module.named_parameters())
    names = matrices(model, layers)
    if not names:
        raise Refused(f"{model.name} has no plain matrix in these blocks (quantised?): open it in float")
    return model.changed(
        [Replaced(n, named[n].detach() * kept(n, named[n], share, by, seed), ties="together") for n in names]
    )


@torch.no_grad()
def weight_zeros(model: Model, layers: Sequence[int] | None = None) -> float:
    """The share of exact zeros among the entries of the blocks' matrices.

    >>> weight_zeros(tuned.model)
    0.0
    """
    named = dict(model.module.named_parameters())
    counts = [(int((named[n] == 0).sum()), named[n].numel()) for n in matrices(model, layers)]
    return sum(a for a, _ in counts) / max(1, sum(b for _, b in counts))


@technique
def weight_sparsity(
    model: Model, data: Rationales, *, shares: Sequence[float] = (0.5, 0.8, 0.9), test: Rationales | None = None, layers: Any = None,
    seeds: Sequence[int] = (0,), steps: int = 60, batch: int = 16, learning_rate: float = 3e-4, head_learning_rate: float | None = None,
    weight_decay: float = 0.01, warmup: int = 5, clip: float | None = 1.0, truncate: int | None = None,
) -> Result:  # fmt: skip
    """Accuracy with so many weights of the blocks set to 0; options as in `fit`.

    Gives over [`share`, `way`] `accuracy` and `zeros`, the share of exact zeros that was counted, with ways "cut" (after plain training,
    none afterwards), "retrained" (by magnitude, while training) and "random" (chosen at random, while training); `plain` is the
    accuracy with all weights, `low` and `high` those of plain training over seeds, or over texts.

    >>> weight_sparsity(model, data, shares=[0.5, 0.9], test=other, steps=2).accuracy
    <xarray.DataArray 'accuracy' (share: 2, way: 3)>...
    """
    encoded = Encoded(model, data, truncate)
    splits = {"test": Encoded(model, test, truncate) if test is not None else encoded}
    each = [(float(s), SparseWeights(float(s))) for s in shares]
    if not each:
        raise InputError("shares=[]: expected shares between 0 and 1")
    each[0][1].check(model, encoded)
    settings = Settings(
        model, encoded, layers, steps, batch, 1, learning_rate, head_learning_rate, weight_decay, warmup, clip
    )
    arms: dict[str, tuple[Objective, ...]] = {"plain": ()}
    for s, objective in each:
        arms |= {f"retrained {s:g}": (objective,), f"random {s:g}": (replace(objective, by="random"),)}
    ways = ("cut", "retrained", "random")
    accuracy, zeros = np.zeros((2, len(each), len(ways)))
    plain = []
    for seed in seeds:
        found, models, *_ = run_arms(settings, arms, splits, (), [seed])
        right = found["plain", seed].right["test"]
        plain.append(float(right.mean()))
        for i, (s, _) in enumerate(each):
            cut = pruned(models["plain"], s)
            mine = measured(cut, encoded, splits, (), (), seed).right["test"]
            accuracy[i, 0] += float(mine.mean()) / len(seeds)
            zeros[i, 0] += weight_zeros(cut) / len(seeds)
            for k, way in enumerate(ways[1:], 1):
                accuracy[i, k] += float(found[f"{way} {s:g}", seed].right["test"].mean()) / len(seeds)
                zeros[i, k] += weight_zeros(models[f"{way} {s:g}"]) / len(seeds)
    frame = xr.Dataset(
        {"accuracy": (("share", "way"), accuracy), "zeros": (("share", "way"), zeros), "plain": float(np.mean(plain))},
        {"share": [s for s, _ in each], "way": list(ways)},
    )
    whole = float(np.mean(plain))
    error = float(np.sqrt(max(whole * (1 - whole), 0.04) / len(splits["test"])))
    frame.attrs["standard_error"] = error
    return Result(frame, kind="weight_sparsity", title=_said(frame, error))


def _said(frame: xr.Dataset, error: float) -> str:
    plain, a = float(frame["plain"]), frame["accuracy"]
    good = [float(s) for s in frame["share"] if float(a.sel(share=s, way="retrained")) >= plain - 2 * error]
    if not good:
        return f"No share was free: {float(a.sel(way='retrained').max()):.2f} at best, {plain:.2f} with all weights"
    at = max(good)
    own, cut, drawn = (float(a.sel(share=at, way=way)) for way in ("retrained", "cut", "random"))
    said = f"{at:.0%} of the weights are 0 at accuracy {own:.2f} (all weights {plain:.2f}; cut without retraining {cut:.2f}, random {drawn:.2f})"
    if drawn >= own - error:
        return f"Which weights go does not matter: {said}"
    return f"Retraining bought nothing: {said}" if cut >= own - error else said
