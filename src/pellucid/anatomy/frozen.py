"""Which affine map is this step at this point, once the scale of its norms is held?

A norm divides by a size of its input, so it is not linear; with that size held at its value on one input it
is:

    norm(x) = gain * (x - mean(x)) * scale(x) + offset          (without the mean for RMS norms)

Gain, offset, centring and scale are found by calling the norm, whatever its class, and the form is checked on
the input itself. Direct logit attribution pushes contributions through this map; folded weights use its gain.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.anatomy.checks import TOLERANCE
from pellucid.errors import Refused

Map = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """gain [d] * (x - mean(x) if centred) * scale [..., 1] + offset [d]"""

    gain: Tensor
    offset: Tensor
    centred: bool
    scale: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        wide = x.double()
        wide = wide - wide.mean(-1, keepdim=True) if self.centred else wide
        return (self.gain * wide * self.scale + self.offset).to(x.dtype)


def freeze(norm: Map, x: Tensor) -> FrozenNorm | None:
    """The norm with its scale held at `x` [..., d]; None if it has not the form of a norm there.

    >>> norm = torch.nn.LayerNorm(4)
    >>> x = torch.tensor([[1.0, 2.0, 3.0, 6.0]])
    >>> frozen = freeze(norm, x)
    >>> frozen.centred, torch.allclose(frozen(x), norm(x), atol=1e-6)
    (True, True)
    """
    d = x.shape[-1]
    signs = torch.ones(d, device=x.device, dtype=x.dtype)
    signs[1::2] = -1
    if d % 2:
        signs[1] = -2  # the mean must be zero
    probe = 100 * signs / signs.square().mean().sqrt()  # so large that the norm's epsilon does not count
    with torch.no_grad():
        if norm(x).shape != x.shape:
            return None
        row = probe.view(*[1] * (x.ndim - 1), d)
        up, down, moved = (norm(each).flatten() for each in (row, -row, row + 100))
        given, made = x.double(), norm(x).double()
    offset, gain = (up + down).double() / 2, (up - down).double() / 2 / (probe.double() / 100)
    tolerance = 3 * TOLERANCE.get(x.dtype, 4e-2)
    centred = _near(moved.double(), up.double(), tolerance)
    shape = FrozenNorm(gain, offset, centred, torch.ones((), dtype=torch.float64, device=x.device))
    flat, wanted = shape(given) - offset, made - offset
    size = flat.square().sum(-1, keepdim=True)
    scale = torch.where(size > 0, (flat * wanted).sum(-1, keepdim=True) / size.clamp_min(1e-300), 0.0)
    return FrozenNorm(gain, offset, centred, scale) if _near(flat * scale, wanted, tolerance) else None


def affine(step: Map, x: Tensor) -> bool:
    """Whether f(a + b) + f(0) = f(a) + f(b) on this input and on noise a hundred times its size."""
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    with torch.no_grad():
        a, b = x, noise * 100 * x.std().clamp_min(1e-3)
        together, apart = step(a + b) + step(torch.zeros_like(x)), step(a) + step(b)
    return _near(together, apart, TOLERANCE.get(x.dtype, 4e-2))


def linearised(steps: Sequence[Map], names: Sequence[str], x: Tensor) -> tuple[Map, Tensor]:
    """Steps in a row as one affine map that agrees with them on `x`, norms frozen there; and their value on
    `x`.

    Refused if a step is neither affine nor a norm.
    """
    maps: list[Map] = []
    for step, name in zip(steps, names, strict=True):
        chosen: Map | None = step if affine(step, x) else freeze(step, x)
        if chosen is None:
            raise Refused(f"{name!r} is not linear, so what passes through it cannot be split into contributions")
        maps.append(chosen)
        with torch.no_grad():
            x = step(x)

    def run(given: Tensor) -> Tensor:
        for each in maps:
            given = each(given)
        return given

    return run, x


def _near(a: Tensor, b: Tensor, tolerance: float) -> bool:
    return float((a - b).abs().max()) <= tolerance * max(float(a.abs().max()), float(b.abs().max()), 1e-12)
