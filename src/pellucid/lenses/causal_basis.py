"""Along which directions of a layer does its lens (and so, the model) change its answer most?

The influence of a unit direction v is how far predictions move when the states' part along it is replaced by its mean:

    sigma(v) = E_h KL( f(h) || f(r(h, v)) ),     r(h, v) = h + <mean - h, v> v

(Belrose et al. 2023, section 4.1). The causal basis is found greedily: v_1 maximises sigma, v_2 maximises it in the
orthogonal complement of v_1, and so on. f is the layer's lens. Whether the model itself uses a direction is another
question: `ablation` measures the same divergence by running the model with the direction replaced.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.engine.edits import Replace
from pellucid.errors import InputError
from pellucid.lenses.logit_lens import unembed
from pellucid.lenses.tuned_lens import TunedLens
from pellucid.model import Model
from pellucid.results import Provenance, Result

Lens = Callable[[Tensor], Tensor]  # states [n, d] -> log-probabilities [n, vocabulary]


def causal_basis(
    model: Model,
    prompts: Any,
    site: str,
    *,
    lens: TunedLens | None = None,
    size: int = 8,
    steps: int = 60,
    states: int = 256,
    restarts: int = 4,
    seed: int = 0,
) -> Result:
    """The `size` directions of a residual along which its lens (tuned, or the logit lens) is most sensitive.

    Influence is measured on at most `states` positions of the prompts. Each direction is sought by projected gradient
    ascent from `restarts` starting points: the states' main directions and random ones (`seed`). Gives `influence` [rank] in
    nats, `direction` [rank, d_model], and two things to hold them against: `random`, the mean influence of random
    directions, and `used` [rank], KL of the model's own predictions when the direction is replaced in the running model
    (`used_random` for random ones). InputError for an unknown site or a size beyond the width.
    """
    if lens is not None:
        lens.check(model)
    name = str(model.sites(site)[0])
    inputs = model.inputs(prompts)
    with torch.no_grad():
        run = model.run(inputs, keep=[name])
    real = inputs.stream("").mask.bool()
    h = run.tensor(name)[real].float()
    generator = torch.Generator().manual_seed(seed)
    h = h[torch.randperm(len(h), generator=generator)[:states]]
    if not 1 <= size <= h.shape[1]:
        raise InputError(f"a basis of {size} directions in a space of {h.shape[1]}: give a size from 1 to {h.shape[1]}")
    mean = h.mean(0)

    def read(x: Tensor) -> Tensor:
        moved = x if lens is None else lens.translate(name, x)
        return unembed(model, moved[None].to(run.tensor(name).dtype))[0].float().log_softmax(-1)

    basis = torch.zeros(0, h.shape[1])
    influence: list[float] = []
    for _ in range(size):
        v, value = _strongest(read, h, mean, basis, steps, restarts, generator)
        basis, influence = torch.cat([basis, v[None]]), [*influence, value]
    chance = torch.nn.functional.normalize(torch.randn(8, h.shape[1], generator=generator), dim=1)
    with torch.no_grad():
        random = float(torch.stack([_influence(read, h, mean, v) for v in chance]).mean())
        used = [_used(model, inputs, name, mean, v, real) for v in basis]
        used_random = float(np.mean([_used(model, inputs, name, mean, v, real) for v in chance]))
    data = xr.Dataset(
        {"influence": ("rank", np.array(influence)), "direction": (("rank", "d_model"), basis.numpy()),
         "used": ("rank", np.array(used)), "random": random, "used_random": used_random},
        coords={"rank": range(size)}, attrs={"site": name, "unit": "nats"},
    )  # fmt: skip
    provenance = Provenance(
        "causal_basis", model.name, digest=model.digest, inputs=list(inputs.texts), seed=seed,
        arguments={"site": name, "size": size, "steps": steps, "states": states, "tuned": lens is not None},
    )  # fmt: skip
    return Result(data, kind="causal basis", title=f"Causal basis of {name}", provenance=provenance)


def _influence(read: Lens, h: Tensor, mean: Tensor, v: Tensor) -> Tensor:
    before = read(h)
    after = read(h + ((mean - h) @ v)[:, None] * v)
    return (before.exp() * (before - after)).sum(-1).mean()


def _strongest(
    read: Lens, h: Tensor, mean: Tensor, basis: Tensor, steps: int, restarts: int, generator: torch.Generator
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


def _used(model: Model, inputs: Any, name: str, mean: Tensor, v: Tensor, real: Tensor) -> float:
    """KL of the model's predictions, in nats, when its states' part along v is replaced by its mean."""
    edit = Replace(name, lambda x: x + ((mean.to(x) - x) @ v.to(x))[..., None] * v.to(x))
    before = model.run(inputs).logits[real].float().log_softmax(-1)
    after = model.run(inputs, edits=[edit]).logits[real].float().log_softmax(-1)
    return float((before.exp() * (before - after)).sum(-1).mean())
