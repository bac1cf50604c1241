"""What knows nothing: models, directions and labels that a finding must beat before it means anything.

Shuffled     every weight matrix with its entries in random order: the same distributions, nothing learned (the placebo of
             probes and of causal abstraction)
Redrawn      weights drawn anew from a normal distribution with each tensor's own mean and deviation (Adebayo et al. 2018)
directions   drawn from the normal distribution, so in no direction more than in another, at a given norm
labels       in random order, also within groups, so that nothing but chance ties them to the examples

Models are changed models (`pellucid.changed`): the user's own keeps every bit, and the change prints with the results.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from pellucid.changed import Change, change_parameter, slots, weights
from pellucid.errors import InputError
from pellucid.model import Model

Label = TypeVar("Label")


@dataclass(frozen=True, eq=False, repr=False)
class Shuffled(Change):
    """The entries of every weight matrix in random order; parameters named in `keep` stay as they are."""

    seed: int = 0
    keep: tuple[str, ...] = ()

    def apply(self, tree: nn.Module) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        known = slots(tree)
        kept = {id(getattr(*known[name])) for name in self.keep}

        def value(old: Tensor) -> Tensor:
            order = torch.randperm(old.numel(), generator=generator).to(old.device)
            return old.flatten()[order].view_as(old)

        for name in weights(tree):
            tensor = getattr(*known[name])
            if tensor.ndim > 1 and id(tensor) not in kept:
                change_parameter(tree, name, value, "together")


@dataclass(frozen=True, eq=False, repr=False)
class Redrawn(Change):
    """Parameters (all by default) drawn anew: normal, with each tensor's own mean and deviation."""

    parameters: tuple[str, ...] | None = None
    seed: int = 0

    def apply(self, tree: nn.Module) -> None:
        generator = torch.Generator().manual_seed(self.seed)

        def value(old: Tensor) -> Tensor:
            own = old.float()
            return torch.randn(old.shape, generator=generator).to(own) * own.std() + own.mean()

        known = slots(tree)
        for name in weights(tree) if self.parameters is None else self.parameters:
            if getattr(*known[name]).numel() > 1:
                change_parameter(tree, name, value, "together")


def shuffled(model: Model, seed: int = 0, keep: Iterable[str] = ()) -> Model:
    """The model with the entries of every weight matrix in random order, but for the parameters named in `keep`."""
    return model.changed(Shuffled(seed, tuple(keep)))


def redrawn(model: Model, parameters: Iterable[str] | None = None, seed: int = 0) -> Model:
    """The model with parameters (by name; all by default) drawn anew from their own mean and deviation."""
    return model.changed(Redrawn(None if parameters is None else tuple(parameters), seed))


def random_directions(n: int, like: Tensor | int, *, norm: float | Tensor = 1.0, seed: int = 0) -> Tensor:
    """[n, width] directions of length `norm` (a number, or one for each), as long as the last dimension of `like` and on its
    device, in its dtype; drawn on the CPU, so the same everywhere.

    >>> random_directions(3, 4, norm=2.0).norm(dim=1)
    tensor([2., 2., 2.])
    """
    width = like if isinstance(like, int) else like.shape[-1]
    drawn = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    drawn = torch.nn.functional.normalize(drawn, dim=1) * torch.as_tensor(norm, dtype=drawn.dtype).reshape(-1, 1).cpu()
    return drawn if isinstance(like, int) else drawn.to(like)


def shuffled_labels(
    labels: Sequence[Label] | np.ndarray,
    seed: int | np.random.Generator = 0,
    *,
    within: Sequence[Hashable] | None = None,
) -> np.ndarray:
    """Labels in random order; with `within` (a group for each label) each group's among themselves. [example]"""
    found: Any = np.array(labels)
    if within is not None and len(within) != len(found):
        raise InputError(f"{len(found)} labels and {len(within)} groups: expected one group for each label")
    rng = np.random.default_rng(seed)
    if within is None:
        return rng.permutation(found)
    for group in dict.fromkeys(within):
        own = np.array([i for i, other in enumerate(within) if other == group])
        found[own] = found[rng.permutation(own)]
    return found
