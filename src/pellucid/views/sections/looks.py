"""Where do the heads look? Attention patterns, with rollout over all layers."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from pellucid.attention import patterns, rollout
from pellucid.errors import PellucidError
from pellucid.results import Result
from pellucid.views.documents import attention
from pellucid.views.evidence import Evidence, top
from pellucid.views.markup import percent, quoted
from pellucid.views.page import Section, missing
from pellucid.views.question import Question
from pellucid.views.schema import Document

TITLE = "Where do the heads look?"
LONG = 512  # tokens: beyond, the patterns of one prompt fill the page


def looks(question: Question, evidence: Evidence) -> Section:
    if len(question.tokens) > LONG:
        return missing(
            "looks",
            "The attention",
            TITLE,
            f"the prompt has {len(question.tokens)} tokens, and patterns are kept up to {LONG}",
        )
    target = None  # an encoder-decoder is read at its start token
    found = patterns(question.model, question.prompt, target=target)
    flows = _flows(question, found)
    best = _best(evidence)
    view = Document(title="Attention", data=attention(found, flows=flows, first=best))
    lead = (
        "Every head’s attention: rows look at columns. Choose a head on the left, then point at a token to see where it looks from there, or who looks at it. "
        "Rollout multiplies the patterns of all layers, half of each kept in place; its control has every head look everywhere alike."
    )
    code = ["found = pl.attention.patterns(model, prompt)", "found.show()"]
    return Section(
        "looks", "The attention", TITLE, lead, "", (view,),
        care="where a head looks is not what it says: much attention can carry nothing (many heads rest on the first token), and little can decide. "
        "Whether a head matters is asked below by switching it off.",
        python=question.code(*code), shell=question.shell, finding=_finding(question, found, best), results=(found,),
    )  # fmt: skip


def _flows(question: Question, found: Result) -> dict[str, np.ndarray]:
    """Rollout, where the patterns are of one stack."""
    if "pattern" not in found.data:
        return {}
    with suppress(PellucidError):
        made = rollout(question.model, question.prompt)
        return {"rollout": made["rollout"].values[-1], "rollout of even attention": made["null"].values[-1]}
    return {}


def _best(evidence: Evidence) -> tuple[int, int] | None:
    """The head of a one-stack model that writes most towards the answer: its layer and number."""
    heads = top(evidence.heads()["writes directly"], 1)
    words = heads[0].split(".") if heads else []
    return (int(words[1]), int(words[-1])) if words[:1] == ["layers"] else None


def _finding(question: Question, found: Result, best: tuple[int, int] | None) -> str:
    if best is None or "pattern" not in found.data or question.position >= found["pattern"].sizes["query"]:
        return ""
    row = found["pattern"].sel(layer=best[0], head=best[1]).values[question.position]
    at = int(np.nanargmax(row))
    where = "itself" if at == question.position else quoted(question.tokens[at])
    return f"Head {best[0]}.{best[1]}, which writes most of all heads towards the answer, looks from {quoted(question.tokens[question.position])} mostly at {where} ({percent(float(row[at]))})."
