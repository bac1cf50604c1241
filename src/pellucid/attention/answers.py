"""What is the answer that attention is asked about, and from which positions is it read?

The tests of attention as explanation compare whole predictions: `Output` gives them as a distribution, over a
classifier's classes or over the vocabulary at one position. Methods with a gradient attribute one score; which rows
of the last layer that score depends on (the first token of a pooled classifier, the last of a decoder, a mask) is
measured by its gradient, not assumed.

    js(p, q) = KL(p || m) / 2 + KL(q || m) / 2,  m = (p + q) / 2    in nats, at most log 2 = 0.693
    tv(p, q) = sum |p - q| / 2                                      from 0 to 1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.engine.inputs import Inputs
from pellucid.engine.locate import locate
from pellucid.engine.run import Run
from pellucid.engine.writing import shows_one_reader
from pellucid.errors import InputError, Refused, SiteError
from pellucid.metrics import Answers, BoundMetric, Metric, class_logit, logit, logit_difference
from pellucid.model import Model

Target = Answers | Metric | Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Output:
    """How a model's prediction is read: at `position` of the vocabulary, or (None) from a classifier."""

    position: int | None

    @classmethod
    def of(cls, model: Model, inputs: Inputs) -> Output:
        """A classifier's classes; at the mask, where the prompt has one; else at the last token."""
        with torch.no_grad():
            logits = model.run(inputs).logits
        if model.anatomy.head is None and logits.ndim != 2:
            raise Refused(
                "this model predicts nothing (it has no head): open it with a language-model or classifier head"
            )
        return cls(None if logits.ndim == 2 else answer_position(model, inputs))

    def probabilities(self, run: Run) -> Tensor:
        """[batch, class or vocabulary]; a classifier with a single logit has two classes, no and yes."""
        z = run.logits
        if self.position is not None:
            stream = run.inputs.stream("")
            at = stream.starts + self.position % int(stream.lengths[0])
            z = z[torch.arange(len(z), device=z.device), at.to(z.device)]
        return distribution(z).cpu()


def distribution(z: Tensor) -> Tensor:
    z = z if z.dtype == torch.float64 else z.float()
    return torch.cat([(-z).sigmoid(), z.sigmoid()], 1) if z.shape[1] == 1 else z.softmax(1)


def answer_position(model: Model, inputs: Inputs) -> int:
    """The only mask of a prompt, counted on its real tokens, else the last token."""
    stream = inputs.stream("")
    mask = getattr(model.tokenizer, "mask_token_id", None)
    found = [] if mask is None else (stream.ids[0] == mask).nonzero().flatten().tolist()
    return found[0] - int(stream.starts[0]) if len(found) == 1 else -1


def scored(model: Model, inputs: Inputs, target: Target | None, against: Answers | None = None) -> BoundMetric:
    """What is attributed: the logit of `target` (minus that of `against`), any metric, or by default the prediction."""
    if target is not None and not isinstance(target, str | int | Sequence):
        if against is not None:
            raise InputError("against= goes with a target token; a metric says itself what it compares")
        return model.bind(target)
    with torch.no_grad():
        logits = model.run(inputs).logits
    if logits.ndim == 2:
        if against is not None:
            classes = class_logit(target if target is not None else int(logits[0].argmax())).bind(None, 1)
            other = class_logit(against).bind(None, 1)
            return model.bind(lambda z: classes(z) - other(z))
        return model.bind(class_logit(int(logits[0].argmax()) if target is None else target))
    position = answer_position(model, inputs)
    if target is None:
        stream = inputs.stream("")
        target = int(logits[0, int(stream.starts[0]) + position % int(stream.lengths[0])].argmax())
    if against is None:
        return model.bind(logit(target, position=position))
    return model.bind(logit_difference(target, against, position=position))


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
