"""How much of the answer does each input token account for?

The input embeddings are moved in a straight line from a baseline b to the prompt x, and the gradient of the score F is
integrated on the way (Sundararajan et al. 2017):

    attribution_i = sum over d of (x_i - b_i) * integral from 0 to 1 of dF/dx_i (b + a (x - b)) da

The attributions add up to F(x) - F(b) (completeness), up to the error of the quadrature; that gap is reported and
bounded. Only the output of the token embedding moves: positions and segments stay as they are. What counts as absence is a
choice that changes the ranking, so the baseline is part of the result; special tokens keep their own embedding in it
(unless `keep_special=False`) and so receive nothing.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from pellucid.anatomy.layout import TOKENS, Layout
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.engine.inputs import Inputs, Stream
from pellucid.errors import InputError, Refused
from pellucid.metrics import Answers, BoundMetric, Metric, logit, logit_difference
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.tasks.tokens import encode

Rule = Literal["gauss-legendre", "riemann-left", "riemann-right", "riemann-middle", "trapezoid"]
POINTS = 4  # gradients in one stretch of the path
LIMIT = 2048  # gradients along a path before it is given up
ROWS_OF_TOKENS = 1024  # tokens in one batch of steps


def integrated_gradients(
    model: Model,
    prompt: Any,
    target: Answers | Metric | Callable[[Tensor], Tensor] | None = None,
    *,
    against: Answers | None = None,
    baseline: str | Tensor | None = None,
    steps: int | None = None,
    rule: Rule = "gauss-legendre",
    tolerance: float = 0.01,
    keep_special: bool = True,
    forced: str | None = None,
) -> Result:
    """Attribute a score of one prompt to its tokens (in an encoder-decoder: to the source tokens).

    `target` is a token whose logit is attributed (minus that of `against`), or any metric; by default the prediction at the
    last position. `baseline` is "pad", "mask" or any token ("." for instance), put in the place of every token; "zero"
    or "mean", the zero or the mean embedding; or a prompt or ids of the same length. The default is "pad", or "mean" for a
    tokenizer without a padding token. Without `steps`, gradients are taken where the path is rough (see `refine`) until the
    completeness gap is within `tolerance` of the attributions' total size, and Refused is raised if 2048 do not suffice;
    with a fixed number of steps of a `rule`, a larger gap is warned about. `forced` is the decoder's text in an encoder-decoder.

    Gives `attribution` [position] with coordinates `token`, `baseline_token` and `special`; `score`, `baseline_score`,
    `gap` = sum of attributions - (score - baseline_score), and `steps`.

    >>> integrated_gradients(model, "The capital of France is", " Paris", baseline="mean").top(3)     # doctest: +SKIP
    """
    if rule not in get_args(Rule):
        raise InputError(f"unknown rule {rule!r}: expected one of {', '.join(get_args(Rule))}")
    if steps is not None and steps < 1:
        raise InputError(f"{steps} steps: expected at least 1")
    inputs = model.inputs(prompt, target=forced)
    if len(inputs) != 1:
        raise InputError(f"integrated gradients take one prompt at a time, got {len(inputs)}: call it once for each")
    source = inputs.streams.get("encoder", inputs.stream(""))
    path = Path(model, inputs, source)
    score = _score(model, path, target, against)
    start = Baseline.of(model, path, source, baseline, keep_special)
    _check_baseline(model, path, start)

    slopes, heights = partial(path.slopes, score, start.values), partial(path.heights, score, start.values)
    if steps is None:
        attribution, n = refine(slopes, heights, tolerance, LIMIT)
    else:
        points, weights = quadrature(rule, steps)
        attribution, n = torch.tensor(weights) @ slopes(torch.tensor(points)).cpu(), len(points)
    baseline_score, here = heights(torch.tensor([0.0, 1.0])).tolist()
    gap = float(attribution.sum()) - (here - baseline_score)
    if abs(gap) > tolerance * float(attribution.abs().sum()):
        message = (
            f"the attributions miss the change of the score, {here - baseline_score:.3g}, by {gap:.2g} after {n} gradients "
            f"from the baseline {start.name!r}"
        )
        if steps is None:
            raise Refused(f"{message}: the path is too rough; choose another baseline, such as a token")
        warnings.warn(f"{message}: take more steps, or none, to have them placed where they are needed", stacklevel=2)

    labels = source.labels[0]
    data = xr.Dataset(
        {
            "attribution": ("position", attribution.cpu().numpy()),
            "score": here,
            "baseline_score": baseline_score,
            "gap": gap,
            "steps": n,
        },
        coords={
            "position": range(len(labels)),
            "token": ("position", list(labels)),
            "baseline_token": ("position", start.labels),
            "special": ("position", start.special.cpu().numpy()),
        },
        attrs={"baseline": start.name, "rule": rule, "attributed": score.name},
    )
    provenance = Provenance(
        "integrated_gradients", model.name, digest=model.digest, inputs=list(inputs.texts),
        arguments={"target": target, "against": against, "baseline": baseline, "steps": steps, "rule": rule,
                   "tolerance": tolerance, "keep_special": keep_special, "forced": forced},
    )  # fmt: skip
    title = f"Integrated gradients of {score.name} from {start.name!r}"
    return Result(data, kind="integrated gradients", title=title, provenance=provenance)


def quadrature(rule: Rule, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Points on [0, 1] and their weights, which add up to 1.

    >>> quadrature("riemann-left", 2)
    (array([0. , 0.5]), array([0.5, 0.5]))
    """
    if rule == "gauss-legendre":
        points, weights = np.polynomial.legendre.leggauss(steps)
        return (points + 1) / 2, weights / 2
    if rule == "trapezoid":
        weights = np.full(steps + 1, 1 / steps)
        weights[[0, -1]] /= 2
        return np.linspace(0, 1, steps + 1), weights
    shift = {"riemann-left": 0.0, "riemann-middle": 0.5, "riemann-right": 1.0}[rule]
    return (np.arange(steps) + shift) / steps, np.full(steps, 1 / steps)


