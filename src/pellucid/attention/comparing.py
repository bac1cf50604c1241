"""How far apart are two attentions, or two predictions; and from which rows of the last layer is an answer read?

    js(p, q) = KL(p || m) / 2 + KL(q || m) / 2,  m = (p + q) / 2    in nats, at most log 2 = 0.693
    tv(p, q) = sum |p - q| / 2                                      from 0 to 1

The tests of attention as explanation compare whole predictions, as `Question.distribution` gives them. Methods with a
gradient ask one score; which rows of the last layer it depends on (the first token of a pooled classifier, the last of a
decoder, a mask) is measured by its gradient, not assumed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.engine.locate import locate
from pellucid.engine.run import Run
from pellucid.engine.writing import shows_one_reader
from pellucid.errors import Refused, SiteError
from pellucid.model import Model


def last_residual(model: Model) -> str | None:
    """The site of the last residual stream, if its gradient can be had."""
    stack = model.anatomy.stacks[-1]
    name = f"{stack.prefix}layers.{len(stack.blocks) - 1}.resid_post"
    try:
        spot = locate(model.anatomy, Site.parse(name))
    except (Refused, SiteError):
        return None
    return None if shows_one_reader(model.anatomy, spot) else name


def rows_read(model: Model, run: Run) -> Tensor:
    """[query], summing to 1: how much each row of the last layer matters to the score, by its gradient's size.

    `run` has the gradient at `last_residual`; without one it is the last token of a causal model, else the first.
    """
    site, stream = last_residual(model), run.inputs.stream("")
    n, start = int(stream.lengths[0]), int(stream.starts[0])
    if site is not None:
        size = run.grad(site)[0].double().norm(dim=-1).cpu()
        if len(size) == stream.ids.shape[1] and float(size.sum()) > 0:
            size = size[start : start + n]
            return (size / size.sum()).to(torch.float32)
    made = torch.zeros(n)
    made[-1 if model.anatomy.stacks[-1].causal else 0] = 1.0
    return made


def js(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence over the last dimension, in nats.

    >>> js(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor(0.6931)
    """
    m = (p + q) / 2
    return (_against(p, m) + _against(q, m)).clamp_min(0) / 2


def _against(p: Tensor, m: Tensor) -> Tensor:
    tiny = torch.finfo(p.dtype).tiny
    return (p * (p.clamp_min(tiny).log() - m.clamp_min(tiny).log())).sum(-1)


def tv(p: Tensor, q: Tensor) -> Tensor:
    """Total variation distance over the last dimension."""
    return (p - q).abs().sum(-1) / 2


def moved(p: Tensor, q: Tensor) -> Tensor:
    """[prompt] the total variation distance of two predictions; its mean over their parts where they have several."""
    return tv(p, q).flatten(1).mean(1) if p.ndim > 2 else tv(p, q)


def certain(p: Tensor, decided: Tensor) -> Tensor:
    """[prompt] the probability of a decision, `p.argmax(-1)` of some prediction; of several parts their mean."""
    found = p.gather(-1, decided.expand(p.shape[:-1])[..., None])[..., 0]
    return found.flatten(1).mean(1) if p.ndim > 2 else found
