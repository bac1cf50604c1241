"""Which parts write the answer? Direct logit attribution."""

from __future__ import annotations

import numpy as np

from pellucid.lenses import direct_logit_attribution
from pellucid.results import Result
from pellucid.views.figures import columns, details, table
from pellucid.views.markup import join, number, quoted, tag
from pellucid.views.page import Section
from pellucid.views.parts import Part, named
from pellucid.views.question import Question

TITLE = "Which parts write the answer?"
KINDS = (("attn", "attention"), ("cross", "cross-attention"), ("mixer", "mixer"), ("mlp", "MLP"))


def direct(question: Question) -> Section:
    assert question.target is not None and question.against is not None
    target, against = question.word(question.target), question.word(question.against)
    found = direct_logit_attribution(
        question.model, question.inputs, target, against=against, by="head", position=question.position
    )
    total, gap = float(found["total"]), float(found["gap"])
    layer, part, share = (found[name].values for name in ("layer", "part", "contribution"))
    labels = [str(i) for i in range(int(layer.max()) + 1)]
    panels = []
    for area, name in KINDS:
        rows = np.array([p.startswith(area) for p in part])
        if rows.any():
            panels.append((name, [float(share[rows & (layer == i)].sum()) for i in range(len(labels))]))
    embed = float(share[part == "embed"].sum())
    rest = float(share[part == "constant"].sum())
    written = strongest(found)
    listed = [
        (p.name, number(p.share, sign=True), f"{number(100 * p.share / total, 0)}%" if total else "")
        for p in written[:10]
    ]
    sums = (
        f"The shares add up to the {question.metric_name} of {number(total, sign=True)} (gap {number(gap, 4)}): "
        + ", ".join(f"{name} {number(sum(v), sign=True)}" for name, v in panels)
        + f", the embedding {number(embed, sign=True)}"
        + (f", constants {number(rest, sign=True)}." if abs(rest) > 0.005 else ".")
    )
    figure = join(
        columns(labels, panels, label=f"Direct contribution to the {question.metric_name} by layer"),
        tag("p", sums, class_="note"),
        tag("h3", "The strongest single writers"),
        table(["component", "share", "of the total"], listed),
        details("Every layer as a table", table(["layer", *(name for name, _ in panels)], [[label, *(number(v[i], sign=True) for _, v in panels)] for i, label in enumerate(labels)])),
    )  # fmt: skip
    lead = (
        f"The final state is a sum of what every part has written. Each part’s share of the {question.metric_name} "
        f"{quoted(question.target.text)} − {quoted(question.against.text)}, by layer; upwards supports the answer. Head 9.4 is head 4 of layer 9."
    )
    where = "" if question.last_first == -1 else f", position={question.last_first}"
    code = [
        f"shares = pl.lenses.direct_logit_attribution(model, prompt, {target!r}, against={against!r}, by='head'{where})",
        "shares.show()",
    ]
    best = max(written, key=lambda p: p.share)
    finding = f"Of single parts, {best.name} writes most of the answer directly: {number(best.share, sign=True)} of {number(total, sign=True)}."
    return Section(
        "direct", "The writers", TITLE, lead, figure,
        care="only the direct way to the output is counted, with the final norm’s scale held at its value here. A part that "
        "works through later ones shows nothing, and a large share may be cancelled by another.",
        python=question.code(*code), shell=question.shell, finding=finding, results=(found,),
    )  # fmt: skip


def strongest(found: Result) -> list[Part]:
    """The heads and MLPs that write most, either way."""
    layer, part, unit, share = (found[name].values for name in ("layer", "part", "unit", "contribution"))
    parts = [
        Part(named(int(a), str(p), int(u)), str(site), float(s))
        for site, a, p, u, s in zip(found["component"].values, layer, part, unit, share, strict=True)
        if a >= 0 and not str(p).endswith(".rest")
    ]
    return sorted(parts, key=lambda p: -abs(p.share))
