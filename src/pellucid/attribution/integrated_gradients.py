"""How much of the answer does each input token account for?

The input embeddings are moved in a straight line from a baseline b to the prompt x, and the gradient of the
score F is integrated on the way (Sundararajan et al. 2017):

    attribution_i = sum over d of (x_i - b_i) * integral from 0 to 1 of dF/dx_i (b + a (x - b)) da

The attributions add up to F(x) - F(b) (completeness), up to the error of the quadrature; that gap is reported
and bounded. Only the output of the token embedding moves: positions and segments stay as they are. What
counts as absence is a choice that changes the ranking, so the baseline is part of the result; special tokens
keep their own embedding in it (unless `keep_special=False`) and so receive nothing.

With `site=` the line is drawn at a layer instead: x is what is met there when the model reads the prompt, b what is met
when it reads the baseline. There special tokens have read the others, so they do receive.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.sites import Site
from pellucid.attribution.baseline import Baseline
from pellucid.attribution.batches import batched
from pellucid.attribution.case import Case
from pellucid.attribution.path import Embedded, Inside
from pellucid.attribution.players import Players
from pellucid.attribution.quadrature import CANCELLED, Rule, quadrature, refine
from pellucid.engine.edits import Edit
from pellucid.engine.pausing import progress
from pellucid.errors import InputError, Refused, one_of
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

LIMIT = 2048  # gradients along a path before it is given up
LARGE = 0.1  # a gap of more of the change is warned about


@technique
@batched
def integrated_gradients(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    baseline: Any = None,
    site: Site | str | None = None,
    steps: int | None = None,
    rule: Rule = "gauss-legendre",
    tolerance: float = 0.01,
    players: Any = "token",
    keep_special: bool = True,
    keep_first: bool | None = None,
    compare: Sequence[Any] = (),
) -> Result:
    """Attribute a score of one prompt to its tokens (in an encoder-decoder: to the source tokens).

    `target` is a token or a class whose logit is attributed (minus that of `against`), any metric, a `continuation` or
    a `reading`; by default the prediction. `baseline` is "pad", "mask" or any token ("." for instance), put in the
    place of every token; "zero" or "mean", the zero or the mean embedding; or a prompt or ids of the same length. The
    default is the first of "mask", "pad" that the tokenizer has, else "mean". `site` names one of the residual stream
    to start from instead of the embedding. Without `steps`, gradients are taken where the path is rough (see `refine`)
    until the completeness gap is within `tolerance` of the change they explain, |score - baseline score| (or of a tenth of
    the attributions' total size, where they cancel to less), and Refused is raised if 2048 do not suffice; with a fixed
    number of steps of a `rule`, a larger gap is warned about, and so is one of more than a tenth of the change. `players`
    sums over words or spans; `decoder` is the decoder's text in an encoder-decoder; `edits` change the model.

    `keep_first`: the first token keeps its embedding and gets nothing. By default it does in decoders that put no mark before
    a text, unless the baseline is a prompt or ids of its own: such models park attention there (Xiao et al. 2024).

    Gives `attribution` [position] (or [player]; with [output] in front for a continuation) with coordinates `token`,
    `baseline_token` and `special`; `score`, `baseline_score`, `gap` = sum of attributions - (score - baseline_score),
    and `steps`, the gradients taken. With `compare`, other baselines, also `rank_agreement` [baseline]: the rank
    correlation of each one's attributions with these.

    >>> integrated_gradients(model, "The capital of France is", baseline="mean").top(3)
    position token special baseline_token attribution score baseline_score gap steps gradients evaluations
    ...
    """
    one_of(rule, Rule, "unknown rule ")
    if steps is not None and steps < 1:
        raise InputError(f"{steps} steps: expected at least 1")
    if steps is None and rule != "gauss-legendre":
        raise InputError(f"the rule {rule!r} needs a number of steps: give steps=50, for instance")
    case = Case.of(model, prompt, target, against=against, decoder=decoder, keep_special=keep_special, edits=edits)
    credited = Players.of(case, players)
    embedded = Embedded(case)
    start = Baseline.of(embedded, baseline, keep_first)
    path = Path.of(embedded, start, site)
    attribution, n = path.integral(steps, rule, tolerance)
    ends = path.heights(torch.tensor([0.0, 1.0])).numpy()
    gap = attribution.sum(-1) - (ends[1] - ends[0])
    _judge(case, start, attribution, ends, gap, n, tolerance, fixed=steps is not None)

    spread = np.zeros((len(gap), len(case.tokens)))
    spread[:, path.place] = attribution
    values, labels = credited.pooled(case, spread)
    variables = {
        "attribution": values, "score": ends[1], "baseline_score": ends[0], "gap": gap, "steps": n,
        "gradients": n, "evaluations": path.evaluations,
    }  # fmt: skip
    coords: dict[str, Any] = {} if labels else {"baseline_token": ("position", list(start.labels))}
    if compare:
        others = [Path.of(embedded, Baseline.of(embedded, b, keep_first), site) for b in compare]
        found = [other.integral(steps, rule, tolerance) for other in others]
        variables["rank_agreement"] = ("baseline", [_ranked_alike(attribution, other) for other, _ in found])
        variables["gradients"] = n + sum(used for _, used in found)
        coords["baseline"] = [b if isinstance(b, str) else f"token ids {i}" for i, b in enumerate(compare)]
    place = "" if site is None else f" at {site}"
    return case.result(
        f"Integrated gradients of {case.question.name}{place} from {start.name!r}", variables,
        coords=coords, labels=labels,
        attrs={**start.about, "rule": rule if steps else "refined", "site": str(site or "embedding")},
    )  # fmt: skip


@dataclass(eq=False)
class Path:
    """The straight line from `start` to `stop`, [1, position, d] each, at the embedding or at a site inside."""

    model: Embedded
    start: Tensor
    stop: Tensor
    place: slice  # where its positions are among those of the case
    evaluations: int = 0  # rows run for scores alone
    bar: progress[None] = field(init=False)

    @classmethod
    def of(cls, embedded: Embedded, start: Baseline, site: Site | str | None) -> Path:
        if site is None:
            return cls(embedded, start.values, embedded.values, slice(None))
        inside = Inside(embedded, site)
        return cls(inside, inside.of(embedded, start.values), inside.values, inside.place)

    def integral(self, steps: int | None, rule: Rule, tolerance: float) -> tuple[np.ndarray, int]:
        """[output, position], and the number of gradients it took."""
        with progress[None](what="gradients", total=steps) as self.bar:
            if steps is None:
                found, n = refine(self.slopes, self.heights, tolerance, LIMIT)
            else:
                points, weights = quadrature(rule, steps)
                slopes = self.slopes(torch.tensor(points))
                found, n = torch.einsum("n,nop->op", torch.tensor(weights), slopes), len(points)
        return found.numpy(), n

    def between(self, at: Tensor) -> Tensor:
        return self.start + at.to(self.start)[:, None, None] * (self.stop - self.start)

    def slopes(self, at: Tensor) -> Tensor:
        """[point, output, position]: the way of each token times the gradient there, at points [n] of the path."""

        def along(gradient: Tensor) -> Tensor:
            return ((self.stop - self.start) * gradient).double().sum(-1).cpu()

        def slope(part: Tensor) -> Tensor:
            made = self.model.gradients(self.between(part), along)[1]
            self.bar.step(len(part))
            return made

        return torch.cat([slope(part) for part in at.split(self.model.batches(len(at)))])

    def heights(self, at: Tensor) -> Tensor:
        """[point, output]: the score at points [n] of the path."""
        self.evaluations += len(at)
        with torch.no_grad():
            parts = at.split(self.model.batches(len(at)))
            return torch.cat([self.model.scores(self.between(part)).double().cpu() for part in parts])


def _judge(
    case: Case, start: Baseline, attribution: np.ndarray, ends: np.ndarray, gap: np.ndarray, n: int, tolerance: float,
    *, fixed: bool,
) -> None:  # fmt: skip
    """Refused (or for a fixed number of steps a warning) where the attributions do not add up; a warning where what they
    miss is much of the change they explain."""
    change = np.abs(ends[1] - ends[0])
    noise = 1e-5 * np.abs(ends).max(0)
    allowed = tolerance * np.maximum(change, CANCELLED * np.abs(attribution).sum(-1)) + noise
    worst = int((np.abs(gap) / np.maximum(allowed, 1e-300)).argmax())
    wrong = abs(gap[worst]) > allowed[worst]
    if not wrong:
        worst = int((np.abs(gap) - noise - LARGE * change).argmax())
        if tolerance > 1 or abs(gap[worst]) - noise[worst] <= LARGE * change[worst]:
            return
    message = (
        f"the attributions miss the change of the score, {ends[1][worst] - ends[0][worst]:.3g}, by {gap[worst]:.2g} "
        f"after {n} gradients from the baseline {start.name!r}"
    )
    if wrong and not fixed:
        raise Refused(
            f"{message}: the path is too rough, or it jumps, as routed experts make it; choose another baseline, such as "
            "a token, or give steps=50, which goes on with a gap that is reported"
        )
    more = "take more steps, or leave steps out" if wrong else "they nearly cancel"
    warnings.warn(f"{message}: {more}{_rival(case)}", stacklevel=5)


def _rival(case: Case) -> str:
    """What the answer could be set against, where it is a token by itself and the model has a second choice."""
    asked = case.question
    if asked.against or not asked.answers or asked.kind not in ("next token", "first token", "masked token", "class"):
        return ""
    with torch.no_grad():
        likely = asked.likeliest(case.model.run(case.inputs, edits=case.edits), 2)[0]
    other = next(a for a in likely if a.ids != asked.answers[0].ids[:1])
    return f"; a contrast changes less and says more, such as against={other.text!r}"


def _ranked_alike(a: np.ndarray, b: np.ndarray) -> float:
    """Spearman's correlation over everything attributed."""
    ranks = [np.argsort(np.argsort(x, axis=-1), axis=-1).ravel() for x in (a, b)]
    return float(np.corrcoef(ranks[0], ranks[1])[0, 1]) if a.shape[-1] > 1 else float("nan")
