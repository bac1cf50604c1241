"""A direction in what a site holds, as a reader: how much of it is there?

    score(h) = h . vector + offset

One class for all that read along a direction: a monitor's probe, a steering vector (`safety.Vector`, which adds the unit its strength is
counted in), the reader of a penalty, standardised on the texts it was fitted on.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from pellucid.controls import random_directions
from pellucid.errors import InputError


@dataclass(frozen=True, eq=False)
class Direction:
    """Reads `values @ vector + offset` at a site: values [..., d] give scores [...], higher for more of it.

    `states` [example, d] are those on which it was standardised, where it was. InputError for values of another width.

    >>> Direction("layers.3.resid_post", torch.ones(2), 0.5)(torch.ones(1, 2))
    tensor([2.5000])
    """

    site: str
    vector: Tensor = field(repr=False)
    offset: float = 0.0
    states: Tensor | None = field(default=None, repr=False, kw_only=True)

    @staticmethod
    def standardised(site: str, vector: Tensor, states: Tensor) -> Direction:
        """Along a direction, with mean 0 and deviation 1 over `states`."""
        own = states.float() @ vector.float()
        scale = own.std().clamp_min(1e-8)
        return Direction(site, vector.float() / scale, float(-own.mean() / scale), states=states)

    @property
    def direction(self) -> Tensor:
        return self.vector

    def __call__(self, values: Tensor) -> Tensor:
        vector = torch.as_tensor(self.vector).to(values)
        if vector.ndim != 1 or values.shape[-1] != len(vector):
            raise InputError(
                f"a direction of {list(vector.shape)} numbers cannot read {values.shape[-1]} at {self.site!r}"
            )
        return values @ vector + self.offset

    def random(self, seed: int = 0) -> Direction:
        """The control: another direction of the same length, standardised on the same states where this is."""
        drawn = random_directions(1, len(self.vector), norm=float(self.vector.norm()), seed=seed)[0]
        return replace(self, vector=drawn) if self.states is None else self.standardised(self.site, drawn, self.states)
