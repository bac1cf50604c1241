"""Attention with exact zeros, and MLPs of which few neurons speak.

sparsemax (Martins and Astudillo 2016) is the nearest distribution to the scores z, entmax 1.5 (Peters et al. 2019) lies between it and softmax:

    sparsemax   p = max(z - t, 0)           entmax 1.5   p = max(z / 2 - t, 0)^2          t such that p adds up to 1

t follows exactly from the sorted scores, so zeros are zeros. Both do not change when a constant is added to z, so they are had from the
pattern the model computes, as the function of log softmax(z): on every family whose pattern is on the map, with its own masks and position
biases; masked keys have softmax 0 and stay 0. Written in plain autograd on the support alone, so second derivatives are right too
(the closed backward with sqrt(p) over all entries fails there).

Zeros are no explanation: what gets sparse is often the sink, so `sparsity` says how much lies on marks; and a plain model cut at test time to
its few largest weights often does as well on short texts (`keep` there).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.edits import Edit, Place
from pellucid.errors import at_least, one_of
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique
from pellucid.tuning.attending import layered
from pellucid.tuning.data import Encoded
from pellucid.tuning.objective import NONE, Objective

Kind = Literal["sparsemax", "entmax15"]
ONE_HOT = 0.9
FAR = 1e4  # below the largest score nothing is in the support


def _shifted(z: Tensor) -> Tensor:
    top = z.amax(-1, keepdim=True)
    return torch.where(top.isfinite(), z - top, 0.0).clamp_min(-FAR)  # a row that is masked throughout becomes uniform


def sparsemax(z: Tensor) -> Tensor:
    """[..., key] the nearest point of the simplex; differentiable twice.

    >>> sparsemax(torch.tensor([1.0, 0.8, -1.0]))
    tensor([0.6000, 0.4000, 0.0000])
    """
    z = _shifted(z)
    with torch.no_grad():
        s = z.sort(-1, descending=True).values
        k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        inside = 1 + k * s > s.cumsum(-1)
        least = s.gather(-1, inside.sum(-1, keepdim=True).clamp_min(1) - 1)
    own = (z >= least).to(z)
    return (z - ((z * own).sum(-1, keepdim=True) - 1) / own.sum(-1, keepdim=True)).clamp_min(0)


def entmax15(z: Tensor) -> Tensor:
    """[..., key] entmax with alpha 1.5; differentiable twice.

    >>> entmax15(torch.tensor([1.0, 1.0, -9.0]))
    tensor([0.5000, 0.5000, 0.0000])
    """
    z = _shifted(z) / 2

    def threshold(x: Tensor, weight: Tensor, n: Tensor) -> Tensor:
        mean = (x * weight).sum(-1, keepdim=True) / n
        spread = ((x - mean).square() * weight).sum(-1, keepdim=True)
        return mean - ((1 - spread).clamp_min(1e-30) / n).sqrt()

    with torch.no_grad():
        s = z.sort(-1, descending=True).values
        k = torch.arange(1, z.shape[-1] + 1, device=z.device, dtype=z.dtype)
        mean, square = s.cumsum(-1) / k, s.square().cumsum(-1) / k
        t = mean - ((1 - k * (square - mean.square())) / k).clamp_min(0).sqrt()
        least = s.gather(-1, (t <= s).sum(-1, keepdim=True).clamp_min(1) - 1)
    own = (z >= least).to(z)
    return (z - threshold(z, own, own.sum(-1, keepdim=True))).clamp_min(0).square()


@dataclass(frozen=True, eq=False, repr=False)
class Sparse(Edit):
    """Attention as sparsemax or entmax 1.5 of the same scores.

    >>> Sparse("layers.0.attn.pattern", "sparsemax").kind
    'sparsemax'
    """

    kind: Kind = "entmax15"

    def new(self, x: Tensor, place: Place) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        z = torch.where(wide > 0, wide, 1.0).log().masked_fill(wide <= 0, -torch.inf)
        made = sparsemax(z) if self.kind == "sparsemax" else entmax15(z)
        return made.to(x.dtype)


@dataclass(frozen=True, eq=False, repr=False)
class Largest(Edit):
    """Only the `k` values of each token that are largest in size; of patterns the k largest of each query, made to add up to what they did.

    >>> Largest("layers.0.mlp.neurons", 8).k
    8
    """

    k: int = 1

    def new(self, x: Tensor, place: Place) -> Tensor:
        least = x.abs().topk(min(self.k, x.shape[-1]), -1).values[..., -1:]
        kept = torch.where(x.abs() >= least, x, 0)
        if str(place.site.part).endswith("pattern"):
            kept = kept * (x.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1e-12))
        return kept


@dataclass(frozen=True)
class SparseAttention(Objective):
    """The model is trained, and from then on run, with sparse attention in `layers` (None: all); has no loss of its own.

    The tuned model runs so under `tuned.edits`. Refused where a layer's pattern is not on the map.

    >>> SparseAttention("sparsemax", layers=[1])
    SparseAttention(weight=1.0, kind='sparsemax', layers=[1])
    """

    kind: Kind = "entmax15"
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of(self.kind, Kind, "kind=")

    def edits(self, model: Model, own: Mapping[str, Tensor] = NONE) -> list[Edit]:
        return [Sparse(site, self.kind) for site in layered(model, "attn.pattern", self.layers)]

    def check(self, model: Model, data: Encoded) -> None:
        self.edits(model)

    def __hash__(self) -> int:
        return hash(repr(self))


@dataclass(frozen=True)
class TopNeurons(Objective):
    """The model is trained, and run, with the `k` largest neurons of each token in `layers` (None: all); has no loss of its own.

    >>> TopNeurons(77).k
    77
    """

    k: int = 64
    layers: Sequence[int] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, k=self.k)

    def edits(self, model: Model, own: Mapping[str, Tensor] = NONE) -> list[Edit]:
        return [Largest(site, self.k) for site in layered(model, "mlp.neurons", self.layers)]

    def check(self, model: Model, data: Encoded) -> None:
        self.edits(model)

    def __hash__(self) -> int:
        return hash(repr(self))


@technique
def sparsity(model: Model, data: Any, *, edits: Sequence[Edit] = (), keep: int | None = None) -> Result:
    """How sparse are attention and neurons on some texts, and where does attention lie? With `keep`, the control: attention cut to so
    many keys a query at test time, without any training (add its accuracy from `right`).

    Over `layer` `zeros` (share of exact zeros among the keys that are no padding; of causal models among those a query sees), `support` (keys
    that are not zero), `entropy` in nats, `marks` (share on marks of the tokenizer), `neuron_zeros`, over [layer, head] `one_hot` (share of queries with .9 or more on one key); and `accuracy`, `right` [text].

    >>> sparsity(tuned.model, data, edits=tuned.edits).zeros
    <xarray.DataArray 'zeros' (layer: 2)>...
    """
    encoded, made = Encoded(model, data), list(edits)
    patterns, neurons = (layered(model, part, None) for part in ("attn.pattern", "mlp.neurons"))
    if keep is not None:
        made += [Largest(site, keep) for site in patterns]
    sums = np.zeros((len(patterns), 5))
    quiet, right = np.zeros((len(neurons), 2)), []
    sure: list[Any] = [0] * len(patterns)
    causal = model.anatomy.stacks[0].causal
    for start in range(0, len(encoded), 32):
        batch = encoded.batch(range(start, min(start + 32, len(encoded))))
        run = model.run(batch.inputs, keep=[*patterns, *neurons], edits=made)
        real = batch.inputs.streams.get("encoder", batch.inputs.stream("")).mask.bool().cpu()
        seen = real[:, None, :] & real[:, :, None]
        seen = seen.tril() if causal else seen
        marks = (~batch.content & real)[:, None, None, :]
        for i, site in enumerate(patterns):
            a = run.tensor(site).float().cpu()
            pairs = seen[:, None].expand_as(a)
            queries = real[:, None].expand(a.shape[:3])
            entropy = -(a * a.clamp_min(1e-30).log()).sum(-1)
            sums[i] += [
                float(((a == 0) & pairs).sum()), float(pairs.sum()), float(entropy[queries].sum()),
                float((a * marks).sum(-1)[queries].sum()), float(queries.sum()),
            ]  # fmt: skip
            sure[i] = sure[i] + ((a.amax(-1) >= ONE_HOT) & queries).sum((0, 2)).numpy()
        for i, site in enumerate(neurons):
            x = run.tensor(site).cpu()[real]
            quiet[i] += [float((x == 0).sum()), float(x.numel())]
        z = batch.read(run.logits)
        right.append((batch.by_row((z.argmax(-1) != batch.answers.to(z.device)).float()) == 0).cpu().numpy())
    zeros, visible, spread, on_marks, rows = sums.T
    variables: dict[str, Any] = {
        "zeros": ("layer", zeros / visible), "support": ("layer", (visible - zeros) / rows), "entropy": ("layer", spread / rows),
        "marks": ("layer", on_marks / rows), "right": ("text", np.concatenate(right).astype(float)),
    }  # fmt: skip
    if len(neurons) == len(patterns):
        variables["neuron_zeros"] = "layer", quiet[:, 0] / quiet[:, 1]
    one_hot = [np.asarray(n) * np.size(n) / r for n, r in zip(sure, rows, strict=True)]
    if len({len(each) for each in one_hot}) == 1:
        variables["one_hot"] = ("layer", "head"), np.stack(one_hot)
    found = xr.Dataset(variables, {"layer": [site.layer for site in patterns]})
    found["accuracy"] = found["right"].mean()
    return Result(
        found, kind="sparsity", title=f"{float(zeros.sum() / visible.sum()):.2f} of all attention is exactly 0"
    )
