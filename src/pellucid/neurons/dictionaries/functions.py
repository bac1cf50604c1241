"""Which features are on, and how strongly, given what the encoder reads?

Every sparse dictionary has a linear encoder; they differ in what becomes of its output u, feature by feature:

    ReLU       f = max(u, 0)                                       Bricken et al. 2023
    TopK       f = max(u, 0) for the k largest u, else 0           Gao et al. 2024
    JumpReLU   f = u where u > threshold (>= 0), else 0            Rajamanoharan et al. 2024b
    Gated      f = max(u exp(r) + shift, 0) where u > 0, else 0    Rajamanoharan et al. 2024a

The paper's gated form has two biases, of the gate and of the magnitude. Here the encoder's bias is that of the gate and
shift = b_magnitude - b_gate exp(r), which is the same function.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Activation(Protocol):
    """Maps what the encoder reads, [..., features], to the features' activations, [..., features]."""

    def __call__(self, u: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class ReLU:
    def __call__(self, u: Tensor) -> Tensor:
        return u.relu()


@dataclass(frozen=True)
class TopK:
    """
    >>> TopK(2)(torch.tensor([3.0, -1.0, 2.0, 1.0]))
    tensor([3., 0., 2., 0.])
    """

    k: int

    def __call__(self, u: Tensor) -> Tensor:
        values, index = u.topk(min(self.k, u.shape[-1]), sorted=False)
        return torch.zeros_like(u).scatter(-1, index, values.relu())


@dataclass(frozen=True, eq=False)
class JumpReLU:
    """threshold: [features]."""

    threshold: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        return u.relu() * (u > self.threshold)


@dataclass(frozen=True, eq=False)
class Gated:
    """rescale (the paper's r_mag) and shift: [features]."""

    rescale: Tensor
    shift: Tensor

    def __call__(self, u: Tensor) -> Tensor:
        return (u * self.rescale.exp() + self.shift).relu() * (u > 0)
