"""Which words does the answer rest on? Integrated gradients."""

from __future__ import annotations

import warnings

import numpy as np

from pellucid.attribution import integrated_gradients
from pellucid.errors import PellucidError
from pellucid.results import Result
from pellucid.views.counterfactual import words_of
from pellucid.views.figures import coloured_tokens, details, legend, table
from pellucid.views.markup import join, number, quoted, token
from pellucid.views.page import Section
from pellucid.views.question import Question

TITLE = "Which words does the answer rest on?"
TOKENS = 4096  # read along the path in all; shorter prompts choose their steps by the gap instead


def words(question: Question) -> Section:
    found = _attributed(question, None)
    values, tokens = found["attribution"].values, [str(t) for t in found["token"].values]
    full = float(np.abs(values).max()) or 1.0
    moved = float(found["score"] - found["baseline_score"])
    baseline = found.data.attrs["baseline"]
    lead = (
        f"Each token's share of the {question.metric_name} by integrated gradients: the prompt's embeddings are faded in from a "
        f"baseline ({_named(baseline, found)}), and the gradient is added up on the way. Blue supports the answer, orange speaks against it."
    )
    sums = (
        f"The shares add up to {number(float(values.sum()), sign=True)}; the {question.metric_name} went from {number(float(found['baseline_score']), sign=True)} "
        f"on the baseline to {number(float(found['score']), sign=True)} on the prompt. Gap: {number(float(found['gap']), 3)}, {int(found['steps'])} steps."
    )
    order = np.argsort(-np.abs(values))[:12]
    rows = [(token(tokens[i]), int(i), number(float(values[i]), 3, sign=True)) for i in order]
    figure = join(
        coloured_tokens(tokens, values, full), legend(f"share of the {question.metric_name}", "signed", full),
        join(sums), details("As a table, the largest first", table(["token", "position", "share"], rows)),
    )  # fmt: skip
    control = _control(question, values, baseline)
    lines = [question.metric_code, "shares = pl.attribution.integrated_gradients(model, prompt, metric)", "shares.show()"]
    best = _strongest(question, values)
    finding = f"Of all words {quoted(best[0])} supports the answer most: {number(best[1], sign=True)} of {number(moved, sign=True)} in the {question.metric_name}."
    return Section(
        "words", "The words", TITLE, lead, figure, care=control, python=question.code(*lines), shell=question.shell,
        finding=finding, results=(found,),
    )  # fmt: skip


def _attributed(question: Question, baseline: str | None) -> Result:
    """Long prompts take a fixed number of steps, whatever gap that leaves: it is shown."""
    length = len(question.tokens)
    steps = None if length <= 64 else max(8, TOKENS // length)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return integrated_gradients(question.model, question.inputs, question.metric, baseline=baseline, steps=steps)


def _named(baseline: str, found: Result) -> str:
    if baseline in ("mean", "zero"):
        return f"the {baseline} embedding"
    stands = next(iter({str(b) for b, s in zip(found["baseline_token"].values, found["special"].values, strict=True) if not s}), "")
    return f"{quoted(stands)} in every place"


def _control(question: Question, values: np.ndarray, baseline: str) -> str:
    """How much the choice of the baseline matters."""
    other = "pad" if baseline == "mean" else "mean"
    known = "what counts as absence is a choice"
    try:
        again = _attributed(question, other)["attribution"].values
    except PellucidError as error:
        return f"{known}; the control with another baseline, {other!r}, was not possible ({error})."
    if len(values) < 3:
        return f"{known}."
    a, b = (np.argsort(np.argsort(v)) for v in (values, again))
    agreement = float(np.corrcoef(a, b)[0, 1])
    top = "the same word" if int(values.argmax()) == int(again.argmax()) else f"{quoted(question.tokens[int(again.argmax())])} instead"
    return (
        f"{known}. As a control, with the {other!r} baseline the tokens' order agrees to {number(agreement)} "
        f"(rank correlation; 1 is full agreement), and {top} comes first. A share is no proof that the model needs the word: see the patches below."
    )


def _strongest(question: Question, values: np.ndarray) -> tuple[str, float]:
    """The word (its tokens together) with the largest share."""
    found = [(w.text, float(values[w.first : w.last].sum())) for w in words_of(question)]
    return max(found or [(question.tokens[int(values.argmax())], float(values.max()))], key=lambda pair: pair[1])
