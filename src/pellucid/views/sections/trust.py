"""How far can each claim be trusted? What speaks for it, what its control says, and the verdict by rules stated here."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pellucid.statistics import spearman
from pellucid.views.evidence import Evidence, agreement, top
from pellucid.views.forms import column
from pellucid.views.markup import number, percent
from pellucid.views.page import Section
from pellucid.views.question import Question
from pellucid.views.schema import Document, Table

TITLE = "How far can this be trusted?"
GOOD, FAIR = 0.8, 0.5  # agreement with a control from which a claim is called solid, or likely


@dataclass(frozen=True)
class Claim:
    section: str  # whose finding it is
    what: str
    support: str
    control: str
    verdict: str


def trust(question: Question, evidence: Evidence) -> Section:
    claims = [
        c
        for c in (_words(evidence), _layers(evidence), _patches(question, evidence), _heads(evidence), _parts(evidence))
        if c
    ]
    evidence.verdicts = {c.section: c.verdict for c in claims}
    rows = {
        "claim": [c.what for c in claims],
        "what speaks for it": [c.support for c in claims],
        "its control": [c.control for c in claims],
        "verdict": [c.verdict for c in claims],
    }
    view = Document(
        title="Claims and their controls",
        data=Table(columns=tuple(column(k, v) for k, v in rows.items()), rows=len(claims)),
    )
    lead = (
        f"Each claim of this page with its control. A claim is called solid where its control agrees to {GOOD} or more, likely from {FAIR}, and a hint below (of patches: 1 less twice the share that unrelated states bring back); "
        "untested where there is no control. All of it is about this one prompt: what holds for a kind of prompt takes many of them."
    )
    counts = {name: sum(c.verdict == name for c in claims) for name in ("solid", "likely", "a hint", "untested")}
    said = ", ".join(f"{n} {name}" for name, n in counts.items() if n)
    finding = (
        f"How far the {len(claims)} claims of this page can be trusted, by their controls: {said}." if claims else ""
    )
    return Section(
        "trust",
        "The trust",
        TITLE,
        lead,
        "",
        (view,),
        python=question.code("print(model.anatomy)"),
        finding=finding,
    )


def verdict(agreed: float) -> str:
    """
    >>> verdict(0.9), verdict(0.6), verdict(0.1), verdict(float("nan"))
    ('solid', 'likely', 'a hint', 'untested')
    """
    if not np.isfinite(agreed):
        return "untested"
    return "solid" if agreed >= GOOD else "likely" if agreed >= FAIR else "a hint"


def _words(evidence: Evidence) -> Claim | None:
    if evidence.completeness is None:
        return None
    first, *others = (r["attribution"].values[1:] for r in evidence.words.values())
    agreed = min((spearman(first, x) for x in others), default=float("nan"))
    gap = f"the shares add up to within {percent(evidence.completeness)} of their size"
    control = f"the least agreement with another method or baseline is {number(agreed)}" if others else "none was run"
    return Claim(
        "words",
        "which words the answer rests on",
        gap,
        control,
        verdict(agreed if evidence.completeness < 0.1 else min(agreed, 0.0)),
    )


def _layers(evidence: Evidence) -> Claim | None:
    """A reading is good where it is of this prompt (the answer leads on no other) and where the state carries the answer."""
    if not evidence.settled:
        return None
    cells = [leads for each in evidence.leads.values() for leads in each]
    elsewhere = float(np.mean(cells)) if cells else float("nan")
    control = f"on {len(evidence.leads)} other prompts of its length it shows the same answer in {percent(elsewhere)} of those layers"
    if evidence.arrives is not None and evidence.settled.isdigit():
        control += f"; patching finds the answer carried there before layer {evidence.arrives}, so what the lens cannot read yet may be there"
    return Claim(
        "layers", "from which layer on the answer can be read", f"the logit lens, whose last row is the model’s own output, shows it from layer {evidence.settled} on",
        control, verdict(1.0 - elsewhere),
    )  # fmt: skip


def _patches(question: Question, evidence: Evidence) -> Claim | None:
    if evidence.restored is None:
        return None
    whole = f"one patched state brings back {percent(min(1.0, max(0.0, evidence.restored)))} of the answer"
    found = evidence.foreign
    if found is None:
        return Claim("patches", "where the fact travels", whole, "none is needed: no single place brings half of the answer back, so none is claimed", verdict(0.0))  # fmt: skip
    control = f"states of {found.prompts} unrelated prompts in {found.places} of those places bring back {number(found.other, sign=True)} on average instead of {number(found.own, sign=True)}"
    # what half of it comes back by anything put in its place is no finding: nothing is left of the claim there
    agreed = 1.0 - 2.0 * max(0.0, found.other) / found.own
    if question.searched:
        control += "; the counterfactual was chosen by pellucid because it works, so this is no more than likely"
        agreed = min(agreed, np.nextafter(GOOD, 0.0))
    return Claim("patches", "where the fact travels", whole, control, verdict(agreed))


def _heads(evidence: Evidence) -> Claim | None:
    heads = evidence.heads()
    zero, mean = heads["needed (zero)"], heads["needed (mean)"]
    if not zero:
        return None
    agreed = agreement(zero, mean) if mean else float("nan")
    strongest = len(set(top(zero, 10)) & set(top(mean, 10)))
    control = (
        f"with mean values the order agrees to {number(agreed)}, and {strongest} of the 10 strongest are the same"
        if mean
        else "mean values were not possible"
    )
    return Claim(
        "heads",
        "which heads the answer needs",
        f"{len(zero)} heads were switched off one at a time",
        control,
        verdict(agreed),
    )


def _parts(evidence: Evidence) -> Claim | None:
    fall = evidence.fell
    if fall is None:
        return None
    least, most = sorted((abs(fall.zero), abs(fall.mean)))
    agreed = least / most if most > 0 and fall.zero * fall.mean > 0 else 0.0
    return Claim(
        "strongest", f"that the answer needs {fall.name}", f"without it the answer’s probability goes from {percent(fall.before)} to {percent(fall.after)}",
        f"at its mean instead of zero the effect is {number(fall.mean, sign=True)} instead of {number(fall.zero, sign=True)}, alike to {number(agreed)}; other prompts may need it as well",
        verdict(agreed),
    )  # fmt: skip
