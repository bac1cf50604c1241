"""Where do the heads look, and what do they do anywhere? Attention patterns with roles, and rollout over all layers."""

from __future__ import annotations

from contextlib import suppress

import numpy as np

from pellucid.attention import head_summaries, patterns, rollout
from pellucid.errors import PellucidError
from pellucid.results import Result
from pellucid.views.evidence import Evidence, top
from pellucid.views.looking import Roles, attention, roles_of
from pellucid.views.markup import percent, quoted
from pellucid.views.page import Section, missing
from pellucid.views.question import Question
from pellucid.views.schema import Document

TITLE = "Where do the heads look?"
LONG = 512  # tokens: beyond, the patterns of one prompt fill the page
STACK = "encoder"  # of an encoder-decoder, whose heads are named


def looks(question: Question, evidence: Evidence) -> Section:
    if len(question.tokens) > LONG:
        return missing(
            "looks",
            "The attention",
            TITLE,
            f"the prompt has {len(question.tokens)} tokens, and patterns are kept up to {LONG}",
        )
    model, target = question.model, question.written
    found = patterns(model, question.prompt, decoder=target)
    more = [*_rolled(question, target), *_summed(question)]
    best = _best(evidence)
    roles = {at: role for result in more for at, role in roles_of(result, "pattern").items()}
    view = Document(title="Attention", data=attention(found, *more, first=best))
    lead = (
        "Every head’s attention: rows look at columns. Choose a head on the left, then point at a token to see where it looks from there, or who looks at it. "
        + (f"Beside the source it shows the decoder writing {quoted(target)}. " if target else "")
        + "Rollout multiplies the patterns of all layers, half of each kept in place; its control has every head look everywhere alike. "
        "Heads are named by what they do on random tokens said twice (induction, duplicate and previous token) and on this prompt."
    )
    return Section(
        "looks", "The attention", TITLE, lead, "", (view,),
        care="where a head looks is not what it says: much attention can carry nothing (many heads rest on the first token), and little can decide. "
        "Whether a head matters is asked below by switching it off.",
        finding=_finding(question, found, best, roles), results=(found, *more),
    )  # fmt: skip


def _rolled(question: Question, target: str | None) -> list[Result]:
    with suppress(PellucidError):
        return [rollout(question.model, question.prompt, decoder=target)]
    return []


def _summed(question: Question) -> list[Result]:
    """What heads do on random tokens said twice and on this prompt; none where the model reads no plain text alone."""
    with suppress(PellucidError, RuntimeError):
        return [
            head_summaries(question.model, question.prompt, stack=STACK if len(question.inputs.streams) > 1 else "")
        ]
    return []


def _best(evidence: Evidence) -> tuple[int, int] | None:
    """The head of a one-stack model that writes most towards the answer: its layer and number."""
    heads = top(evidence.heads()["writes directly"], 1)
    words = heads[0].split(".") if heads else []
    return (int(words[1]), int(words[-1])) if words[:1] == ["layers"] else None


def _finding(question: Question, found: Result, best: tuple[int, int] | None, roles: Roles) -> str:
    if best is None or "pattern" not in found.data or question.position >= found["pattern"].sizes["query"]:
        return ""
    row = found["pattern"].sel(layer=best[0], head=best[1]).values[question.position]
    at = int(np.nanargmax(row))
    where = "itself" if at == question.position else quoted(question.tokens[at])
    does = f", by its habit a head of the kind “{roles[best]}”," if best in roles else ","
    return f"Head {best[0]}.{best[1]}, which writes most of all heads towards the answer{does} looks from {quoted(question.tokens[question.position])} mostly at {where} ({percent(float(row[at]))})."
