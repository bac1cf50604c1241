"""Which attention heads does the answer need? Switching them off one at a time."""

from __future__ import annotations

import numpy as np

from pellucid.causal import ablation
from pellucid.errors import PellucidError, Refused
from pellucid.results import Result
from pellucid.views.figures import Axis, grid
from pellucid.views.markup import Html, join, number, tag
from pellucid.views.page import Section
from pellucid.views.parts import Part, named
from pellucid.views.question import Question

TITLE = "Which heads does the answer need?"


def heads(question: Question) -> tuple[Section, list[Part]]:
    """The section, and every head with its effect."""
    found, shown, parts = [], [], []
    over = ""
    for stack in question.model.anatomy.stacks:
        if not any(block.attentions for block in stack.blocks):
            continue
        over = f"{stack.prefix}layers.*.attn.heads.*{question.at}"
        result = ablation(question.model, question.inputs, over=over, metric=question.metric)
        found.append(result)
        shown.append(_grid(question, result, stack.name))
        effect, layers, units = result["effect"].values, result["layer"].values, result["head"].values
        parts += [
            Part(named(int(a), "attn.heads", int(h), stack.name), f"{stack.prefix}layers.{a}.attn.heads.{h}", float(effect[i, j]))
            for i, a in enumerate(layers) for j, h in enumerate(units) if np.isfinite(effect[i, j])
        ]  # fmt: skip
    if not parts:
        raise Refused("this model has no attention heads")
    parts.sort(key=lambda p: -abs(p.share))
    worst = min(parts, key=lambda p: p.share)
    where = "where the answer is read (the prompt is long)" if question.at else "everywhere"
    lead = (
        f"Each cell is one attention head, set to zero {where}; the number is the change of the {question.metric_name} "
        f"({number(float(found[0]['clean']), sign=True)} when nothing is off). Orange: the answer suffers without the head. Blue: it does better."
    )
    lines = [
        question.metric_code, f"effect = pl.causal.ablation(model, prompt, over={over!r}, metric=metric)",
        "effect.show()",
    ]  # fmt: skip
    finding = f"Switching off {worst.name} costs the answer most among {len(parts)} heads: {number(worst.share, sign=True)} in the {question.metric_name}."
    section = Section(
        "heads", "The heads", TITLE, lead, shown, care=_control(question, found), python=question.code(*lines), shell=question.shell,
        finding=finding, results=tuple(found),
    )  # fmt: skip
    return section, parts


def _grid(question: Question, result: Result, stack: str) -> Html:
    effect = result["effect"].values
    full = float(np.nanquantile(np.abs(effect), 0.99)) or 1.0
    rows = Axis("layer", [str(i) for i in result["layer"].values])
    columns = Axis("head", [str(i) for i in result["head"].values])
    shown = grid(
        effect,
        rows,
        columns,
        label=f"Change when a head is off, {stack or 'by layer and head'}",
        name=f"change of the {question.metric_name}",
        scale="signed",
        full=full,
    )
    return join(tag("h3", stack.capitalize()) if stack else None, shown)


def _control(question: Question, found: list[Result]) -> str:
    """The same with heads set to their mean over the prompt's tokens: how much hangs on what switching off means."""
    known = (
        "zero is a state the model never sees, so a head can matter here for being missed rather than for what it says"
    )
    try:
        over = str(found[-1].provenance.arguments["over"])
        again = ablation(question.model, question.inputs, over=over, how="mean", metric=question.metric)[
            "effect"
        ].values
    except PellucidError as error:
        return f"{known}; the control with mean values was not possible ({error})."
    zero = found[-1]["effect"].values
    both = np.isfinite(zero) & np.isfinite(again)
    if both.sum() < 3:
        return f"{known}."
    a, b = (np.argsort(np.argsort(v[both])) for v in (zero, again))
    return (
        f"{known}. As a control, every head was also set to its mean over the prompt’s tokens: the heads’ order agrees to "
        f"{number(float(np.corrcoef(a, b)[0, 1]))} (rank correlation). Other heads can make up for one that is off, which does not show here."
    )
