"""What happens when the strongest parts are switched off?"""

from __future__ import annotations

import torch

from pellucid.causal import ablation
from pellucid.engine.edits import Ablate
from pellucid.engine.run import Run
from pellucid.errors import PellucidError
from pellucid.results import Result
from pellucid.views.evidence import Evidence, Fall
from pellucid.views.forms import column
from pellucid.views.markup import number
from pellucid.views.naming import Part, named
from pellucid.views.page import Section, missing
from pellucid.views.question import Option, Question, asked_of, likeliest
from pellucid.views.schema import Document, Table

TITLE = "What happens without the strongest parts?"
UNSURE = ("vectors", "value", "span")  # no probability of one answer among others
SHOWN = 10


def strongest(question: Question, evidence: Evidence) -> Section:
    """The heads and MLPs whose absence changes the answer most, each switched off in two ways."""
    heads, written = evidence.zero, evidence.written
    others, found = _others(question)
    direct = {p.site: p.share for p in written}
    ranked = sorted([*heads, *others], key=lambda p: -abs(p.share))[: SHOWN if not question.at else SHOWN // 2]
    if not ranked:
        return missing(
            "strongest",
            "The strongest parts",
            TITLE,
            "no part of this model is on the map as one that can be switched off",
        )
    metric, clean = question.metric, question.scores[0]
    zero, mean, without = [], [], []
    for part in ranked:
        with torch.no_grad():
            run = question.model.run(question.inputs, edits=[Ablate(part.site + question.at, "mean")])
        mean.append(float(question.model.score(run, metric)[0]) - clean)
        zero.append(part.share)
        without.append(_says(question, part))
    columns = [column("part", [p.name for p in ranked]), column("off (zero)", zero), column("off (mean)", mean)]
    if written:
        columns.append(column("writes directly", [direct.get(p.site, float("nan")) for p in ranked]))
    if question.kind not in UNSURE:
        columns += [
            column("then the answer is", [w.text for w in without if w], tokens=True),
            column("its probability", [w.probability for w in without if w], bar=1.0),
        ]
        intact = question.options[0]
        if without[0] is not None:
            evidence.fell = Fall(ranked[0].name, intact.probability, _left(question, ranked[0]), zero[0], mean[0])
    view = Document(
        title="The strongest parts, switched off",
        data=Table(columns=tuple(columns), rows=len(ranked), components=tuple(p.site for p in ranked)),
    )
    lead = (
        f"The {len(ranked)} heads and MLPs whose absence changes the {question.metric_name} of {number(clean, sign=True)} most. “Zero” sets what the part writes to nothing, "
        "“mean” to what it writes on average over the prompt’s tokens; the likeliest answer is the one with the part at zero."
    )
    return Section(
        "strongest", "The strongest parts", TITLE, lead, "", (view,),
        care="early MLPs often act as a second embedding: without them nothing works, which does not make them the place where this fact is kept. "
        "Where zero and mean disagree, trust neither alone.",
        results=found,
    )  # fmt: skip


def _others(question: Question) -> tuple[list[Part], tuple[Result, ...]]:
    """MLPs, and the mixers of blocks without attention."""
    parts, found = [], []
    for stack in question.model.anatomy.stacks:
        for part in ("mlp.out", "mixer.out"):
            try:
                result = ablation(
                    question.model,
                    question.inputs,
                    over=f"{stack.prefix}layers.*.{part}{question.at}",
                    metric=question.metric,
                )
            except PellucidError:
                continue  # a stack without such parts on the map
            found.append(result)
            parts += [
                Part(named(int(a), part, stack=stack.name), f"{stack.prefix}layers.{a}.{part}", float(e))
                for a, e in zip(result["layer"].values, result["effect"].values, strict=True)
            ]
    return parts, tuple(found)


def _says(question: Question, part: Part) -> Option | None:
    """The likeliest answer without a part."""
    if question.kind in UNSURE:
        return None
    asked, run = question.asked or asked_of(question.model, question.inputs), _without(question, part)
    return likeliest(asked, run, 1)[0]


def _left(question: Question, part: Part) -> float:
    """What is left of the probability of the model's own answer without a part."""
    asked = question.asked or asked_of(question.model, question.inputs)
    p = asked.distribution(_without(question, part))[0]
    return float((p[:, 1] if p.ndim == 2 else p)[question.options[0].id])


def _without(question: Question, part: Part) -> Run:
    with torch.no_grad():
        return question.model.run(question.inputs, edits=[Ablate(part.site + question.at)])
