"""What happens when the strongest parts are switched off?"""

from __future__ import annotations

import torch

from pellucid.causal import ablation
from pellucid.engine.edits import Ablate
from pellucid.errors import PellucidError
from pellucid.results import Result
from pellucid.views.figures import table
from pellucid.views.markup import join, number, percent, token
from pellucid.views.page import Section, missing
from pellucid.views.parts import Part, named
from pellucid.views.question import Question, read

TITLE = "What happens without the strongest parts?"
SHOWN = 10


def strongest(question: Question, heads: list[Part], written: list[Part]) -> Section:
    """The heads and MLPs whose absence changes the answer most, each switched off in two ways."""
    others, found = _others(question)
    direct = {p.site.replace(".attn.z_out.", ".attn.heads."): p.share for p in written}
    ranked = sorted([*heads, *others], key=lambda p: -abs(p.share))[: SHOWN if not question.at else SHOWN // 2]
    if not ranked:
        return missing(
            "strongest",
            "The strongest parts",
            TITLE,
            "no part of this model is on the map as one that can be switched off",
        )
    metric, clean = question.metric, question.scores[0]
    rows = []
    for part in ranked:
        with torch.no_grad():
            run = question.model.run(question.inputs, edits=[Ablate(part.site + question.at, "mean")])
        mean = float(question.model.score(run, metric)[0]) - clean
        row = [part.name, number(part.share, sign=True), number(mean, sign=True)]
        if written:
            row.append(number(direct[part.site], sign=True) if part.site in direct else "")
        rows.append([*row, _says(question, part)])
    columns = ["part", "off (zero)", "off (mean)", *(["writes directly"] if written else []), "then the answer is"]
    lead = (
        f"The {len(ranked)} heads and MLPs whose absence changes the {question.metric_name} of {number(clean, sign=True)} most. “Zero” sets what the part writes to nothing, "
        "“mean” to what it writes on average over the prompt’s tokens; the last column is the likeliest answer with the part at zero."
    )
    code = [
        question.metric_code,
        f"without = model.run(prompt, edits=[pl.Ablate({ranked[0].site + question.at!r})])",
        "print(model.score(without, metric) - model.score(model.run(prompt), metric))",
    ]
    return Section(
        "strongest", "The strongest parts", TITLE, lead, table(columns, rows),
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


def _says(question: Question, part: Part) -> object:
    if question.kind == "embedding":
        return ""
    with torch.no_grad():
        logits = question.model.run(question.inputs, edits=[Ablate(part.site + question.at)]).logits
    best = read(question.model, logits, question.kind, question.position, 1)[0]
    return join(token(best.text), f" {percent(best.probability)}")
