"""Panels on demand: what a view shows of a prompt, made when somebody opens it.

Each is the document that the same method gives in a notebook, with the Python that makes it. Panels but the attention are
drawn of the model without the reader's edits, which their note then says.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from pellucid.attention import patterns
from pellucid.attribution import METHODS
from pellucid.causal import patching
from pellucid.errors import InputError, nearest
from pellucid.lenses import direct_logit_attribution
from pellucid.model import Model
from pellucid.results import Result
from pellucid.views import compare
from pellucid.views import schema as s
from pellucid.views.documents import document
from pellucid.views.forms import tokens
from pellucid.views.looking import attention as attention_view
from pellucid.views.markup import quoted
from pellucid.views.question import ALONE, Question, ask
from pellucid.views.schema import Code, Document, Numbers
from pellucid.workbench import edits as acting
from pellucid.workbench import finder
from pellucid.workbench.answers import Memory
from pellucid.workbench.messages import ViewReply, ViewRequest

CARE = {  # what can mislead in each method
    "saliency": "sizes of gradients, which say how strongly the answer reacts to a token, not in which direction",
    "gradient_x_input": "a straight line drawn at this prompt alone; where the model saturates even its signs can be wrong, "
    "so look at integrated gradients or occlusion before you believe one",
    "smoothgrad": "a mean of gradients at noisy inputs, which are no prompts the model ever read",
    "integrated_gradients": "the shares depend on the baseline that stands for an absent token, which is a choice",
    "deeplift": "differences from a baseline, which is a choice, carried through nonlinearities by a rule",
    "relevance": "shares by a rule for each operation; another rule gives other shares",
    "occlusion": "one token at a time is put away: what two tokens say alike is missed by neither",
    "lime": "a linear model of sampled prompts with gaps; another seed gives other numbers",
    "kernel_shap": "estimated from sampled prompts with gaps; another seed gives other numbers",
}
OVERS = {"resid": "layers.*.resid_pre@*", "heads": "layers.*.attn.heads.*", "attention": "layers.*.attn.out@*", "mlp": "layers.*.mlp.out@*"}  # fmt: skip


def draw(model: Model, memory: Memory, asked: ViewRequest) -> ViewReply:
    """One panel. PellucidError where it cannot be had for this prompt or model."""
    if asked.view == "anatomy":
        return ViewReply(document=document(model, code=f"import pellucid as pl\n\n{model.opened}.anatomy"))
    question, note = _last(model, memory, asked)
    makers: dict[str, Callable[[Question, ViewRequest], ViewReply]] = {
        "tokens": _tokens, "contributions": _contributions, "heads": _heads, "patching": _patching,
        "neurons": _neurons, "neuron": _neuron, "attention": lambda q, a: _attention(q, a, memory),
    }  # fmt: skip
    made = makers[asked.view](question, asked)
    edited = any(edit.on for edit in asked.edits) and asked.view != "attention"
    notes = [note, made.note, "Drawn of the model without your edits." if edited else ""]
    return msgspec.structs.replace(made, note=" ".join(filter(None, notes)))


def _last(model: Model, memory: Memory, asked: ViewRequest) -> tuple[Question, str]:
    """What is asked, with its runs, which all panels of a prompt share."""
    key = (asked.prompt, asked.other, asked.view == "patching", asked.answer, asked.word)
    if memory.question[0] != key:
        memory.question = key, posed(model, *key)
    found: tuple[Question, str] = memory.question[1]
    return found


def posed(
    model: Model, prompt: str, other: str | None, needs_other: bool = False, answer: str = "", word: str = ""
) -> tuple[Question, str]:
    """What is asked of the model, and a remark. A second prompt that does not align is left out, unless it is needed."""
    if model.anatomy.answering.meaning == "label" and not word.strip():
        raise InputError("this model labels every word: name the word whose label is asked about")
    target, at = (answer.strip() and answer) or None, word.strip() or None
    if needs_other and not other:
        raise InputError("patching needs a second prompt of as many tokens with another answer; give one")
    try:
        question = ask(model, prompt, target, other or None, 10, at)
    except InputError as error:
        if not other or needs_other:
            raise
        question = ask(model, prompt, target, None, 10, at)
        return question, f"The second prompt is left out here: {error}."
    return question, " ".join(question.notes)


def _tokens(question: Question, asked: ViewRequest) -> ViewReply:
    named = asked.options.get("method", "gradient_x_input")
    names = [str(name) for name in (named if isinstance(named, list) and named else [named])]
    for name in names:
        if name not in METHODS:
            raise InputError(f"there is no attribution method {name!r}{nearest(name, METHODS)}")
    found = {name: METHODS[name](question.model, question.inputs, question.metric) for name in names}
    shown = compare(found, "Which tokens the answer rests on")
    if len(found) == 1:
        shown = msgspec.structs.replace(shown, data=tokens(found, unit=f"attribution to the {question.measured}"))
    care = " ".join(f"{name.replace('_', ' ')}: {CARE[name]}." for name in names if name in CARE)
    return ViewReply(document=msgspec.structs.replace(shown, lead=_rival(question), care=care))


def _rival(question: Question) -> str:
    """Which contrast is asked about, and how to ask about another."""
    if question.target is not None and question.kind in ALONE:  # its own score, without a rival
        return "" if question.kind == "value" else f"Asked is {quoted(question.target.text)}, by its own score."
    if question.target is None or question.against is None:
        return ""
    asked = f"Asked is why {quoted(question.target.text)} rather than {quoted(question.against.text)}"
    if question.counterfactual is not None:
        return f"{asked}, the answer to the second prompt."
    return f"{asked}, the runner-up. A second prompt with another answer asks against that one."


def _attention(question: Question, asked: ViewRequest, memory: Memory) -> ViewReply:
    found = acting.asked(question.model, asked.edits)

    engine = acting.ready(found, memory, asked.prompt, asked.other)
    result = patterns(question.model, question.inputs, edits=engine)
    shown = document(result)
    if (first := _head(asked.options.get("component"))) is not None:
        shown = msgspec.structs.replace(shown, data=attention_view(result, first=first))
    if not found:
        return ViewReply(document=shown)
    lines = [f"other = {asked.other!r}"] if asked.other else []
    lines += acting.edit_lines(asked.edits, asked.other, question.model, question.last_first)
    return _reply(shown, question, *lines, "pl.attention.patterns(model, prompt, edits=edits).show()")


def _head(component: Any) -> tuple[int, int] | None:
    """(layer, head) of a head's address."""
    words = str(component or "").split(".")
    ends = words[-4:] if len(words) >= 5 and words[-5] == "layers" else []
    return (int(ends[0]), int(ends[3])) if len(ends) == 4 and ends[0].isdigit() and ends[3].isdigit() else None


