"""Do the methods agree on which heads matter, and where do they not?"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import numpy as np

from pellucid.views.evidence import Evidence, agreement, top
from pellucid.views.forms import column
from pellucid.views.markup import Child, join, number, tag
from pellucid.views.naming import named
from pellucid.views.page import Section, missing
from pellucid.views.question import Question
from pellucid.views.schema import Document, Table

TITLE = "Do the methods agree?"
SHOWN = 5  # of each method's strongest heads


def agree(question: Question, evidence: Evidence) -> Section:
    methods = {name: values for name, values in evidence.heads().items() if len(values) > 2}
    if len(methods) < 2:
        return missing("agree", "The agreement", TITLE, "less than two methods could rank the heads of this model")
    heads = list(dict.fromkeys(site for values in methods.values() for site in top(values, SHOWN)))
    names = [_name(site) for site in heads]
    columns = [
        column("head", names),
        *(column(name, [values.get(s, np.nan) for s in heads]) for name, values in methods.items()),
    ]
    view = Document(
        title="The strongest heads of each method",
        data=Table(columns=tuple(columns), rows=len(heads), components=tuple(heads)),
    )
    pairs = {(a, b): agreement(methods[a], methods[b]) for a, b in combinations(methods, 2)}
    common = set.intersection(*(set(top(values, SHOWN)) for values in methods.values()))
    said = "; ".join(f"“{a}” and “{b}” {number(r)}" for (a, b), r in pairs.items() if np.isfinite(r))
    lead = (
        f"Three ways to rank heads, on one scale: what a head writes towards the answer itself, and what the {question.metric_name} falls by when it is off, "
        f"in two ways. Shown are the {SHOWN} strongest of each. Rank correlations over all heads: {said}."
    )
    finding = (
        f"{_list([_name(s) for s in heads if s in common])} {'is' if len(common) == 1 else 'are'} among the {SHOWN} strongest heads by every method."
        if common
        else f"No head is among the {SHOWN} strongest by every method: the methods measure different things here."
    )
    return Section(
        "agree", "The agreement", TITLE, lead, _disagreements(methods), (view,),
        care="methods that share an assumption agree for that reason alone: both ways of switching off see a head’s whole effect, the direct share only its last step.",
        finding=finding,
    )  # fmt: skip


def _name(site: str) -> str:
    words = site.split(".")
    stack = "" if words[0] == "layers" else words[0]
    return named(int(words[-4]), "attn.heads", int(words[-1]), stack)


def _list(names: list[str]) -> str:
    text = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    return text[0].upper() + text[1:]


def _disagreements(methods: Mapping[str, Mapping[str, float]]) -> Child:
    """Heads that one method puts first and another far behind, with what that means."""
    said = []
    direct, zero, mean = (methods.get(n, {}) for n in ("writes directly", "needed (zero)", "needed (mean)"))
    for site in top(direct, SHOWN):
        if zero and site in zero and zero[site] < 0.25 * direct[site]:
            said.append(
                f"{_name(site)} writes {number(direct[site], sign=True)} directly, but without it only {number(zero[site], sign=True)} is lost: others make up for it, or undo it."
            )
    for site in top(zero, SHOWN):
        if direct and abs(direct.get(site, 0.0)) < 0.25 * zero[site]:
            said.append(
                f"{_name(site)} is needed ({number(zero[site], sign=True)} lost without it) but writes only {number(direct.get(site, 0.0), sign=True)} itself: it works through later parts."
            )
        if mean and site in mean and mean[site] < 0.25 * zero[site]:
            said.append(
                f"{_name(site)} is missed when set to zero ({number(zero[site], sign=True)}), not when set to its mean ({number(mean[site], sign=True)}): its average output is what counts, not what it says here."
            )
    if not said:
        return ""
    return join(
        tag("h3", "Where they disagree"), tag("ul", [tag("li", line[0].upper() + line[1:]) for line in said[:8]])
    )
