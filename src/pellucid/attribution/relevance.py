"""Which tokens, layers, heads, neurons and query-key pairs did the answer come through?

    R(x) = x * G(x)        summed over a token's embedding: its relevance

Layer-wise relevance propagation hands the answer back through the model, operator by operator, each sharing it out
among what it was made from (Bach et al. 2015). G is a gradient whose rules at norms, products, activations and softmax
are those of AttnLRP (Achtibat et al. 2024), written down in `relevance_rules`; one forward and one backward pass give
the relevance of the tokens and of every site inside. The model is run as it is: rules belong to operators, not to
families, and a model that passes an operator without a rule is refused by name.

What is handed back adds up to the answer only where nothing keeps a part of it. The biases' share (with them positions,
segments and all other constants that are added) is told in `biases`; what else is missing the softmax kept, whose
Taylor rule conserves nothing by itself. rules="cp-lrp" holds the softmax at its value (Ali et al. 2022): then tokens
and biases add up exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from pellucid.anatomy.opening import main_output
from pellucid.anatomy.sites import Site
from pellucid.anatomy.structure import Tap
from pellucid.anatomy.wiretap import Handler, Wiretap
from pellucid.attribution.batches import batched
from pellucid.attribution.case import Case
from pellucid.attribution.path import spared
from pellucid.attribution.players import Players
from pellucid.attribution.relevance_rules import Rules
from pellucid.engine.edits import Edit
from pellucid.engine.locate import expand, locate
from pellucid.engine.run import Run, Session
from pellucid.errors import InputError, Refused, among, listed
from pellucid.metrics import Answers
from pellucid.model import Model
from pellucid.results import Result
from pellucid.technique import technique

RuleSet = Literal["attnlrp", "cp-lrp"]
_SUMMED = {"batch", "d_model", "d_head"}


@technique
@batched
def relevance_propagation(
    model: Model,
    prompt: Any,
    target: Any = None,
    *,
    against: Answers | None = None,
    decoder: str | None = None,
    edits: Sequence[Edit] = (),
    players: Any = "token",
    rules: RuleSet = "attnlrp",
    epsilon: float = 0.0,
    sites: str | Site | Sequence[str | Site] = (),
) -> Result:
    """The relevance of each token, and of the `sites` named, from one forward and one backward pass.

    `target`, `against`, `decoder` and `players` are those of `integrated_gradients`. Special tokens are tokens like any
    other here: what went through them is theirs. `rules` are "attnlrp" or "cp-lrp" (see above); `epsilon`, in the units
    of activations, lets linear maps whose output is small keep it (LRP-epsilon). `sites` are such as
    "layers.*.resid_post", "layers.*.attn.z" (relevance of heads), "layers.*.mlp.neurons", or "layers.*.attn.scores" and
    "layers.*.attn.pattern" (of every query-key interaction).

    InputError for unknown rules, or sites that name a unit or a position. Refused where the model passes an operator
    without a rule, or its weights let no gradient through.

    Gives `attribution` [position] (or [player]; with [output] in front for a continuation), `score`, `gap` = sum of the
    tokens' relevance - score, `biases` (relevance that biases, positions and other constants took), `elsewhere`
    (relevance of decoder tokens that get no credit), and for each part in `sites` the relevance [layer, ...] by its name,
    summed over the model's and heads' width.

    >>> relevance_propagation(model, "The capital of France is", " Paris", sites="layers.*.attn.scores")
    Relevance of logit (attnlrp)
    attribution: attribution, score, gap, biases, elsewhere, gradients, attn.scores over position 5, ...
    """
    if not among(rules, RuleSet):
        raise InputError(f"unknown rules {rules!r}: expected {' or '.join(map(repr, get_args(RuleSet)))}")
    if epsilon < 0:
        raise InputError(f"epsilon={epsilon}: expected zero or a small positive number")
    if edits:
        raise Refused(
            "relevance propagation has rules for the operators of a model, and an edit is none of them: use "
            "integrated_gradients, or a method that only runs the model, such as occlusion"
        )
    case = Case.of(model, prompt, target, against=against, decoder=decoder)
    found = _propagate(
        case,
        [sites] if isinstance(sites, str | Site) else listed("sites", sites, "addresses of sites"),
        rules == "cp-lrp",
        epsilon,
    )
    credited, zero = Players.of(case, players), torch.zeros(len(found.scores))
    tokens = torch.cat([found.tokens[name] for name in case.streams], 1)
    elsewhere = [x.sum(1) for name, x in found.tokens.items() if name not in case.streams]
    values, labels = credited.pooled(case, tokens.numpy())
    inside, coords = _labelled(case, found.sites)
    variables = {
        "attribution": values, "score": found.scores, "gap": tokens.sum(1) - found.scores, "biases": found.biases,
        "elsewhere": sum(elsewhere, zero), "gradients": 1, **inside,
    }  # fmt: skip
    return case.result(
        f"Relevance of {case.question.name} ({rules})", variables,
        coords=coords, attrs={"rules": rules, "epsilon": epsilon}, labels=labels,
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Relevances:
    """What one forward pass, and one backward pass for each output, gave."""

    scores: Tensor  # [output]
    tokens: dict[str, Tensor]  # stream -> [output, position]
    biases: Tensor  # [output]
    sites: dict[Site, Tensor]  # [output, ...], without batch, summed over widths


def _propagate(case: Case, at: Sequence[str | Site], hold_softmax: bool, epsilon: float) -> Relevances:
    anatomy, module, inputs, target = case.model.anatomy, case.model.module, case.inputs, case.question
    wanted = [site for each in at for site in expand(anatomy, each)]
    _check_sites(wanted, hold_softmax)
    session = Session(anatomy, inputs, [*wanted, *([target.site.whole] if target.site else [])], gradients=True)
    handlers: dict[Tap, Handler] = {
        tap: partial(_unless_constant, tap, handler, session.kept) for tap, handler in session.handlers().items()
    }
    streams = {name: s.ids for name, s in inputs.streams.items() if name or len(inputs.streams) == 1}
    forward, last = spared(case)
    with torch.enable_grad():
        with (
            Rules(module, streams, hold_softmax=hold_softmax, epsilon=epsilon, memo=anatomy.memo) as rules,
            Wiretap(module, handlers, 1),
        ):
            output = module(**{**inputs.tensors, **forward})
        if target.site is not None:
            scores = case.read(Run(anatomy, inputs, output, session.kept, session.sites).tensor(target.site))[0]
        else:
            mask = inputs.stream("").mask
            scores = target.read(main_output(output), mask[:, -last:] if last else mask)[0]
    _check(case, rules, scores)
    taps = {site: locate(anatomy, site).tap for site in wanted}
    # a state that only shows one of its readers has zeros added to it, whose gradient is that of all its readers
    met = {t: session.zeros[t].added[0] if t in session.zeros else session.kept[t] for t in taps.values()}
    return _backward(scores, rules, taps, met, session.kept)


def _unless_constant(tap: Tap, handler: Handler, kept: dict[Tap, Tensor], x: Tensor) -> Tensor | None:
    """What depends on no token is noted, and stays the constant it is."""
    if x.requires_grad:
        return handler(x)
    kept[tap] = x.detach()
    return None


def _check_sites(sites: Sequence[Site], hold_softmax: bool) -> None:
    for site in sites:
        if site != site.whole or site.part == "logits":
            raise InputError(
                f"sites={str(site)!r}: name whole parts of layers, such as 'layers.*.attn.z', and select later"
            )
        if hold_softmax and site.part.partition(".")[2] in ("q", "k", "scores", "pattern", "router"):
            raise InputError(
                f"sites={str(site)!r}: with rules='cp-lrp' the softmax and what leads to it are constants, without relevance; "
                "use rules='attnlrp'"
            )


def _check(case: Case, rules: Rules, scores: Tensor) -> None:
    """Refused where something on the way from the tokens to the target has no rule."""
    name = case.model.name
    if not all(rules.tokens[stream] for stream in case.streams):
        raise Refused(f"{name} does not look its input tokens up in an embedding")
    if not scores.requires_grad:
        raise Refused(
            f"no gradient reaches the embeddings of {name}: its weights are quantised, or the target counts; use a method "
            "that only runs the model: occlusion, shapley, kernel_shap or lime"
        )
    without = sorted(rules.uncovered | rules.opaque(scores))
    if without:
        raise Refused(
            f"{name} uses {', '.join(without)}, for which relevance propagation has no rule: use another method, or load "
            "the model with attn_implementation='sdpa' or 'eager' where it is a kernel of attention"
        )


def _backward(
    scores: Tensor, rules: Rules, taps: dict[Site, Tap], met: dict[Tap, Tensor], kept: dict[Tap, Tensor]
) -> Relevances:
    """Value times gradient at the tokens, the constants and the sites, for one output after another."""
    leaves = [leaf for each in rules.tokens.values() for leaf in each]
    n, wanted = len(scores), [*leaves, *rules.constants, *(x for x in met.values() if x.requires_grad)]
    tokens: dict[str, list[Tensor]] = {name: [] for name in rules.tokens}
    biases, sites = [], dict[Site, list[Tensor]]((site, []) for site in taps)
    for o in range(n):
        with torch.enable_grad():  # else scores[o] forgets where it comes from
            found = torch.autograd.grad(scores[o], wanted, retain_graph=o + 1 < n, allow_unused=True)
        gradient = dict(zip(map(id, wanted), found, strict=True))
        for name, looked_up in rules.tokens.items():
            size = rules.streams[name].numel()
            rows = [_relevance(x, gradient[id(x)]).flatten(0, -2)[:size].sum(-1) for x in looked_up]
            tokens[name].append(sum(rows, torch.zeros(size, dtype=torch.float64)))
        biases.append(_total(rules.constants, [gradient[id(x)] for x in rules.constants]))
        for site, tap in taps.items():
            value = _relevance(kept[tap], gradient.get(id(met[tap])))
            summed = [i for i, dim in enumerate(site.dims) if dim in _SUMMED]
            sites[site].append(value.sum(summed))
    return Relevances(
        scores.detach().cpu().double(),
        {name: torch.stack(rows) for name, rows in tokens.items()},
        torch.tensor(biases, dtype=torch.float64),
        {site: torch.stack(values) for site, values in sites.items()},
    )


def _relevance(x: Tensor, gradient: Tensor | None) -> Tensor:
    """Value times gradient in float64; a masked score, minus infinity, has none."""
    if gradient is None:
        return torch.zeros(x.shape, dtype=torch.float64)
    x = x.detach().double()
    return torch.where(x.isinf(), 0.0, x * gradient).cpu()


def _total(constants: list[Tensor], gradients: list[Tensor | None]) -> float:
    """The relevance of all constants; those that mask (minus infinity, without a gradient) have none."""
    with torch.no_grad():
        reached = [(x, g) for x, g in zip(constants, gradients, strict=True) if g is not None]
        each = [(x * g).flatten() for x, g in reached]
        return float(torch.cat(each).nan_to_num(0.0).sum(dtype=torch.float64)) if each else 0.0


def _labelled(case: Case, sites: dict[Site, Tensor]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Each part's relevance over its layers, dimensions named (by stack where there are several); and coordinates.

    Layers that lack a part, and entries a layer lacks where layers differ in size, are NaN.
    """
    anatomy, several = case.model.anatomy, len(case.model.anatomy.stacks) > 1
    coords: dict[str, Any] = {}
    groups: dict[tuple[str, str], dict[Site, Tensor]] = {}
    for site, values in sites.items():
        groups.setdefault((site.stack, site.part), {})[site] = values
    variables: dict[str, Any] = {}
    for (stack, part), members in groups.items():
        spot = locate(anatomy, next(iter(members)))
        prefix, layered = f"{stack}." if stack else "", spot.site.layer is not None
        owner = {"key": spot.keys, "position": spot.stream}

        def dim(name: str, owner: dict[str, str] = owner, stack: str = stack or spot.stream) -> str:
            return f"{owner.get(name, stack)}_{name}" if several else name

        dims = [dim(d) for d in spot.site.dims if d not in _SUMMED]
        layers: list[Any] = sorted({s.layer for s in sites if s.stack == stack and isinstance(s.layer, int)})
        if layered:
            coords[dim("layer")], dims = layers, [dim("layer"), *dims]
        outputs, *sizes = (max(each) for each in zip(*(v.shape for v in members.values()), strict=True))
        array = np.full((outputs, *([len(layers)] if layered else []), *sizes), np.nan)
        for site, values in members.items():
            place: list[Any] = [slice(None), *([layers.index(site.layer)] if layered else [])]
            array[(*place, *(slice(n) for n in values.shape[1:]))] = values
        single = case.question.single
        variables[prefix + part] = (dims, array[0]) if single else (["output", *dims], array)
    return variables, coords
