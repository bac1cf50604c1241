"""Along which directions of a layer does its lens (and so, the model) change its answer most?

The influence of a unit direction v is how far predictions move when the states' part along it is replaced by its mean:

    sigma(v) = E_h KL( f(h) || f(r(h, v)) ),     r(h, v) = h + <mean - h, v> v

(Belrose et al. 2023, section 4.1). The causal basis is found greedily: v_1 maximises sigma, v_2 maximises it in the
orthogonal complement of v_1, and so on. f is the layer's lens. Whether the model itself uses a direction is another
question: `ablation` measures the same divergence by running the model with the direction replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.edits import Edit, Replace
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.lenses.lens import Lens, lens_sites, logits
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

Reader = Callable[[Tensor], Tensor]  # states [n, d] -> log-probabilities [n, vocabulary]


@technique
def causal_basis(
    model: Model,
    prompts: Any,
    site: str,
    *,
    through: Lens | None = None,
    size: int = 8,
    steps: int = 60,
    states: int = 256,
    restarts: int = 4,
    seed: int = 0,
    edits: Sequence[Edit] = (),
) -> Result:
    """The `size` directions of a residual along which its lens (`through`, or the logit lens) is most sensitive.

    Influence is measured on at most `states` positions of the prompts. Each direction is sought by projected gradient
    ascent from `restarts` starting points: the states' main directions and random ones (`seed`). Gives `influence` [rank] in
    nats, `direction` [rank, d_model], and two things to hold them against: `random`, the mean influence of random
    directions, and `used` [rank], KL of the model's own predictions when the direction is replaced in the running model
    (`used_random` for random ones). `edits` hold in every run. InputError for an unknown site or a size beyond the width.
    """
    if through is not None:
        through.check(model)
    if len(names := lens_sites(model, site)) != 1:
        raise InputError(f"{site!r} names {len(names)} sites: a causal basis is of one")
    (name,) = names
    inputs = model.inputs(prompts)
    with torch.no_grad():
        run = model.run(inputs, keep=[name], edits=edits)
    real = inputs.stream("").mask.bool()
    h = run.tensor(name)[real].float()
    generator = torch.Generator().manual_seed(seed)
    h = h[torch.randperm(len(h), generator=generator)[:states]]
    if not 1 <= size <= h.shape[1]:
        raise InputError(f"a basis of {size} directions in a space of {h.shape[1]}: give a size from 1 to {h.shape[1]}")
    mean = h.mean(0)

    def read(x: Tensor) -> Tensor:
        return logits(model, x, name, through).log_softmax(-1)

    basis = torch.zeros(0, h.shape[1])
    influence: list[float] = []
    for _ in progress(range(size), "causal basis"):
        v, value = _strongest(read, h, mean, basis, steps, restarts, generator)
        basis, influence = torch.cat([basis, v[None]]), [*influence, value]
    chance = torch.nn.functional.normalize(torch.randn(8, h.shape[1], generator=generator), dim=1)
    with torch.no_grad():
        random = float(torch.stack([_influence(read, h, mean, v) for v in chance]).mean())
        used = [_used(model, inputs, edits, name, mean, v, real) for v in basis]
        used_random = float(np.mean([_used(model, inputs, edits, name, mean, v, real) for v in chance]))
    data = xr.Dataset(
        {"influence": ("rank", np.array(influence)), "direction": (("rank", "d_model"), basis.numpy()),
         "used": ("rank", np.array(used)), "random": random, "used_random": used_random},
        coords={"rank": range(size)}, attrs={"site": name, "unit": "nats"},
    )  # fmt: skip
    return Result(data, kind="causal basis", title=f"Causal basis of {name}")


def _influence(read: Reader, h: Tensor, mean: Tensor, v: Tensor) -> Tensor:
    mean, v = mean.to(h), v.to(h)
    before = read(h)
    after = read(h + ((mean - h) @ v)[:, None] * v)
    return (before.exp() * (before - after)).sum(-1).mean()


def _strongest(
    read: Reader, h: Tensor, mean: Tensor, basis: Tensor, steps: int, restarts: int, generator: torch.Generator
) -> tuple[Tensor, float]:
    """Gradient ascent on the sphere in the complement of the basis, with a step that shrinks where it overshoots."""

    def project(v: Tensor) -> Tensor:
        return torch.nn.functional.normalize(v - (v @ basis.T) @ basis, dim=0)

    main = torch.linalg.svd(h - mean, full_matrices=False).Vh[: restarts // 2]
    starts = [*main, *torch.randn(restarts - len(main), h.shape[1], generator=generator)]
    best, most = project(starts[0]), -1.0
    for start in starts:
        v, rate, value = project(start), 0.5, -1.0
        for _ in range(steps):
            v = v.requires_grad_()
            with torch.enable_grad():
                sigma = _influence(read, h, mean, v)
            (slope,) = torch.autograd.grad(sigma, v)
            v, slope, now = v.detach(), slope.detach(), float(sigma.detach())
            if now > most:
                best, most = v, now
            rate = rate * 0.5 if now < value else rate
            value = now
            tangent = slope - (slope @ v) * v
            if rate < 1e-3 or float(tangent.norm()) < 1e-9:
                break
            v = project(v + rate * torch.nn.functional.normalize(tangent, dim=0))
    return best, most


def _used(model: Model, inputs: Any, edits: Sequence[Edit], name: str, mean: Tensor, v: Tensor, real: Tensor) -> float:
    """KL of the model's predictions, in nats, when its states' part along v is replaced by its mean."""
    edit = Replace(name, lambda x: x + ((mean.to(x) - x) @ v.to(x))[..., None] * v.to(x))
    before = model.run(inputs, edits=edits).logits[real].float().log_softmax(-1)
    after = model.run(inputs, edits=[*edits, edit]).logits[real].float().log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())
