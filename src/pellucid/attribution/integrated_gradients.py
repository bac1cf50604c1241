"""How much of the answer does each input token account for?

The input embeddings are moved in a straight line from a baseline b to the prompt x, and the gradient of the
score F is integrated on the way (Sundararajan et al. 2017):

    attribution_i = sum over d of (x_i - b_i) * integral from 0 to 1 of dF/dx_i (b + a (x - b)) da

The attributions add up to F(x) - F(b) (completeness), up to the error of the quadrature; that gap is reported
and bounded. Only the output of the token embedding moves: positions and segments stay as they are. What
counts as absence is a choice that changes the ranking, so the baseline is part of the result; special tokens
keep their own embedding in it (unless `keep_special=False`) and so receive nothing.
"""

from __future__ import annotations

import inspect
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, get_args

import torch
import xarray as xr
from torch import Tensor, nn

from pellucid.anatomy.layout import TOKENS, Layout
from pellucid.anatomy.opening import main_output
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.attribution.quadrature import Rule, quadrature, refine
from pellucid.engine.inputs import Inputs, Stream
from pellucid.errors import InputError, Refused
from pellucid.metrics import Answers, BoundMetric, Metric, class_logit, logit, logit_difference
from pellucid.model import Model
from pellucid.results import Provenance, Result
from pellucid.tasks.tokens import encode

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

    `target` is a token whose logit is attributed (minus that of `against`), or any metric; by default the
    prediction at the last position. `baseline` is "pad", "mask" or any token ("." for instance), put in the
    place of every token; "zero" or "mean", the zero or the mean embedding; or a prompt or ids of the same
    length. The default is "pad", or "mean" for a tokenizer without a padding token. Without `steps`,
    gradients are taken where the path is rough (see `refine`) until the completeness gap is within
    `tolerance` of the attributions' total size, and Refused is raised if 2048 do not suffice; with a fixed
    number of steps of a `rule`, a larger gap is warned about. `forced` is the decoder's text in an
    encoder-decoder.

    Gives `attribution` [position] with coordinates `token`, `baseline_token` and `special`; `score`,
    `baseline_score`, `gap` = sum of attributions - (score - baseline_score), and `steps`.

    >>> integrated_gradients(model, "The capital of France is", baseline="mean").top(3)  # doctest: +SKIP
    """
    if rule not in get_args(Rule):
        raise InputError(f"unknown rule {rule!r}: expected one of {', '.join(get_args(Rule))}")
    if steps is not None and steps < 1:
        raise InputError(f"{steps} steps: expected at least 1")
    if steps is None and rule != "gauss-legendre":
        raise InputError(f"the rule {rule!r} needs a number of steps: give steps=50, for instance")
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
            f"the attributions miss the change of the score, {here - baseline_score:.3g}, by {gap:.2g} after "
            f"{n} gradients from the baseline {start.name!r}"
        )
        if steps is None:
            raise Refused(f"{message}: the path is too rough; choose another baseline, such as a token")
        warnings.warn(f"{message}: take more steps, or leave steps out", stacklevel=2)

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
        attrs={"baseline": start.name, "rule": rule if steps else "refined", "attributed": score.name},
    )
    provenance = Provenance(
        "integrated_gradients", model.name, digest=model.digest, inputs=list(inputs.texts),
        arguments={"target": target, "against": against, "baseline": baseline, "steps": steps, "rule": rule,
                   "tolerance": tolerance, "keep_special": keep_special, "forced": forced},
    )  # fmt: skip
    title = f"Integrated gradients of {score.name} from {start.name!r}"
    return Result(data, kind="integrated gradients", title=title, provenance=provenance)


def _score(model: Model, path: Path, target: Any, against: Answers | None) -> BoundMetric:
    """What is attributed, as a bound metric: by default the prediction at the last position, or the class."""
    if target is None:
        target = int(path.logits.flatten(0, -2)[-1].argmax())
    if not isinstance(target, str | int | Sequence):
        if against is not None:
            raise InputError("against= goes with a target token; a metric says itself what it compares")
        return model.bind(target)
    if path.logits.ndim == 2:
        if against is not None:
            raise InputError("against= compares tokens, and this model is a classifier: give a metric")
        return model.bind(class_logit(target))
    return model.bind(logit(target) if against is None else logit_difference(target, against))


class Path:
    """Runs the model with its token embeddings [1, position, d] replaced, many versions in one batch.

    The embedding's output is edited where it is made, so that nothing else about the forward pass changes:
    this serves families that take no `inputs_embeds`, and encoder-decoders whose stacks share an embedding.
    """

    def __init__(self, model: Model, inputs: Inputs, source: Stream) -> None:
        self.model, self.inputs, self.source = model, inputs, source
        name, nth, self.embedding = self._find()
        self.tap = Tap(name, "out", Layout(TOKENS, TOKENS), nth=nth)
        self.values = self.embed(source.ids)

    def _find(self) -> tuple[str, int, nn.Embedding]:
        """The embedding module that is given the source tokens, and at which of its calls it is."""
        module: Any = self.model.module
        calls, found = Counter[str](), list[tuple[str, int]]()

        def seen(name: str) -> Callable[[Any, Any], None]:
            def hook(_: Any, args: tuple[Any, ...]) -> None:
                if args and isinstance(args[0], Tensor) and torch.equal(args[0], self.source.ids):
                    found.append((name, calls[name]))
                calls[name] += 1

            return hook

        tables = {n: m for n, m in module.named_modules() if isinstance(m, nn.Embedding)}
        hooks = [m.register_forward_pre_hook(seen(n)) for n, m in tables.items()]
        try:
            with torch.no_grad():
                self.logits = main_output(module(**self.inputs.tensors))
        finally:
            for hook in hooks:
                hook.remove()
        if not found:
            raise Refused(f"{self.model.name} does not look its input tokens up in an embedding")
        own = module.get_input_embeddings()
        name, nth = next((f for f in found if tables[f[0]] is own), found[0])
        return name, nth, tables[name]

    def embed(self, ids: Tensor) -> Tensor:
        with torch.no_grad():
            made: Tensor = self.embedding(ids)
        return made

    def mean(self) -> Tensor:
        """[d], the mean over the vocabulary, as the embedding hands tokens out (some families scale them)."""
        ids = torch.arange(len(self.embedding.weight), device=self.source.ids.device)
        total = torch.stack([self.embed(part[None]).double().sum(1)[0] for part in ids.split(8192)]).sum(0)
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
class Baseline:
    """Where the path starts: embeddings [1, position, d], and what stands there in words."""

    name: str
    values: Tensor
    labels: list[str]
    special: Tensor  # [position] the prompt's special tokens

    @classmethod
    def of(
        cls, model: Model, path: Path, source: Stream, baseline: str | Tensor | None, keep_special: bool
    ) -> Baseline:
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
            labels = [
                own if is_special else b for own, b, is_special in zip(source.labels[0], labels, special, strict=True)
            ]
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
            f"the baseline has {ids.shape[1]} tokens and the prompt {length}: give one token, a prompt of "
            f"{length} tokens, 'pad', 'mask', 'zero' or 'mean'"
        )
    return ids


def _check_baseline(model: Model, path: Path, start: Baseline) -> None:
    """A norm has no gradient at zero: refuse a path that starts where the residual stream is nothing."""
    tap = model.anatomy.stacks[0].blocks[0].taps.get("resid_pre")
    if start.name == "zero" and tap is not None and bool((path.met(tap, start.values) == 0).all(-1).any()):
        raise Refused(
            "at the zero baseline the residual stream of this model is zero (it adds no positions), "
            "where its first norm divides zero by zero and the integral does not exist: choose "
            "baseline='pad', 'mean' or a token such as '.'"
        )
