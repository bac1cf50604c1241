"""Which attention heads does the answer need? Switching them off one at a time, in two ways."""

from __future__ import annotations

import numpy as np

from pellucid.causal import ablation
from pellucid.errors import PellucidError, Refused
from pellucid.results import Result
from pellucid.statistics import spearman
from pellucid.views.evidence import Evidence
from pellucid.views.markup import number
from pellucid.views.naming import Part, named
from pellucid.views.page import Section
from pellucid.views.question import Question
from pellucid.views.schema import Axis, Document, Grid, Numbers, Plane

TITLE = "Which heads does the answer need?"


def heads(question: Question, evidence: Evidence) -> Section:
    found: list[Result] = []
    views = []
    for stack in question.model.anatomy.stacks:
        if not any(block.attentions for block in stack.blocks):
            continue
        over = f"{stack.prefix}layers.*.attn.heads.*{question.at}"
        zero = ablation(question.model, question.inputs, over=over, metric=question.metric)
        mean = _at_mean(question, over)
        found += [zero, *([mean] if mean is not None else [])]
        views.append(_view(question, zero, mean, stack.name, stack.prefix))
        evidence.zero += _parts(zero, stack.name, stack.prefix)
        if mean is not None:
            evidence.mean |= {p.site: p.share for p in _parts(mean, stack.name, stack.prefix)}
    if not evidence.zero:
        raise Refused("this model has no attention heads")
    evidence.zero.sort(key=lambda p: -abs(p.share))
    worst = min(evidence.zero, key=lambda p: p.share)
    where = "where the answer is read (the prompt is long)" if question.at else "everywhere"
    lead = (
        f"Each cell is one attention head, switched off {where}; the number is the change of the {question.metric_name} "
        f"({number(float(found[0]['clean']), sign=True)} when nothing is off). Orange: the answer suffers without the head. Blue: it does better. "
        "“Zero” sets what the head says to nothing, “mean” to what it says on average over the prompt’s tokens."
    )
    finding = f"Switching off {worst.name} costs the answer most among {len(evidence.zero)} heads: {number(worst.share, sign=True)} in the {question.metric_name}."
    return Section(
        "heads", "The heads", TITLE, lead, "", tuple(views), care=_care(evidence),
        finding=finding, results=tuple(found),
    )  # fmt: skip


def _at_mean(question: Question, over: str) -> Result | None:
    """The control; None where the model does not allow it."""
    try:
        return ablation(question.model, question.inputs, over=over, how="mean", metric=question.metric)
    except PellucidError:
        return None


def _parts(result: Result, stack: str, prefix: str) -> list[Part]:
    effect, layers, units = result["effect"].values, result["layer"].values, result["head"].values
    return [
        Part(named(int(a), "attn.heads", int(h), stack), f"{prefix}layers.{a}.attn.heads.{h}", float(effect[i, j]))
        for i, a in enumerate(layers) for j, h in enumerate(units) if np.isfinite(effect[i, j])
    ]  # fmt: skip


def _view(question: Question, zero: Result, mean: Result | None, stack: str, prefix: str) -> Document:
    component = f"{prefix}layers.{{row}}.attn.heads.{{column}}"
    planes = [
        Plane(name=name, values=Numbers.of(r["effect"].values), component=component)
        for name, r in (("zero", zero), ("mean", mean))
        if r is not None
    ]
    rows, columns = (Axis(name=dim, labels=tuple(str(i) for i in zero[dim].values)) for dim in ("layer", "head"))
    full = float(np.nanquantile(np.abs(zero["effect"].values), 0.99)) or 1.0
    data = Grid(
        rows=rows, columns=columns, planes=tuple(planes), unit=f"change of the {question.metric_name}", full=full
    )
    return Document(
        title=f"Heads of the {stack}, off one at a time" if stack else "Heads, off one at a time", data=data
    )


def _care(evidence: Evidence) -> str:
    known = (
        "zero is a state the model never sees, so a head can matter here for being missed rather than for what it says"
    )
    pairs = [(p.share, evidence.mean[p.site]) for p in evidence.zero if p.site in evidence.mean]
    if len(pairs) < 3:
        return f"{known}; the control with mean values was not possible here."
    agreed = spearman(*map(np.array, zip(*pairs, strict=True)))
    return (
        f"{known}. Against the control with mean values the heads’ order agrees to {number(agreed)} (rank correlation). "
        "Other heads can make up for one that is off, which does not show here."
    )
