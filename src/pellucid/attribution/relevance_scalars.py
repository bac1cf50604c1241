"""Which modules are functions of one number, and what do such functions make of zero?

Activations are often written in several operators (GELU by tanh, SiLU with a learnt slope). Relevance passes them as one
function f, by its slope from (0, f(0)); so they are found by calling every module that has no parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

Function = Callable[..., Any]
_origins: dict[Any, tuple[float, float]] = {}
_parts: WeakKeyDictionary[nn.Module, tuple[float, float] | None] = WeakKeyDictionary()


def origin(function: Function, key: Any = None) -> tuple[float, float]:
    """f(0), and the slope of f there."""
    if key in _origins:
        return _origins[key]
    with torch.no_grad():
        low, middle, high = function(torch.tensor([-1e-4, 0.0, 1e-4], dtype=torch.float64)).tolist()
    found = middle, (high - low) / 2e-4
    if key is not None:
        _origins[key] = found
    return found


def scalar_modules(module: nn.Module) -> dict[nn.Module, tuple[float, float]]:
    """The modules that are functions of one number, with f(0) and the slope there: found by calling them."""
    found = {}
    for part in module.modules():
        if part not in _parts:
            _parts[part] = None if any(True for _ in part.children()) else _scalar(part)
        if (at := _parts[part]) is not None:
            found[part] = at
    return found


def _scalar(part: nn.Module) -> tuple[float, float] | None:
    like = next(part.parameters(), torch.empty(0))
    x = torch.tensor([[[-2.0, -0.3, 0.4, 1.5, 3.0], [0.7, -1.1, 0.2, -0.6, 2.2]]]).to(like)
    moved = x.clone()
    moved[0, 0, 2] += 1.0
    order = torch.tensor([3, 1, 4, 0, 2])
    try:
        with torch.no_grad():
            y, other, permuted = part.forward(x), part.forward(moved), part.forward(x[..., order])
            changed = y != other
            changed[0, 0, 2] = False
            if y.shape != x.shape or torch.equal(x, y) or changed.any() or not torch.allclose(y[..., order], permuted):
                return None
            low, middle, high = part.forward(x.new_tensor([[[-1e-2, 0.0, 1e-2]]]))[0, 0].tolist()
    except Exception:  # it takes something else: no function of one number
        return None
    return middle, (high - low) / 2e-2