def _score(model: Model, path: Path, target: Any, against: Answers | None) -> BoundMetric:
    """What is attributed, as a bound metric."""
    if target is None:
        with torch.no_grad():
            target = int(main_output(path.run(path.values))[0, -1].argmax())
    if not isinstance(target, str | int | Sequence):
        if against is not None:
            raise InputError("against= goes with a target token; a metric says itself what it compares")
        return model.bind(target)
    return model.bind(logit(target) if against is None else logit_difference(target, against))


class Path:
    """Runs the model with its token embeddings [1, position, d] replaced, many versions in one batch.

    The embedding's output is edited where it is made, so that nothing else about the forward pass changes: this serves
    families that take no `inputs_embeds`, and encoder-decoders whose two stacks share one embedding.
    """

    def __init__(self, model: Model, inputs: Inputs, source: Stream) -> None:
        self.model, self.inputs, self.source = model, inputs, source
        self.embedding = model.module.get_input_embeddings()
        name = next(n for n, m in model.module.named_modules() if m is self.embedding)
        self.tap = Tap(name, "out", Layout(TOKENS, TOKENS), nth=self._nth(name))
        self.values = self.embed(source.ids)

    def _nth(self, name: str) -> int:
        """Which call of the embedding module reads the source tokens."""
        given: list[Tensor] = []
        hook = self.embedding.register_forward_pre_hook(lambda _, args: given.append(args[0]))
        try:
            with torch.no_grad():
                self.model.module(**self.inputs.tensors)
        finally:
            hook.remove()
        for n, ids in enumerate(given):
            if ids.shape == self.source.ids.shape and bool((ids == self.source.ids).all()):
                return n
        raise Refused(f"{self.model.name} does not pass its input tokens through {name!r}, its input embedding")

    def embed(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            made: Tensor = self.embedding(ids)
        return made

    def mean(self) -> Tensor:
        """[d], the mean over the vocabulary, as the embedding hands tokens out (some families scale them)."""
        ids = torch.arange(self.embedding.weight.shape[0], device=self.source.ids.device)
        total = sum(self.embed(part[None]).double().sum(1)[0] for part in ids.split(8192))
        return (total / len(ids)).to(self.values.dtype)

    def met(self, tap: Tap, embeddings: Tensor) -> Tensor:
        """What is met at a tap when the model runs on these embeddings."""
        kept: list[Tensor] = []
        with torch.no_grad():
            self.run(embeddings, {tap: kept.append})
        return kept[0]

    def run(self, embeddings: Tensor, handlers: dict[Tap, Handler] | None = None, **forward: Any) -> Any:
        """The model's output for embeddings [row, position, d]."""
        handlers = {**(handlers or {}), self.tap: lambda x: embeddings}
        rows = {
            k: v.repeat_interleave(len(embeddings), 0) if isinstance(v, Tensor) and v.ndim and len(v) == 1 else v
            for k, v in self.inputs.tensors.items()
        }
        with Wiretap(self.model.module, handlers, len(embeddings)):
            return self.model.module(**rows, **forward)

    def score(self, score: BoundMetric, embeddings: Tensor) -> Tensor:
        """[row]; where only the last position is read, only that one is unembedded."""
        accepted = inspect.signature(self.model.module.forward).parameters
        forward: dict[str, Any] = {"use_cache": False} if "use_cache" in accepted else {}
        stream = self.inputs.stream("")
        mask = stream.mask.expand(len(embeddings), -1)
        if "logits_to_keep" in accepted and score.positions == (-1,) and not stream.padded:
            forward["logits_to_keep"], mask = 1, mask[:, -1:]
        return score.score(main_output(self.run(embeddings, **forward)), mask)

    def slopes(self, score: BoundMetric, start: Tensor, at: Tensor) -> Tensor:
        """[point, position]: the way of each token times the gradient there, at points [n] of the path."""
        made = []
        for part in at.split(max(1, ROWS_OF_TOKENS // start.shape[1])):
            with torch.enable_grad():
                embeddings = self.between(start, part).requires_grad_()
                (gradient,) = torch.autograd.grad(self.score(score, embeddings).sum(), embeddings)
            made.append(((self.values - start) * gradient).double().sum(-1))
        return torch.cat(made)

    def heights(self, score: BoundMetric, start: Tensor, at: Tensor) -> Tensor:
        """[point]: the score at points [n] of the path."""
        with torch.no_grad():
            parts = at.split(max(1, ROWS_OF_TOKENS // start.shape[1]))
            return torch.cat([self.score(score, self.between(start, part)) for part in parts]).double()

    def between(self, start: Tensor, at: Tensor) -> Tensor:
        return start + at.to(start)[:, None, None] * (self.values - start)


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of the path: its attributions [position] and how far they miss the rise of the score along it."""

    start: float
    stop: float
    attribution: Tensor
    gap: float


def refine(
    slopes: Callable[[Tensor], Tensor], heights: Callable[[Tensor], Tensor], tolerance: float, limit: int
) -> tuple[Tensor, int]:
    """The integral of slopes [point, position] over [0, 1], stretches halved where completeness is missed.

    Paths can be nearly flat and then jump (where an attention sink moves, say), so points are spent where the gap is. Ends
    when the stretches' gaps, taken absolutely, add up to no more than `tolerance` of the attributions' size, or after
    `limit` points; returns the attributions [position] and the number of points.
    """
    points, weights = (torch.tensor(x) for x in quadrature("gauss-legendre", POINTS))
    todo, done, used = [(i / 4, (i + 1) / 4) for i in range(4)], [], 0
    while True:
        edges = torch.tensor(todo, dtype=torch.float64)
        width = edges[:, 1:] - edges[:, :1]
        parts = slopes((edges[:, :1] + points * width).flatten()).unflatten(0, (-1, len(points)))
        made = torch.einsum("snp,n,s->sp", parts, weights.to(parts), width[:, 0].to(parts))
        rise = heights(edges.flatten()).unflatten(0, (-1, 2)).diff(dim=1)[:, 0]
        used += len(points) * len(todo)
        gaps = (made.sum(1) - rise).tolist()
        done += [Piece(a, b, attribution, gap) for (a, b), attribution, gap in zip(todo, made, gaps, strict=True)]
        total = torch.stack([piece.attribution for piece in done]).sum(0)
        allowed = tolerance * float(total.abs().sum())
        done.sort(key=lambda piece: abs(piece.gap))
        missed = np.cumsum([abs(piece.gap) for piece in done])
        if missed[-1] <= allowed or used >= limit:
            return total, used
        enough = int(np.searchsorted(missed, allowed / 2))
        done, split = done[:enough], done[enough:]
        todo = [ends for p in split for m in [(p.start + p.stop) / 2] for ends in ((p.start, m), (m, p.stop))]


@dataclass(frozen=True, eq=False)
class Baseline:
    """Where the path starts: embeddings [1, position, d], and what stands there in words."""

    name: str
    values: Tensor
    labels: list[str]
    special: Tensor  # [position] the prompt's special tokens

    @classmethod
    def of(cls, model: Model, path: Path, source: Stream, baseline: str | Tensor | None, keep_special: bool) -> Baseline:
        tokenizer = model.tokenizer
        if baseline is None:
            baseline = "mean" if getattr(tokenizer, "pad_token_id", None) is None else "pad"
        known = torch.tensor(getattr(tokenizer, "all_special_ids", []), device=source.ids.device)
        special = torch.isin(source.ids[0], known)
        if isinstance(baseline, str) and baseline in ("zero", "mean"):
            one = path.mean() if baseline == "mean" else torch.zeros_like(path.values[0, 0])
            values, labels = one.expand_as(path.values).clone(), [f"({baseline})"] * source.ids.shape[1]
        else:
            ids = _baseline_ids(model, source, baseline)
            values = path.embed(ids)
            labels = [f"#{i}" if tokenizer is None else tokenizer.decode([i]) for i in ids[0].tolist()]
        if keep_special:
            values = torch.where(special[:, None], path.values, values)
            labels = [own if is_special else b for own, b, is_special in zip(source.labels[0], labels, special, strict=True)]
        return cls(baseline if isinstance(baseline, str) else "token ids", values, labels, special)


def _baseline_ids(model: Model, source: Stream, baseline: str | Tensor) -> Tensor:
    """Token ids [1, position] of a baseline named by a token, a prompt or ids."""
    length = source.ids.shape[1]
    if isinstance(baseline, Tensor):
        ids = baseline.reshape(1, -1).to(source.ids)
    elif model.tokenizer is None:
        raise InputError(f"the baseline {baseline!r} needs a tokenizer: give 'zero', 'mean' or token ids")
    elif baseline in ("pad", "mask"):
        token = getattr(model.tokenizer, f"{baseline}_token_id")
        if token is None:
            raise InputError(f"this tokenizer has no {baseline} token: choose baseline='mean' or a token such as '.'")
        ids = torch.full_like(source.ids, token)
    else:
        alone = encode(model.tokenizer, baseline, specials=False)[0]
        ids = source.ids.new_tensor([alone * length if len(alone) == 1 else encode(model.tokenizer, baseline)[0]])
    if ids.shape[1] != length:
        raise InputError(
            f"the baseline has {ids.shape[1]} tokens and the prompt {length}: give one token, a prompt of {length} tokens, "
            "'pad', 'mask', 'zero' or 'mean'"
        )
    return ids


def _check_baseline(model: Model, path: Path, start: Baseline) -> None:
    """A norm has no gradient at zero: refuse a path that starts where the residual stream is nothing at all."""
    stack = model.anatomy.stacks[0]
    tap = stack.blocks[0].taps.get("resid_pre")
    if start.name != "zero" or tap is None:
        return
    entering = path.met(tap, start.values)
    nothing = entering.abs().amax(-1)[0] == 0
    if bool(nothing.any()):
        raise Refused(
            "at the zero baseline the residual stream of this model is zero (it adds no position embeddings), where its first "
            "norm divides zero by zero and the integral does not exist: choose baseline='pad', 'mean' or a token such as '.'"
        )
