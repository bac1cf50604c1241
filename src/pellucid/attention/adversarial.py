"""How different could attention have been, with the same prediction?

The largest change of attention that leaves the output where it is (Jain and Wallace 2019, section 4.2.2):

    maximise   mean over rows of js(A', A)       subject to   tv(output', output) <= epsilon

A' = softmax(log A + delta), with delta a free number per layer, head, query and visible key, so that A' is a pattern
the mask allows. As in their code, Adam climbs the divergence minus a price for leaving the band,

    strength * max(0, tv - epsilon)

from several random starts at once; what is returned is the farthest pattern met on the way that lies within epsilon,
found again in a run of its own. (They optimise over one softmax layer, we over all layers at once; rows whose change
cannot reach the output, such as those of unread positions in the last layer, are left alone and not counted.) The
divergence is at most log 2 = 0.693. It says that attention *need not* be what it is for this answer; not that this
attention would ever be learnt, which `adversarial_training` asks.

`edits(result)` are the edits that put the adversarial attention in: every reading of this package takes them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.sites import choose
from pellucid.attention.comparing import certain, js, moved
from pellucid.attention.patterns import Attended, Kind, asked, attended, kinds, labelled, single, stacked, visible
from pellucid.engine.edits import Edit, Patch
from pellucid.engine.inputs import Inputs
from pellucid.engine.pausing import progress
from pellucid.errors import InputError
from pellucid.metrics import BoundMetric
from pellucid.model import Model
from pellucid.question import Question
from pellucid.results import Result
from pellucid.technique import technique


@technique
def adversarial_attention(
    model: Model,
    prompt: Any,
    *,
    layers: int | str = "*",
    epsilon: float = 0.01,
    steps: int = 200,
    restarts: int = 2,
    learning_rate: float = 0.1,
    strength: float = 50.0,
    seed: int = 0,
) -> Result:
    """The farthest attention found in `layers` of the only or last stack that moves the prediction at most `epsilon`.

    Gives `js` [layer, head, query] in nats (NaN for rows that cannot reach the output), `original` and `adversarial`
    [layer, head, query, key], and the numbers `divergence` (mean js), `largest`, `moved_tv` (the distance of the
    prediction, at most epsilon), `probability` and `adversarial_probability` of the predicted class or token, and
    `reached` [restart], the divergence each restart came to. A divergence of 0 means that nothing was found. Refused and
    InputError as in `patterns`, InputError for options out of range.

    >>> found = adversarial_attention(classifier, "A dull and lifeless film.", steps=20)
    >>> rollout(classifier, "A dull and lifeless film.", edits=edits(found))
    Attention rollout, residual share 0.5
    attention rollout: rollout, null over layer 2, query 7, key 7...
    """
    if not 0 < epsilon < 1 or steps < 1 or restarts < 1:
        raise InputError(
            f"epsilon={epsilon}, steps={steps}, restarts={restarts}: expected 0 < epsilon < 1, and at least one of each"
        )
    inputs = single(model, prompt)
    if inputs.stream("").padded:
        raise InputError("the prompt is padded: give it without padding")
    kind = next(k for k in reversed(kinds(model.anatomy)) if k.area == "attn")
    rows = [kind.layers.index(i) for i in choose(layers, max(kind.layers) + 1, "layer", "layers") if i in kind.layers]
    search = Search.of(model, inputs, kind, rows, epsilon)
    found, reached = search.climb(steps, restarts, learning_rate, strength, seed)
    check = attended(model, inputs, [_put(kind, kind.layers[r], p) for r, p in zip(rows, found, strict=True)])
    after = search.question.distribution(check.run)
    counted = stacked(search.counted).nan_to_num(0).bool()
    divergence = stacked(search.moved(found)).masked_fill(~counted, float("nan")).numpy()
    decided = search.before.argmax(-1)
    layer = kind.dims[0]
    data = xr.Dataset(
        {
            "js": (kind.dims[:3], divergence),
            "original": (kind.dims, stacked(search.originals).numpy()),
            "adversarial": (kind.dims, stacked(found).numpy()),
            "divergence": float(np.nanmean(divergence)),
            "largest": float(np.nanmax(divergence)),
            "moved_tv": float(moved(after, search.before)[0]),
            "probability": float(certain(search.before, decided)[0]),
            "adversarial_probability": float(certain(after, decided)[0]),
            "reached": ("restart", reached),
        },
        attrs={"stack": kind.stack},
    )
    data = labelled(data, search.found).assign_coords({layer: [kind.layers[r] for r in rows]})
    return Result(data, kind="adversarial attention", title="Other attention, same prediction")


def edits(result: Result) -> list[Edit]:
    """The edits that put the attention of an `adversarial_attention` result in."""
    patterns = result.adversarial
    kind = Kind(result.data.attrs["stack"], "attn", ())
    return [
        _put(kind, layer, torch.from_numpy(values[~np.isnan(values).all((1, 2))]))
        for layer, values in zip(patterns[patterns.dims[0]].values.tolist(), patterns.values, strict=True)
    ]


def _put(kind: Kind, layer: int, pattern: Tensor) -> Edit:
    """Put in a pattern [head, query, key], or one per row of the batch."""
    return Patch(kind.site(layer), pattern.transpose(-3, -2))


@dataclass(frozen=True, eq=False)
class Search:
    """One prompt, the layers whose attention may change, and the prediction that may not."""

    model: Model
    inputs: Inputs
    kind: Kind
    rows: list[int]
    epsilon: float
    question: Question
    found: Attended
    before: Tensor  # [1, class] the prediction
    counted: list[Tensor]  # per layer [head, query], 1 where a row has a choice and reaches the output

    @classmethod
    def of(cls, model: Model, inputs: Inputs, kind: Kind, rows: list[int], epsilon: float) -> Search:
        question = asked(model, inputs)
        found = attended(model, inputs, grad_of=probe(question))
        counted = [reaching(found, kind)[r] for r in rows]
        if not any(bool(c.any()) for c in counted):
            raise InputError("no attention of these layers reaches the output: choose others, or a longer prompt")
        before = question.distribution(found.run).detach()
        return cls(model, inputs, kind, rows, epsilon, question, found, before, counted)

    @property
    def originals(self) -> list[Tensor]:
        return [self.found.values[self.kind][r] for r in self.rows]

    def moved(self, patterns: Sequence[Tensor]) -> list[Tensor]:
        """Per layer the divergence of each row, [..., head, query], of patterns [..., head, query, key]."""
        return [js(p, a.expand_as(p)) for p, a in zip(patterns, self.originals, strict=True)]

    def mean(self, moved: Sequence[Tensor]) -> Tensor:
        """[...] the mean over rows that count."""
        total = torch.stack([(d * c).sum((-2, -1)) for d, c in zip(moved, self.counted, strict=True)]).sum(0)
        return total / sum(float(c.sum()) for c in self.counted)

    def climb(
        self, steps: int, restarts: int, learning_rate: float, strength: float, seed: int
    ) -> tuple[list[Tensor], np.ndarray]:
        """The farthest pattern per layer [head, query, key] within epsilon, and how far each start came."""
        generator = torch.Generator().manual_seed(seed)
        masks = [visible(self.found.values[self.kind])[r] for r in self.rows]
        logs = [
            a.clamp_min(1e-12).log().masked_fill(~m, -torch.inf) for a, m in zip(self.originals, masks, strict=True)
        ]
        sums = [a.sum(-1, keepdim=True) for a in self.originals]
        free = [torch.randn(restarts, *a.shape, generator=generator).to(a).requires_grad_() for a in self.originals]
        optimiser = torch.optim.Adam(free, lr=learning_rate)
        batch = self.inputs.rows([0] * restarts)
        best, reached = [a.expand(restarts, *a.shape).clone() for a in self.originals], self.before.new_zeros(restarts)
        for _ in progress(range(steps), "adversarial attention"):
            with torch.enable_grad():
                made = [
                    torch.where(c[..., None] > 0, (log + d).softmax(-1) * s, a)
                    for a, log, d, s, c in zip(self.originals, logs, free, sums, self.counted, strict=True)
                ]
                far = self.mean(self.moved(made))
                put = [_put(self.kind, self.kind.layers[r], p) for r, p in zip(self.rows, made, strict=True)]
                off = moved(self.question.distribution(self.model.run(batch, edits=put)), self.before)
                loss = (strength * (off - 0.9 * self.epsilon).clamp_min(0) - far).sum()
                optimiser.zero_grad()
                for x, slope in zip(free, torch.autograd.grad(loss, free), strict=True):
                    x.grad = slope
            better = (off <= 0.99 * self.epsilon) & (far > reached)
            reached = torch.where(better, far.detach(), reached)
            for kept, p in zip(best, made, strict=True):
                kept[better] = p.detach()[better]
            optimiser.step()
        top = int(reached.argmax())
        return [b[top] for b in best], reached.numpy()


def reaching(found: Attended, kind: Kind) -> list[Tensor]:
    """Per layer [head, query], 1 where a row sees several keys and reaches the output, by the gradient of `probe`."""
    seen = visible(found.values[kind])
    return [
        (((g * s).abs().amax(-1) > 0) & (s.sum(1) > 1)).to(g) for g, s in zip(found.gradients[kind], seen, strict=True)
    ]


def probe(question: Question) -> BoundMetric:
    """A fixed random mixture of what is predicted: whatever reaches the output has a gradient."""

    def mixture(logits: Tensor) -> Tensor:
        weights = torch.randn(logits.shape[1:], generator=torch.Generator().manual_seed(0)).to(logits)
        return (logits * weights).flatten(1).sum(1)

    return question.whole("probe", mixture)
