"""Which modules are functions of one number, and what do such functions make of zero?

Activations are often written in several operators (GELU by tanh, SiLU with a learnt slope). Relevance passes them as one
function f, by its slope from (0, f(0)); so they are found by calling every module that has no parts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pellucid.anatomy.fingerprint import Memo

Function = Callable[..., Any]
_origins: dict[Any, tuple[float, float]] = {}


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


def scalar_modules(module: nn.Module, memo: Memo | None = None) -> dict[nn.Module, tuple[float, float]]:
    """The modules that are functions of one number, with f(0) and the slope there: found by calling them, once for
    weights that a memo knows."""
    if memo is not None:
        return memo("functions of one number", lambda: scalar_modules(module))
    found = {part: _scalar(part) for part in module.modules() if not any(True for _ in part.children())}
    return {part: at for part, at in found.items() if at is not None}


def _scalar(part: nn.Module) -> tuple[float, float] | None:
    like = next(part.parameters(), torch.empty(0))
    if not like.is_floating_point():  # packed weights: a linear layer
        return None
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
