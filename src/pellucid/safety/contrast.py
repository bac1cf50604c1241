"""Which direction tells two kinds of prompts apart, at each layer, and is it more than chance?

Of values x at one site (of the last token, or the mean over tokens but the first), plus and minus:

    mean          mean(x+) - mean(x-)                                       CAA (Rimsky et al. 2024), Arditi et al. 2024
    pca           first right singular vector of the differences x+ - x-    pairs; RepE (Zou et al. 2023)
    pca_centred   the same after their mean, the contrast itself, was subtracted: what repeng's default `pca_diff` computes
    lda           (shrunk covariance within classes)^-1 (mean(x+) - mean(x-)), Ledoit and Wolf's shrinkage
    logistic      the weights of a logistic probe

The sign is that of the mean difference. Beside each direction stand its cosine with the mean difference (no principal component need
find the contrast: single differences are often longer than their mean), how well single differences agree with it, the same for
two halves of the data, and the length of the mean difference when the labels of each pair are drawn by chance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from pellucid.anatomy.sites import Site
from pellucid.corpus import read_each
from pellucid.engine.checkpoint import reading_tensors
from pellucid.engine.edits import left_aligned
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, among, at_least, listed
from pellucid.model import Model
from pellucid.probing.linear import LogisticProbe
from pellucid.results import Result
from pellucid.safety.vector import KEY, Pool, Vector, load_vectors, pooled, save_vectors
from pellucid.technique import technique

Kind = Literal["mean", "pca", "pca_centred", "lda", "logistic"]
LEAST, DRAWS = 4, 200


@dataclass(eq=False)
class Contrast:
    """Directions between two lists of prompts, one at each of `sites`; `kind` and `pool` as the module says.

    After `fit`: `vectors_` by site, each with its `edit`, and `result_`.

    >>> Contrast("mean", sites="layers.8:20.resid_post").fit(model, happy, sad).at(12)
    <Vector mean layers.12.resid_post, layers.12.resid_post, 32 wide, unit ...>
    """

    kind: Kind = "mean"
    sites: str | Sequence[str] = "layers.*.resid_post"
    pool: Pool = "last"
    batch: int = 16
    seed: int = 0
    vectors_: dict[str, Vector] = field(init=False, repr=False)
    result_: Result = field(init=False, repr=False)

    @technique
    def fit(self, model: Model, plus: Any, minus: Any) -> Contrast:
        """Fit on prompts of either kind (texts, ids, chats). Lists of one length are pairs, which PCA needs.

        `result_` over `site`: `cosine` with the mean difference, `size` of the mean difference in `unit`s, with `shuffled`, the 95 %
        point of its size under labels drawn by chance; `agreement`, the mean cosine of single differences with the direction (pairs);
        `halves`, the cosine of the directions of two halves; `unit`, and `unit_with_first` for comparison; `sink`, the share of the
        first token's residual on the direction. InputError for fewer than four prompts of a kind, or one on both sides.
        """
        if not among(self.kind, Kind) or not among(self.pool, Pool):
            raise InputError(f"kind={self.kind!r}, pool={self.pool!r}: expected {get_args(Kind)} and {get_args(Pool)}")
        plus, minus = (listed(n, x, "several prompts") for n, x in (("plus", plus), ("minus", minus)))
        _check(plus, minus, self.kind)
        patterns = [self.sites] if isinstance(self.sites, str) else list(self.sites)
        sites = [site for pattern in patterns for site in model.sites(pattern)]
        seen = Seen.of(model, [*plus, *minus], sites, self.pool, self.batch)
        rng, n, digest = np.random.default_rng(self.seed), len(plus), model.digest
        order = torch.as_tensor(rng.permutation(min(n, len(minus))))
        columns: dict[str, list[float]] = {}
        self.vectors_ = {}
        for i, site in enumerate(map(str, sites)):
            a, b = seen.values[i, :n], seen.values[i, n:]
            mean = a.mean(0) - b.mean(0)
            if not float(mean.norm()) > 0:
                raise InputError(f"both kinds of prompts give the same at {site!r}: there is no direction between them")
            u = direction(self.kind, a, b, self.seed)
            named = f"{self.kind} {site}"
            self.vectors_[site] = v = Vector(site, u, float(seen.unit[i]), seen.first[i], digest, named)
            halves = [direction(self.kind, a[h], b[h], self.seed) for h in (order[::2], order[1::2])]
            paired = len(a) == len(b)
            agree = float(cosine_similarity(a - b, u[None]).mean()) if paired else np.nan
            found = {
                "cosine": float(cosine_similarity(u, mean, 0)), "size": float(mean.norm() / seen.unit[i]),
                "shuffled": _by_chance(a, b, rng) / float(seen.unit[i]), "agreement": agree,
                "halves": float(cosine_similarity(halves[0], halves[1], 0)), "unit": float(seen.unit[i]),
                "unit_with_first": float(seen.with_first[i]), "sink": v.sink,
            }  # fmt: skip
            for key, value in found.items():
                columns.setdefault(key, []).append(value)
        data = xr.Dataset({k: ("site", x) for k, x in columns.items()}, {"site": list(self.vectors_)})
        self.result_ = Result(data, kind="contrast", title=self._title(data))
        return self

    def _title(self, data: xr.Dataset) -> str:
        n = data.sizes["site"]
        weak, aside = int((data["size"] <= data.shuffled).sum()), int((abs(data.cosine) < 0.5).sum())
        said = f"Directions by {self.kind} at {n} sites"
        said += f"; at {weak} the contrast is no longer than chance makes it" if weak else ""
        return said + (f"; at {aside} the direction is not the contrast (cosine below .5)" if aside else "")

    def at(self, site: str | int) -> Vector:
        """The vector at a site, or at the output of a layer by its number."""
        name = f"layers.{site}.resid_post" if isinstance(site, int) else str(Site.parse(site))
        found = [
            v for key, v in self.vectors_.items() if key == name or (isinstance(site, int) and key.endswith(f".{name}"))
        ]
        if len(found) != 1:
            raise InputError(f"there is no vector at {name!r}: there are {', '.join(list(self.vectors_)[:12])}")
        return found[0]

    def check(self, model: Model) -> None:
        """InputError if it was fitted on other weights."""
        next(iter(self.vectors_.values())).check(model)

    def save(self, path: str | Path) -> Path:
        """One safetensors file, tied to the weights."""
        settings = {f.name: getattr(self, f.name) for f in fields(self) if f.init}
        return save_vectors(list(self.vectors_.values()), path, {"settings": settings})

    @classmethod
    def load(cls, path: str | Path) -> Contrast:
        """What `save` wrote, without its `result_`; `check(model)` says whether it belongs to a model."""
        with reading_tensors(path, KEY, "is no saved Contrast") as (about, _):
            made = cls(**about["settings"])
        made.vectors_ = {v.site: v for v in load_vectors(path)}
        return made


def direction(kind: Kind, plus: Tensor, minus: Tensor, seed: int = 0) -> Tensor:
    """[d] of length 1, from values [example, d] of either kind."""
    mean = plus.mean(0) - minus.mean(0)
    if kind in ("pca", "pca_centred"):
        x = plus - minus
        found = torch.linalg.svd(x - x.mean(0) if kind == "pca_centred" else x, full_matrices=False).Vh[0]
    elif kind == "mean":
        found = mean
    else:
        x, y = torch.cat([plus, minus]), [1] * len(plus) + [0] * len(minus)
        if kind == "lda":
            from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

            lda = LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto").fit(x.double().numpy(), y)
            found = torch.as_tensor(lda.coef_[0]).to(x)
        else:
            weight = LogisticProbe(seed=seed).fit(x, y).weight_
            found = weight[:, 1] - weight[:, 0]
    found = normalize(found, dim=0)
    return -found if float(found @ mean) < 0 else found


@dataclass(frozen=True)
class Seen:
    """What prompts give at sites: pooled `values` [site, prompt, d] in float32 on the CPU; mean lengths over tokens without and
    with first ones, [site]; the mean first residual of length 1, [site, d]."""

    values: Tensor
    unit: Tensor
    with_first: Tensor
    first: Tensor

    @classmethod
    def of(
        cls, model: Model, prompts: Sequence[Any], sites: Sequence[Site], pool: Pool = "last", batch: int = 16
    ) -> Seen:
        """Prompts, `batch` at a time; those of one token count as their first and only one."""
        at_least(1, batch=batch)
        read_each(model, list(prompts))
        found: list[Tensor] = []
        sums, counts, first = torch.zeros(len(sites), 2), torch.zeros(2), []
        for start in progress(range(0, len(prompts), batch), "batches of prompts"):
            inputs = model.inputs(list(prompts[start : start + batch]))
            run = model.run(inputs, keep=[str(s) for s in sites], logits=False)
            rows = [left_aligned(*run.everywhere(site)) for site in sites]
            if any(x.ndim != 3 for x, _ in rows) or len({x.shape[2] for x, _ in rows}) > 1:
                raise InputError(
                    "a vector needs sites that hold one vector of equal width for each token, such as layers.*.resid_post"
                )
            x, lengths = torch.stack([each.detach().float().cpu() for each, _ in rows]), rows[0][1].cpu()
            real = (torch.arange(x.shape[2]) < lengths[:, None]).float()
            later = real.clone()
            later[lengths > 1, 0] = 0
            norms = x.norm(dim=-1)
            sums += torch.stack([(norms * later).sum((1, 2)), (norms * real).sum((1, 2))], 1)
            counts += torch.stack([later.sum(), real.sum()])
            first.append(normalize(x[:, :, 0], dim=-1))
            found.append(torch.stack([pooled(each, lengths, pool) for each in x]))
        means = sums / counts
        return cls(torch.cat(found, 1), means[:, 0], means[:, 1], torch.cat(first, 1).mean(1))


@technique
def vector(model: Model, site: str, direction: Any, prompts: Any, *, name: str = "") -> Vector:
    """A direction of your own at a site as a `Vector`: a probe's weights, a dictionary feature's `decoder[i]`, a difference.

    `prompts` are ordinary ones, from which the unit of strength and the first token's residual are taken.
    InputError where the direction is not as wide as the site.

    >>> vector(model, "layers.12.resid_post", dictionary.decoder[7], texts).edit(.3)
    Steer('layers.12.resid_post', vector=<tensor [32]>, strength=..., tokens='-1:')
    """
    if len(found := model.sites(site)) != 1:
        raise InputError(f"{site!r} names {len(found)} sites: a vector belongs to one")
    where = found[0]
    seen = Seen.of(model, [prompts] if isinstance(prompts, str) else list(prompts), [where])
    given = torch.as_tensor(direction)
    if given.shape != seen.first[0].shape:
        raise InputError(f"the direction is {list(given.shape)}, and {site!r} is {seen.first.shape[1]} wide")
    return Vector(str(where), given, float(seen.unit[0]), seen.first[0], model.digest, name)


def _check(plus: Sequence[Any], minus: Sequence[Any], kind: Kind) -> None:
    for name, given in (("plus", plus), ("minus", minus)):
        if len(given) < LEAST:
            raise InputError(f"{name} holds {len(given)} prompts: a direction needs at least {LEAST} of either kind")
    both = set(map(repr, plus)) & set(map(repr, minus))
    if both:
        raise InputError(
            f"{len(both)} prompts stand on both sides, such as {next(iter(both))}: a contrast needs what differs"
        )
    if kind.startswith("pca") and len(plus) != len(minus):
        raise InputError(
            f"{kind!r} needs pairs, and got {len(plus)} and {len(minus)} prompts: take kind='mean', or pairs"
        )


def _by_chance(plus: Tensor, minus: Tensor, rng: np.random.Generator) -> float:
    """The 95 % point of the length of the mean difference where labels are drawn: within pairs, or of all."""
    if len(plus) == len(minus):
        signs = torch.as_tensor(rng.choice([-1.0, 1.0], (DRAWS, len(plus)))).to(plus)
        drawn = signs @ (plus - minus) / len(plus)
    else:
        x = torch.cat([plus, minus])
        share = torch.cat([torch.full((len(plus),), 1 / len(plus)), torch.full((len(minus),), -1 / len(minus))])
        drawn = torch.stack([share[torch.as_tensor(rng.permutation(len(x)))] for _ in range(DRAWS)]) @ x
    return float(drawn.norm(dim=1).quantile(0.95))
