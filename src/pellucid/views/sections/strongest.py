"""What happens when the strongest parts are switched off?"""

from __future__ import annotations

import torch
from torch import Tensor

from pellucid.causal import ablation
from pellucid.engine.edits import Ablate
from pellucid.errors import PellucidError
from pellucid.results import Result
from pellucid.views.evidence import Evidence, Fall
from pellucid.views.forms import column
from pellucid.views.markup import number
from pellucid.views.naming import Part, named
from pellucid.views.page import Section, missing
from pellucid.views.question import Option, Question, read
from pellucid.views.schema import Document, Table

TITLE = "What happens without the strongest parts?"
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
    if question.kind != "embedding":
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
    code = [
        question.metric_code,
        f"without = model.run(prompt, edits=[pl.Ablate({ranked[0].site + question.at!r})])",
        "print(model.score(without, metric) - model.score(model.run(prompt), metric))",
    ]
    return Section(
        "strongest", "The strongest parts", TITLE, lead, "", (view,),
        care="early MLPs often act as a second embedding: without them nothing works, which does not make them the place where this fact is kept. "
        "Where zero and mean disagree, trust neither alone.",
        python=question.code(*code), shell=question.shell, results=found,
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
    if question.kind == "embedding":
        return None
    return read(question.model, _logits(question, part), question.kind, question.position, 1)[0]


def _left(question: Question, part: Part) -> float:
    """What is left of the probability of the model's own answer without a part."""
    logits = _logits(question, part)
    p = (logits[0] if question.kind == "class" else logits[0, question.position]).float().softmax(-1)
    return float(p[question.options[0].id])


def _logits(question: Question, part: Part) -> Tensor:
    with torch.no_grad():
        return question.model.run(question.inputs, edits=[Ablate(part.site + question.at)]).logits
