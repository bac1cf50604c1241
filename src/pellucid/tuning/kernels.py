"""Gradients of gradients through attention: which kernel has them, and are they right on this model?

Fused attention lets a first gradient through and has no second one; the error comes in the last backward pass of a step, or,
with a weight that warms up, in the middle of a run. So the decision is made before the first step: explicit ("eager")
attention goes as it is, `sdpa` runs on torch's math kernel for the passes that need it (the same numbers to rounding) and
has its own back afterwards, and flash, flex and paged kernels are refused. That the second derivatives are right is tried
on the first row: the curvature along a direction v of the embeddings by two backward passes, against two first gradients,

    H v   and   (g(x + h v) - g(x - h v)) / 2h
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pellucid.errors import Refused
from pellucid.model import Model

STEPS = (1e-2, 1e-3, 1e-4)  # of the norm of the embeddings: kinks (ReLU) ask for small ones, rounding for large ones
LIKE = 0.99  # cosine


def implementation(model: Model) -> str:
    """What the config says its attention is computed by."""
    config: Any = getattr(model.module, "config", None)
    return str(getattr(config, "_attn_implementation", None) or "eager")


def check_kernels(model: Model, who: str) -> None:
    """Refused where attention is computed by a kernel without second derivatives."""
    name = implementation(model)
    if any(word in name for word in ("flash", "flex", "paged")):
        raise Refused(
            f"{who} needs gradients of gradients, and {name} has none: open the model with attn_implementation='eager' or "
            "'sdpa', say path='finite', or use tuning.Consistency, which needs none"
        )


@contextmanager
def exact_kernels(model: Model) -> Iterator[None]:
    """While this lasts, `sdpa` is computed by torch's math kernel, which has second derivatives; afterwards as before."""
    if implementation(model) != "sdpa":
        yield
        return
    with sdpa_kernel(SDPBackend.MATH):
        yield


def check_curvature(gradient: Callable[[Tensor], Tensor], x: Tensor, who: str) -> None:
    """Refused where the second derivative at x [row, position, d] is missing, or another than that of finite steps."""
    v = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    v = v / v.norm() * x.norm()
    x = x.detach().requires_grad_()
    try:
        g = gradient(x)
        (exact,) = torch.autograd.grad((g * v).sum(), [x], allow_unused=True)
    except RuntimeError as error:
        raise Refused(
            f"{who} needs gradients of gradients, and this model has none ({str(error)[:90]}): open it with "
            "attn_implementation='eager', or use tuning.Consistency, which needs none"
        ) from None
    if exact is None or x.dtype not in (torch.float32, torch.float64):
        return  # linear to here, or too coarse to try
    exact, like = exact.detach(), []
    for step in STEPS:
        near = (gradient(x.detach() + step * v) - gradient(x.detach() - step * v)).detach() / (2 * step)
        size = float(exact.norm() * near.norm())
        like.append(float((exact * near).sum()) / size if size > 0 else 1.0)
        if like[-1] >= LIKE:
            return
    raise Refused(
        f"{who} needs gradients of gradients, and those of this model are wrong: their curvature is not that of two "
        f"gradients side by side (cosine {max(like):.2f}); use tuning.Consistency, which needs none"
    )
