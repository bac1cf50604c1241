"""What does the model answer, and on the counterfactual?"""

from __future__ import annotations

from pellucid.engine.given import Pair
from pellucid.views.markup import Child, Html, bars, join, number, percent, quoted, tag, token
from pellucid.views.page import Section
from pellucid.views.question import ALONE, Option, Question

SAYS = {
    "next token": "The likeliest next tokens after the prompt.",
    "masked token": "The likeliest tokens in place of the mask.",
    "first token": "The likeliest first tokens of what the decoder writes.",
    "class": "The likeliest classes.",
    "value": "The number that the model gives.",
    "label": "The likeliest labels of the word.",
    "span": "The likeliest stretch of the prompt: the probability of its start times that of its end.",
}


def answer(question: Question, top: int) -> Section:
    if question.target is None:
        return _embedding(question)
    if question.kind == "value":
        return _value(question)
    shown = [_options(question.options[:top], f"After the prompt: {question.text}")]
    if question.counterfactual is not None:
        shown.append(_options(question.other_options[:top], f"After the counterfactual: {_shown(question)}"))
    writes = tag("p", "Written on from there, always taking the likeliest: ", quoted(question.written), class_="note") if question.written else None  # fmt: skip
    figure = join(tag("div", shown, class_="pair"), writes, tag("p", _measured(question), class_="note"))
    lines = ["run = model.run(prompt)", f"print({_likeliest(question, top)})"]
    best, *others = question.options
    finding = f"The model answers {quoted(best.text)} with {percent(best.probability)}"
    if others:
        finding += f"; next comes {quoted(others[0].text)} with {percent(others[0].probability)}"
    finding += "."
    if question.counterfactual is not None:
        other = question.other_options[0]
        finding += f" On the counterfactual it answers {quoted(other.text)} with {percent(other.probability)}."
    return Section(
        "answer", "The answer", "What does the model answer?", SAYS[question.kind], figure,
        care=_counterfactual(question), python=question.code(*lines), finding=finding,
    )  # fmt: skip


def _shown(question: Question) -> str:
    other = question.counterfactual
    return f"{other.first} / {other.second}" if isinstance(other, Pair) else str(other)


def _place(question: Question) -> str:
    return "" if question.kind == "class" else f", {question.last_first}"


def _likeliest(question: Question, top: int) -> str:
    if question.kind == "span":
        return "pl.question.Question.of(model, prompt).answers"
    independent = question.model.anatomy.answering.independent
    squashed = "sigmoid()" if independent and question.kind in ("class", "label") else "softmax(-1)"
    return f"run.logits[0{_place(question)}].{squashed}.topk({min(top, question.model.anatomy.answering.size or top)})"


def _value(question: Question) -> Section:
    """A number has no rivals and no probability."""
    assert question.target is not None
    said = [number(x, sign=True) for x in question.scores]
    finding = f"The model gives {said[0]} ({question.target.text})."
    finding += f" For the counterfactual it gives {said[1]}." if len(said) > 1 else ""
    return Section(
        "answer", "The answer", "What does the model answer?", SAYS["value"], tag("p", _measured(question), class_="note"),
        care=_counterfactual(question), python=question.code("print(model.run(prompt).logits[0])"), finding=finding,
    )  # fmt: skip


def _options(options: list[Option], heading: str) -> Html:
    return tag(
        "div", tag("h3", heading), bars([(token(o.text), o.probability, percent(o.probability)) for o in options])
    )


def _measured(question: Question) -> Child:
    """What every later section measures, in words and on both prompts."""
    assert question.target is not None
    if question.kind in ALONE:
        of = {"class": "the logit of the class", "value": "the number that the model gives:"}
        what = of.get(question.kind, "the start logit and the end logit, added up, of the span")
        return f"Throughout, the answer is measured by {what} {quoted(question.target.text)}."
    if question.against is None:
        return f"Throughout, the answer is measured by the logit of {quoted(question.target.text)}."
    said = [
        f"{number(x, sign=True)} on the {where}"
        for x, where in zip(question.scores, ("prompt", "counterfactual"), strict=False)
    ]
    return join(
        "Throughout, the answer is measured by the logit difference ", token(question.target.text), " − ", token(question.against.text),
        f", the logarithm of the ratio of their probabilities: {' and '.join(said)}.",
    )  # fmt: skip


def _counterfactual(question: Question) -> str:
    if question.made:
        return (
            f"no counterfactual was given, so pellucid made one: {question.made}. "
            + ("One of your own, with a meaning you know, says more" if question.searched else "To ask another")
            + ": --counterfactual “...”, of as many tokens."
        )
    return (
        ""
        if question.counterfactual
        else "there is no counterfactual: give one, of as many tokens, to see what changes the answer."
    )


def _embedding(question: Question) -> Section:
    lead = (
        "This model has no head that answers: it turns a text into vectors, one per token. Throughout, it is measured how "
        "similar (cosine) the vectors' mean stays to that of the intact model on this prompt, which is 1."
    )
    width = question.run.logits.shape[-1]
    finding = f"The model gives no answer but vectors of {width} numbers; what is measured is how similar their mean stays (1 = the same)."
    if question.counterfactual is not None:
        similar = number(question.scores[1])
        finding += f" The counterfactual's is {similar}."
    return Section(
        "answer", "The output", "What does the model give?", lead,
        python=question.code("print(model.run(prompt).logits[0].mean(0))"), finding=finding,
    )  # fmt: skip
