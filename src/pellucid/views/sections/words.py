"""Which words does the answer rest on? Integrated gradients."""

from __future__ import annotations

import warnings

import numpy as np

from pellucid.attribution import integrated_gradients
from pellucid.results import Result
from pellucid.views.counterfactual import words_of
from pellucid.views.figures import coloured_tokens, details, legend, table
from pellucid.views.markup import join, number, quoted, tag, token
from pellucid.views.page import Section, missing
from pellucid.views.question import Question

TITLE = "Which words does the answer rest on?"
STEPS = (24, 96)  # along the path, until the gap is within `TOLERANCE` of the shares' total size
TOLERANCE = 0.02
TOKENS = 1600  # read along the path in all: long prompts take fewer steps, and no control beyond `LONG` tokens
LONG = 128


def words(question: Question) -> Section:
    if len(question.tokens) < 2:
        return missing("words", "The words", TITLE, "a prompt of one token has no words to compare")
    fill, other = _baselines(question)[:2]
    found = _attributed(question, fill)
    values, tokens = found["attribution"].values, [str(t) for t in found["token"].values]
    full = float(np.abs(values).max()) or 1.0
    moved = float(found["score"] - found["baseline_score"])
    gap, rough = float(found["gap"]), abs(float(found["gap"])) > 0.1 * float(np.abs(values).sum())
    lead = (
        f"Each token's share of the {question.metric_name} by integrated gradients: the prompt is faded in from a baseline "
        f"({quoted(question.model.tokenizer.decode([fill]))} in place of every token but the first, which therefore has no share), and the gradient is added up on the way. Blue supports the answer, orange speaks against it."
    )
    sums = (
        f"The shares add up to {number(float(values.sum()), sign=True)}; the {question.metric_name} went from {number(float(found['baseline_score']), sign=True)} "
        f"on the baseline to {number(float(found['score']), sign=True)} on the prompt. Gap: {number(gap, 3)}, {int(found['steps'])} steps."
        + (" That gap is large: the path is too rough here, and the shares are no more than a hint." if rough else "")
    )
    order = np.argsort(-np.abs(values))[:12]
    rows = [(token(tokens[i]), int(i), number(float(values[i]), 3, sign=True)) for i in order]
    figure = join(
        coloured_tokens(tokens, values, full), legend(f"share of the {question.metric_name}", "signed", full),
        tag("p", sums, class_="note"), details("As a table, the largest first", table(["token", "position", "share"], rows)),
    )  # fmt: skip
    control = _control(question, values, other)
    lines = [
        question.metric_code,
        f"baseline = model.inputs(prompt).stream({question.prefix[:-1]!r}).ids[0].clone()",
        f"baseline[1:] = {fill}  # {question.model.tokenizer.decode([fill])!r}",
        f"shares = pl.attribution.integrated_gradients(model, prompt, metric, baseline=baseline, steps={int(found['steps'])})",
        "shares.show()",
    ]
    name, most = _strongest(question, values)
    whole = f"{number(most, sign=True)} of the {number(moved, sign=True)} by which the prompt changes the {question.metric_name}"
    finding = (
        f"Of all words {quoted(name)} supports the answer most: {whole}."
        if most > 0
        else "No word of the prompt supports the answer by itself."
    )
    return Section(
        "words", "The words", TITLE, lead, figure, care=control, python=question.code(*lines), shell=question.shell,
        finding=finding, results=(found,),
    )  # fmt: skip


def _attributed(question: Question, token_id: int) -> Result:
    """From a baseline with `token_id` in every place but the first: many models park attention on their first token,
    and a path that takes it away as well is too rough to integrate."""
    baseline = question.source.ids[0].clone()
    baseline[1:] = token_id
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


def _control(question: Question, values: np.ndarray, token_id: int) -> str:
    """How much the choice of the baseline matters."""
    known = "what counts as absence is a choice"
    if not 3 < len(values) <= LONG:
        return f"{known}."
    other = _attributed(question, token_id).values
    a, b = (np.argsort(np.argsort(v[1:])) for v in (values, other))
    first, then = (quoted(_strongest(question, v)[0]) for v in (values, other))
    same = f"{first} comes first again" if first == then else f"{then} comes first instead of {first}"
    return (
        f"{known}. As a control, from a baseline of {quoted(question.model.tokenizer.decode([token_id]))} the order of the tokens agrees to "
        f"{number(float(np.corrcoef(a, b)[0, 1]))} (rank correlation; 1 is full agreement), and {same}. A share is no proof that the model needs the word."
    )


def _strongest(question: Question, values: np.ndarray) -> tuple[str, float]:
    """The word (its tokens together) with the largest share."""
    found = [(w.text, float(values[w.first : w.last].sum())) for w in words_of(question)]
    return max(found or [(question.tokens[int(values.argmax())], float(values.max()))], key=lambda pair: pair[1])
