"""Are prompts with absent tokens still prompts the model knows?

A faithfulness figure is read off altered prompts. Where these lie far from anything the model was trained on, it may
answer as it does because they are strange, not because a word is gone (Hooker et al. 2019). Prompts are compared where
they enter the middle block, by the mean of the residual over positions:

    d(x) = distance to the nearest clean prompt other than the one x was made of
    outside = share of altered prompts with d larger than 95 % of clean prompts have

About 0.05 means no different from clean text; near 1 means every altered prompt is unlike all clean ones.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr

from pellucid.attribution.absence import absence
from pellucid.attribution.case import Case
from pellucid.attribution.evaluation.faithfulness import counts
from pellucid.corpus import read_each
from pellucid.errors import InputError
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

ABSENT = (0.1, 0.2, 0.5, 1.0)
FEWEST = 10  # prompts, below which there is no telling what is far
WARN = 0.5
NOTHING = BoundMetric("nothing", None, None, lambda z: z.flatten(1)[:, 0])  # no answer is asked: prompts are compared


@technique
def distribution_shift(
    model: Model,
    prompts: Sequence[Any],
    *,
    players: Any = "token",
    replacement: Any = None,
    reference: Any = None,
    absent: Sequence[float] = ABSENT,
    seed: int = 0,
) -> Result:
    """How far prompts lie from clean ones when a share of their players, drawn at random, is absent.

    Gives `outside` [absent] (see above) and `distance` [absent], the median of d over that of clean prompts. Warns where
    more than half of the prompts lie outside with half of their tokens gone. InputError for fewer than ten prompts.
    """
    if len(prompts) < FEWEST:
        raise InputError(f"{len(prompts)} prompts: expected {FEWEST} or more to say what is far from clean text")
    read_each(model, list(prompts))
    rng = np.random.default_rng(seed)
    clean, altered, name = [], [], ""
    for prompt in prompts:
        case = Case.of(model, prompt, NOTHING)
        world = absence(case, players, replacement, reference=reference, draws=1, seed=seed)
        n, name = len(world.players), world.name
        order = rng.permutation(n)
        ks = [int(counts(n, (share,))[0]) for share in absent]
        present = torch.ones(len(ks) + 1, n, dtype=torch.bool)
        for row, k in zip(present[1:], ks, strict=True):
            row[torch.from_numpy(order[:k])] = False
        found = world.vectors(present)
        clean.append(found[0])
        altered.append(found[1:])
    far = torch.cdist(torch.stack(altered, 1), torch.stack(clean))  # [absent, prompt, clean]
    own = torch.cdist(torch.stack(clean), torch.stack(clean))
    itself = torch.eye(len(clean), dtype=torch.bool)
    here = own.masked_fill(itself, torch.inf).amin(1).numpy()
    there = far.masked_fill(itself, torch.inf).amin(2).numpy()
    outside = (there > np.quantile(here, 0.95)).mean(1)
    half = [share for share, out in zip(absent, outside, strict=True) if share <= 0.5 and out > WARN]
    if half:
        warnings.warn(
            f"with {min(half):.0%} of the tokens taken away by {name!r}, most prompts lie outside the clean ones: what "
            "faithfulness says there may be about strange prompts; compare another replacement",
            stacklevel=2,
        )
    data = xr.Dataset(
        {"outside": ("absent", outside), "distance": ("absent", np.median(there, 1) / np.median(here))},
        coords={"absent": list(absent)},
        attrs={"replacement": name, "prompts": len(prompts)},
    )
    return Result(data, kind="distribution shift", title=f"Prompts with tokens taken away by {name!r}")
