"""Which parts write the answer? Direct logit attribution."""

from __future__ import annotations

import numpy as np

from pellucid.lenses import direct_logit_attribution
from pellucid.results import Result
from pellucid.views.evidence import Evidence
from pellucid.views.forms import contributions
from pellucid.views.markup import number, quoted, tag
from pellucid.views.naming import Part, named, site_of
from pellucid.views.page import Section
from pellucid.views.question import Question
from pellucid.views.schema import Document

TITLE = "Which parts write the answer?"
KINDS = (("attn", "attention"), ("cross", "cross-attention"), ("mixer", "mixer"), ("mlp", "MLP"))


def direct(question: Question, evidence: Evidence) -> Section:
    assert question.target is not None and question.against is not None
    target, against = question.word(question.target), question.word(question.against)
    found = direct_logit_attribution(
        question.model, question.inputs, target, against=against, by="head", positions=question.position
    )
    total, gap = float(found["total"]), float(found["gap"])
    part, share = (found[name].values for name in ("part", "contribution"))
    areas = []
    for area, name in KINDS:
        rows = np.array([p.startswith(area) for p in part])
        if rows.any():
            areas.append((name, float(share[rows].sum())))
    embed = float(share[part == "embed"].sum())
    rest = float(share[part == "constant"].sum())
    written = evidence.written = strongest(found)
    sums = (
        f"The shares add up to the {question.metric_name} of {number(total, sign=True)} (gap {number(gap, 4)}): "
        + ", ".join(f"{name} {number(v, sign=True)}" for name, v in areas)
        + f", the embedding {number(embed, sign=True)}"
        + (f", constants {number(rest, sign=True)}." if abs(rest) > 0.005 else ".")
    )
    lead = (
        f"The final state is a sum of what every part has written. Each part’s share of the {question.metric_name} "
        f"{quoted(question.target.text)} − {quoted(question.against.text)}, added up part by part; blue supports the answer. Head 9.4 is head 4 of layer 9."
    )
    best = max(written, key=lambda p: p.share)
    finding = f"Of single parts, {best.name} writes most of the answer directly: {number(best.share, sign=True)} of {number(total, sign=True)}."
    return Section(
        "direct", "The writers", TITLE, lead, tag("p", sums, class_="note"),
        (Document(title="Direct logit attribution", data=contributions(found)),),
        care="only the direct way to the output is counted, with the final norm’s scale held at its value here. A part that "
        "works through later ones shows nothing, and a large share may be cancelled by another.",
        finding=finding, results=(found,),
    )  # fmt: skip


def strongest(found: Result) -> list[Part]:
    """The heads and MLPs that write most, either way."""
    layer, part, unit, share = (found[name].values for name in ("layer", "part", "unit", "contribution"))
    parts = [
        Part(named(int(a), str(p), int(u)), site_of(str(site)), float(s))
        for site, a, p, u, s in zip(found["component"].values, layer, part, unit, share, strict=True)
        if a >= 0 and not str(p).endswith(".rest")
    ]
    return sorted(parts, key=lambda p: -abs(p.share))