def _shares(question: Question, by: Any) -> Result:
    """Direct logit attribution of the answer."""
    lacking = question.lacks("direct")
    if lacking or question.target is None:
        raise InputError(f"there are no contributions to split here: {lacking or 'this model has no answer'}")
    rival = question.against if question.counterfactual is not None else None
    target, against = question.word(question.target), None if rival is None else question.word(rival)
    return direct_logit_attribution(
        question.model, question.inputs, target, against=against, by=by, positions=question.last_first
    )


def _contributions(question: Question, asked: ViewRequest) -> ViewReply:
    found = _shares(question, asked.options.get("by", "head"))
    assert question.target is not None
    return ViewReply(document=document(found, title=f"What wrote {quoted(question.target.text)}"))


def _heads(question: Question, asked: ViewRequest) -> ViewReply:
    """The direct effects of all heads, layer by head."""
    found = _shares(question, "head")
    data, prefix = found.data, question.model.anatomy.stacks[-1].prefix
    part = data["part"].values.astype(str)
    heads = np.char.endswith(part, ".heads") & np.char.startswith(part, "attn")
    if not heads.any():
        raise InputError("this model has no heads whose contributions can be told apart")
    layer, unit = (data[name].values[heads] for name in ("layer", "unit"))
    values = np.full((layer.max() + 1, unit.max() + 1), np.nan)
    values[layer, unit] = data["contribution"].values[heads]
    rows, columns = (s.Axis(name=n, labels=tuple(map(str, range(k)))) for n, k in zip(("layer", "head"), values.shape, strict=True))  # fmt: skip
    plane = s.Plane(name="direct effect", values=Numbers.of(values), component=f"{prefix}layers.{{row}}.attn.heads.{{column}}")  # fmt: skip
    grid = s.Grid(rows=rows, columns=columns, planes=(plane,), unit="contribution to the logit")
    return ViewReply(document=document(found, title="What each head writes towards the answer", data=grid))


def _patching(question: Question, asked: ViewRequest) -> ViewReply:
    return ViewReply(document=patched(question, asked.options))


def patched(question: Question, options: dict[str, Any]) -> Document:
    over = over_of(question, options)
    found = patching(question.model, question.prompt, question.counterfactual, over=over, metric=question.metric)
    return document(found, title="Where the difference between the prompts is carried")


def over_of(question: Question, options: dict[str, Any]) -> str:
    over = str(options.get("over", "resid"))
    if over not in OVERS:
        raise InputError(f"there is nothing to patch over called {over!r}{nearest(over, OVERS)}")
    return question.prefix + OVERS[over]


def _neurons(question: Question, asked: ViewRequest) -> ViewReply:
    wanted = _options(asked.options, finder.Wanted)
    rows, shown, note = finder.neurons(question, wanted)
    made = _reply(shown, question, 'run = model.run(prompt, keep="layers.*.mlp.neurons")')
    return msgspec.structs.replace(made, rows=rows, note=note)


def _neuron(question: Question, asked: ViewRequest) -> ViewReply:
    component = str(asked.options.get("component", ""))
    shown, note = finder.page(question, component)
    line = f"model.run(prompt, keep={component!r})[{component!r}], pl.neurons.logit_effects(model, {component!r})"
    return msgspec.structs.replace(_reply(shown, question, line), note=note)


def _options(given: dict[str, Any], kind: Any) -> Any:
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise InputError(f"these options cannot be used: {error}") from None


def _reply(shown: Document, question: Question, *lines: str) -> ViewReply:
    return ViewReply(document=msgspec.structs.replace(shown, code=Code(python=question.code(*lines))))
