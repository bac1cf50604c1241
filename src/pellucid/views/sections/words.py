"""Which words does the answer rest on? Integrated gradients, with occlusion and a second baseline beside them."""

from __future__ import annotations

import warnings
from contextlib import suppress

import numpy as np

from pellucid.attribution import integrated_gradients, occlusion
from pellucid.errors import PellucidError
from pellucid.results import Result
from pellucid.statistics import spearman
from pellucid.views.counterfactual import words_of
from pellucid.views.evidence import Evidence
from pellucid.views.forms import tokens
from pellucid.views.markup import number, quoted, tag
from pellucid.views.page import Section, missing
from pellucid.views.question import Question
from pellucid.views.schema import Document

TITLE = "Which words does the answer rest on?"
STEPS = (24, 96)  # along the path, until the gap is within `TOLERANCE` of the shares' total size
TOLERANCE = 0.02
TOKENS = 1600  # read along the path in all: long prompts take fewer steps, and no control beyond `LONG` tokens
LONG = 128


def words(question: Question, evidence: Evidence) -> Section:
    if len(question.tokens) < 2:
        return missing("words", "The words", TITLE, "a prompt of one token has no words to compare")
    fill, other = _baselines(question)[:2]
    found = _attributed(question, fill)
    evidence.words = {"integrated gradients": found, **_others(question, fill, other)}
    values = found["attribution"].values
    moved, gap = float(found["score"] - found["baseline_score"]), float(found["gap"])
    evidence.completeness = abs(gap) / max(1e-9, float(np.abs(values).sum()))
    stand_in = quoted(question.model.tokenizer.decode([fill]))
    lead = (
        f"Each token’s share of the {question.metric_name}. Integrated gradients fade the prompt in from {stand_in} in place of every token but the first (which "
        "therefore has no share) and add the gradient up on the way; occlusion puts that token in for one token at a time. Blue supports the answer, orange speaks against it."
    )
    sums = (
        f"The shares of integrated gradients add up to {number(float(values.sum()), sign=True)}; the {question.metric_name} went from "
        f"{number(float(found['baseline_score']), sign=True)} on the baseline to {number(float(found['score']), sign=True)} on the prompt. Gap: {number(gap, 3)}, {int(found['steps'])} steps."
        + (
            " That gap is large: the path is too rough here, and the shares are no more than a hint."
            if evidence.completeness > 0.1
            else ""
        )
    )
    name, most = _strongest(question, values)
    whole = f"{number(most, sign=True)} of the {number(moved, sign=True)} by which the prompt changes the {question.metric_name}"
    finding = (
        f"Of all words {quoted(name)} supports the answer most: {whole}."
        if most > 0
        else "No word of the prompt supports the answer by itself."
    )
    view = Document(
        title="Words by several methods" if len(evidence.words) > 1 else "Words",
        data=tokens(evidence.words, unit=f"share of the {question.metric_name}"),
    )
    return Section(
        "words", "The words", TITLE, lead, tag("p", sums, class_="note"), (view,), care=_control(question, evidence.words),
        finding=finding, results=tuple(evidence.words.values()),
    )  # fmt: skip


def _others(question: Question, fill: int, other: int) -> dict[str, Result]:
    """A second method from the same baseline, and the first one from a second baseline."""
    if not 3 < len(question.tokens) <= LONG:
        return {}
    found = {}
    with suppress(PellucidError):
        found["occlusion"] = occlusion(
            question.model, question.inputs, question.metric, baseline=_baseline(question, fill)
        )
    found[f"integrated gradients from {question.model.tokenizer.decode([other])!r}"] = _attributed(question, other)
    return found


def _baseline(question: Question, token_id: int) -> list[int]:
    """The first token, and another in place of all others."""
    first, *others = question.source.ids[0].tolist()
    return [first, *(token_id for _ in others)]


def _attributed(question: Question, token_id: int) -> Result:
    """From a baseline with `token_id` in every place but the first: many models park attention on their first token,
    and a path that takes it away as well is too rough to integrate."""
    baseline = _baseline(question, token_id)
    most = max(8, TOKENS // len(baseline))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the gap is shown
        for steps in sorted({min(n, most) for n in STEPS}):
            found = integrated_gradients(
                question.model, question.inputs, question.metric, baseline=baseline, steps=steps
            )
            if abs(float(found["gap"])) <= TOLERANCE * float(np.abs(found.values).sum()):
                break
    return found


def _baselines(question: Question) -> list[int]:
    """Two tokens that say little and yet stand in texts: a full stop, a line end, ... A padding token is none: a model has
    never read one."""
    tokenizer = question.model.tokenizer
    plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (".", "\n", ",", ";", "a", "b")]
    single = [ids[0] for ids in plain if len(ids) == 1 and ids[0] != tokenizer.unk_token_id]
    return list(dict.fromkeys([*single, 0, 1]))


def _control(question: Question, methods: dict[str, Result]) -> str:
    """How much the choice of the method and of the baseline matters."""
    known = "what counts as absence is a choice"
    (_, first), *others = ((name, r["attribution"].values) for name, r in methods.items())
    if not others:
        return f"{known}."
    word = _strongest(question, first)[0]
    said = []
    for name, values in others:
        then = _strongest(question, values)[0]
        same = (
            f"{quoted(word)} comes first again"
            if then == word
            else f"{quoted(then)} comes first instead of {quoted(word)}"
        )
        said.append(f"{name}: the order of the tokens agrees to {number(spearman(first[1:], values[1:]))}, and {same}")
    return f"{known}, and so is the method. Beside integrated gradients ({'; '.join(said)}; rank correlation, 1 is full agreement). A share is no proof that the model needs the word."


def _strongest(question: Question, values: np.ndarray) -> tuple[str, float]:
    """The word (its tokens together) with the largest share."""
    found = [(w.text, float(values[w.first : w.last].sum())) for w in words_of(question)]
    return max(found or [(question.tokens[int(values.argmax())], float(values.max()))], key=lambda pair: pair[1])
